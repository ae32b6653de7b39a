"""What a step costs and how fast it went: useful FLOPs, the device's peak, seconds by phase, memory."""

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_patch.data.pair_dataset import Work
from megatron_patch.model.qwen2 import Qwen2Config

PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "B100": 1750, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989,
    "H20": 148, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L20": 119, "A40": 150, "A10": 125,
}  # fmt: skip
"""Dense bfloat16 tensor-core peaks by the words of the device's name, first match; NVIDIA's data sheets."""


PHASES = ("data", "forward_backward", "optimizer", "other")
"""Of a step's seconds."""


def useful_flops(model: Qwen2Config, work: Work) -> np.ndarray:
    """float64 [samples]: operations that forward and backward of each sample need, padding and recomputation not counted.

    6 x body parameters x real tokens + causal attention (6 x heads x head_dim x length^2 per layer and sequence)
    + 6 x output layer x scored tokens.
    """
    projections = model.hidden * model.head_dim * (2 * model.heads + 2 * model.kv_groups)
    body = model.layers * (projections + 3 * model.hidden * model.ffn)
    attention = model.layers * model.heads * model.head_dim
    return 6.0 * (float(body) * work.tokens + float(attention) * work.squares + float(model.hidden * model.vocab) * work.scored)


def peak_flops() -> float | None:
    """Dense bfloat16 FLOP/s of this process's device; None when it is not in the table (a CPU never is)."""
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def peak_memory() -> int:
    """Most bytes that this process has held so far: of the GPU's memory, or of the machine's where there is none."""
    on_gpu = int(torch.cuda.max_memory_allocated())
    return on_gpu or _peak_resident()


def _peak_resident() -> int:
    """This process's own, on Linux; getrusage's may be that of the process which started it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(re.search(r"^VmHWM:\s+(\d+) kB", status, flags=re.MULTILINE)[1]) * 1024  # type: ignore[index]


class StepClock:
    """Seconds of a step by phase: ``data`` (waiting for micro-batches), ``forward_backward`` (without it), ``optimizer``, ``other``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to a phase, less what inner phases took."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started - inner

    def waited_for(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """The same items; the time they take to come is ``data``."""
        while True:
            with self.phase("data"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def lap(self) -> dict[str, float]:
        """``seconds`` since the last lap and, of these, ``seconds/<phase>``; then start anew."""
        now = time.perf_counter()
        whole, phases = now - self._started, dict.fromkeys(PHASES[:-1], 0.0) | self.seconds
        self._started, self.seconds = now, {}
        phases[PHASES[-1]] = max(0.0, whole - sum(phases.values()))
        return {"seconds": whole, **{f"seconds/{name}": seconds for name, seconds in phases.items()}}
