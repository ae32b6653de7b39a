"""Hidden states -> one log-prob sum per response, on the last pipeline stage, without ever holding tokens x vocabulary.

``response_logps`` is an ``output_processor`` (megatron/core/models/gpt/gpt_model.py:719): upstream hands it the hidden states, the output
layer and the tied weight, and what it returns is the model's output. Only positions that predict response tokens reach the output layer, a
chunk of them at a time: the chunk's logits are float32, shared out over tensor parallelism by vocabulary, used and forgotten, and computed
again in backward; only the last chunk's stay, because backward can begin with them. So the peak is chunk x vocabulary / TP, whatever the
batch. The weight's gradient goes into Megatron's float32 buffer where there is one, chunk by chunk, so that nothing is rounded on the way
and no pass over a second one of its size is made. The same idea without the vocabulary split: Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models" (arXiv 2411.09009), section 4.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_patch.preference.logps import ScoredTargets, sum_by_response

# T packed tokens, N scored tokens, C of them in a chunk, R responses, H hidden, V rows of the vocabulary on this rank.

_CONVERTED_ROWS = 8192
"""Rows of a bfloat16 output weight that are float32 at a time where the device has no product that accumulates into float32."""


class VocabularyShard(NamedTuple):
    """This rank's part of the output layer and how its tokens are worked through."""

    rows: int
    """V, padding included."""
    first_row: int
    size: int
    """Rows that exist over all ranks. Rows beyond are -inf: a zero row would take probability mass."""
    group: Any
    """The ranks that share the vocabulary."""
    chunk: int
    """C, tokens."""

    def own(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(whether this rank has the target's row, the row's number here) of targets [C]."""
        column = targets - self.first_row
        return (column >= 0) & (column < self.rows), column.clamp(0, self.rows - 1)


def _logits(hidden: Tensor, weight: Tensor, shard: VocabularyShard) -> Tensor:
    """float32 [C, V] of hidden [C, H] and weight [V, H], -inf in the padded rows.

    float32, because bfloat16 logits of 16 to 32 are 0.125 apart: policy and reference would differ by rounding alone.
    """
    if weight.dtype == torch.float32:
        logits = hidden.float() @ weight.t()
    elif weight.is_cuda:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # type: ignore[call-overload]
    else:
        logits = hidden.new_empty(hidden.size(0), weight.size(0), dtype=torch.float32)
        for into, rows in zip(logits.split(_CONVERTED_ROWS, dim=1), weight.split(_CONVERTED_ROWS), strict=True):
            torch.mm(hidden.float(), rows.float().t(), out=into)
    existing = shard.size - shard.first_row
    if existing < shard.rows:
        logits[:, max(0, existing) :] = float("-inf")
    return logits


def _exponentials(hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk on this rank: exp(logit - largest) [C, V], the largest logit [C], the target's logit or 0 [C]."""
    logits = _logits(hidden, weight, shard)
    mine, column = shard.own(targets)
    peak = logits.amax(dim=-1).clamp(min=torch.finfo(torch.float32).min)  # finite on a rank that has padding only
    chosen = torch.where(mine, logits.gather(-1, column.unsqueeze(-1)).squeeze(-1), 0.0)
    return logits.sub_(peak.unsqueeze(-1)).exp_(), peak, chosen


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden[positions] @ weight^T)[targets], the vocabulary split over a process group, a chunk of positions at a time.

    Forward and backward collectives are explicit, because torch's functional ones fail on gloo subgroups; there are two of [N] floats.
    The gradient of ``hidden`` is this rank's share: upstream's region in front of it sums over the ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor, shard: VocabularyShard, embeds: bool
    ) -> Tensor:
        """hidden: [T, H]; weight: [V, H]; positions, targets: int64 [N], targets in global vocabulary rows; returns float32 [N] nats."""
        peak, total, chosen = hidden.new_empty(3, len(targets), dtype=torch.float32)
        exponentials = None
        for part in _chunks(len(targets), shard.chunk):
            del exponentials  # of the chunk before, which backward computes again
            exponentials, peak[part], chosen[part] = _exponentials(hidden[positions[part]], weight, targets[part], shard)
            total[part] = exponentials.sum(dim=-1)
        own_peak = peak.clone()
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=shard.group)
        own_share = (own_peak - peak).exp()
        sums = torch.stack([total * own_share, chosen])
        torch.distributed.all_reduce(sums, group=shard.group)
        total, chosen = sums
        scale = own_share / total  # from exponentials to probabilities
        ctx.save_for_backward(hidden, weight, positions, targets, own_peak, scale)
        ctx.shard, ctx.embeds, ctx.last_exponentials = shard, embeds, exponentials
        return (chosen - peak) - total.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        """d logp / d logit = onehot(target) - softmax; sums over chunks are float32."""
        hidden, weight, positions, targets, own_peak, scale = ctx.saved_tensors
        shard, (grad,) = ctx.shard, grads
        exponentials, ctx.last_exponentials = ctx.last_exponentials, None  # changed in place: a second backward computes them again
        grad_hidden = torch.zeros_like(hidden)
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        if main_grad is None or main_grad.dtype != torch.float32:
            main_grad = None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if main_grad is None else main_grad
        for part in reversed([*_chunks(len(targets), shard.chunk)]):
            rows = hidden[positions[part]]
            if exponentials is None:
                exponentials = _logits(rows, weight, shard).sub_(own_peak[part].unsqueeze(-1)).exp_()
            mine, column = shard.own(targets[part])
            grad_logits: Tensor = exponentials.mul_((-grad[part] * scale[part]).unsqueeze(-1))
            grad_logits.scatter_add_(-1, column.unsqueeze(-1), (grad[part] * mine).unsqueeze(-1))
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden.index_add_(0, positions[part], (grad_logits @ weight).to(hidden.dtype))
            _add_outer(grad_weight, grad_logits, rows)
            del grad_logits  # before the next chunk's are made
            exponentials = None
        for_autograd = grad_weight.to(weight.dtype) if main_grad is None else _already_added(weight, ctx.embeds)
        return grad_hidden, for_autograd, None, None, None, None


