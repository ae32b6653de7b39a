"""When a training counts as finished, and what is shown when it fails; a stand-in for the run script trains nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from toolkit_helpers import write_jsonl

from toolkits.loss_comparison import trials as module
from toolkits.loss_comparison.jobs import Job
from toolkits.loss_comparison.materials import Materials, Store
from toolkits.loss_comparison.plan import Run
from toolkits.loss_comparison.trials import Bench, Diverged, Trial, TrialFailed

STAND_IN = 'mkdir -p "$OUTPUT/hf"; echo "$PRESET $*" >>"$OUTPUT/called"; echo "[error] no luck"; exit ${STAND_IN_CODE:-0}\n'
NUMBERS = {"greedy_accuracy": 0.5}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    (tmp_path / "run.sh").write_text(STAND_IN)
    (tmp_path / "dpo.args").write_text("--loss-type sigmoid\n")
    write_jsonl(tmp_path / "problems.jsonl", [{"question": "q", "answer": "#### 1"}])
    monkeypatch.setattr(module, "RUN_SCRIPT", str(tmp_path / "run.sh"))
    monkeypatch.setattr(module, "measure", lambda *_: NUMBERS)
    stores = {split: Store(str(tmp_path / split), split, 3) for split in ("valid", "heldout")}
    problems = dict.fromkeys(("valid", "heldout"), tmp_path / "problems.jsonl")
    training: dict[str | None, Store] = {None: Store(str(tmp_path / "train"), "train", 3)}
    return Bench(tmp_path / "out", Materials(tmp_path / "sft", "weights", problems, stores, training), 5)


@pytest.fixture
def trial(bench: Bench) -> Trial:
    return Trial(Run("r2 = 0.1/x", bench.out.parent / "dpo.args", ("--r2", "0.1"), (1e-5,), 10, None, None, 0.1, ""), 1e-5, 3)


def test_the_command(bench: Bench, trial: Trial) -> None:
    bench.train(trial)
    called = (bench.folder(trial) / "called").read_text().split()
    parent = bench.out.parent
    assert called[0] == str(parent / "dpo.args")
    assert called[1:] == [
        "--hf-path", str(parent / "sft"), "--pair-data", str(parent / "train"), "--valid-pair-data", str(parent / "heldout"),
        "--eval-interval", "5", "--train-iters", "10", "--r2", "0.1", "--lr", "1e-05", "--seed", "3",
    ]  # fmt: skip
    assert bench.folder(trial).parent == bench.out / "runs/r2-=-0.1-x"


def test_finished_is_what_the_marker_says(bench: Bench, trial: Trial) -> None:
    assert not bench.is_trained(trial)
    bench.train(trial)
    assert bench.is_trained(trial) and bench.training_seconds(trial) > 0
    marker = bench.folder(trial) / "finished.json"
    recorded = json.loads(marker.read_text())
    assert recorded["configuration"]["flags"] == ["--r2", "0.1"] and recorded["configuration"]["preset"] == "--loss-type sigmoid\n"
    marker.write_text(json.dumps(recorded | {"configuration": recorded["configuration"] | {"steps": 11}}))
    assert not bench.is_trained(trial)


@pytest.mark.parametrize("change", ["flags", "steps", "rate", "seed", "preset", "weights", "pairs", "evaluated", "interval"])
def test_every_change_is_another_training(bench: Bench, trial: Trial, change: str) -> None:
    bench.train(trial)
    materials = bench.materials
    if change == "preset":
        trial.run.preset.write_text("--loss-type ipo\n")
    changed = {
        "flags": replace(trial, run=replace(trial.run, flags=("--r2", "0.2"))),
        "steps": replace(trial, run=replace(trial.run, steps=11)),
        "rate": replace(trial, learning_rate=2e-5),
        "seed": replace(trial, seed=4),
    }.get(change, trial)
    other = {
        "weights": replace(bench, materials=replace(materials, weights="others")),
        "pairs": replace(bench, materials=replace(materials, training={None: Store("train", "others", 3)})),
        "evaluated": replace(bench, materials=replace(materials, stores=materials.stores | {"heldout": Store("heldout", "others", 3)})),
        "interval": replace(bench, eval_interval=6),
    }.get(change, bench)
    assert not other.is_trained(changed)


def test_numbers_are_of_what_is_there_now(bench: Bench, trial: Trial) -> None:
    bench.train(trial)
    assert bench.measured(trial, "valid") is None
    bench.measure(trial, "valid")
    bench.measure(None, "valid")
    assert bench.measured(trial, "valid") == bench.measured(None, "valid") == NUMBERS
    assert bench.measured(trial, "heldout") is None
    bench.train(trial)
    assert bench.measured(trial, "valid") is None and bench.measured(None, "valid") == NUMBERS
    bench.measure(trial, "valid")
    write_jsonl(bench.materials.problems["valid"], [{"question": "another", "answer": "#### 2"}])
    assert bench.measured(trial, "valid") is None and bench.measured(None, "valid") is None


def test_a_diverged_training_is_not_tried_again(bench: Bench, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.out.parent / "run.sh").write_text('echo "[error] gradients are NaN or infinite"; exit 1\n')
    assert not bench.is_diverged(trial) and not bench.is_diverged(None)
    with pytest.raises(Diverged, match="gradients are NaN or infinite"):
        bench.train(trial)
    assert bench.is_diverged(trial) and not bench.is_trained(trial) and bench.measured(trial, "valid") is None
    assert Job(trial, "valid").is_done(bench)
    other = replace(trial, learning_rate=2e-5)
    assert not bench.is_diverged(other) and not Job(other, "valid").is_done(bench)


def test_what_says_that_a_training_diverged() -> None:
    """The words in the two complaints that end it: of log-probs, and of gradients."""
    checks = (Path(__file__).parents[3] / "megatron_patch/step_checks.py").read_text()
    assert len(re.findall(f'return f"[^"]*{module.DIVERGED}', checks)) == 2


def test_a_failure_names_run_last_lines_and_logs(bench: Bench, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_CODE", "3")
    with pytest.raises(TrialFailed) as failure:
        bench.train(trial)
    assert str(failure.value).splitlines() == [
        "[failed] r2 = 0.1/x, rate 1e-05, seed 3: exit code 3",
        "[error] no luck",
        f"[failed] r2 = 0.1/x, rate 1e-05, seed 3: its logs: {bench.folder(trial)}/logs",
    ]
    assert not bench.is_trained(trial)
