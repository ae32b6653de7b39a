"""What of a job's lines the terminal and the log get, also where neither can take them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_disk import resize, small_disk

SCRIPT = Path(__file__).parents[3] / "scripts/terminal.py"
LINES = b"[xpo] step 1/3 | loss 1\nnoise \xff\n[xpo] step 2/3 | loss 2\n[error] twice\n[error] twice\n[xpo] step 3/3 | loss 3\nno newline"
SHOWN = b"[xpo] step 1/3 | loss 1\n[error] twice\n[xpo] step 3/3 | loss 3\n"


def run(*words: object, python: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess[bytes]:
    """With the lines as its input."""
    return subprocess.run([*python, str(SCRIPT), *map(str, words)], input=LINES, capture_output=True)


def test_the_log_has_every_byte_and_the_terminal_our_lines(tmp_path: Path) -> None:
    done = run(tmp_path / "log")
    assert (done.returncode, done.stdout, done.stderr) == (0, SHOWN, b"")
    assert (tmp_path / "log").read_bytes() == LINES


def test_outside_of_an_image_pythons_own_library_is_enough() -> None:
    """``-I -S``: nothing that is installed."""
    assert run(python=(sys.executable, "-I", "-S")).stdout == SHOWN


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("shell", [("bash", "-c"), ("script", "-eqc")])  # script's has a terminal, so that the steps are a bar
@pytest.mark.parametrize("log", ["/dev/full", "/nowhere/log"])
def test_a_full_disk_ends_no_job(shell: tuple[str, ...], log: str, tmp_path: Path) -> None:
    """Under the terminal's output and under the log: all input is read to its end."""
    (tmp_path / "lines").write_bytes(LINES * 2000)
    command = f"stty rows 24 cols 100; (cat lines && echo >&2 all of it) | {sys.executable} {SCRIPT} {log} >/dev/full"
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([*shell, command], cwd=tmp_path, timeout=60, **streams)
    assert b"all of it" in done.stdout and b"Traceback" not in done.stdout, done.stdout
    assert (b"%|" in done.stdout) is (shell[0] == "script"), done.stdout


def test_the_log_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    """Whole lines are lost, so that those that are kept begin where a line begins."""
    with small_disk(tmp_path / "disk", "12k") as disk:
        job = subprocess.Popen([sys.executable, SCRIPT, disk / "log"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert job.stdin is not None and job.stdout is not None
        for number in range(500):
            job.stdin.write(b"a line of some length, number %d\n" % number)
        job.stdin.write(b"[xpo] so far\n")
        assert job.stdout.readline() == b"[xpo] so far\n"
        resize(disk, "64k")
        job.stdin.write(b"[error] the end\n")
        job.communicate()
        lines = (disk / "log").read_bytes().splitlines()
        assert 200 < len(lines) < 500 and lines[-1] == b"[error] the end"
        assert {*lines[:-1]} <= {b"a line of some length, number %d" % number for number in range(500)} | {b"[xpo] so far"}
