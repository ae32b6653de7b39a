"""Whose a temporary file is: writers on several nodes, killed ones and live ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch.data import atomic_files
from megatron_patch.data.atomic_files import atomic_path, remove_stale, temporary_path, write_json

ROOT = Path(__file__).parents[3]
NODE = """
import os, sys
from pathlib import Path
os.getpid = lambda: 4711
from megatron_patch.data.atomic_files import write_json
sys.stdin.read()
for number in range(300):
    write_json(Path(sys.argv[1]), {"plan": number})
"""


def test_nodes_whose_process_ids_are_equal_do_not_meet(tmp_path: Path) -> None:
    """Two writers of one file with one process id, started together."""
    command = [sys.executable, "-c", NODE, str(tmp_path / "plan.json")]
    nodes = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for node in nodes:
        assert node.stdin is not None
        node.stdin.close()
    errors = [node.stderr.read() for node in nodes if node.stderr is not None]
    assert [node.wait(timeout=60) for node in nodes] == [0, 0], errors
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_name_is_one_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {temporary_path(tmp_path / "x")}
    assert names == {temporary_path(tmp_path / "x")}
    for where, attribute, value in ((os, "getpid", 1), (atomic_files.socket, "gethostname", "other-node"), (atomic_files, "_START", "00")):
        with monkeypatch.context() as patch:
            patch.setattr(where, attribute, value if isinstance(value, str) and attribute == "_START" else lambda value=value: value)
            names.add(temporary_path(tmp_path / "x"))
    assert len(names) == 4


def left_by(folder: Path, process: int, monkeypatch: pytest.MonkeyPatch, host: str | None = None) -> Path:
    """What a writer of x of that number left."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process)
        if host:
            patch.setattr(atomic_files.socket, "gethostname", lambda: host)
        path = temporary_path(folder / "x")
    path.touch()
    return path


def test_what_killed_writers_left_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    stale = [left_by(tmp_path, gone.pid, monkeypatch), left_by(tmp_path, os.getppid(), monkeypatch, "another-node.with-dashes")]
    stale += [left_by(tmp_path, os.getpid(), monkeypatch), tmp_path / ".x.tmp-4711"]
    stale[-1].touch()
    live, others = left_by(tmp_path, os.getppid(), monkeypatch), tmp_path / f".xy.tmp-{gone.pid}"
    others.touch()
    remove_stale(tmp_path / "x")
    assert sorted(tmp_path.iterdir()) == sorted([live, others])


def test_nothing_or_all_of_a_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"a": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_text() == '{\n "a": 1\n}\n' and len(list(tmp_path.iterdir())) == 1
