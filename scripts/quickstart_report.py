"""What the quickstart found: report.json and curves.png, from the exported checkpoints and the runs' metrics.

    python scripts/quickstart_report.py outputs/quickstart

Every number about a model is computed here with transformers from its Hugging Face folder, so anybody can compute it again.
Log-ratios are policy minus fine-tuned model, in nats per token of the response, end token included.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from transformers.utils import logging as transformers_logging

from megatron_patch.data.atomic_files import read_json, write_json
from megatron_patch.data.pair_store import PairStore, reference_record
from megatron_patch.evaluation.parity import transformers_logps
from toolkits.loss_comparison.measure import fraction_solved, greedy_answers, load, log_ratios, pair_numbers, read_problems

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = {"lpo": "LPO (lpo-ste)", "dpo": "DPO (sigmoid)"}
COLOURS = {"lpo": "tab:blue", "dpo": "tab:orange"}


def training_rows(run: Path) -> list[dict[str, Any]]:
    """The training steps of a run's metrics.jsonl."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if "grad_norm" in row]


def draw_curves(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Chosen and rejected log-ratio, margin and loss over steps, all runs side by side."""
    panels = (
        ("lpo/chosen_logratio", "chosen log-ratio (nats per token)"),
        ("lpo/rejected_logratio", "rejected log-ratio (nats per token)"),
        ("lpo/margin", "margin (nats per token)"),
        ("loss", "loss / loss at step 1"),
    )
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for axis, (name, label) in zip(axes.flat, panels, strict=True):
        for run, steps in rows.items():
            values = np.array([row[name] for row in steps])
            values = values / values[0] if name == "loss" else values
            axis.plot([row["iteration"] for row in steps], values, color=COLOURS[run], label=RUNS[run], linewidth=1.2)
        if name != "loss":
            axis.axhline(0, color="grey", linewidth=0.6)
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
    for axis in axes[1]:
        axis.set_xlabel("optimiser step")
    axes[0, 0].legend(frameon=False)
    figure.suptitle("From the same weights on the same pairs")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def dropped(folder: Path) -> dict[str, int]:
    """What the stages that wrote into ``folder`` dropped or left out, by reason."""
    counts: Counter[str] = Counter()
    for path in folder.glob("*.tally.json"):
        tally = read_json(path, "a stage's tally")
        counts.update(tally["dropped"])
        counts.update(tally["left_out"])
    return dict(counts)


def make_report(out: Path) -> dict[str, Any]:
    """Measure the three models and collect what the runs recorded."""
    models = {name: str(out / name / "hf") for name in ("sft", *RUNS)}
    problems = read_problems(out / "problems/heldout.jsonl")
    store, trained = PairStore(out / "heldout/train"), PairStore(out / "pairs/train")
    pairs = [store[i] for i in range(len(store))]
    reference = transformers_logps(models["sft"], pairs)
    heldout = {run: pair_numbers(log_ratios(store, transformers_logps(models[run], pairs), reference)) for run in RUNS}
    step_zero = json.loads((out / "lpo/step_zero.json").read_text(encoding="utf-8"))
    seconds = dict(line.split("\t") for line in (out / "seconds.tsv").read_text(encoding="utf-8").splitlines())
    return {
        **{f"{name}_accuracy": fraction_solved(greedy_answers(*load(folder), problems), problems) for name, folder in models.items()},
        "heldout": heldout,
        "heldout_problems": len(problems),
        "heldout_pair_count": len(store),
        "step0": {
            key: step_zero[key] for key in ("loss", "max_abs_chosen_logratio_per_token", "max_abs_rejected_logratio_per_token")
        },
        "pairs": len(trained),
        "dropped": dropped(out / "pairs"),
        "parallel": reference_record(trained)["extra"]["layout"],  # LPO and DPO are started with the same TP, PP and processes
        "learning_rates": {run: max(row["learning_rate"] for row in training_rows(out / run)) for run in RUNS},
        "seconds": {name: float(value) for name, value in seconds.items()},
        "models": models,
        "heldout_pairs": str(out / "heldout/train.jsonl"),
    }


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{'':10}{'greedy':>9}{'preference':>12}{'chosen':>10}{'rejected':>10}{'margin':>18}"]
    lines.append(f"{'':10}{'accuracy':>9}{'accuracy':>12}{'(log-ratios in nats per token)':>38}")
    lines.append(f"{'SFT':10}{report['sft_accuracy']:9.3f}")
    for run, name in RUNS.items():
        h = report["heldout"][run]
        margin = f"{h['margin']:+.4f} ± {h['margin_stderr']:.4f}"
        accuracy = report[f"{run}_accuracy"]
        ratios = f"{h['chosen_logratio']:+10.4f}{h['rejected_logratio']:+10.4f}"
        lines.append(f"{name[:3]:10}{accuracy:9.3f}{h['preference_accuracy']:12.3f}{ratios}{margin:>18}")
    counts = {"training pairs": "pairs", "held-out problems": "heldout_problems", "held-out pairs": "heldout_pair_count"}
    lines.append(", ".join(f"{report[key]} {what}" for what, key in counts.items()))
    return "\n".join(lines)


def main(out: Path) -> None:
    """Write ``report.json`` and ``curves.png`` into ``out`` and print the table."""
    transformers_logging.disable_progress_bar()
    draw_curves({run: training_rows(out / run) for run in RUNS}, out / "curves.png")
    report = make_report(out)
    write_json(out / "report.json", report)
    print(table(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
