"""Causal attention over packed (THD) rows: which keys each stretch of queries sees, and the kernel that computes it.

megatron-core's local attention refuses packed sequences, so the torch layer spec brings this one. A packed row is a number of *blocks*
end to end. A block's queries see some earlier keys and, causally, their own: the mask of a causal attention aligned at its lower right
corner. Plain sequences have no earlier keys; with them the same words describe a chunk of a sequence (context parallelism) and a
response behind a prompt that it shares.

On a GPU in half precision the kernel is ``torch.nn.attention.varlen`` (FlashAttention, no padding). Elsewhere blocks of like length are
spread over right-padded grids, one call of ``scaled_dot_product_attention`` each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from inspect import signature
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_patch.transfer import to_device

# T packed tokens, N query heads and G key/value heads of this rank, D head size; a grid has B blocks of Q queries and K keys.

_ALIKE = 0.875
"""Blocks share a grid when the shortest has at least this part of the longest one's queries and keys..."""
_SHORT = 64
"""...or when none has more tokens than this: then calls cost more than padding."""


class Grid(NamedTuple):
    """Blocks of like length, padded on the right to one shape."""

    shape: tuple[int, int, int]  # B, Q, K
    queries: Tensor  # int64 [B * Q]: token of each cell; padding repeats the block's first
    keys: Tensor  # int64 [B * K]
    mask: Tensor | None  # bool [B, 1, Q, K], true where seen; None for a plain causal one (then Q = K)


class Blocks:
    """What each stretch of a packed row sees, as both kernels need it.

    Args:
        queries: tokens of each block, end to end in the row. keys: what each sees, its own tokens the last of it; None: these alone.
        key_tokens: int64 [sum of keys], the rows of the key tensor that the blocks see, end to end; None: the row itself.
        device: where the row is.
    """

    def __init__(
        self, queries: Sequence[int], keys: Sequence[int] | None = None, key_tokens: Tensor | None = None, *, device: Any = "cpu"
    ) -> None:
        self.queries, self.keys = list(queries), list(keys if keys is not None else queries)
        self.key_tokens, self.device = key_tokens, device
        assert all(0 < q <= k for q, k in zip(self.queries, self.keys, strict=True))

    @cached_property
    def cumulative(self) -> tuple[Tensor, Tensor]:
        """int32 [blocks + 1] each: where the blocks' queries and keys start, and the totals."""
        both = torch.tensor([[0, *accumulate(self.queries)], [0, *accumulate(self.keys)]], dtype=torch.int32)
        both = to_device(both, self.device)
        return both[0], both[1]

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: where each token is in its sequence, which is after the keys before its block's own."""
        before = torch.tensor(self.keys) - torch.tensor(self.queries)
        sizes = torch.tensor(self.queries)
        first = before + sizes - sizes.cumsum(0)
        return to_device(torch.arange(int(sizes.sum())) + first.repeat_interleave(sizes), self.device)

    @cached_property
    def grids(self) -> tuple[list[Grid], Tensor]:
        """Grids that hold all blocks, and int64 [T]: the cell of each token, the grids' query cells numbered end to end."""
        grids: list[Grid] = []
        cell_of_token = torch.empty(sum(self.queries), dtype=torch.long)
        first_query, first_key = ([0, *accumulate(lengths)] for lengths in (self.queries, self.keys))
        begin = 0
        for members in self._alike():
            q, k, start_q, start_k = (torch.tensor([x[b] for b in members]) for x in (self.queries, self.keys, first_query, first_key))
            shape = (len(members), int(q.max()), int(k.max()))
            tokens, real = _cells(start_q, q, shape[1])
            cell_of_token[tokens[real]] = begin + torch.nonzero(real.view(-1)).view(-1)
            begin += tokens.numel()
            keys = to_device(_cells(start_k, k, shape[2])[0].view(-1), self.device)
            keys = keys if self.key_tokens is None else self.key_tokens[keys]
            mask = None if torch.equal(q, k) else to_device(_lower_right(q, k, shape), self.device)
            grids.append(Grid(shape, to_device(tokens.view(-1), self.device), keys, mask))
        return grids, to_device(cell_of_token, self.device)

    def _alike(self) -> list[list[int]]:
        """Numbers of the blocks in groups of like length, longest first."""
        groups: list[list[int]] = []
        most_keys = fewest = most = 0
        for b in sorted(range(len(self.queries)), key=lambda b: (-self.keys[b], -self.queries[b])):
            lowest, highest = min(fewest, self.queries[b]), max(most, self.queries[b])
            if groups and (most_keys <= _SHORT or (self.keys[b] >= _ALIKE * most_keys and lowest >= _ALIKE * highest)):
                groups[-1].append(b)
                fewest, most = lowest, highest
            else:
                groups.append([b])
                most_keys, fewest, most = self.keys[b], self.queries[b], self.queries[b]
        return groups


