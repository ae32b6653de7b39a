"""Packed attention against a softmax written out for one sequence and one head at a time."""

import math
from itertools import pairwise

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.model.packed_attention import PackedAttention, causal_attention

LENGTHS = [[5], [1, 1, 1], [3, 7, 1, 4], [8, 8]]
HEADS = [(4, 4), (4, 2), (6, 1)]  # query heads, key/value heads


def packed(lengths, heads, groups, head_dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def rows(count):
        return torch.randn(total, count, head_dim, generator=generator, dtype=dtype).requires_grad_()

    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return rows(heads), rows(groups), rows(groups), cu_seqlens


def naive(query, key, value, cu_seqlens, scale):
    out = torch.zeros_like(query)
    per_group = query.size(1) // key.size(1)
    for begin, end in pairwise(cu_seqlens.tolist()):
        for head in range(query.size(1)):
            for t in range(begin, end):
                scores = key[begin : t + 1, head // per_group] @ query[t, head] * scale
                weights = scores.exp() / scores.exp().sum()
                out[t, head] = weights @ value[begin : t + 1, head // per_group]
    return out


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads, groups", HEADS)
def test_values_and_gradients_are_the_naive_ones(lengths, heads, groups):
    query, key, value, cu_seqlens = packed(lengths, heads, groups)
    mine = causal_attention(query, key, value, cu_seqlens, max(lengths), 0.3)
    assert mine.shape == query.shape
    weights = torch.randn(mine.shape, dtype=mine.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((mine * weights).sum(), (query, key, value))
    expected = naive(query, key, value, cu_seqlens, 0.3)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    for grad, other in zip(grads, torch.autograd.grad((expected * weights).sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-11, atol=1e-12)


def test_longest_may_be_overstated():
    query, key, value, cu_seqlens = packed([3, 5], 4, 2)
    exact, loose = (causal_attention(query, key, value, cu_seqlens, longest, 0.3) for longest in (5, 9))
    torch.testing.assert_close(exact, loose, rtol=1e-13, atol=1e-13)


def test_no_sequence_sees_another_or_its_own_future():
    lengths = [4, 6, 3]
    query, key, value, cu_seqlens = packed(lengths, 4, 2, dtype=torch.float32)
    before = causal_attention(query, key, value, cu_seqlens, 6, 0.3)
    with torch.no_grad():
        for tensor in (query, key, value):
            tensor[7:10] = 1e3  # the last three of the six tokens of the second sequence
    after = causal_attention(query, key, value, cu_seqlens, 6, 0.3)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False] * 7 + [True] * 3 + [False] * 3


def test_gradient_stays_inside_the_sequence():
    query, key, value, cu_seqlens = packed([4, 6, 3], 4, 2)
    out = causal_attention(query, key, value, cu_seqlens, 6, 0.3)
    for grad in torch.autograd.grad(out[4:8].square().sum(), (query, key, value)):
        touched = grad.flatten(1).abs().sum(1) > 0
        assert not touched[:4].any() and not touched[8:].any() and touched[4:8].any()


def transformer_config(**options):
    return TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0, **options)


def test_module_scales_by_the_root_of_the_head_size():
    query, key, value, cu_seqlens = packed([3, 5], 4, 2)
    module = PackedAttention(transformer_config(), 1, AttnMaskType.causal, "self")
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=5, max_seqlen_kv=5)
    out = module(query, key, value, None, packed_seq_params=params)
    expected = naive(query, key, value, cu_seqlens, 1 / math.sqrt(8))
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
    with pytest.raises(ValueError, match="packed_seq_params"):
        PackedAttention(transformer_config(), 1, AttnMaskType.causal, "self")(query, key, value)
