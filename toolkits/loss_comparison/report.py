"""The tables of a comparison: ``comparison.json`` with everything, ``comparison.md`` for reading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.data.atomic_files import atomic_path, write_json
from toolkits.loss_comparison.plan import SFT, Comparison
from toolkits.loss_comparison.protocol import PROTOCOL, Estimate, certain, estimate, is_at_the_end, verdict
from toolkits.loss_comparison.trials import Bench, Numbers, Trial

ACCURACY = "greedy_accuracy"
ERROR_RATE = "character_error_rate"
PAIR_COLUMNS = {
    "preference_accuracy": "preference accuracy", "chosen_logratio": "chosen log-ratio", "rejected_logratio": "rejected log-ratio",
    "margin": "margin",
}  # fmt: skip
SIGNED = ("chosen_logratio", "rejected_logratio", "margin")
NOTHING = "—"


@dataclass(frozen=True)
class Findings:
    """What the trainings and measurements of a comparison gave."""

    comparison: Comparison
    bench: Bench
    tried: Mapping[Trial, Numbers | None]
    """On validation problems and pairs, at every rate; None: diverged."""
    rates: Mapping[str, float]
    """The chosen one, by run."""
    final: Mapping[str, Mapping[Trial, Numbers]]
    """On held-out problems and pairs, by run, one a seed."""
    sft: Mapping[str, Numbers]
    """The untouched model, by split."""

    def estimate(self, name: str, metric: str) -> Estimate:
        """A held-out number of a run, or of the untouched model."""
        if name == SFT:
            return certain(self.sft["heldout"][metric])
        return estimate([numbers[metric] for numbers in self.final[name].values()])

    @property
    def reference(self) -> str:
        """What the others are held against: the file's baseline, else the best greedy accuracy."""
        return self.comparison.baseline or max((SFT, *self.final), key=lambda name: self.estimate(name, ACCURACY).mean)

    def verdict(self, name: str) -> str:
        """What may be said of a run's greedy accuracy against the reference's."""
        if name == self.reference:
            return "baseline" if self.comparison.baseline else "best"
        return verdict(self.estimate(name, ACCURACY), self.estimate(self.reference, ACCURACY))

    @property
    def columns(self) -> dict[str, str]:
        """Metric -> heading, in the order of the tables; greedy accuracy stands before them."""
        return {**PAIR_COLUMNS, **({ERROR_RATE: "character error rate"} if self.comparison.character_error_rate else {})}


def write_report(findings: Findings, source: Path, plots: Sequence[Path]) -> None:
    """Both files, into the comparison's folder."""
    out = findings.bench.out
    write_json(out / "comparison.json", as_json(findings, source))
    with atomic_path(out / "comparison.md") as temporary:
        temporary.write_text(as_markdown(findings, source, plots), encoding="utf-8")


def as_json(findings: Findings, source: Path) -> dict[str, Any]:
    """Every number, every rate tried, every configuration."""
    bench, comparison = findings.bench, findings.comparison
    ended = (trial for trial, numbers in findings.tried.items() if numbers is not None)
    trained = {*ended, *(trial for trials in findings.final.values() for trial in trials)}
    return {
        "title": comparison.title,
        "file": str(source),
        "protocol": list(PROTOCOL),
        "sizes": sizes(findings),
        "reference": findings.reference,
        SFT: dict(findings.sft),
        "runs": {name: _run_as_json(findings, name) for name in findings.final},
        "rates_tried": [
            {"run": trial.run.name, "learning_rate": trial.learning_rate, "seed": trial.seed, "valid": numbers,
             "chosen": trial.learning_rate == findings.rates[trial.run.name]}
            for trial, numbers in findings.tried.items()
        ],
        "trainings": len(trained),
        "training_seconds": sum(bench.training_seconds(trial) for trial in trained),
    }  # fmt: skip


def _run_as_json(findings: Findings, name: str) -> dict[str, Any]:
    trials = list(findings.final[name])
    run = trials[0].run
    heldout = {metric: findings.estimate(name, metric) for metric in (ACCURACY, *PAIR_COLUMNS, ERROR_RATE)}
    return {
        "preset": str(run.preset), "flags": list(run.flags), "steps": run.steps, "pairs": run.pairs, "x": run.x,
        "learning_rate": findings.rates[name], "at_the_end_of_its_rates": is_at_the_end(run, findings.rates[name]),
        "rates_from": run.rates_from, "seeds": [trial.seed for trial in trials],
        "heldout": {metric: {"mean": e.mean, "half_width": e.half_width, "values": list(e.values)} for metric, e in heldout.items()},
        "verdict": findings.verdict(name),
        "folders": [str(findings.bench.folder(trial)) for trial in trials],
    }  # fmt: skip


