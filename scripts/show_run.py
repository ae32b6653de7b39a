"""What one or several runs were and how they went: settings, data, checkpoints, last numbers; curves as a picture.

    python scripts/show_run.py outputs/math
    python scripts/show_run.py outputs/math outputs/dpo --png curves.png --metrics loss rewards/margins eval_loss
    python scripts/show_run.py outputs/math outputs/dpo --html runs.html        # facts and curves as one page
"""

import argparse
import base64
import io
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_patch import display, metrics_file
from megatron_patch.checkpoint import saved
from megatron_patch.data.atomic_files import read_json
from megatron_patch.run_record import starts

_STYLE = "img { width: 100%; background: #fff; border-radius: 8px; } details { margin-top: .6rem; }\n"
METRICS = ("loss", "rewards/accuracies", "rewards/margins", "lpo/chosen_logratio", "grad_norm", "eval_loss")


def facts(save: Path) -> Iterator[tuple[str, str]]:
    """(name, value) lines about a run."""
    begun = starts(save)
    last, rows = begun[-1], metrics_file.rows(save)
    yield "started", begun[0]["started"] + (f", {len(begun)} times, last {last['started']}" if len(begun) > 1 else "")
    state = read_json(save / "run_state.json", "how a run ended") if (save / "run_state.json").exists() else None
    yield "state", f"{state['state']} at step {state['iteration']}" if state else "running, or killed"
    layout = " ".join(f"{name.upper()} {size}" for name, size in last["layout"].items())
    yield "trained", f"{last['mode']} on {last['device']}, {last['processes']} processes: {layout}"
    yield "command", shlex.join(last["command"])
    yield "weights", f"{last['weights']['path']} ({last['weights']['fingerprint'][:12]})"
    for store in last["stores"]:
        reference = f", reference by {store['reference']['weights'][:12]} in {store['reference']['dtype']}" if store["reference"] else ""
        yield f"{store['use']} data", f"{store['prefix']}: {store['samples']} ({store['fingerprint'][:12]}){reference}"
    yield "revision", last["revision"] or "unknown"
    yield "versions", ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    yield "checkpoints", ", ".join(map(str, reversed(saved.steps(save)))) or "none"
    if (save / "best.json").exists():
        best = read_json(save / "best.json", "the best evaluation of a run")
        yield "best", f"step {best['step']}, {best['metric']} {best['value']:.6g}"
    for name in METRICS:
        values = [(row["iteration"], row[name]) for row in rows if row.get(name) is not None]
        if values:
            yield name, f"{values[0][1]:.6g} at step {values[0][0]}, {values[-1][1]:.6g} at step {values[-1][0]}"


def settings(save: Path) -> Iterator[tuple[str, str]]:
    """Every flag of the last start, given or not."""
    return ((f"--{name.replace('_', '-')}", json.dumps(value)) for name, value in starts(save)[-1]["settings"].items())


def draw(runs: Sequence[Path], metrics: Sequence[str], to: Path | BinaryIO, kind: str = "png") -> None:
    """One panel a metric, one curve a run; ``kind``: png or svg. ValueError for a metric that no run has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {run: metrics_file.rows(run) for run in runs}
    known = sorted({name for of in rows.values() for row in of for name in row} - {"iteration"})
    unknown = [name for name in metrics if name not in known]
    if not metrics:
        raise ValueError(f"nothing to draw yet: no step in {', '.join(str(run / 'metrics.jsonl') for run in runs)}")
    if unknown:
        raise ValueError(f"no run has a metric {unknown[0]!r}; there are {', '.join(known)}")
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, panels = pyplot.subplots(lines, columns, figsize=(4.5 * columns, 3 * lines), squeeze=False, layout="constrained")
    for panel, name in zip(panels.flat, metrics, strict=False):
        for run in runs:
            points = [(row["iteration"], row[name]) for row in rows[run] if row.get(name) is not None]
            panel.plot(*zip(*points, strict=True) if points else ((), ()), label=run.name, lw=1.2, marker="." if len(points) < 30 else None)
        panel.set(title=name, xlabel="step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    for panel in list(panels.flat)[len(metrics) :]:
        panel.remove()
    if len(runs) > 1:
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    figure.savefig(to, dpi=120, format=kind)
    pyplot.close(figure)


def report(runs: Sequence[Path], metrics: Sequence[str]) -> str:
    """One page: what each run was, and the curves of all of them."""
    picture = io.BytesIO()
    draw(runs, metrics, picture, "svg")
    curves = base64.b64encode(picture.getvalue()).decode()
    title = display.safe(", ".join(run.name for run in runs))
    body = f'<h1>{title}</h1>\n<img alt="curves" src="data:image/svg+xml;base64,{curves}">\n'
    for run in runs:
        body += f"<h2>{display.safe(str(run))}</h2>\n{display.facts(facts(run))}\n"
        body += f"<details><summary>all settings</summary>{display.facts(settings(run))}</details>\n"
    return display.document(", ".join(run.name for run in runs), body, style=_STYLE, pictures=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print and draw; 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="folders that were given as --save (or OUTPUT)")
    parser.add_argument("--settings", action="store_true", help="show every flag of the last start, given or not")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw curves")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs no other file")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=f"which (default: those of {', '.join(METRICS)} that are there)")
    args = parser.parse_args(argv)
    try:
        for run in args.runs:
            print(f"{run}")
            for name, value in (*facts(run), *(settings(run) if args.settings else ())):
                print(display.visible(f"  {name:20} {value}"))
        there = {name for run in args.runs for row in metrics_file.rows(run) for name in row}
        metrics = args.metrics or [name for name in METRICS if name in there]
        if args.png:
            draw(args.runs, metrics, args.png)
            print(f"curves: {args.png}")
        if args.html:
            args.html.write_text(report(args.runs, metrics), encoding="utf-8")
            print(f"report: {args.html}")
    except (ValueError, OSError) as error:
        print(f"[error] {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
