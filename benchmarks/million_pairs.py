"""How long, and how much memory, from nothing to the first global batch of a store of a million pairs; the same at step 50,000.

    python -m benchmarks.million_pairs --store outputs/million/pairs > benchmarks/million_pairs.log

The store (random tokens; a pair has 10 to 20) is made first when it is not there, file by file with numpy: the writer takes one pair at a
time. Each measurement has a process of its own. Memory is resident memory above what the process has once everything is imported, at its
peak, mapped pages of the store included; the page cache is warm. `--against FOLDER` measures another checkout too, on the same store, in
turns.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, BATCH, RANKS, MAX_TOKENS = 1000, 128, 4, 2048
BUDGET_S, BUDGET_MB = 5.0, 300.0
ROOT = Path(__file__).parents[1]


def make_store(prefix: Path, pairs: int, seed: int = 0) -> None:
    """A pair store with scores and reference log-probs, as the stages would leave it."""
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    from megatron_patch.data import pair_store as ps

    rng = np.random.default_rng(seed)
    lengths = rng.integers((4, 3, 3), (8, 7, 7), (pairs, 3))  # prompt, chosen, rejected: 10 to 19 tokens in all
    prefix.parent.mkdir(parents=True, exist_ok=True)
    rng.integers(0, VOCABULARY, lengths.sum(), dtype=np.int32).tofile(f"{prefix}.bin")
    with _IndexWriter(f"{prefix}.idx", np.int32) as writer:
        writer.write(lengths.ravel(), None, np.arange(pairs + 1) * 3)
    columns = ps.ColumnBuilder()
    for i, (chosen, rejected) in enumerate(rng.normal(size=(pairs, 2)).tolist()):
        columns.add(f"{_scrambled(i)}-0", _scrambled(i // 4), (chosen, rejected), i + 1)
    columns.save(Path(f"{prefix}.meta.npz"))
    files = {suffix: _description(Path(f"{prefix}{suffix}")) for suffix in (".bin", ".idx", ".meta.npz")}
    manifest = {"format": ps.FORMAT, "format_version": ps.FORMAT_VERSION, "kind": "pairs", "count": pairs, "files": files}
    fingerprints = {"tokenizer": {"fingerprint": "t"}, "template": {"fingerprint": "t"}}
    Path(f"{prefix}.json").write_text(json.dumps(manifest | fingerprints))
    fingerprint = ps.PairStore(prefix).fingerprint
    logps = -rng.uniform(1, 50, (pairs, 2))
    ps.write_reference_logps(prefix, logps, store_fingerprint=fingerprint, weights_fingerprint="w", dtype="float32")


def _scrambled(i: int) -> str:
    """16 hex digits that look like a hash: multiplying by an odd number gives different ones for different numbers."""
    return f"{(i + 1) * 0x9E3779B97F4A7C15 % 2**64:016x}"


def _description(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (at its peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(prefix: str, step: int) -> dict[str, Any]:
    """Open, shuffle, balance, pack: seconds, MB above the imports, and the batch's names, so that runs can be compared."""
    from megatron.core.datasets import indexed_dataset  # noqa: F401  imported by the store: not part of what is measured

    from megatron_patch.data.batch_plan import BatchPlan, PairOrder
    from megatron_patch.data.pair_dataset import MicroBatchStream, RowShape, SampleSet
    from megatron_patch.model.qwen2 import Qwen2Config
    from megatron_patch.throughput import useful_flops

    model = Qwen2Config(
        layers=28, hidden=3584, heads=28, kv_groups=4, head_dim=128, ffn=18944, vocab=VOCABULARY, tied=False, rope_base=1e6,
        norm_eps=1e-6, max_positions=32768, init_std=0.02,
    )  # fmt: skip
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    before, laps, started = resident_mb("VmRSS"), {}, time.perf_counter()

    def lap(what: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = make()
        laps[what] = round(time.perf_counter() - start, 3)
        return made

    samples = lap("open", lambda: SampleSet([prefix], "pairs", with_reference=True, weights_fingerprint="w"))
    lap("longest", lambda: samples[int(samples.tokens.argmax())].name)  # what a run looks at before it starts
    order = PairOrder(samples.sizes, seed=1)
    cost = lap("cost", lambda: useful_flops(model, samples.work(False)))
    plan = lap("plan", lambda: BatchPlan(order, samples.tokens, batch=BATCH, ranks=RANKS, max_tokens=MAX_TOKENS, cost=cost))
    split = lap("shuffle and balance", lambda: plan.step(step * BATCH))
    batches = MicroBatchStream(samples, plan, rank=0, vocab_size=VOCABULARY, shape=RowShape()).from_position(step * BATCH)
    packed = lap("first batch", lambda: [next(batches) for _ in split])
    total = time.perf_counter() - started
    names = [name for batch in packed for name in batch.names]
    digest = hashlib.sha256(repr([(b.names, b.tokens.tolist(), b.reference.tolist()) for b in packed]).encode()).hexdigest()[:16]
    cost = {"seconds": round(total, 3), "mb": round(resident_mb("VmHWM") - before, 1)}
    return {"step": step, **cost, "laps": laps, "names": names, "batch": digest}


def in_a_process(prefix: Path, step: int, root: Path = ROOT) -> dict[str, Any]:
    """`measure` in a process of its own, with the library of the checkout at `root`."""
    command = [sys.executable, "-W", "ignore", __file__, "--store", str(prefix.resolve()), "--measure", str(step)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def within_budget(row: dict[str, Any]) -> bool:
    """What a store of a million pairs may cost."""
    return row["seconds"] < BUDGET_S and row["mb"] < BUDGET_MB


def report(name: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    laps = ", ".join(f"{what} {seconds:.3f}" for what, seconds in row["laps"].items())
    print(f"{name}  step {row['step']:>6}  {row['seconds']:.3f} s  {row['mb']:>6.1f} MB  ({laps})  batch {row['batch']}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, metavar="PREFIX", help="made when it is not there")
    parser.add_argument("--pairs", type=int, default=1_000_000, metavar="N", help="of a store to be made (default %(default)s)")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, measured in turns")
    parser.add_argument("--measure", type=int, metavar="STEP", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Print the table; 1 when a measurement of this checkout is over the budget."""
    args = parse()
    if args.measure is not None:
        print(json.dumps(measure(str(args.store), args.measure)))
        return 0
    if not Path(f"{args.store}.ref.json").exists():
        make_store(args.store, args.pairs)
    print("python -m benchmarks.million_pairs --store PREFIX" + (" --against FOLDER" if args.against else ""))
    print(f"{args.pairs} pairs, batches of {BATCH} over {RANKS} ranks; budget {BUDGET_S:g} s and {BUDGET_MB:g} MB above the imports")
    good = True
    for step in (0, 0, 50_000, 50_000):
        if args.against:
            report("before", in_a_process(args.store, step, args.against.resolve()))
        row = in_a_process(args.store, step)
        report("now   ", row)
        good = good and within_budget(row)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
