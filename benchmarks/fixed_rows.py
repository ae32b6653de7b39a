"""Rows as long as their pairs against rows padded to a budget (`--pad-micro-batches`).

First under two pipeline stages: stages that get rows of different lengths tell each other the shapes first; padding saves that and costs
the padding. Then, for scale, what padding every response to `--seq-length` 4,096 costs, as the LPO paper's own scripts do: a row of two
pairs and 16,384 tokens, next to the same two pairs without padding and the ratio of tokens (our padding passes through the linear
layers only, theirs through attention too). The same pairs, by turns; the first step of each process is not counted; medians.

    python -m benchmarks.fixed_rows --output benchmarks/fixed_rows
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.materials import Case, make_materials, run_ours


class Setting(NamedTuple):
    """Two runs to compare."""

    name: str
    case: Case
    budget: int
    """Tokens of a row."""
    flags: tuple[object, ...] = ()
    processes: int = 1


PIPELINE = ("--pipeline-model-parallel-size", 2)
SETTINGS = (
    Setting("PP2, rows of 1,024", Case("small", "8k", "gsm8k", 32), 1024, PIPELINE, 2),
    Setting("PP2, rows of 2,048", Case("small", "8k", "gsm8k", 32), 2048, PIPELINE, 2),
    Setting("responses padded to 4,096", Case("small", "8k", "gsm8k", 2), 4 * 4096),
)


def measure(folder: Path, setting: Setting, steps: int, repetitions: int) -> dict[str, Any]:
    """Both sides of one setting."""
    make_materials(folder, setting.case, steps)
    seconds: dict[str, list[float]] = {"as they come": [], "padded": []}
    padding: dict[str, float] = {}
    slots: dict[str, float] = {}
    for _ in range(repetitions):
        for name in seconds:
            flags = [*setting.flags, *(["--pad-micro-batches"] if name == "padded" else [])]
            run = run_ours(folder, setting.case, steps, setting.budget, *flags, processes=setting.processes)
            seconds[name] += run["seconds"][1:]
            padding[name] = statistics.mean(row["padding_fraction"] for row in run["rows"])
            slots[name] = statistics.mean(row["micro_batches"] for row in run["rows"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["padded"] / medians["as they come"]
    tokens = (1 - padding["as they come"]) / (1 - padding["padded"])
    measured = {"medians": medians, "ratio": ratio, "tokens": tokens, "padding": padding, "micro_batches": slots, "seconds": seconds}
    return {"setting": setting.name, **measured}


def page(results: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown."""
    rows = []
    for r in results:
        times = [f"{s:.2f}" for s in r["medians"].values()]
        numbers = [f"{r['ratio']:.2f}", f"{r['tokens']:.2f}", f"{r['padding']['padded']:.1%}", f"{r['micro_batches']['padded']:.1f}"]
        rows.append([r["setting"], *times, *numbers])
    return report.table(("setting", "as they come, s/step", "padded, s/step", "ratio", "of tokens", "padding", "micro-batches"), rows)


def draw(results: list[dict[str, Any]]) -> Any:
    """What padding costs, beside the ratio of tokens."""
    figure, plot = report.axes(6, 1.3 + 0.5 * len(results))
    plot.barh([r["setting"] for r in results], [r["ratio"] for r in results], 0.5, color="tab:blue", label="time")
    plot.plot([r["tokens"] for r in results], range(len(results)), "k|", ms=20, mew=2, label="tokens")
    plot.axvline(1, color="gray", lw=0.8)
    plot.set(xscale="log", xlabel="padded over as they come")
    plot.set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    plot.minorticks_off()
    plot.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = report.parser(__doc__, repetitions=2, folder="benchmark-fixed-rows", steps=4)
    args = parser.parse_args(argv)
    results = [measure(args.folder.resolve() / s.name.replace(" ", "-"), s, args.steps, args.repetitions) for s in SETTINGS]
    report.write(args.output, "Rows padded to a budget", results, page(results), report.machine(), draw(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
