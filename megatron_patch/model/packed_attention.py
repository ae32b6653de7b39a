"""Causal attention over packed (THD) sequences with torch's ``scaled_dot_product_attention``.

megatron-core's local attention refuses packed sequences, so the torch layer spec brings this one. A packed row of T tokens is
S sequences end to end; each attends to itself only. The rows are spread over a right-padded [S, L] grid, where a causal mask
alone keeps the padding out of sight of every real query, so one call serves all sequences without a mask in memory.
"""

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# T packed tokens, S sequences, L the longest of them, N query heads and G key/value heads of this rank, D head size.


def causal_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """Causal attention of each sequence of a packed row to itself.

    Args:
        query: [T, N, D]. key, value: [T, G, D], N a multiple of G (grouped-query attention).
        cu_seqlens: int [S + 1], first token of each sequence and T at the end.
        max_seqlen: L, in tokens.
        scale: factor on query times key.
    Returns:
        [T, N, D].
    """
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    sequences = lengths.numel()
    row = torch.repeat_interleave(torch.arange(sequences, device=query.device), lengths, output_size=query.size(0))
    slot = row * max_seqlen + torch.arange(query.size(0), device=query.device) - cu_seqlens[:-1].long()[row]  # [T] into S * L

    def spread(packed: Tensor) -> Tensor:
        """[T, H, D] -> [S, H, L, D], zeros where a sequence has no token."""
        grid = packed.new_zeros(sequences * max_seqlen, *packed.shape[1:]).index_copy(0, slot, packed)
        return grid.view(sequences, max_seqlen, *packed.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        spread(query), spread(key), spread(value), is_causal=True, scale=scale, enable_gqa=query.size(1) != key.size(1)
    )
    return out.transpose(1, 2).reshape(sequences * max_seqlen, *query.shape[1:]).index_select(0, slot)


class PackedAttention(MegatronModule):
    """``core_attention`` of the torch layer spec. Holds no weights; heads are already split over tensor parallelism."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"packed attention is causal self-attention, not {attn_mask_type} {attention_type}")
        if config.attention_dropout:
            raise ValueError(f"packed attention has no dropout, but --attention-dropout is {config.attention_dropout}")
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> Tensor:
        """query [T, N, D], key and value [T, G, D] -> [T, N * D]."""
        if packed_seq_params is None:
            raise ValueError("packed attention needs packed_seq_params: every batch of this project is packed (THD)")
        out = causal_attention(
            query, key, value, packed_seq_params.cu_seqlens_q, int(packed_seq_params.max_seqlen_q), self.scale
        )
        return out.reshape(out.size(0), -1)
