"""Pictures of a comparison: evaluations on the held-out pairs over steps, and accuracies as bars or over a number of the run."""

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from toolkits.loss_comparison.plan import SFT
from toolkits.loss_comparison.report import ACCURACY, ERROR_RATE, Findings

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (
    ("eval_lpo/chosen_logratio", "chosen log-ratio (nats per token)", True),
    ("eval_lpo/rejected_logratio", "rejected log-ratio (nats per token)", True),
    ("eval_lpo/margin", "margin (nats per token)", True),
    ("eval_rewards/accuracies", "preference accuracy (log-ratio sums)", False),
)  # metric, label, whether it is 0 before the first step
ACCURACY_PANELS = {ACCURACY: "greedy accuracy on held-out problems", ERROR_RATE: "character error rate"}
TEN = [matplotlib.colormaps["tab10"](place) for place in range(10)]
Curve = tuple[np.ndarray, np.ndarray]
"""Steps [S] and values [seeds, S]."""


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations in a training's metrics.jsonl, one a step: a training that went on after an interruption may repeat its last."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return list({row["iteration"]: row for row in rows if "eval_loss" in row}.values())


def curve(seeds: Sequence[Sequence[Mapping[str, Any]]], metric: str, from_zero: bool) -> Curve:
    """One metric of the evaluations of a run's trainings, one a seed; ``from_zero`` puts a 0 at step 0."""
    steps = np.array([row["iteration"] for row in seeds[0]])
    values = np.array([[row[metric] for row in rows] for rows in seeds])
    if from_zero:
        return np.concatenate([[0], steps]), np.pad(values, ((0, 0), (1, 0)))
    return steps, values


def colours(findings: Findings) -> dict[str, Any]:
    """By run: a scale where runs have an x, so that their order shows; else distinct colours."""
    runs, distinct = findings.comparison.runs, cycle(TEN)
    ordered = sorted({run.x for run in runs if run.x is not None})
    scale = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(len(ordered), 1)))
    series = {run.series for run in runs if run.x is not None}
    by_x = len(series) == 1
    return {run.name: scale[ordered.index(run.x)] if by_x and run.x is not None else next(distinct) for run in runs}


def draw_curves(findings: Findings, path: Path) -> None:
    """Mean over seeds, with a band from the lowest to the highest seed."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, layout="constrained")
    colour = colours(findings)
    seeds = {name: [evaluations(findings.bench.folder(trial)) for trial in trials] for name, trials in findings.final.items()}
    for axis, (metric, unit, from_zero) in zip(axes.flat, PANELS, strict=True):
        for name, rows in seeds.items():
            steps, values = curve(rows, metric, from_zero)
            label = f"{name}, rate {findings.rates[name]:g}"
            axis.plot(steps, values.mean(axis=0), color=colour[name], label=label, linewidth=1.4, marker=".", markersize=4)
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour[name], alpha=0.15, linewidth=0)
        if from_zero:
            axis.axhline(0, color="grey", linewidth=0.6)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
    for axis in axes[1]:
        axis.set_xlabel("optimiser step")
    _legend(figure, axes[0, 0])
    count = len(findings.comparison.seeds)
    figure.suptitle(f"{findings.comparison.title}: held-out pairs, {f'mean and range of {count} seeds' if count > 1 else 'one seed'}")
    _save(figure, path)


def draw_accuracies(findings: Findings, path: Path) -> None:
    """Greedy accuracy, and the character error rate where the file asks for it, with 95% intervals."""
    metrics = [ACCURACY, *([ERROR_RATE] if findings.comparison.character_error_rate else [])]
    figure, axes = plt.subplots(1, len(metrics), figsize=(7 * len(metrics), 4.8), squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics, strict=True):
        (_bars if findings.comparison.x is None else _over_x)(axis, findings, metric)
        axis.set_ylabel(ACCURACY_PANELS[metric])
        axis.grid(alpha=0.25, axis="y")
        axis.set_axisbelow(True)
    _legend(figure, axes[0, 0])
    figure.suptitle(findings.comparison.title)
    _save(figure, path)


def _level(axis: Any, findings: Findings, name: str, metric: str, colour: Any) -> None:
    """A run without an x, or the untouched model, as a horizontal line with its interval."""
    value = findings.estimate(name, metric)
    axis.axhline(value.mean, color=colour, linestyle="--", linewidth=1.2, label=name)
    if value.half_width:
        axis.axhspan(value.mean - value.half_width, value.mean + value.half_width, color=colour, alpha=0.12, linewidth=0)


def _bars(axis: Any, findings: Findings, metric: str) -> None:
    names, colour = list(findings.final), colours(findings)
    values = [findings.estimate(name, metric) for name in names]
    axis.bar(names, [value.mean for value in values], yerr=[value.half_width or 0.0 for value in values],
             color=[colour[name] for name in names], capsize=4, alpha=0.85)  # fmt: skip
    _level(axis, findings, SFT, metric, "black")
    axis.tick_params(axis="x", labelrotation=30 if len(names) > 4 else 0)
    for label in axis.get_xticklabels():
        label.set_horizontalalignment("right" if len(names) > 4 else "center")


def _over_x(axis: Any, findings: Findings, metric: str) -> None:
    runs = findings.comparison.runs
    distinct = cycle(TEN)
    for series in dict.fromkeys(run.series for run in runs if run.x is not None):
        points = sorted((run.x, run.name) for run in runs if run.x is not None and run.series == series)
        values = [findings.estimate(name, metric) for _, name in points]
        axis.errorbar([x for x, _ in points], [value.mean for value in values], yerr=[value.half_width or 0.0 for value in values],
                      color=next(distinct), marker="o", capsize=4, label=series or f"over {findings.comparison.x}")  # fmt: skip
    for run in runs:
        if run.x is None:
            _level(axis, findings, run.name, metric, next(distinct))
    _level(axis, findings, SFT, metric, "black")
    axis.set_xlabel(findings.comparison.x)


def _legend(figure: Any, axis: Any) -> None:
    """One for all panels, below them."""
    handles, labels = axis.get_legend_handles_labels()
    inches = 0.6 + 0.085 * max(map(len, labels))  # of one column: the line, and letters of the default size
    columns = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
