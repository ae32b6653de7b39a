"""Losses that look beyond their pair: the same in one process and in two, with one and with several micro-batches a step; resumed.

And every other loss trains: each name of ``--loss-type`` gives gradients of its own.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.checkpoint import saved
from megatron_patch.preference.losses import LOSSES
from tests.distributed import harness
from tests.distributed.materials import PAIRS, Bench, make_store
from tests.distributed.test_layouts import TOLERANCE, worst
from tests.distributed.test_resume import resumed, whole

SUM = ("--loss-type", "sigmoid", "bco", "sft", "--loss-weights", 0.8, 0.2, 1)
SPO = ("--loss-type", "ipo", "--anchor", "spo", "--anchor-value", "running-minimum", "--anchor-slack", 1e-4)
FAST = ("--statistics-decay", 0.5)
CASES = {
    "kto": ("--loss-type", "kto"),
    "kto-pair": ("--loss-type", "kto-pair"),
    "bco": ("--loss-type", "bco", "--beta", 0.1, *FAST),
    "alpha-dpo": ("--loss-type", "alpha-dpo", *FAST),
    "sum": SUM,
    "spo": SPO,
    "aot": ("--loss-type", "aot", "--beta", 0.1),
    "aot-unpaired": ("--loss-type", "aot-unpaired", "--beta", 0.1),
}
EVERYTHING = ("--global-batch-size", PAIRS)
FOUR = {"one": (*EVERYTHING, "--max-tokens-per-micro-batch", 600), "dp2": (*EVERYTHING, "--max-tokens-per-micro-batch", 300)}
SLOW = {"kto-pair", "sum", "spo", "aot-unpaired"}


def parameters(names: list[str]) -> list[object]:
    """Cases, the slower half of them in the ci tier."""
    return [pytest.param(name, marks=[pytest.mark.full] if name in SLOW else [], id=name) for name in names]


def trained(bench: Bench, layout: str, *flags: object) -> list[dict[str, float]]:
    """Metrics of a run."""
    return harness.metrics(bench.train(layout, bench.reference(), *flags))


def compare(judge: list[dict[str, float]], rows: list[dict[str, float]]) -> dict[str, float]:
    """Worst relative differences; a loss that stands still compares nothing."""
    losses = [row["loss"] for row in judge]
    assert max(losses) / min(losses) > 1.002, losses
    return {name: worst(rows, judge, name) for name in ("loss", "grad_norm")}


@pytest.mark.parametrize("case", parameters(list(CASES)))
def test_two_processes_equal_one(bench: Bench, case: str, record_property: Callable[[str, object], None]) -> None:
    """One micro-batch a step: what a loss sees of the batch is gathered over both ranks."""
    judge, rows = (trained(bench, layout, *CASES[case]) for layout in ("one", "dp2"))
    assert {row["micro_batches"] for row in judge + rows} == {1}
    difference = compare(judge, rows)
    record_property("worst", difference)
    assert max(difference.values()) <= TOLERANCE, difference


@pytest.mark.parametrize("case", parameters([name for name in CASES if not name.startswith("aot")]))
def test_two_processes_equal_one_with_four_micro_batches(bench: Bench, case: str, record_property: Callable[[str, object], None]) -> None:
    """The same pairs share a micro-batch at both layouts, so a mean over a micro-batch is the same number."""
    judge, rows = (trained(bench, layout, *CASES[case], *FOUR[layout]) for layout in ("one", "dp2"))
    assert {row["micro_batches"] for row in judge + rows} == {4}
    difference = compare(judge, rows)
    record_property("worst", difference)
    assert max(difference.values()) <= TOLERANCE, difference


@pytest.mark.parametrize(("case", "layout"), [("kto", "tp2-pp2"), ("alpha-dpo", "tp2-pp2"), ("alpha-dpo", "vpp2")])
@pytest.mark.ci
def test_stages_without_losses_share_the_statistics(bench: Bench, case: str, layout: str) -> None:
    """Only the last pipeline stage sees log-probs. (Not kto at vpp2, where a step is two micro-batches and z0 the mean of each.)"""
    difference = compare(trained(bench, "one", *CASES[case]), trained(bench, layout, *CASES[case]))
    assert max(difference.values()) <= TOLERANCE, difference


def test_statistics_are_those_of_the_batches_before(bench: Bench) -> None:
    """By hand from the logged margins: bco's mean reward, averaged with a decay of one half."""
    rows = trained(bench, "one", *CASES["bco"])
    expected = 0.0
    for row in rows:
        assert row["statistics/bco/reward"] == pytest.approx(expected, abs=1e-6)
        expected = 0.5 * expected + 0.5 * (row["rewards/chosen"] + row["rewards/rejected"]) / 2
    assert abs(rows[-1]["statistics/bco/reward"]) > 0.01


