"""One comparison, from its TOML file to its report; scripts/compare_losses.sh starts it.

    python -m toolkits.loss_comparison examples/qwen2_5/comparisons/r2.toml --out outputs/comparisons/r2 --jobs 2

Exit code: 0 finished, 2 a user's error in one line, 1 a training failed (the others are kept, the same command goes on).
"""

import argparse
import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from toolkits.loss_comparison.jobs import Job, JobsFailed, end_together, run_jobs, say
from toolkits.loss_comparison.materials import SPLITS, StageError, make_materials
from toolkits.loss_comparison.plan import Comparison, read_comparison
from toolkits.loss_comparison.plots import draw_accuracies, draw_curves
from toolkits.loss_comparison.protocol import choose_rates, final_trials, selection_trials
from toolkits.loss_comparison.report import Findings, write_report
from toolkits.loss_comparison.trials import Bench, Numbers, Subject


def carry_out(comparison: Comparison, bench: Bench, workers: int) -> Findings:
    """Follow the protocol: every rate with the first seed, then every seed at the chosen rate."""

    def numbers(subject: Subject, split: str) -> Numbers:
        found = bench.measured(subject, split)
        if found is None:
            raise JobsFailed(f"{subject} diverged; a report needs every seed: take its rate out of the file")
        return found

    untouched = [Job(None, split) for split in SPLITS]
    candidates = selection_trials(comparison)
    run_jobs(bench, "learning rates", [*untouched, *(Job(trial, "valid") for trial in candidates)], workers)
    tried = {trial: None if bench.is_diverged(trial) else numbers(trial, "valid") for trial in candidates}
    rates = choose_rates(comparison, tried)
    say("chosen: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()))
    final = final_trials(comparison, rates)
    run_jobs(bench, "seeds", [Job(trial, "heldout") for trials in final.values() for trial in trials], workers)
    heldout = {name: {trial: numbers(trial, "heldout") for trial in trials} for name, trials in final.items()}
    return Findings(comparison, bench, tried, rates, heldout, {split: numbers(None, split) for split in SPLITS})


def show(findings: Findings, file: Path) -> None:
    """Plots, tables, and a line that says where they are."""
    out = findings.bench.out
    plots = [out / "curves.png", out / "accuracy.png"]
    draw_curves(findings, plots[0])
    draw_accuracies(findings, plots[1])
    write_report(findings, file, plots)
    say(f"{out}/comparison.md, comparison.json, {', '.join(plot.name for plot in plots)}")


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """The folder of the runs, made, for this process alone; ValueError where another holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another comparison is at work in this folder") from None
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.toml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs and the report")
    parser.add_argument("--jobs", type=int, required=True, metavar="N", help="trainings at a time")
    args = parser.parse_args(argv)
    end_together()
    try:
        if args.jobs < 1:
            raise ValueError(f"JOBS must be at least 1, got {args.jobs}")
        comparison = read_comparison(args.file)
        with only_one(args.out):
            bench = Bench(args.out, make_materials(comparison, args.out), comparison.eval_interval)
            show(carry_out(comparison, bench, args.jobs), args.file)
    except ValueError as error:
        sys.stderr.write(f"[error] {error}\n")
        return 2
    except StageError as error:
        return error.code
    except JobsFailed as error:
        sys.stderr.write(f"[failed] {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
