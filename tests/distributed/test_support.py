"""Feature by feature: docs/support.md says of each pair that a test runs it, or that it is refused, and both are so."""

import itertools
import re
from collections.abc import Callable

import pytest

from tests.distributed import harness
from tests.distributed.materials import LAYOUTS, Bench
from tests.distributed.test_bad_input import assert_one_line
from tests.distributed.test_layouts import ROUNDED, TIERS

DOCUMENT = harness.ROOT / "docs/support.md"


def given(flag: str) -> Callable[[int, tuple[object, ...]], bool]:
    """Whether a layout has a flag."""
    return lambda processes, flags: flag in flags


def has_data_parallelism(processes: int, flags: tuple[object, ...]) -> bool:
    """Whether there are more processes than one copy of the model needs."""
    sizes = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")
    for size in sizes:
        processes //= int(str(flags[flags.index(size) + 1])) if size in flags else 1
    return processes > 1


FEATURES: dict[str, Callable[[int, tuple[object, ...]], bool]] = {
    "TP": given("--tensor-model-parallel-size"),
    "SP": given("--sequence-parallel"),
    "PP": given("--pipeline-model-parallel-size"),
    "VPP": given("--num-virtual-stages-per-pipeline-rank"),
    "CP": given("--context-parallel-size"),
    "DP": has_data_parallelism,
    "DO": given("--use-distributed-optimizer"),
    "share": given("--share-prompt"),
    "recompute": given("--recompute-granularity"),
    "bf16": given("--bf16"),
    "fixed": given("--pad-micro-batches"),
}
MODES = {"xpo": "sigmoid", "finetune": "finetune", "pretrain": "pretrain"}
TE = ("--transformer-impl", "transformer_engine")
SHARE = ("--share-prompt",)
# pair -> (flags, what the one line says). Transformer Engine is refused with everything, so with each.
REFUSED: dict[frozenset[str], tuple[tuple[object, ...], tuple[str, ...]]] = {
    frozenset(("CP", "share")): (
        ("--context-parallel-size", 2, *SHARE), ("--share-prompt with --context-parallel-size > 1 is not supported",)
    ),
    frozenset(("share", "TE")): ((*SHARE, *TE, "--allow-untested"), ("Transformer Engine",)),
    frozenset(("share", "finetune")): ((*SHARE, "--train-mode", "finetune"), ("--share-prompt: --train-mode finetune has one sequence",)),
    frozenset(("share", "pretrain")): ((*SHARE, "--train-mode", "pretrain"), ("--share-prompt: --train-mode pretrain has one sequence",)),
    **{
        frozenset((name, "TE")): (TE, ("no test has run these layers", "--allow-untested"))
        for name in (*FEATURES, *MODES)
        if name != "share"
    },
}  # fmt: skip


def run_by_tests() -> set[frozenset[str]]:
    """Pairs that some run of test_layouts.py has."""
    pairs: set[frozenset[str]] = set()
    for mode, layout in (*TIERS, *ROUNDED):
        names = [name for name, has in FEATURES.items() if has(*LAYOUTS[layout])]
        names.append(next((known for known, word in MODES.items() if word == mode), "xpo"))
        pairs |= {frozenset(pair) for pair in itertools.combinations(names, 2)}
    return pairs


def documented() -> dict[frozenset[str], str]:
    """The cells of the table: "yes" or "no", by pair."""
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), DOCUMENT.read_text().splitlines())
    rows = [re.split(r"\s*\|\s*", line.strip()[1:-1].strip(" ")) for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    header, cells = rows[0][1:], {}
    for name, *values in rows[2:]:
        for other, value in zip(header, values, strict=False):
            if value:
                cells[frozenset((name, other))] = value
    return cells


def test_every_pair_is_tested_or_refused_as_documented() -> None:
    expected = {pair: "yes" for pair in run_by_tests()} | {pair: "no" for pair in REFUSED}
    assert not run_by_tests() & set(REFUSED)
    names = [*FEATURES, *MODES, "TE"]
    every = {frozenset(pair) for pair in itertools.combinations(names, 2)} - {frozenset(p) for p in itertools.combinations(MODES, 2)}
    assert set(expected) == every
    assert documented() == expected


@pytest.mark.parametrize(
    "pair", [*(pair for pair in REFUSED if "share" in pair), frozenset(("TP", "TE"))], ids=lambda pair: "-".join(sorted(pair))
)
def test_what_is_refused_says_so(bench: Bench, pair: frozenset[str]) -> None:
    """The others that are refused with Transformer Engine are refused for it alone, by the same line."""
    flags, says = REFUSED[pair]
    data, save = bench.reference(), bench.folder("refused")
    argv = [*bench.flags(data), "--save", save, "--export-hf", save / "hf", *flags]
    run = harness.launch(2 if "CP" in pair else 1, harness.TRAIN, argv, save.with_suffix(".log"), {"LPO_TRACEBACK": ""})
    assert_one_line(run, says)
    assert not save.exists() or not list(save.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--fp16",), ("--fp16 is not supported",)),
        (("--use-distributed-optimizer", "--optimizer-cpu-offload", "--use-precision-aware-optimizer"), ("--optimizer-cpu-offload",)),
        (("--micro-batch-size", 2), ("--micro-batch-size 2", "--max-tokens-per-micro-batch")),
        (("--iterations-to-skip", 3), ("--iterations-to-skip",)),
        (("--hierarchical-context-parallel-sizes", 1), ("--hierarchical-context-parallel-sizes is not supported",)),
        (("--decrease-batch-size-if-needed",), ("--decrease-batch-size-if-needed", "--global-batch-size pairs")),
        (("--use-torch-fsdp2",), ("fsdp2",)),
        (("--logps-chunk-tokens", 0), ("--logps-chunk-tokens 0",)),
    ],
)
def test_what_is_never_supported_says_so(bench: Bench, flags: tuple[object, ...], says: tuple[str, ...]) -> None:
    save = bench.folder("refused")
    argv = [*bench.flags(bench.reference()), "--save", save, *flags]
    assert_one_line(harness.launch(1, harness.TRAIN, argv, save.with_suffix(".log"), {"LPO_TRACEBACK": ""}), says)
