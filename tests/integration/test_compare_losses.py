"""compare_losses.sh as a user starts it, on a small quickstart's materials: what it writes, what a second call leaves alone, a failure."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.full

FILE = """
title = "r2 without an anchor"
materials = "{materials}"
preset = "examples/qwen2_5/comparisons/schedule.args"
steps = 12
eval_interval = 4
seeds = [3]
x = "r2"

[[runs]]
name = "r2 = 2"
flags = "--loss-type lpo-ste --anchor none --r2 2"
learning_rates = [1e-4, 2e-4]
x = 2
"""
SECOND = """
[[runs]]
name = "{name}"
flags = "--loss-type {loss} --anchor none"
rates_from = "r2 = 2"
pairs = "perturbed"
x = 0.1

[pair_sets.perturbed]
method = "perturb"
"""


def compare(work: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Write the file and run the script on it."""
    (work / "small.toml").write_text(text)
    environment = {**os.environ, "QUICKSTART_SMALL": "1", "COMPARE_OUT": str(work / "out"), "DEVICE": "cpu"}
    command = ["bash", "scripts/compare_losses.sh", str(work / "small.toml")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one comparison: r2 = 2 on the quickstart's pairs, and r2 = 0.1 on the same."""
    folder = tmp_path_factory.mktemp("compare")
    done = compare(folder, both(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def both(work: Path) -> str:
    second = SECOND.format(name="r2 = 0.1", loss="lpo-ste --r2 0.1").replace('pairs = "perturbed"\n', "").partition("[pair_sets")[0]
    return FILE.format(materials=work / "materials") + second


def report(work: Path) -> dict[str, Any]:
    return json.loads((work / "out/comparison.json").read_text())


def test_report(work: Path) -> None:
    found = report(work)
    assert [(row["run"], row["learning_rate"]) for row in found["rates_tried"]] == [("r2 = 2", 1e-4), ("r2 = 2", 2e-4)]
    assert found["trainings"] == 3  # the chosen rate's first seed is not trained twice
    (chosen,) = [row["learning_rate"] for row in found["rates_tried"] if row["chosen"]]
    assert {run["learning_rate"] for run in found["runs"].values()} == {chosen}
    markdown = (work / "out/comparison.md").read_text()
    assert "| SFT | — |" in markdown and "taken from r2 = 2" in markdown
    assert all((work / "out" / name).stat().st_size > 10_000 for name in ("curves.png", "accuracy.png"))


def test_larger_r2_pushes_rejected_answers_further_down(work: Path) -> None:
    """The rejected side's share of the gradient is r2 / (r1 + r2): 2/3 against 1/11. At the same rate, in the report and on the way."""
    runs = report(work)["runs"]
    rejected = {name: run["heldout"]["rejected_logratio"]["mean"] for name, run in runs.items()}
    assert rejected["r2 = 2"] < rejected["r2 = 0.1"] - 0.02
    metrics = {name: (Path(run["folders"][0]) / "metrics.jsonl").read_text().splitlines() for name, run in runs.items()}
    last = {name: [row for row in map(json.loads, rows) if "eval_loss" in row][-1] for name, rows in metrics.items()}
    for name, row in last.items():  # Megatron during training, transformers afterwards: the same pairs, the same weights
        assert row["iteration"] == 12 and row["eval_lpo/rejected_logratio"] == pytest.approx(rejected[name], abs=1e-5)


def test_a_second_call_trains_nothing(work: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (work / "out/runs").rglob("*") if path.is_file()}
    done = compare(work, both(work))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[compare] learning rates: 4 to measure, 4 finished before" in done.stdout
    assert "[compare] seeds: 2 to measure, 2 finished before" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (work / "out/runs").rglob("*") if path.is_file()} == before


@pytest.mark.full
def test_a_failure_is_shown_and_the_rest_kept(work: Path) -> None:
    """A loss that does not exist, on pairs that are made for it first."""
    done = compare(work, FILE.format(materials=work / "materials") + SECOND.format(name="wrong", loss="lpo-stem"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "select: 120 records read, 120 kept" in done.stdout
    assert "[compare] learning rates: 4 to measure, 4 finished before" in done.stdout
    assert "[failed] wrong, rate " in done.stderr and "unknown loss 'lpo-stem'" in done.stderr
    assert "[failed] 1 of 1 failed; the others are kept" in done.stderr


def test_a_mistake_in_the_file_is_one_line(work: Path) -> None:
    done = compare(work, both(work).replace("steps", "stepz"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"[error] {work}/small.toml: stepz: unknown key (did you mean steps?)\n"
