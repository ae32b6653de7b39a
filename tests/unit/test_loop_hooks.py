"""The useful FLOPs that the console's TFLOP/s are made of, against matrix products counted one by one."""

import numpy as np

from megatron_patch.loop_hooks import useful_flops
from megatron_patch.model.qwen2 import Qwen2Config

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
    lengths = np.array([[7, 30], [12, 5]])
    scored = 19
    expected = 3 * (sum(forward_by_hand(int(n), 0) for n in lengths.flat) + 2 * scored * 64 * 501)
    assert useful_flops(MODEL, lengths, scored) == expected


def test_padding_and_prompts_are_not_output_work() -> None:
    short, long = useful_flops(MODEL, np.array([10]), 4), useful_flops(MODEL, np.array([10]), 9)
    assert long - short == 6 * 64 * 501 * 5
