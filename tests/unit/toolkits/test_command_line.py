"""The stages as a user types them: `python -m`, one line on stderr and exit code 2 for a mistake, and a help that shows how."""

import re
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


def nameless(text):
    """Options whose value has no other name than the option's own, in capitals: nothing says what it counts."""
    return [option for option, value in re.findall(r"--([a-z-]{2,}) ([A-Z_]+)", text) if option.replace("-", "_").upper() == value]


@pytest.mark.parametrize("stage", ["normalise", "candidates", "select", "build_pairs", "inspect", "extend_vocab"])
def test_help(capsys, stage):
    module = __import__(f"toolkits.lpo_data_preprocessing.{stage}", fromlist=["main"])
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--overwrite" in out and nameless(out) == []
    assert f"\nexample:\n  python -m toolkits.lpo_data_preprocessing.{stage} " in out and len(out.splitlines()) < 90
    assert ("--max-drop-fraction" in out) == (stage in ("normalise", "candidates", "select", "build_pairs"))


def test_help_of_the_reference_pass():
    """The example is where a terminal stands after thousands of lines of Megatron's flags; what the pass is, where a pager opens."""
    done = python_m("reference_logps", "--help")
    first, last = done.stdout.splitlines()[:6], done.stdout.splitlines()[-2:]
    assert done.returncode == 0 and first[0].startswith("usage: torchrun ") and "sums in nats" in " ".join(first)
    example = "  torchrun --nproc-per-node 2 -m toolkits.lpo_data_preprocessing.reference_logps --hf-path"
    assert last[0] == "example:" and last[1].startswith(example) and "--block-pairs PAIRS" in done.stdout


def test_every_stage_has_a_help_that_is_tested():
    folder = ROOT / "toolkits" / "lpo_data_preprocessing"
    stages = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert stages == {"normalise", "candidates", "select", "build_pairs", "inspect", "extend_vocab", "reference_logps"}
