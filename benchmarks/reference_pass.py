"""The reference pass against the forward half of a training step: does it do the floating-point operations as fast?

Of a step's operations a third is the forward pass. The pass's operations per second, over those of a training step on the same pairs with
the same micro-batches: 1 is what the operations allow, 0.9 the target. The first block and the first step are not counted; processes take
turns; medians.

    python -m benchmarks.reference_pass --output benchmarks/reference_pass
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.train_step import CASES, ROOT, Case, make_materials, run_ours

TOKENS = 4096


def seconds_of_blocks(folder: Path, case: Case) -> list[float]:
    """How long each block of the pass took, from the lines it prints, the first left out."""
    for old in folder.glob("pairs.ref.*"):
        old.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
    command += ["toolkits.lpo_data_preprocessing.reference_logps", "--device", "cpu", "--seq-length", "4096", "--hf-path", folder / "model"]
    command += ["--pair-data", folder / "pairs", "--block-pairs", case.batch, "--max-tokens-per-micro-batch", TOKENS]
    environment = dict(os.environ, OMP_NUM_THREADS="2", PYTHONWARNINGS="ignore", PYTHONUNBUFFERED="1")
    times = []
    with subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " pairs | " in line:
                times.append(time.perf_counter())
    assert process.returncode == 0
    return [after - before for before, after in itertools.pairwise(times)]


def measure(folder: Path, case: Case, steps: int, repetitions: int) -> dict[str, Any]:
    """Both sides of one case."""
    from megatron_patch.data.batch_plan import PairOrder
    from megatron_patch.data.pair_dataset import SampleSet
    from megatron_patch.model.qwen2 import read_qwen2_config
    from megatron_patch.throughput import useful_flops

    folder.mkdir(parents=True)
    make_materials(folder, case, steps)
    model, samples = read_qwen2_config(str(folder / "model")), SampleSet([str(folder / "pairs")], "pairs")
    flops = useful_flops(model, samples.work(False))
    per_block = flops.reshape(steps, case.batch).sum(axis=1)[1:] / 3
    per_step = flops[PairOrder([len(samples)], seed=1).positions(case.batch, len(samples))].reshape(steps - 1, case.batch).sum(axis=1)
    passes: list[float] = []
    training: list[float] = []
    for _ in range(repetitions):
        passes += [count / s for count, s in zip(per_block, seconds_of_blocks(folder, case), strict=True)]
        run = run_ours(folder, case, steps, TOKENS)
        training += [count / s for count, s in zip(per_step, run["seconds"][1:], strict=True)]
    rates = {"pass": statistics.median(passes), "training": statistics.median(training)}
    return {"case": case.name, "flops_per_second": rates, "ratio": rates["pass"] / rates["training"], "passes": passes, "steps": training}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="writes PREFIX.json and PREFIX.md")
    parser.add_argument("--cases", nargs="+", default=["small-8k-gsm8k", "small-152k-gsm8k"], choices=CASES)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark-reference-pass"), help="for models, stores and runs")
    parser.add_argument("--steps", type=int, default=4, help="blocks and steps of each process; the first is not counted")
    parser.add_argument("--repetitions", type=int, default=2, help="processes of each side")
    args = parser.parse_args(argv)
    results = [measure(args.folder.resolve() / name, CASES[name], args.steps, args.repetitions) for name in args.cases]
    machine = f"Python {platform.python_version()}, torch {torch.__version__}, 2 threads, float32"
    lines = [f"# Reference pass\n\n`python -m benchmarks.reference_pass --output {args.output}`; {machine}\n"]
    lines += ["| case | pass, GFLOP/s | training, GFLOP/s | ratio | target 0.9 |", "|---|---:|---:|---:|---|"]
    for r in results:
        rates = [r["flops_per_second"][side] / 1e9 for side in ("pass", "training")]
        verdict = "met" if r["ratio"] >= 0.9 else f"missed by {0.9 - r['ratio']:.2f}"
        lines.append(f"| {r['case']} | {rates[0]:.1f} | {rates[1]:.1f} | {r['ratio']:.2f} | {verdict} |")
    Path(f"{args.output}.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")
    Path(f"{args.output}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