def sizes(findings: Findings) -> dict[str, int]:
    """How many problems and pairs the numbers rest on."""
    materials = findings.bench.materials
    counts = {f"{split} problems": _lines(path) for split, path in materials.problems.items()}
    counts |= {f"{split} pairs": store.pairs for split, store in materials.stores.items()}
    return counts | {f"training pairs ({name or 'quickstart'})": store.pairs for name, store in materials.training.items()}


def _lines(path: Path) -> int:
    with open(path, "rb") as stream:
        return sum(1 for _ in stream)


def as_markdown(findings: Findings, source: Path, plots: Sequence[Path]) -> str:
    """The report for people."""
    counted = ", ".join(f"{what}: {count}" for what, count in sizes(findings).items())
    parts = [
        f"# {findings.comparison.title}",
        f"Made by `./scripts/compare_losses.sh {source}`. {counted}.",
        *(f"![{plot.stem}]({plot.name})" for plot in plots),
        "## Held-out problems and pairs",
        table(_final_heading(findings), [_final_row(findings, name) for name in (SFT, *findings.final)]),
        "Log-ratios and margin: nats per token, policy minus fine-tuned model; at the untouched model they are 0. Preference accuracy: the "
        "fraction of pairs with a positive margin.",
        "## Every rate tried",
        table(_rates_heading(), _rates_rows(findings)),
        "## Protocol",
        "\n".join(f"{number}. {rule}" for number, rule in enumerate(PROTOCOL, start=1)),
        "## Runs",
        table(("run", "preset", "flags", "steps", "pairs"), _configuration_rows(findings)),
    ]
    return "\n\n".join(parts) + "\n"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def show(value: Estimate, signed: bool = False) -> str:
    """Mean ± half of the 95% interval, where there is one."""
    mean = f"{value.mean:{'+' if signed else ''}.3f}"
    return f"{mean} ± {value.half_width:.3f}" if value.half_width is not None and len(value.values) > 1 else mean


def _final_heading(findings: Findings) -> list[str]:
    return ["", "learning rate", "greedy accuracy", f"against {findings.reference}", *findings.columns.values()]


def _final_row(findings: Findings, name: str) -> list[str]:
    accuracy = [show(findings.estimate(name, ACCURACY)), findings.verdict(name)]
    if name == SFT:
        rest = [show(findings.estimate(SFT, metric)) if metric == ERROR_RATE else NOTHING for metric in findings.columns]
        return [SFT, NOTHING, *accuracy, *rest]
    rest = [show(findings.estimate(name, metric), metric in SIGNED) for metric in findings.columns]
    return [name, f"{findings.rates[name]:g}", *accuracy, *rest]


def _rates_heading() -> list[str]:
    return ["", "learning rate", "greedy accuracy (validation)", *(f"{heading} (validation)" for heading in PAIR_COLUMNS.values()), ""]


def _rates_rows(findings: Findings) -> list[list[str]]:
    rows = [[SFT, NOTHING, f"{findings.sft['valid'][ACCURACY]:.3f}", *(NOTHING for _ in PAIR_COLUMNS), ""]]
    for run in findings.comparison.runs:
        if run.rates_from is not None:
            empty = [NOTHING] * (1 + len(PAIR_COLUMNS))
            rows.append([run.name, f"{findings.rates[run.name]:g}", *empty, f"taken from {run.rates_from}"])
        for trial, numbers in findings.tried.items():
            if trial.run == run:
                rows.append([run.name, f"{trial.learning_rate:g}", *_rate_cells(numbers), _mark(findings, trial)])
    return rows


def _rate_cells(numbers: Numbers | None) -> list[str]:
    metrics = (ACCURACY, *PAIR_COLUMNS)
    if numbers is None:
        return [NOTHING] * len(metrics)
    return [f"{numbers[metric]:{'+' if metric in SIGNED else ''}.3f}" for metric in metrics]


def _mark(findings: Findings, trial: Trial) -> str:
    if findings.tried[trial] is None:
        return "diverged"
    if trial.learning_rate != findings.rates[trial.run.name]:
        return ""
    return "chosen, at the end of its rates" if is_at_the_end(trial.run, trial.learning_rate) else "chosen"


def _configuration_rows(findings: Findings) -> list[list[str]]:
    return [
        [run.name, run.preset.stem, f"`{' '.join(run.flags)}`" if run.flags else "", str(run.steps), run.pairs or "quickstart"]
        for run in findings.comparison.runs
    ]
