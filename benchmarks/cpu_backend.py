"""What the CPU backend itself costs: the training step written by hand (`train_step.run_loop`), with `cpu_backend.install()` and without.

The backend looks at every call of torch for a CUDA device to redirect. The same step in two kinds of process, by turns; the first step of
each is not counted; medians. And the same for steps of very short responses, where calls weigh most.

    python -m benchmarks.cpu_backend --output benchmarks/cpu_backend
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.materials import SEED, Case, Pair, make_materials
from benchmarks.train_step import run_loop

CASE = Case("small", "8k", "random", 4)
LENGTHS = (8, 32, 128, 512)
"""Tokens of a prompt, and of each response."""


def random_pairs(length: int, count: int) -> list[Pair]:
    """All of the same lengths."""
    rng = np.random.default_rng(SEED)
    return [tuple(rng.integers(0, 8_000, length).tolist() for _ in range(3)) for _ in range(count)]  # type: ignore[misc]


def seconds(folder: Path, steps: int, side: str) -> list[float]:
    """Of every counted step, in a process of its own."""
    words = ("--side", side, "--folder", folder, "--steps", steps, "--output", "-")
    return json.loads(report.python("-m", "benchmarks.cpu_backend", *words)[-1].text)["seconds"][1:]


def measure(folder: Path, length: int, steps: int, repetitions: int) -> dict[str, Any]:
    """Both sides at one length."""
    make_materials(folder, CASE, steps, random_pairs(length, steps * CASE.batch))
    found: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(repetitions):
        for side in found:
            found[side] += seconds(folder, steps, side)
    medians = {side: statistics.median(values) for side, values in found.items()}
    return {"length": length, "medians": medians, "ratio": medians["with"] / medians["without"], "seconds": found}


def page(results: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown."""
    rows = [[str(r["length"]), *(f"{1000 * s:.1f}" for s in r["medians"].values()), f"{r['ratio']:.3f}"] for r in results]
    return report.table(("tokens of prompt and response", "without, ms/step", "with, ms/step", "ratio"), rows)


def draw(results: list[dict[str, Any]]) -> Any:
    """The ratio over the length."""
    figure, plot = report.axes(6, 3.5)
    plot.plot([r["length"] for r in results], [r["ratio"] for r in results], "o-")
    plot.axhline(1, color="gray", lw=0.8)
    plot.set(xscale="log", xlabel="tokens of each prompt and of each response", ylabel="step with the CPU backend over without")
    plot.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    plot.minorticks_off()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report, or, inside that, one side."""
    parser = report.parser(__doc__, repetitions=3, folder="benchmark-cpu-backend", steps=6)
    parser.add_argument("--side", choices=("with", "without"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        if args.side == "with":
            from megatron_patch import cpu_backend

            cpu_backend.install()
        print(json.dumps(run_loop(args.folder, CASE, args.steps, 1)))
        return 0
    results = [measure(args.folder.resolve() / str(n), n, args.steps, args.repetitions) for n in LENGTHS]
    report.write(args.output, "The CPU backend's own cost", results, page(results), report.machine("transformers"), draw(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