def _already_added(weight: Tensor, embeds: bool) -> Tensor | None:
    """What autograd gets for a weight whose gradient is in its ``main_grad``, as upstream does it (core/tensor_parallel/layers.py:692).

    DDP's hook waits for a gradient, which it leaves alone when the weight says that it was added: memory that nobody fills or reads. A
    weight that is the embedding too gets one from there, which has to be added.
    """
    if embeds:
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


def _add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """float32 total [V, H] += left [C, V]^T right [C, H], without rounding the products to the factors' dtype."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
    else:
        total.addmm_(left.float().t(), right.float())


class _SumOverContext(torch.autograd.Function):
    """Sum over the ranks that hold parts of the same responses, forward and backward.

    Every rank then has the whole loss and counts its pairs; both are summed over these ranks once more by Megatron, so the mean is right.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: Any) -> Tensor:
        """[R] of this rank's tokens -> [R] of all."""
        ctx.group, total = group, sums.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of all ranks' losses."""
        total = grads[0].clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def _chunks(count: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, count, chunk))


def token_logps(
    hidden: Tensor, weight: Tensor, scored: ScoredTargets, *, vocab_size: int, group: Any, chunk: int, embeds: bool = False
) -> Tensor:
    """Log-probs [N] (nats, float32) of the scored tokens of a packed row; differentiable in ``hidden`` and ``weight``.

    Args:
        hidden: [T, H], all of the row's tokens on every rank of ``group``. weight: [V, H], this rank's rows of the output layer.
        vocab_size: rows that exist over all ranks. group: the ranks that share the vocabulary.
        chunk: tokens whose logits are held at a time. embeds: the weight is also the embedding that these hidden states began with.
    """
    shard = VocabularyShard(weight.size(0), weight.size(0) * torch.distributed.get_rank(group), vocab_size, group, chunk)
    return _ChunkedLogProbs.apply(hidden, weight, scored.positions, scored.targets, shard, embeds)


def response_logps(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: ScoredTargets,
    config: Any,
    vocab_size: int,
    chunk: int,
    **_: Any,
) -> Tensor:
    """``output_processor`` of every pass: hidden states [T (/TP with SP), 1, H] -> [R] sums of response log-probs (nats, float64).

    Both traps of the hook are handled here: DDP's forward pre-hook that waits for the parameter all-gather, and the weight
    gradient that must exist even when this micro-batch scores nothing.
    """
    if config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    weight = output_weight if output_weight is not None else output_layer.weight
    group = parallel_state.get_tensor_model_parallel_group()
    embeds = output_layer.weight is None  # tied, on the only stage: a last stage of several has a copy of its own
    logps = token_logps(hidden.squeeze(1), weight, context, vocab_size=vocab_size, group=group, chunk=chunk, embeds=embeds)
    sums = sum_by_response(logps, context)
    if parallel_state.get_context_parallel_world_size() > 1:
        sums = _SumOverContext.apply(sums, parallel_state.get_context_parallel_group())
    return sums
