"""Ten training steps are the same ten steps however they are spread over processes and micro-batches.

The judge is one process with one micro-batch a step. Losses and gradient norms are compared relatively; the learning rate moves
the loss by more than 1%, so equality is not that of a run that stands still. The lpo family is compared off its tie: at policy =
reference the hinge anchor sits on its kink and rounding decides about its gradient.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.data.pair_store import PairStore
from tests.distributed import harness
from tests.distributed.materials import PAIRS, Bench, make_store, tensors
from tests.distributed.test_step_zero import shifted_reference

TOLERANCE = 1e-5
OFF_TIE = ("--allow-reference-mismatch", "--no-parity-check")
OTHERS = ("tp2", "tp2-sp", "pp2", "vpp2", "tp2-pp2", "tp2-pp2-sp", "dp2", "dp2-do", "small micro-batches", "dp2 small micro-batches")
QUICK = {
    "sigmoid": ("tp2-sp", "pp2", "vpp2", "dp2", "dp2-do", "small micro-batches", "tp2-pp2-sp"),
    "ipo": ("tp2-sp", "dp2-do"),
    "lpo-ste": ("tp2-sp", "pp2", "dp2-do", "small micro-batches"),
    "finetune": ("tp2-sp", "vpp2", "dp2-do"),
}
CONTEXT = ("cp2", "cp2-do", "cp2-dp2 small micro-batches", "tp2-cp2-sp", "cp2-pp2")
ONCE = (
    "pp4 small micro-batches", "dp2-do small micro-batches", "small chunks", "tp2-sp small chunks", "dp2-do small chunks", "pp2 fixed rows",
    "tp2-pp2-sp fixed rows", "full recompute", "full recompute tp2-pp2-sp", "attention recompute", "mlp recompute cp2", "share-prompt",
    "share-prompt small micro-batches", "share-prompt tp2-sp", "share-prompt pp2", "share-prompt dp2-do", "everything cp2",
    "everything share-prompt dp2",
)  # fmt: skip
ALSO_QUICK = ("tp2-sp small chunks", "pp2 fixed rows", "full recompute", "share-prompt", "share-prompt tp2-sp")
IN_FULL = [("finetune", "everything cp2"), ("finetune", "everything dp2"), ("pretrain", "everything cp2"), ("pretrain", "everything dp2")]
LATER = {"ipo": "full", "lpo-ste": "full", "finetune": "full"}  # the layouts that are not quick; of sigmoid in CI
TIERS = {
    **{(mode, layout): LATER.get(mode, "ci") for mode in QUICK for layout in (*OTHERS, *CONTEXT)},
    **{(mode, layout): "quick" for mode, quick in QUICK.items() for layout in quick},
    **{("sigmoid", layout): "quick" if layout in ALSO_QUICK else "ci" for layout in ONCE},
    **dict.fromkeys(IN_FULL, "full"),
    ("sigmoid", "cp2"): "quick",
    ("lpo-ste", "tp2-cp2-sp"): "quick",
}
CASES = [
    pytest.param(mode, layout, marks=[] if tier == "quick" else [getattr(pytest.mark, tier)], id=f"{mode}-{layout.replace(' ', '-')}")
    for (mode, layout), tier in TIERS.items()
]
# bfloat16 with float32 main gradients, compared with float32.
ROUNDED = {
    ("sigmoid", "bf16"): "ci", ("sigmoid", "everything bf16 cp2"): "full", ("sigmoid", "everything bf16 share-prompt dp2"): "full",
    ("finetune", "everything bf16 cp2"): "full", ("pretrain", "everything bf16 cp2"): "full",
}  # fmt: skip


@pytest.fixture(scope="session")
def off_tie(bench: Bench) -> Path:
    """Pairs whose reference is 0.05 nats per token below or above the policy, alternately."""
    return shifted_reference(bench.reference(), bench.folder("off-tie"), np.where(np.arange(PAIRS) % 2, 0.05, -0.05)[:, None])


def trained(bench: Bench, off_tie: Path, mode: str, layout: str) -> list[dict[str, float]]:
    """Metrics of ten steps."""
    if mode in ("finetune", "pretrain"):
        save = bench.train(layout, bench.sft if mode == "finetune" else bench.text, "--train-mode", mode)
    elif mode == "lpo-ste":
        save = bench.train(layout, off_tie, "--loss-type", mode, *OFF_TIE)
    else:
        save = bench.train(layout, bench.reference(), "--loss-type", mode)
    return harness.metrics(save)


def worst(rows: list[dict[str, float]], judge: list[dict[str, float]], name: str) -> float:
    """Largest relative difference of a metric over the steps."""
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in judge]
    return max(abs(row[name] / right[name] - 1) for row, right in zip(rows, judge, strict=True))


@pytest.mark.parametrize(("mode", "layout"), CASES)
def test_ten_steps_equal_one_process(
    bench: Bench, off_tie: Path, mode: str, layout: str, record_property: Callable[[str, object], None]
) -> None:
    """Measured, worst relative difference of loss and gradient norm: loss 4.6e-7, gradient norm 6.8e-7 (lpo-ste at PP2 and TP2 x PP2)."""
    judge, rows = trained(bench, off_tie, mode, "one"), trained(bench, off_tie, mode, layout)
    losses = [row["loss"] for row in judge]
    assert len(losses) == 10
    assert max(losses) / min(losses) > 1.01, f"the loss stands still: {losses}"
    difference = {name: worst(rows, judge, name) for name in ("loss", "grad_norm")}
    record_property("worst", difference)
    assert max(difference.values()) <= TOLERANCE, difference


@pytest.mark.parametrize(
    ("mode", "layout"), [pytest.param(*case, marks=getattr(pytest.mark, tier), id="-".join(case)) for case, tier in ROUNDED.items()]
)
def test_bfloat16_is_float32_within_its_precision(
    bench: Bench, off_tie: Path, mode: str, layout: str, record_property: Callable[[str, object], None]
) -> None:
    judge, rows = trained(bench, off_tie, mode, "one"), trained(bench, off_tie, mode, layout)
    difference = {name: worst(rows, judge, name) for name in ("loss", "grad_norm")}
    record_property("worst", difference)
    assert 1e-6 < difference["loss"] < 0.01 and difference["grad_norm"] < 0.05, difference


GRADIENTS = ("tp2-sp", "pp2", "cp2", "share-prompt", "tp2-cp2-sp", "share-prompt pp2", "small micro-batches")


@pytest.mark.ci
@pytest.mark.parametrize("model", ["tied", pytest.param("untied", marks=pytest.mark.full)])
@pytest.mark.parametrize("layout", GRADIENTS)
def test_gradients_are_those_of_one_process(bench: Bench, off_tie: Path, layout: str, model: str) -> None:
    """Every tensor's, after one step: to 1e-5 of its own largest and 3e-6 of the model's (float32 rounds by 1.1e-6 on some CPUs)."""
    flags = ("--train-iters", 1, "--lr", 0.0, "--clip-grad", 0.0, "--loss-type", "sigmoid", *OFF_TIE)
    judge, found = (
        tensors(bench.train(at, off_tie, *flags, model=model, alter="unsaved,exported_gradients") / "hf") for at in ("one", layout)
    )
    assert judge.keys() == found.keys() and all(gradient.any() for gradient in judge.values())
    largest = max(float(gradient.abs().max()) for gradient in judge.values())
    for name, gradient in judge.items():
        difference = (gradient - found[name]).abs().max()
        assert difference <= 3e-6 * largest and difference <= 1e-5 * gradient.abs().max(), (name, float(difference), largest)


@pytest.mark.parametrize("layout", ["share-prompt", pytest.param("share-prompt dp2-do", marks=pytest.mark.ci)])
def test_several_pairs_of_a_prompt_share_it(bench: Bench, layout: str) -> None:
    """Sixteen prompts with three pairs each, all in a step: the same steps, and each prompt is computed once."""
    prefix = make_store(bench.folder("same-prompt") / "pairs", "pairs", same_prompt=3, seed=5)
    flags = ("--loss-type", "simpo", "--train-iters", 3, "--global-batch-size", PAIRS)
    judge, rows = (harness.metrics(bench.train(where, prefix, *flags)) for where in ("one", layout))
    assert max(worst(rows, judge, name) for name in ("loss", "grad_norm")) <= TOLERANCE
    lengths = PairStore(prefix).lengths.astype(int)
    separate, once = lengths.sum() + lengths[:, 0].sum(), lengths[::3, 0].sum() + lengths[:, 1:].sum()
    for each, tokens in ((judge, separate), (rows, once)):
        assert all(row["tokens_per_second"] * row["seconds"] == pytest.approx(tokens) for row in each)


def test_fixed_rows_are_padded(bench: Bench, off_tie: Path) -> None:
    """What "fixed rows" compares: micro-batches of which more is padding than the little that sequence parallelism needs."""
    rows = trained(bench, off_tie, "sigmoid", "pp2 fixed rows")
    assert min(row["padding_fraction"] for row in rows) > 0.02 and min(row["micro_batches"] for row in rows) > 1
    assert {row["padding_fraction"] for row in trained(bench, off_tie, "sigmoid", "pp2")} == {0}


def test_export_holds_the_last_step(bench: Bench) -> None:
    """With the parameter all-gather overlapped, an export right after the last step must not be one step old."""
    flags = ("--loss-type", "sigmoid")
    before = tensors(bench.models["tied"])
    judge, found = (tensors(bench.train(layout, bench.reference(), *flags) / "hf") for layout in ("one", "dp2-do"))
    moved = max(float((judge[name] - before[name]).abs().max()) for name in judge)
    apart = max(float((judge[name] - found[name]).abs().max()) for name in judge)
    assert moved > 5e-3 and apart < 0.05 * moved, (moved, apart)  # Adam moves a weight by up to 1e-3 a step


def test_micro_batches_differ(bench: Bench, off_tie: Path) -> None:
    """What "small micro-batches" compares: several micro-batches a step against one."""
    assert {row["micro_batches"] for row in trained(bench, off_tie, "sigmoid", "one")} == {1}
    assert min(row["micro_batches"] for row in trained(bench, off_tie, "sigmoid", "small micro-batches")) > 2


def test_a_loss_off_the_tie_moves_its_anchor(bench: Bench, off_tie: Path) -> None:
    """The anchor acts on some pairs and not on others, and training changes on which: both sides of its kink are compared."""
    active = [row["lpo/anchor_active"] for row in trained(bench, off_tie, "lpo-ste", "one")]
    assert all(0 < share < 1 for share in active[:5]) and active[-1] < active[0], active


def test_an_empty_micro_batch_changes_nothing(bench: Bench) -> None:
    """One pair a step under virtual PP2, which needs an even number of micro-batches: one of them holds no pair."""
    flags = ("--global-batch-size", 1, "--train-iters", 3)
    judge, rows = (harness.metrics(bench.train(layout, bench.reference(), *flags)) for layout in ("one", "vpp2"))
    assert {row["micro_batches"] for row in rows} == {2}
    assert max(worst(rows, judge, name) for name in ("loss", "grad_norm")) <= TOLERANCE


def test_many_buckets_gathered_late(bench: Bench) -> None:
    """An untied output layer in a bucket of its own, gathered while the forward pass runs: nobody may use it before it has arrived."""
    data = bench.reference("untied")
    judge = harness.metrics(bench.train("one", data, "--loss-type", "sigmoid", model="untied"))
    rows = harness.metrics(bench.train("dp2-do", data, "--loss-type", "sigmoid", "--ddp-bucket-size", 10000, model="untied"))
    assert max(worst(rows, judge, name) for name in ("loss", "grad_norm")) <= TOLERANCE
