"""The reference pass against the forward half of a training step: does it do the floating-point operations as fast?

Of a step's operations a third is the forward pass. The pass's operations per second (loading, gathering and saving in its clock), over
those of the forward and backward of training steps on the same pairs (without loading, optimizer and logging): 1 is what the operations
allow, 0.9 the target. (Training's backward computes the logits of all but the last chunk again, which is counted as no work, so at a large
vocabulary the ratio may be above 1.) A block, after which the pass gathers and saves, is four steps' pairs (1,024 by default), so --steps
is a multiple of four. The first block and the first step are not counted; processes take turns; medians.

    python -m benchmarks.reference_pass --output benchmarks/reference_pass
"""

import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.materials import CASES, Case, FloatArray, flops_of_pairs, make_materials, order_of, run_ours, run_reference_pass

TOKENS = 4096
STEPS_A_BLOCK = 4


def seconds_of_blocks(folder: Path, case: Case) -> list[float]:
    """How long each block of the pass took, the first left out, from the lines it prints."""
    for old in folder.glob("pairs.ref.*"):
        old.unlink()
    printed = run_reference_pass(folder, "--block-pairs", STEPS_A_BLOCK * case.batch, "--max-tokens-per-micro-batch", TOKENS)
    times = [line.seconds for line in printed if " pairs | " in line.text]
    return [after - before for before, after in itertools.pairwise(times)]


def measure(folder: Path, case: Case, steps: int, repetitions: int) -> dict[str, Any]:
    """Both sides of one case."""
    make_materials(folder, case, steps)
    flops = flops_of_pairs(folder)

    def sums(counts: FloatArray, pairs: int) -> FloatArray:
        return counts.reshape(-1, pairs).sum(axis=1)[1:]

    passes: list[float] = []
    training: list[float] = []
    for _ in range(repetitions):
        passes += [count / 3 / s for count, s in zip(sums(flops, STEPS_A_BLOCK * case.batch), seconds_of_blocks(folder, case), strict=True)]
        seconds = [row["seconds/forward_backward"] for row in run_ours(folder, case, steps, TOKENS)["rows"][1:]]
        training += [count / s for count, s in zip(sums(flops[order_of(len(flops))], case.batch), seconds, strict=True)]
    rates = {"pass": statistics.median(passes), "training": statistics.median(training)}
    return {"case": case.name, "flops_per_second": rates, "ratio": rates["pass"] / rates["training"], "passes": passes, "steps": training}


def page(results: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown."""
    rows = []
    for r in results:
        rates = [f"{r['flops_per_second'][side] / 1e9:.1f}" for side in ("pass", "training")]
        rows.append([r["case"], *rates, f"{r['ratio']:.2f}", report.verdict(r["ratio"], 0.9)])
    return report.table(("case", "pass, GFLOP/s", "forward and backward, GFLOP/s", "ratio", "target 0.9"), rows)


def draw(results: list[dict[str, Any]]) -> Any:
    """Both rates of every case."""
    figure, plot = report.axes(6, 1.3 + 0.7 * len(results))
    for offset, side, color in ((-0.18, "pass", "tab:blue"), (0.18, "training", "tab:gray")):
        rates = [r["flops_per_second"][side] / 1e9 for r in results]
        plot.barh([i + offset for i in range(len(results))], rates, 0.32, color=color, label=side)
    plot.set_yticks(range(len(results)), [r["case"] for r in results])
    plot.set_xlabel("useful GFLOP/s")
    plot.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = report.parser(__doc__, repetitions=2, folder="benchmark-reference-pass", steps=16)
    parser.add_argument("--cases", nargs="+", default=["small-8k-gsm8k", "small-152k-gsm8k", "base-8k-tail"], choices=CASES)
    args = parser.parse_args(argv)
    results = [measure(args.folder.resolve() / name, CASES[name], args.steps, args.repetitions) for name in args.cases]
    report.write(args.output, "Reference pass", results, page(results), report.machine(), draw(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
