"""Data that is damaged, stale or makes NaN: found before training where that is possible, and never trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.checkpoint import saved
from megatron_patch.data.pair_store import PairStore
from tests.distributed import harness
from tests.distributed.altered import NAN_PAIR
from tests.distributed.materials import Bench, copy_store
from tests.distributed.test_resume import batches

NAN = ("--loss-type", "sigmoid")


def steps_with_the_pair(save: Path, ranks: int) -> list[int]:
    """Steps whose pairs include the one that is NaN."""
    return [step for step, names in batches(save, ranks).items() if NAN_PAIR in names]


@pytest.mark.ci
@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("dp2-do", 2), pytest.param("tp2-pp2", 4, marks=pytest.mark.full)])
def test_steps_with_nan_are_left_out(bench: Bench, layout: str, ranks: int) -> None:
    """``--skip-bad-batches``: those steps and no others; the weights stay finite and the learning rate waits."""
    save = bench.train(layout, bench.reference(), *NAN, "--skip-bad-batches", 5, alter="nan_response,recorded")
    bad = steps_with_the_pair(save, ranks)
    rows = harness.metrics(save)
    assert bad and [row["iteration"] for row in rows if row["skipped"]] == bad and [row["iteration"] for row in rows] == list(range(1, 11))
    for row, before in zip(rows[1:], rows, strict=False):
        assert (row["loss"] is None) == bool(row["skipped"])
        assert (row["learning_rate"] == before["learning_rate"]) == bool(row["skipped"]), row
    assert all(row["grad_norm"] > 0 for row in rows if not row["skipped"])


def test_too_many_steps_with_nan_end_the_run(bench: Bench) -> None:
    """The first is left out, the second ends it: the pair, its store and what to run."""
    save = bench.folder("nan-twice")
    run = bench.attempt("one", save, bench.reference(), *NAN, "--train-iters", 15, "--skip-bad-batches", 1, alter="nan_response,recorded")
    (error,) = run.errors
    assert run.codes == [2] and f"{NAN_PAIR} " in error and "toolkits.lpo_data_preprocessing.inspect" in error
    bad = steps_with_the_pair(save, 1)
    assert len(bad) == 2 and [row["iteration"] for row in harness.metrics(save)] == list(range(1, bad[1]))
    assert f"{NAN_PAIR} " in next(line for line in run.output.splitlines() if "this step is left out" in line)


def flipped(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damaged_store(bench: Bench) -> tuple[tuple[object, ...], str]:
    """Of the right size, with another token."""
    prefix = copy_store(bench.reference(), bench.folder("damaged-store"))
    flipped(Path(f"{prefix}.bin"))
    return ("--pair-data", prefix, "--verify-data"), f"{prefix}.bin: contents changed"


def damaged_shard(bench: Bench) -> tuple[tuple[object, ...], str]:
    """A bit of a tensor that the fingerprint does not sample would do; these tensors are small, so the gate is told to go on."""
    folder = bench.folder("damaged-shard")
    shutil.copytree(bench.models["tied"], folder)
    flipped(folder / "model.safetensors")
    return ("--hf-path", folder, "--verify-data", "--allow-reference-mismatch"), "model.safetensors: its contents changed"


def missing_store(bench: Bench) -> tuple[tuple[object, ...], str]:
    """Not there any more."""
    return ("--pair-data", bench.root / "gone/pairs"), "gone/pairs.json: the manifest of a pair store is missing"


def half_a_store(bench: Bench) -> tuple[tuple[object, ...], str]:
    """Its writer was killed: no manifest yet."""
    prefix = copy_store(bench.reference(), bench.folder("half-a-store"))
    Path(f"{prefix}.json").unlink()
    return ("--pair-data", prefix), f"{prefix}.json: the manifest of a pair store is missing"


def stale_reference(bench: Bench) -> tuple[tuple[object, ...], str]:
    """Computed with other weights than those that training starts from."""
    return ("--hf-path", bench.models["other"]), "reference log-probs of another weights"


def reference_of_another_store(bench: Bench) -> tuple[tuple[object, ...], str]:
    """The store was built again since."""
    prefix = copy_store(bench.reference(), bench.folder("rebuilt-store"))
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "another"
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    assert PairStore(prefix).fingerprint != PairStore(bench.reference()).fingerprint
    return ("--pair-data", prefix), "reference log-probs of another store"


@pytest.mark.parametrize(
    "fault", [damaged_store, damaged_shard, missing_store, half_a_store, stale_reference, reference_of_another_store]
)
def test_found_before_training(bench: Bench, fault: Callable[[Bench], tuple[tuple[object, ...], str]]) -> None:
    """One line with the file, exit code 2, nothing trained."""
    flags, says = fault(bench)
    save = bench.folder(fault.__name__)
    run = bench.launch("one", harness.TRAIN, [*bench.flags(bench.reference()), "--save", save, *flags], Path(f"{save}.log"))
    (error,) = run.errors
    assert run.codes == [2] and says in error, run.output[-3000:]
    assert not (save / "metrics.jsonl").exists()


def test_whole_data_is_verified(bench: Bench) -> None:
    """And the run says so."""
    save = bench.folder("verified")
    run = bench.attempt("one", save, bench.reference(), "--train-iters", 1, "--verify-data", alter="unsaved")
    assert run.ok and "[xpo] stores and weights verified" in run.output, run.output[-3000:]


def test_batch_that_new_ranks_cannot_share(bench: Bench) -> None:
    """A run of one process goes on with three, which cannot have equal parts of ten pairs: the flag to change is named."""
    save = bench.folder("three-ranks")
    assert bench.attempt("one", save, bench.reference(), "--save-interval", 3, "--train-iters", 3, alter="").ok
    argv = [*bench.flags(bench.reference()), "--save", save, "--load", save]
    run = harness.launch(3, harness.TRAIN, argv, save.with_suffix(".log"), {"LPO_TRACEBACK": ""})
    (error,) = run.errors
    assert saved.tracked_step(save) == 3 and saved.damage(saved.folder_of(save, 3)) is None
    assert set(run.codes) == {2} and "--global-batch-size 10" in error and "3 data-parallel ranks" in error
