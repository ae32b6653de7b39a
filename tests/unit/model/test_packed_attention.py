"""Packed attention against a softmax written out for one sequence and one head at a time."""

import inspect
import math
from itertools import chain

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.model import packed_attention
from megatron_patch.model.packed_attention import Blocks, PackedAttention, PackedLayout, causal_attention, context_blocks, has_varlen_kernel

LENGTHS = [[5], [1, 1, 1], [3, 7, 1, 4], [8, 8]]
HEADS = [(4, 4), (4, 2), (6, 1)]  # query heads, key/value heads


def packed(lengths, heads, groups, head_dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def rows(count):
        return torch.randn(total, count, head_dim, generator=generator, dtype=dtype).requires_grad_()

    return rows(heads), rows(groups), rows(groups), Blocks(lengths)


def naive(query, key, value, blocks, scale):
    """Softmax by softmax: the last of a block's queries sees all of its keys, the one before it all but the last..."""
    out = torch.zeros_like(query)
    per_group = query.size(1) // key.size(1)
    rows = blocks.key_tokens if blocks.key_tokens is not None else torch.arange(len(key))
    token = first = 0
    for queries, keys in zip(blocks.queries, blocks.keys, strict=True):
        for i in range(queries):
            seen = rows[first : first + keys - queries + i + 1]
            for head in range(query.size(1)):
                scores = key[seen, head // per_group] @ query[token, head] * scale
                weights = scores.exp() / scores.exp().sum()
                out[token, head] = weights @ value[seen, head // per_group]
            token += 1
        first += keys
    return out


def assert_same(query, key, value, blocks):
    mine = causal_attention(query, key, value, blocks, 0.3)
    assert mine.shape == query.shape
    weights = torch.randn(mine.shape, dtype=mine.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((mine * weights).sum(), (query, key, value))
    expected = naive(query, key, value, blocks, 0.3)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    for grad, other in zip(grads, torch.autograd.grad((expected * weights).sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads, groups", HEADS)
def test_values_and_gradients_are_the_naive_ones(lengths, heads, groups):
    assert_same(*packed(lengths, heads, groups))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_other_precisions_are_the_same_within_theirs(dtype, tolerance):
    exact = packed([3, 7, 1, 4], 4, 2)
    rounded = [rows.detach().to(dtype).requires_grad_() for rows in exact[:3]]
    judge, found = (causal_attention(*rows, exact[3], 0.3) for rows in (exact[:3], rounded))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), judge, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(out.square().sum(), rows) for out, rows in ((judge, exact[:3]), (found, rounded))]
    for expected, grad in zip(*grads, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=4 * tolerance, atol=4 * tolerance)


# (tokens of each block, the rows that each sees)
SHARED = {
    "two responses behind one prompt": ([3, 2, 4], [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7, 8]]),
    "the same, and a sequence of its own": ([3, 2, 2, 5], [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [7, 8, 9, 10, 11]]),
    "two chunks of a longer sequence, keys of all four": ([2, 2], [[8, 9], [8, 9, 2, 3, 4, 5, 0, 1]]),
    "a chunk that sees more than others in its grid": ([2, 2, 2], [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("alone", [True, False], ids=["a grid each", "one grid"])
def test_blocks_see_earlier_keys_and_their_own(name, alone, monkeypatch):
    monkeypatch.setattr(packed_attention, "_SHORT", 0 if alone else 64)
    lengths, seen = SHARED[name]
    query, *_ = packed(lengths, 4, 2)
    _, key, value, _ = packed([max(map(max, seen)) + 1], 4, 2, seed=1)
    assert_same(query, key, value, Blocks(lengths, [len(rows) for rows in seen], torch.tensor([*chain.from_iterable(seen)])))


@pytest.mark.parametrize("ranks", [2, 3])
def test_context_ranks_together_are_the_whole_row(ranks):
    """Each rank's queries, over the keys of all ranks lying rank after rank, give its rows of the whole attention."""
    lengths = [2 * ranks * n for n in (1, 3, 2)]
    query, key, value, whole = packed(lengths, 4, 2)
    expected = naive(query, key, value, whole, 0.3)
    place = []
    for rank in range(ranks):
        place.append([])
        for start, length in zip((0, *torch.tensor(lengths).cumsum(0).tolist()), lengths, strict=False):
            chunk = length // (2 * ranks)
            place[-1] += [start + c * chunk + i for c in (rank, 2 * ranks - 1 - rank) for i in range(chunk)]
    rank_after_rank = [*chain.from_iterable(place)]
    for rank in range(ranks):
        blocks = context_blocks(lengths, rank, ranks, "cpu")
        mine = causal_attention(query[place[rank]], key[rank_after_rank], value[rank_after_rank], blocks, 0.3)
        torch.testing.assert_close(mine, expected[place[rank]], rtol=1e-12, atol=1e-12)


def test_positions_go_on_after_what_a_block_sees():
    assert Blocks([3, 2]).positions.tolist() == [0, 1, 2, 0, 1]
    assert Blocks([3, 2, 1], [3, 5, 4]).positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert context_blocks([4, 8], 0, 2, "cpu").positions.tolist() == [0, 3, 0, 1, 6, 7]
    assert context_blocks([4, 8], 1, 2, "cpu").positions.tolist() == [1, 2, 2, 3, 4, 5]


def test_padding_is_bounded_and_calls_are_few():
    generator = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in torch.empty(200).log_normal_(5.7, 1.0, generator=generator).clamp(1, 8000)]
    grids, cell_of_token = Blocks(lengths).grids
    assert sum(grid.queries.numel() for grid in grids) <= 1.15 * sum(lengths)
    assert len(grids) <= 40
    assert len(set(cell_of_token.tolist())) == sum(lengths)
    cells = torch.cat([grid.queries for grid in grids])
    assert torch.equal(cells[cell_of_token], torch.arange(sum(lengths)))


def test_no_sequence_sees_another_or_its_own_future():
    lengths = [4, 6, 3]
    query, key, value, blocks = packed(lengths, 4, 2, dtype=torch.float32)
    before = causal_attention(query, key, value, blocks, 0.3)
    with torch.no_grad():
        for tensor in (query, key, value):
            tensor[7:10] = 1e3  # the last three of the six tokens of the second sequence
    after = causal_attention(query, key, value, blocks, 0.3)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False] * 7 + [True] * 3 + [False] * 3


def test_gradient_stays_inside_the_sequence():
    query, key, value, blocks = packed([4, 6, 3], 4, 2)
    out = causal_attention(query, key, value, blocks, 0.3)
    for grad in torch.autograd.grad(out[4:8].square().sum(), (query, key, value)):
        touched = grad.flatten(1).abs().sum(1) > 0
        assert not touched[:4].any() and not touched[8:].any() and touched[4:8].any()


def transformer_config(**options):
    return TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0, **options)


def test_module_scales_by_the_root_of_the_head_size(monkeypatch):
    query, key, value, blocks = packed([3, 5], 4, 2)
    module = PackedAttention(transformer_config(), 1, AttnMaskType.causal, "self")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: {"one rank": 1}[group])
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: {"one rank": 0}[group])
    layout = PackedLayout.of([3, 5], (-1, -1), "cpu", "one rank")
    assert layout.cu_seqlens_q.tolist() == layout.cu_seqlens_kv.tolist() == [0, 8] and layout.max_seqlen_q == layout.max_seqlen_kv == 8
    real = PackedLayout.of([3, 5], (-1, -1), "cpu", "one rank", one_sequence=False)
    assert real.cu_seqlens_q.tolist() == real.cu_seqlens_kv.tolist() == [0, 3, 8] and real.max_seqlen_q == real.max_seqlen_kv == 5
    out = module(query, key, value, None, packed_seq_params=layout)
    expected = naive(query, key, value, blocks, 1 / math.sqrt(8))
    assert out.shape == (8, 32)
    torch.testing.assert_close(out, expected.reshape(8, 32), rtol=1e-12, atol=1e-12)
    assert not list(module.parameters())


def test_what_it_cannot_do_is_refused():
    config = transformer_config()
    with pytest.raises(ValueError, match="causal self-attention"):
        PackedAttention(config, 1, AttnMaskType.padding, "self")
    with pytest.raises(ValueError, match="causal self-attention"):
        PackedAttention(config, 1, AttnMaskType.causal, "cross")
    config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"--attention-dropout is 0\.1"):
        PackedAttention(config, 1, AttnMaskType.causal, "self")
    query, key, value, _ = packed([3], 4, 2)
    with pytest.raises(ValueError, match="PackedLayout"):
        PackedAttention(transformer_config(), 1, AttnMaskType.causal, "self")(query, key, value)


