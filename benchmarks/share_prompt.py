"""`--share-prompt` against separate sequences: speed-up of a training step by how long prompts are beside their responses.

Pairs of 600 response tokens (chosen and rejected together) behind prompts of a quarter to eight times one response. Ideal is the ratio of
the operations that both need (prompt computed twice against once). Two processes by turns; the first step of each is not counted; medians.

    python -m benchmarks.share_prompt --output benchmarks/share_prompt
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.materials import SEED, Case, Pair, flops_of_pairs, make_materials, run_ours

RATIOS = (0.25, 0.5, 1, 2, 4, 8)
RESPONSE = 300
CASE = Case("small", "8k", "alike", 4)


def alike(ratio: float, count: int) -> list[Pair]:
    """Random tokens, all pairs of the same lengths."""
    rng = np.random.default_rng(SEED)
    lengths = (int(ratio * RESPONSE), RESPONSE, RESPONSE)
    return [tuple(rng.integers(0, 8_000, n).tolist() for n in lengths) for _ in range(count)]  # type: ignore[misc]


def measure(folder: Path, ratio: float, steps: int, repetitions: int) -> dict[str, Any]:
    """Median seconds of a step, separate and shared, and the ratio of operations."""
    make_materials(folder, CASE, steps, alike(ratio, steps * CASE.batch))
    seconds: dict[str, list[float]] = {"separate": [], "shared": []}
    losses: dict[str, list[float]] = {}
    for _ in range(repetitions):
        for name in seconds:
            flags = ["--share-prompt"] if name == "shared" else []
            run = run_ours(folder, CASE, steps, 2 * int((ratio + 1) * RESPONSE), *flags)
            seconds[name] += run["seconds"][1:]
            losses[name] = run["losses"]
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) < 1e-4, f"the losses differ: {losses}"
    ideal = float(flops_of_pairs(folder).sum() / flops_of_pairs(folder, share_prompts=True).sum())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"ratio": ratio, "ideal": ideal, "speed_up": medians["separate"] / medians["shared"], "medians": medians, "seconds": seconds}


def page(results: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown."""
    rows = []
    for r in results:
        times = [f"{r['medians'][side]:.2f}" for side in ("separate", "shared")]
        rows.append([str(r["ratio"]), *times, f"{r['speed_up']:.2f}", f"{r['ideal']:.2f}", f"{r['speed_up'] / r['ideal']:.2f}"])
    head = ("prompt / response", "separate, s/step", "shared, s/step", "speed-up", "ideal", "of ideal")
    what = f"Target 0.9 of ideal; a step is {CASE.batch} pairs; 4 layers, hidden 512, vocabulary 8k, float32."
    return [*report.table(head, rows), "", what]


def draw(results: list[dict[str, Any]]) -> Any:
    """Speed-up over the ratio."""
    figure, plot = report.axes(6, 4)
    ratios = [r["ratio"] for r in results]
    plot.plot(ratios, [r["ideal"] for r in results], "k--", label="ideal: operations saved")
    plot.plot(ratios, [r["speed_up"] for r in results], "o-", label="measured")
    plot.axhline(1, color="gray", lw=0.8)
    plot.set(xscale="log", xlabel="prompt tokens / response tokens", ylabel="speed-up of a training step")
    plot.set_xticks(ratios, [str(r) for r in ratios])
    plot.minorticks_off()
    plot.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = report.parser(__doc__, repetitions=2, folder="benchmark-share-prompt", steps=3)
    args = parser.parse_args(argv)
    results = [measure(args.folder.resolve() / str(ratio), ratio, args.steps, args.repetitions) for ratio in RATIOS]
    report.write(args.output, "Shared prompts", results, page(results), report.machine(), draw(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
