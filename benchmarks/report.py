"""What the benchmarks share: a process for each side, the machine they ran on, and one JSON, Markdown and PNG file each."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
THREADS = len(os.sched_getaffinity(0))


def parser(description: str | None, *, repetitions: int, folder: str = "", steps: int = 0) -> argparse.ArgumentParser:
    """One that shows the script's own text and has ``--output`` and ``--repetitions``, and where something is trained the other two."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.json, PREFIX.md and PREFIX.png")
    made.add_argument("--repetitions", type=int, default=repetitions, help="of each side (default %(default)s)")
    if folder:
        made.add_argument("--folder", type=Path, default=Path("outputs") / folder, help="for models, stores and runs (default %(default)s)")
        made.add_argument("--steps", type=int, default=steps, help="of each process; the first is not counted (default %(default)s)")
    return made


class Line(NamedTuple):
    """Of what a process printed."""

    seconds: float
    """When, by a clock that the lines share."""
    text: str


def python(*words: object, threads: int = THREADS) -> list[Line]:
    """What ``python WORDS`` prints, run from the checkout with `threads` threads; raises CalledProcessError."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore", PYTHONUNBUFFERED="1")
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = [Line(time.perf_counter(), text) for text in process.stdout or ()]
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return lines


def torchrun(*words: object, processes: int = 1) -> list[Line]:
    """What ``torchrun WORDS`` prints; the processes share the threads."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return python(*launcher, *words, threads=max(1, THREADS // processes))


def machine(*packages: str) -> str:
    """Where and with what this was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", *packages))
    return f"{THREADS} cores ({processor()}), Python {platform.python_version()}, {versions}, commit {commit or 'unknown'}"


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is a name."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def verdict(value: float, target: float, *, least: bool = True) -> str:
    """Whether a target (a least value, or a largest) is met, and by how much it is missed."""
    missed = target - value if least else value - target
    return "met" if missed <= 0 else f"missed by {missed:.2f}"


def results(prefix: Path) -> Any:
    """What `write` has written there, or an empty list."""
    path = Path(f"{prefix}.json")
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []


def write(prefix: Path, title: str, results: Any, lines: Sequence[str], where: str, figure: Any = None) -> None:
    """The three files of a benchmark (the picture where there is a figure)."""
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}"
    page = [f"# {title}", "", f"`{command}`", "", where, "", *lines]
    if figure is not None:
        figure.savefig(f"{prefix}.png", dpi=150)
        page += ["", f"![{title}]({prefix.name}.png)"]
    Path(f"{prefix}.json").write_text(json.dumps({"command": command, "machine": where, "results": results}, indent=1) + "\n", "utf-8")
    Path(f"{prefix}.md").write_text("\n".join(page) + "\n", encoding="utf-8")


def axes(width: float, height: float) -> tuple[Any, Any]:
    """An empty picture without a screen: (figure, axes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    plot = figure.subplots()
    plot.spines[["top", "right"]].set_visible(False)
    return figure, plot
