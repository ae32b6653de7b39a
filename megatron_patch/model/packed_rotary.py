"""Rotary frequencies of each token of a packed row, where upstream computes them sequence by sequence.

megatron-core turns THD sequences one after the other, in a Python loop with several waits for the device per sequence, layer and tensor
(core/models/common/embeddings/rope_utils.py:180). When the frequencies are as many as the row's tokens it takes them as they lie (:225):
so the row is described as one sequence, and this module says which position each token has. Positions may then also continue those of a
shared prompt.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_patch.model.packed_attention import PackedLayout


class PackedRotary(torch.nn.Module):
    """Stands in for ``rotary_pos_emb`` of a ``GPTModel`` (core/models/gpt/gpt_model.py:403). Holds no weights."""

    def __init__(self, upstream: RotaryEmbedding) -> None:
        super().__init__()
        self._table, self._known = upstream.get_emb, torch.empty(0)
        self._layout: PackedLayout | None = None

    def get_rotary_seq_len(self, *arguments: Any, **_: Any) -> int:
        """Called first, with the layout of the row, in ``GPTModel``'s order; returns how many positions the table must have."""
        layout = arguments[4]
        if not isinstance(layout, PackedLayout):
            raise ValueError("packed rotary positions need a PackedLayout: every batch of this project is packed (THD)")
        self._layout = layout
        return max(layout.blocks.keys)

    def forward(self, positions: int, **_: Any) -> Tensor:
        """[T, 1, 1, D]: frequencies by token; under context parallelism this rank's are where upstream cuts them out for it."""
        layout, self._layout = self._layout, None
        assert layout is not None, "get_rotary_seq_len of the same forward pass comes first"
        if len(self._known) < positions:
            self._known = self._table(positions)
        own = self._known[layout.blocks.positions]
        if layout.context_ranks == 1:
            return own
        half, rank = len(own) // 2, layout.context_rank
        row = own.new_zeros(layout.context_ranks * len(own), *own.shape[1:])
        row[rank * half : (rank + 1) * half] = own[:half]
        row[len(row) - (rank + 1) * half : len(row) - rank * half] = own[half:]
        return row
