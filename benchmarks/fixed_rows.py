"""Rows as long as their pairs against rows padded to the budget (`--pad-micro-batches`), under two pipeline stages.

Stages that get rows of different lengths tell each other the shapes first; padding saves that and costs the padding. Both sides train the
same pairs with the same budgets, by turns; the first step of each process is not counted; medians.

    python -m benchmarks.fixed_rows --output benchmarks/fixed_rows
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.train_step import CASES, make_materials, run_ours

BUDGETS = (2048, 8192)
CASE = CASES["small-8k-gsm8k"]


def measure(folder: Path, budget: int, steps: int, repetitions: int) -> dict[str, Any]:
    """Both sides at one budget."""
    seconds: dict[str, list[float]] = {"as they come": [], "fixed": []}
    padding: dict[str, float] = {}
    for _ in range(repetitions):
        for name in seconds:
            flags = ["--pipeline-model-parallel-size", 2, *(["--pad-micro-batches"] if name == "fixed" else [])]
            run = run_ours(folder, CASE, steps, budget, *flags, processes=2)
            seconds[name] += run["seconds"][1:]
            padding[name] = statistics.mean(row["padding_fraction"] for row in run["rows"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["fixed"] / medians["as they come"]
    return {"budget": budget, "medians": medians, "ratio": ratio, "padding": padding, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="writes PREFIX.json and PREFIX.md")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark-fixed-rows"), help="for model, store and runs")
    parser.add_argument("--steps", type=int, default=4, help="of each process; the first is not counted")
    parser.add_argument("--repetitions", type=int, default=2, help="runs of each side")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    folder.mkdir(parents=True)
    make_materials(folder, CASE, args.steps)
    results = [measure(folder, budget, args.steps, args.repetitions) for budget in BUDGETS]
    machine = f"Python {platform.python_version()}, torch {torch.__version__}, gloo, two stages of one thread each, {CASE.name}, float32"
    lines = [f"# Fixed rows under two pipeline stages\n\n`python -m benchmarks.fixed_rows --output {args.output}`; {machine}\n"]
    lines += ["| tokens of a micro-batch | as they come, s/step | fixed, s/step | fixed over | padding of fixed |"]
    lines += ["|---:|---:|---:|---:|---:|"]
    for r in results:
        times = " | ".join(f"{seconds:.2f}" for seconds in r["medians"].values())
        lines.append(f"| {r['budget']} | {times} | {r['ratio']:.2f} | {r['padding']['fixed']:.1%} |")
    Path(f"{args.output}.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")
    Path(f"{args.output}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
