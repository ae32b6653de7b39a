"""Peak memory and time of the log-prob step (hidden states -> log-probs of the scored tokens -> gradients), plain against chunked.

Plain is what a trainer writes first: all logits, `log_softmax`, `gather`. Chunked is `megatron_patch.model.response_logps.token_logps`.
Both get the same hidden states [T, H] and output weight [V, H] in float32, sum the log-probs and go back to both gradients, the weight's
added to a buffer that is there before, as under Megatron's DDP. Each point
of memory is a process of its own: the peak of its resident memory during the step, above what it had before (inputs made, one small step
done). Plain is measured as far as it fits and extended by a straight line (dashed in the picture).

    python -m benchmarks.logps_memory --output benchmarks/logps_memory
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks import report

CHUNKS = (256, 512, 1024, 2048, 4096)
FULL, SHARD = 151_936, 37_984
"""Rows of Qwen2.5's output layer, and of a quarter of it (TP 4)."""


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[T] log-probs with all logits in memory."""
    return torch.log_softmax(hidden @ weight.t(), dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def chunked_logps(chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Ours, in a process group of one."""
    import torch.distributed as dist

    from megatron_patch.model.response_logps import token_logps
    from megatron_patch.preference.logps import ScoredTargets

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        every = torch.arange(len(targets))
        scored = ScoredTargets(every, targets, every, len(targets))
        return token_logps(hidden, weight, scored, vocab_size=weight.size(0), group=dist.group.WORLD, chunk=chunk)

    return logps


