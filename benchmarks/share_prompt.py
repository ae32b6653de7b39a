"""`--share-prompt` against separate sequences: speed-up of a training step by how long prompts are beside their responses.

Pairs of 600 response tokens (chosen and rejected together) behind prompts of a quarter to eight times one response. Ideal is the ratio of
the operations that both need (prompt computed twice against once). Two processes by turns; the first step of each is not counted; medians.

    python -m benchmarks.share_prompt --output benchmarks/share_prompt
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_step import SEED, Case, make_model, reference_pass, run_ours

RATIOS = (0.25, 0.5, 1, 2, 4, 8)
RESPONSE, PAIRS = 300, 4


def make_pairs(prefix: Path, ratio: float, count: int) -> None:
    """Random tokens, all pairs alike."""
    from megatron_patch.data.pair_store import PairStoreWriter

    rng = np.random.default_rng(SEED)
    with PairStoreWriter(prefix, "pairs") as writer:
        for i in range(count):
            lengths = (int(ratio * RESPONSE), RESPONSE, RESPONSE)
            writer.add([rng.integers(0, 8_000, n) for n in lengths], id=f"p{i}", group=str(i))
        writer.commit(tokenizer={"fingerprint": "none"}, template={"fingerprint": "none"}, sources=[])


def measure(folder: Path, ratio: float, steps: int, repetitions: int) -> dict[str, Any]:
    """Median seconds of a step, separate and shared, and the ratio of operations."""
    from megatron_patch.data.pair_dataset import SampleSet
    from megatron_patch.model.qwen2 import read_qwen2_config
    from megatron_patch.throughput import useful_flops

    case = Case("small", "8k", "gsm8k", PAIRS)
    folder.mkdir(parents=True)
    make_model(folder / "model", case)
    make_pairs(folder / "pairs", ratio, steps * PAIRS)
    reference_pass(folder)
    seconds: dict[str, list[float]] = {"separate": [], "shared": []}
    losses: dict[str, list[float]] = {}
    for _ in range(repetitions):
        for name in seconds:
            flags = ["--share-prompt"] if name == "shared" else []
            run = run_ours(folder, case, steps, 2 * int((ratio + 1) * RESPONSE), *flags)
            seconds[name] += run["seconds"][1:]
            losses[name] = run["losses"]
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) < 1e-4, f"the losses differ: {losses}"
    model, samples = read_qwen2_config(str(folder / "model")), SampleSet([str(folder / "pairs")], "pairs")
    ideal = float(useful_flops(model, samples.work(False)).sum() / useful_flops(model, samples.work(True)).sum())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"ratio": ratio, "ideal": ideal, "speed_up": medians["separate"] / medians["shared"], "medians": medians, "seconds": seconds}


def report(results: list[dict[str, Any]], title: str) -> str:
    """A Markdown page."""
    rows = [
        f"| {r['ratio']} | {r['medians']['separate']:.2f} | {r['medians']['shared']:.2f} | {r['speed_up']:.2f} | {r['ideal']:.2f} |"
        for r in results
    ]
    head = ["| prompt / response | separate, s/step | shared, s/step | speed-up | ideal |", "|---:|---:|---:|---:|---:|"]
    return "\n".join([title, "", *head, *rows, "", "![speed-up](share_prompt.png)", ""])


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over the ratio."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    ratios = [r["ratio"] for r in results]
    axes.plot(ratios, [r["ideal"] for r in results], "k--", label="ideal: operations saved")
    axes.plot(ratios, [r["speed_up"] for r in results], "o-", label="measured")
    axes.axhline(1, color="gray", lw=0.8)
    axes.set(xscale="log", xlabel="prompt tokens / response tokens", ylabel="speed-up of a training step")
    axes.set_xticks(ratios, [str(r) for r in ratios])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="writes PREFIX.json, PREFIX.md and PREFIX.png")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark-share-prompt"), help="for models, stores and runs")
    parser.add_argument("--steps", type=int, default=3, help="of each process; the first is not counted")
    parser.add_argument("--repetitions", type=int, default=2, help="processes of each side")
    args = parser.parse_args(argv)
    results = [measure(args.folder.resolve() / str(ratio), ratio, args.steps, args.repetitions) for ratio in RATIOS]
    machine = f"Python {platform.python_version()}, torch {torch.__version__}, 2 threads, 4 layers, hidden 512, vocabulary 8k, float32"
    title = f"# Shared prompts\n\n`python -m benchmarks.share_prompt --output {args.output}`; {machine}"
    Path(f"{args.output}.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")
    Path(f"{args.output}.md").write_text(report(results, title), encoding="utf-8")
    draw(results, Path(f"{args.output}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
