"""The stages as a user types them: `python -m`, one line on stderr and exit code 2 for a mistake, and a help that shows how."""

import subprocess
import sys

import pytest
from toolkit_helpers import ROOT, read_jsonl, write_jsonl

QUICK = ("normalise", "select")  # these import neither torch nor megatron


def python_m(stage, *argv):
    command = [sys.executable, "-m", f"toolkits.lpo_data_preprocessing.{stage}", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("stage", QUICK)
def test_mistake_is_one_line_and_two(tmp_path, stage):
    done = python_m(stage, "--input", write_jsonl(tmp_path / "in.jsonl", ["{"]), "--output", tmp_path / "out.jsonl")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and f"[error] {stage}: {tmp_path}/in.jsonl:1: not valid JSON" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_success_is_quiet_on_stderr(tmp_path):
    rows = write_jsonl(tmp_path / "in.jsonl", [{"question": "q", "answer": "a"}])
    done = python_m("normalise", "--input", rows, "--output", tmp_path / "out.jsonl")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("normalise: 1 records read, 1 kept")
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize("stage", ["normalise", "candidates", "select", "build_pairs"])
def test_help(capsys, stage):
    module = __import__(f"toolkits.lpo_data_preprocessing.{stage}", fromlist=["main"])
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f"example:\n  python -m toolkits.lpo_data_preprocessing.{stage} --input" in out
    assert "--max-drop-fraction" in out and "--overwrite" in out