@pytest.mark.parametrize(("case", "layout"), [("alpha-dpo", "dp2"), pytest.param("spo", "tp2-sp", marks=pytest.mark.full)])
def test_statistics_travel_in_checkpoints(bench: Bench, case: str, layout: str) -> None:
    """A resumed run has the losses and the statistics of one that was not interrupted, to the last bit."""
    uninterrupted = whole(bench, layout, *CASES[case])
    judge, rows = harness.metrics(uninterrupted), harness.metrics(resumed(bench, layout, uninterrupted, *CASES[case]))
    names = [name for name in judge[0] if name.startswith("statistics/")]
    assert names and any(judge[5][name] != judge[0][name] for name in names)
    for name in ("loss", "grad_norm", *names):
        assert [row[name] for row in rows] == [row[name] for row in judge], name


def test_evaluation_does_not_move_the_statistics(bench: Bench) -> None:
    """The same training with and without evaluations in between."""
    plain = bench.train("one", bench.reference(), *CASES["alpha-dpo"])
    watched = bench.train("one", bench.reference(), *CASES["alpha-dpo"], "--valid-pair-data", bench.reference(), "--eval-interval", 2)
    assert [row["loss"] for row in harness.metrics(plain)] == [row["loss"] for row in harness.metrics(watched)]
    evaluations = [row for row in map(json.loads, (watched / "metrics.jsonl").read_text().splitlines()) if "eval_loss" in row]
    assert len(evaluations) == 5


def test_aot_refuses_a_step_of_several_micro_batches(bench: Bench) -> None:
    save = bench.folder("aot-split")
    run = bench.attempt("dp2", save, bench.reference(), *CASES["aot"], *FOUR["dp2"])
    (error,) = run.errors
    assert set(run.codes) == {2} and "loss aot sorts the pairs of a whole step, but step 1 needs 4 micro-batches" in error
    assert not list(save.glob("iter_*"))


def test_aot_refuses_it_after_a_change_of_the_batch_too(bench: Bench) -> None:
    """Two steps of 20 pairs are done, two of 10 are left."""
    flags, save = (*CASES["aot"], "--train-iters", 4, "--save-interval", 2), bench.folder("aot-other-batch")
    first = bench.attempt("one", save, bench.reference(), *flags, "--global-batch-size", 20, "--exit-interval", 2, alter="")
    assert saved.tracked_step(save) == 2, first.output[-4000:]
    run = bench.attempt("one", save, bench.reference(), *flags, *FOUR["one"], "--load", save, alter="")
    (error,) = run.errors
    assert run.codes == [2] and "but step 3 needs 4 micro-batches" in error


def test_odpo_refuses_pairs_without_a_score_gap(bench: Bench, tmp_path: Path) -> None:
    unscored = make_store(tmp_path / "unscored", "pairs", count=3, scored=False)
    assert bench.launch("one", harness.REFERENCE, bench.reference_flags("tied", unscored), tmp_path / "log").ok
    run = bench.attempt("one", bench.folder("odpo"), unscored, "--loss-type", "odpo", "--global-batch-size", 3)
    (error,) = run.errors
    assert "loss odpo needs pairs whose chosen_score is greater" in error and f"3 are not, the first is p000 ({unscored})" in error


def test_a_loss_without_a_reference_needs_none(bench: Bench) -> None:
    """The same losses as with one; what a log-ratio would be is not reported, rather than reported as NaN."""
    flags = ("--loss-type", "simpo", "--valid-pair-data")
    with_one = bench.train("one", bench.reference(), *flags, bench.reference())
    without = bench.train("one", bench.pairs, *flags, bench.pairs)
    assert [row["loss"] for row in harness.metrics(with_one)] == [row["loss"] for row in harness.metrics(without)]
    missing = set(harness.metrics(with_one)[0]) - set(harness.metrics(without)[0])
    assert {"rewards/margins", "lpo/margin"} <= missing and "logps/chosen" not in missing
    assert "NaN" not in (without / "metrics.jsonl").read_text() and not (without / "step_zero.json").exists()
    foreign = bench.attempt("one", bench.folder("foreign"), bench.reference("other"), "--loss-type", "simpo", "--train-iters", 1)
    assert foreign.ok and "no reference is used" in foreign.output and "reference log-probs of another weights" in foreign.output
    run = bench.attempt("one", bench.folder("anchored"), bench.pairs, "--loss-type", "simpo", "--anchor", "hinge")
    assert ".ref.json" in run.errors.pop()


@pytest.mark.full
def test_every_loss_trains_and_differs_from_the_others(bench: Bench) -> None:
    """One step that moves the weights and a second one that shows where to: no two losses give the same gradient norms."""
    seen: dict[tuple[float, ...], str] = {}
    for name in LOSSES:
        flags = ("--loss-type", name, "--train-iters", 3, *(("--r2", 0.3) if name in ("lpo-ste", "lpo-ste-paper", "lpo-r") else ()))
        rows = trained(bench, "one", *flags)
        norms = tuple(round(row["grad_norm"], 6) for row in rows)
        assert min(norms) > 0 and norms not in seen, (name, seen.get(norms), norms)
        seen[norms] = name
