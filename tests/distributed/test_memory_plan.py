"""What ``--dry-run`` says a rank will hold is what it holds: weights, gradients and optimizer state to the byte, activations within 15%."""

import json
from pathlib import Path

import pytest

from tests.distributed import harness
from tests.distributed.materials import Bench, make_model, make_store

ENTRY = harness.ROOT / "tests/distributed/memory_entry.py"
ROWS = ("--pad-micro-batches", "--max-tokens-per-micro-batch", 1024, "--seq-length", 512, "--logps-chunk-tokens", 256)
COUNTED = ("parameters", "weights", "gradients", "optimizer")
CASES = [
    (False, "tp2-sp", ("--bf16",)),
    (True, "dp2-do", ("--bf16",)),
    pytest.param(True, "pp4", (), marks=pytest.mark.full),
    pytest.param(False, "tp2-cp2-sp", (), marks=pytest.mark.full),
    pytest.param(True, "vpp2", ("--bf16", "--use-distributed-optimizer"), marks=pytest.mark.full),
    pytest.param(False, "full recompute", (), marks=pytest.mark.full),
]


@pytest.fixture(scope="module")
def materials(bench: Bench) -> tuple[dict[bool, Path], Path]:
    """Models, tied or not, so wide that what is small beside hidden states is small; pairs of about 450 tokens."""
    folder = bench.folder("wide")
    models = {tied: make_model(folder / str(tied), tied=tied, seed=0, hidden=512) for tied in (True, False)}
    return models, make_store(folder / "pairs", "pairs", count=16, shortest=110, longest=128)


@pytest.mark.ci
@pytest.mark.parametrize(("tied", "layout", "flags"), CASES)
def test_ranks_hold_what_was_planned(
    bench: Bench, materials: tuple[dict[bool, Path], Path], tied: bool, layout: str, flags: tuple[str, ...]
) -> None:
    """The fullest rank of each stage; all rows are as long as the budget, so that the plan's row is the real one."""
    models, pairs = materials
    out = bench.folder(f"memory-{layout}")
    run = bench.launch(layout, ENTRY, [out, *bench.flags(pairs, "--hf-path", models[tied], *ROWS, *flags)], Path(f"{out}.log"))
    assert run.ok, run.output[-4000:]
    ranks = [json.loads(path.read_text()) for path in sorted(out.parent.glob(f"{out.name}.*.json"))]
    assert ranks[0]["micro_batches"] >= 4
    for stage in {rank["stage"] for rank in ranks}:
        here = [rank for rank in ranks if rank["stage"] == stage]
        planned, measured = here[0]["planned"], {name: max(rank["measured"][name] for rank in here) for name in here[0]["measured"]}
        assert {name: planned[name] for name in COUNTED} == {name: measured[name] for name in COUNTED}
        assert planned["activations"] == pytest.approx(measured["activations"], rel=0.15), stage