def _cells(starts: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(int64 [B, width] start + offset, the start where padded; bool [B, width], where it is not padded)."""
    offset = torch.arange(width)
    real = offset < lengths.unsqueeze(1)
    return starts.unsqueeze(1) + torch.where(real, offset, 0), real


def _lower_right(queries: Tensor, keys: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """bool [B, 1, Q, K]: query i of n sees the keys up to i + k - n."""
    last_seen = torch.arange(shape[1]) + (keys - queries).unsqueeze(1)
    return (torch.arange(shape[2]) <= last_seen.unsqueeze(2)).unsqueeze(1)


@dataclass
class PackedLayout(PackedSeqParams):
    """What each stretch of a packed row sees.

    To upstream the row is one sequence (a tensor in the machine's memory: reading it does not wait for the device): it only turns queries
    and keys by it, and which positions they have is for ``packed_rotary`` to say. Transformer Engine's attention reads the sequences from
    it, so for that they are the real ones.
    """

    blocks: Blocks = field(kw_only=True)
    context_rank: int = 0
    context_ranks: int = 1
    context_group: Any = None
    """The ranks that each have a part of every sequence."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], behind: Sequence[int], device: Any, context_group: Any, *, one_sequence: bool = True
    ) -> "PackedLayout":
        """Sequences of these lengths, each attending to itself and to the one it is behind (-1: to none).

        ``context_group``: the ranks over which each sequence is split (data/packed_batch.py says how). ``one_sequence``: as above.
        """
        rank, ranks = torch.distributed.get_rank(context_group), torch.distributed.get_world_size(context_group)
        blocks = row_blocks(lengths, behind, device) if ranks == 1 else context_blocks(lengths, rank, ranks, device)
        starts = torch.tensor([0, sum(lengths)], dtype=torch.int32) if one_sequence else Blocks(lengths, device=device).cumulative[0]
        longest = sum(lengths) if one_sequence else max(lengths)
        return cls(
            qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest, blocks=blocks,
            context_rank=rank, context_ranks=ranks, context_group=context_group,
        )  # fmt: skip


def row_blocks(lengths: Sequence[int], behind: Sequence[int], device: Any) -> Blocks:
    """Sequences of a row: each sees itself and the whole of the one it is behind, if any."""
    if max(behind) < 0:
        return Blocks(lengths, device=device)
    starts = [0, *accumulate(lengths)]
    places = [torch.arange(start, stop) for start, stop in pairwise(starts)]
    seen = [(places[before], own) if before >= 0 else (own,) for own, before in zip(places, behind, strict=True)]
    keys = [sum(map(len, parts)) for parts in seen]
    return Blocks(lengths, keys, to_device(torch.cat([*chain.from_iterable(seen)]), device), device=device)


def context_blocks(lengths: Sequence[int], rank: int, ranks: int, device: Any) -> Blocks:
    """What a context-parallel rank's two chunks of each sequence see of the keys of all ranks, which lie rank after rank.

    Args:
        lengths: of the whole sequences, multiples of ``2 * ranks``.
    """
    chunks = [length // (2 * ranks) for length in lengths]
    row = 2 * sum(chunks)
    queries: list[int] = []
    keys: list[int] = []
    tokens: list[Tensor] = []
    for chunk, start in zip(chunks, accumulate((2 * chunk for chunk in chunks), initial=0), strict=False):
        owners = [(j, 0) if j < ranks else (2 * ranks - 1 - j, chunk) for j in range(2 * ranks)]
        places = torch.cat([torch.arange(chunk) + owner * row + start + behind for owner, behind in owners])
        for last in (rank, 2 * ranks - 1 - rank):
            queries.append(chunk)
            keys.append((last + 1) * chunk)
            tokens.append(places[: keys[-1]])
    return Blocks(queries, keys, to_device(torch.cat(tokens), device), device=device)


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks, rank after rank; their gradients go back summed. torch's functional collectives fail on gloo subgroups."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        """[T / CP, ...] -> [T, ...]."""
        ctx.group, ctx.rows = group, rows.size(0)
        everywhere = rows.new_empty(rows.size(0) * torch.distributed.get_world_size(group), *rows.shape[1:])
        torch.distributed.all_gather_into_tensor(everywhere, rows.contiguous(), group=group)
        return everywhere

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """[T, ...] -> [T / CP, ...]."""
        own = grads[0].new_empty(ctx.rows, *grads[0].shape[1:])
        torch.distributed.reduce_scatter_tensor(own, grads[0].contiguous(), group=ctx.group)
        return own, None


@cache
def _varlen_kernel() -> Callable[..., Any] | None:
    """``torch.nn.attention.varlen.varlen_attn``, where this torch has one that takes what is asked of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "scale", "enable_gqa"} <= signature(varlen_attn).parameters.keys() else None


def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch computes this without padding: FlashAttention, so Ampere or later, half precision, heads of at most 256 in eights."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_size % 8 or head_size > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and _varlen_kernel() is not None


def kernel_name(device: str, dtype: torch.dtype, head_size: int) -> str:
    """What computes attention there, for people."""
    varlen = has_varlen_kernel(torch.device(device), dtype, head_size)
    return "torch.nn.attention.varlen" if varlen else "scaled_dot_product_attention by length"


def causal_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """Attention of each block of a packed row to the keys it sees.

    Args:
        query: [T, N, D]. key, value: [rows, G, D], N a multiple of G (grouped-query attention); rows = T unless ``blocks`` says which.
        scale: factor on query times key.
    Returns:
        [T, N, D].
    """
    attend = _varlen_attention if has_varlen_kernel(query.device, query.dtype, query.size(-1)) else _grid_attention
    return attend(query, key, value, blocks, scale)


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
    varlen_attn = _varlen_kernel()
    assert varlen_attn is not None
    if blocks.key_tokens is not None:
        key, value = _seen(key, blocks.key_tokens), _seen(value, blocks.key_tokens)
    of_queries, of_keys = blocks.cumulative
    return varlen_attn(
        query, key, value, of_queries, of_keys, max(blocks.queries), max(blocks.keys),
        window_size=(-1, 0), scale=scale, enable_gqa=query.size(1) != key.size(1),
    )  # fmt: skip


def _seen(rows: Tensor, tokens: Tensor) -> Tensor:
    """rows[tokens], where several blocks may see one row; the gradients of its copies are added up in float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).index_select(0, tokens).to(rows.dtype)


def _grid_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
    grids, cell_of_token = blocks.grids
    if query.is_cuda:  # only the flash and math kernels group heads: with a mask or in float32 all scores would be in memory
        key, value = (rows.repeat_interleave(query.size(1) // key.size(1), dim=1) for rows in (key, value))

    def spread(packed: Tensor, tokens: Tensor, rows: int) -> Tensor:
        """[T, H, D] -> [B, H, Q or K, D]."""
        chosen = packed.index_select(0, tokens) if blocks.key_tokens is None else _seen(packed, tokens)
        return chosen.view(rows, -1, *packed.shape[1:]).transpose(1, 2)

    outputs = []
    for grid in grids:
        out = F.scaled_dot_product_attention(
            spread(query, grid.queries, grid.shape[0]), spread(key, grid.keys, grid.shape[0]), spread(value, grid.keys, grid.shape[0]),
            attn_mask=grid.mask, is_causal=grid.mask is None, scale=scale, enable_gqa=query.size(1) != key.size(1),
        )  # fmt: skip
        outputs.append(out.transpose(1, 2).reshape(-1, *query.shape[1:]))
    return torch.cat(outputs).index_select(0, cell_of_token)


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
        if not isinstance(packed_seq_params, PackedLayout):
            raise ValueError("packed attention needs a PackedLayout: every batch of this project is packed (THD)")
        if packed_seq_params.context_ranks > 1:
            both = _GatherRows.apply(torch.cat([key, value], dim=-1), packed_seq_params.context_group)
            key, value = both.split([key.size(-1), value.size(-1)], dim=-1)
        return causal_attention(query, key, value, packed_seq_params.blocks, self.scale).flatten(1)