def test_the_kernel_without_padding_is_for_half_precision_on_a_gpu(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not has_varlen_kernel(gpu, torch.bfloat16, 128), "Turing has no FlashAttention of bfloat16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert has_varlen_kernel(gpu, torch.bfloat16, 128)
    for where in ((gpu, torch.float32, 128), (cpu, torch.bfloat16, 128), (gpu, torch.bfloat16, 20), (gpu, torch.bfloat16, 264)):
        assert not has_varlen_kernel(*where)
    names = [packed_attention.kernel_name(device, torch.bfloat16, 64) for device in ("cuda", "cpu")]
    assert names == ["torch.nn.attention.varlen", "scaled_dot_product_attention by length"]


def test_the_kernel_without_padding_gets_the_blocks_as_it_counts_them(monkeypatch):
    """It runs on GPUs alone: a stand-in takes its arguments at their word (flash attention's lower right corner)."""
    from torch.nn.attention import varlen

    takes = inspect.signature(varlen.varlen_attn)

    def stand_in(*arguments, window_size, scale, enable_gqa):
        takes.bind(*arguments, window_size=window_size, scale=scale, enable_gqa=enable_gqa)
        query, key, value, of_queries, of_keys, max_q, max_k = arguments
        assert all(starts.dtype == torch.int32 and starts.is_contiguous() for starts in (of_queries, of_keys))
        queries, keys = of_queries.diff().tolist(), of_keys.diff().tolist()
        assert window_size == (-1, 0) and enable_gqa and (max_q, max_k) == (max(queries), max(keys))
        return naive(query, key, value, Blocks(queries, keys), scale)

    assert packed_attention._varlen_kernel() is varlen.varlen_attn
    monkeypatch.setattr(packed_attention, "_varlen_kernel", lambda: stand_in)
    monkeypatch.setattr(packed_attention, "has_varlen_kernel", lambda *_: True)
    for lengths, seen in SHARED.values():
        query, *_ = packed(lengths, 4, 2)
        _, key, value, _ = packed([max(map(max, seen)) + 1], 4, 2, seed=1)
        assert_same(query, key, value, Blocks(lengths, [len(rows) for rows in seen], torch.tensor([*chain.from_iterable(seen)])))
    assert_same(*packed([3, 7, 1, 4], 4, 2))