def step(side: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Forward and backward; the sum of the log-probs."""
    hidden.grad, weight.grad_added_to_main_grad = None, False  # type: ignore[attr-defined]
    total = side(hidden, weight, targets).sum()
    total.backward()
    return total.item()


def inputs(tokens: int, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for every side and process."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator) * 0.02
    return states.requires_grad_(), as_under_ddp(weight.requires_grad_()), torch.randint(vocabulary, (tokens,), generator=generator)


def as_under_ddp(weight: Any) -> Tensor:
    """With a buffer for its gradient, and what Megatron's DDP does when a gradient is there (distributed_data_parallel.py:476)."""
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False

    def hook(parameter: Any) -> None:
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(hook)
    return weight


class Peak(threading.Thread):
    """The most resident memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.done = psutil.Process(), threading.Event()
        self.most = self.before = self.process.memory_info().rss

    def run(self) -> None:
        """Look every two milliseconds."""
        while not self.done.wait(0.002):
            self.most = max(self.most, self.process.memory_info().rss)


def measure_memory(side: Callable, tokens: int, vocabulary: int, hidden: int) -> dict[str, float]:
    """Bytes above the baseline, and seconds, of one step."""
    states, weight, targets = inputs(tokens, vocabulary, hidden)
    step(side, states[:8].detach().requires_grad_(), weight, targets[:8])
    watch = Peak()
    watch.start()
    started = time.perf_counter()
    total = step(side, states, weight, targets)
    seconds = time.perf_counter() - started
    watch.done.set()
    watch.join()
    return {"bytes": watch.most - watch.before, "seconds": seconds, "sum": total}


def measure_time(tokens: int, scored: int, vocabulary: int, hidden: int, chunk: int, repetitions: int) -> dict[str, Any]:
    """Seconds of both sides, by turns in one process: plain over `tokens`, chunked over the `scored` of them."""
    states, weight, targets = inputs(tokens, vocabulary, hidden)
    chunked = chunked_logps(chunk)
    seconds: dict[str, list[float]] = {"plain": [], "chunked": []}
    for _ in range(repetitions + 1):
        for name, side, count in (("plain", plain_logps, tokens), ("chunked", chunked, scored)):
            part = states[:count].detach().requires_grad_()
            started = time.perf_counter()
            step(side, part, weight, targets[:count])
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {"seconds": {name: values[1:] for name, values in seconds.items()}, "ratio": medians["chunked"] / medians["plain"], **medians}


def in_a_process(*words: object) -> dict[str, Any]:
    """What another process of this script measured."""
    return json.loads(report.python("-m", "benchmarks.logps_memory", "--output", "-", *words)[-1].text)


def line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line."""
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(slope), float(y.mean() - slope * x.mean())


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured."""
    memory: list[dict[str, Any]] = []
    shape = ("--hidden", args.hidden, "--chunk", args.chunk)
    plan = [("plain", FULL, (1024, 2048, 4096)), ("plain", SHARD, (4096, 8192, 16384))]
    plan += [("chunked", FULL, (1024, 4096, 16384, 65536)), ("chunked", SHARD, (4096, 16384, 65536))]
    for side, vocabulary, counts in plan:
        for tokens in counts:
            found = in_a_process("--measure", side, "--tokens", tokens, "--vocabulary", vocabulary, *shape)
            memory.append({"side": side, "vocabulary": vocabulary, "tokens": tokens, **found})
            print(side, vocabulary, tokens, f"{found['bytes'] / 2**20:.0f} MiB, {found['seconds']:.1f} s", file=sys.stderr)
    whole = ("--vocabulary", FULL, "--hidden", args.hidden)
    common = (*whole, "--chunk", args.chunk, "--repetitions", args.repetitions)
    times = {
        "equal tokens, 4 chunks of which 3 are computed again": in_a_process(
            "--measure", "time", "--tokens", 4096, "--scored", 4096, *common
        ),
        "plain scores prompts too (half of the tokens)": in_a_process("--measure", "time", "--tokens", 4096, "--scored", 2048, *common),
    }
    chunks = {chunk: in_a_process("--measure", "chunked", "--tokens", 4096, *whole, "--chunk", chunk) for chunk in CHUNKS}
    return {"memory": memory, "times": times, "chunks": chunks, "hidden": args.hidden, "chunk": args.chunk}


def of(results: dict[str, Any], side: str, vocabulary: int) -> list[tuple[int, float]]:
    """(tokens, bytes) of one curve."""
    return [(m["tokens"], m["bytes"]) for m in results["memory"] if (m["side"], m["vocabulary"]) == (side, vocabulary)]


def page(results: dict[str, Any]) -> list[str]:
    """Tables in Markdown."""
    hidden, gibi = results["hidden"], 2**30
    rows, found = [], []
    for vocabulary in (FULL, SHARD):
        plain, chunked = dict(of(results, "plain", vocabulary)), dict(of(results, "chunked", vocabulary))
        slope, start = line(list(plain.items()))
        for tokens in sorted({*plain, *chunked}):
            known = f"{plain[tokens] / gibi:.2f} GiB" if tokens in plain else f"({(start + slope * tokens) / gibi:.1f} GiB by the line)"
            rows.append([str(vocabulary), str(tokens), known, f"{chunked[tokens] / gibi:.2f} GiB" if tokens in chunked else ""])
    for vocabulary in (FULL, SHARD):
        growth = line(of(results, "chunked", vocabulary))[0] / (4 * hidden)
        met = report.verdict(growth, 3, least=False)
        found.append(f"- chunked, {vocabulary} rows: {4 * hidden * growth:.0f} bytes a token, {growth:.2f} x hidden bytes; target 3: {met}")
    for name, limit in zip(results["times"], (1.4, 1.0), strict=True):
        times = results["times"][name]
        found.append(
            f"- time, {name}: chunked {times['chunked']:.2f} s, plain {times['plain']:.2f} s (medians), ratio {times['ratio']:.2f}; "
            f"target {limit}: {report.verdict(times['ratio'], limit, least=False)}"
        )
    chunks = [[str(n), f"{of['bytes'] / gibi:.2f} GiB", f"{of['seconds']:.1f}"] for n, of in results["chunks"].items()]
    by_chunk = report.table((f"chunk ({FULL} rows, 4,096 tokens)", "peak", "seconds, once"), chunks)
    return [*report.table(("vocabulary rows", "tokens", "plain", "chunked"), rows), "", *found, "", *by_chunk]


def draw(results: dict[str, Any]) -> Any:
    """Peak memory over tokens."""
    figure, plot = report.axes(7, 4.5)
    for color, vocabulary in (("tab:blue", FULL), ("tab:orange", SHARD)):
        plain, chunked = (sorted(of(results, side, vocabulary)) for side in ("plain", "chunked"))
        slope, start = line(plain)
        beyond = [plain[-1][0], 65536]
        plot.plot(*zip(*[(t, b / 2**30) for t, b in plain], strict=True), "s-", color=color, label=f"plain, {vocabulary} rows")
        plot.plot(beyond, [(start + slope * t) / 2**30 for t in beyond], "--", color=color)
        plot.plot(*zip(*[(t, b / 2**30) for t, b in chunked], strict=True), "o-", color=color, mfc="w", label=f"chunked, {vocabulary} rows")
    plot.set(xscale="log", yscale="log", xlabel="scored tokens", ylabel="peak memory of the step (GiB)")
    plot.set_xticks([1024, 4096, 16384, 65536], ["1k", "4k", "16k", "64k"])
    plot.set_title(f"Log-prob step, hidden {results['hidden']}, chunk {results['chunk']}, float32; dashed: extended")
    plot.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report, or, inside that, one point."""
    parser = report.parser(__doc__, repetitions=3)
    parser.add_argument("--hidden", type=int, default=896, help="hidden size (896: Qwen2.5 0.5B)")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens whose logits are held at a time")
    parser.add_argument("--measure", choices=("plain", "chunked", "time"), help=argparse.SUPPRESS)
    for name in ("tokens", "scored", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure == "time":
        print(json.dumps(measure_time(args.tokens, args.scored, args.vocabulary, args.hidden, args.chunk, args.repetitions)))
    elif args.measure:
        side = plain_logps if args.measure == "plain" else chunked_logps(args.chunk)
        print(json.dumps(measure_memory(side, args.tokens, args.vocabulary, args.hidden)))
    else:
        results = compare(args)
        report.write(args.output, "Log-prob step: plain against chunked", results, page(results), report.machine(), draw(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
