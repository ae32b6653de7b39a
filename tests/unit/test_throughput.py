"""The useful FLOPs that the console's TFLOP/s are made of, against matrix products counted one by one; the clock of a step."""

import time

import numpy as np
import pytest
import torch

from megatron_patch.data.pair_dataset import Work
from megatron_patch.model.qwen2 import Qwen2Config
from megatron_patch.throughput import PEAK_TFLOPS, StepClock, peak_flops, useful_flops

MODEL = Qwen2Config(
    layers=3, hidden=64, heads=4, kv_groups=2, head_dim=16, ffn=96, vocab=501, tied=True,
    rope_base=1e6, norm_eps=1e-6, max_positions=512, init_std=0.02,
)  # fmt: skip


def forward_by_hand(length: int, scored: int) -> float:
    """Two operations a multiply-add, every product of one sequence, causal attention counted at half of the full square."""
    rows_of = {"q": 64, "k": 32, "v": 32}
    projections = sum(2 * length * 64 * rows for rows in rows_of.values()) + 2 * length * 64 * 64
    mlp = 3 * 2 * length * 64 * 96
    attention = 4 * (2 * length * length * 16 + 2 * length * length * 16) / 2
    return 3 * (projections + mlp + attention) + 2 * scored * 64 * 501


def test_useful_flops_are_three_forward_passes() -> None:
    lengths, scored = np.array([[7, 30], [12, 5]]), np.array([[4, 11], [3, 1]])
    expected = [3 * sum(forward_by_hand(int(n), int(k)) for n, k in zip(*row, strict=True)) for row in zip(lengths, scored, strict=True)]
    work = Work(lengths.sum(1), np.square(lengths).sum(1), scored.sum(1))
    assert useful_flops(MODEL, work).tolist() == expected


def test_prompts_are_not_output_work() -> None:
    short, long = useful_flops(MODEL, Work(np.array([10, 10]), np.array([100, 100]), np.array([4, 9])))
    assert long - short == 6 * 64 * 501 * 5


@pytest.mark.parametrize(
    "name, tflops",
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA GB200", 2500), ("NVIDIA A100-SXM4-80GB", 312),
     ("NVIDIA H200 NVL", 835), ("NVIDIA A10", 125), ("NVIDIA A10G", None), ("NVIDIA RTX A4000", None), ("cpu", None)],
)
def test_peak_of_a_device_is_found_by_its_name(monkeypatch, name, tflops) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops() == (tflops and tflops * 1e12)


def test_a_name_that_holds_another_comes_first() -> None:
    names = list(PEAK_TFLOPS)
    assert all(names.index(long) < names.index(short) for long in names for short in names if short != long and short in long)


def test_every_second_of_a_step_has_one_phase(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(seconds, item=None):
        now[0] += seconds
        return item

    clock = StepClock()
    with clock.phase("optimizer"):
        passes(1)
        with clock.phase("forward_backward"):
            passes(2)
            for _ in clock.waited_for(passes(4, item) for item in "abc"):
                passes(8)
        passes(16)
    passes(32)
    expected = {"seconds": 87, "seconds/data": 12, "seconds/forward_backward": 26, "seconds/optimizer": 17, "seconds/other": 32}
    assert clock.lap() == expected
    passes(3)
    assert clock.lap() == dict.fromkeys(expected, 0) | {"seconds": 3, "seconds/other": 3}
