"""Hidden states -> one log-prob sum per response, on the last pipeline stage.

``response_logps`` is an ``output_processor`` (megatron/core/models/gpt/gpt_model.py:719): upstream hands it the hidden states,
the output layer and the tied weight, and what it returns is the model's output. Only positions that predict response tokens
reach the output layer; the log-softmax is vocabulary-parallel, in float32, and never sees the padded rows of the vocabulary.
"""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_patch.preference.logps import ScoredTargets, sum_by_response

# T packed tokens, N scored tokens, R responses, H hidden, V rows of the vocabulary on this rank.


class _VocabParallelLogProb(torch.autograd.Function):
    """log softmax(logits)[target] with the vocabulary split over a process group.

    Forward and backward collectives are explicit, because torch's functional ones fail on gloo subgroups.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first_row: int, group: Any) -> Tensor:
        """logits: [N, V] float32; targets: int64 [N] in global vocabulary rows; returns [N] nats."""
        peak = logits.max(dim=-1).values
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=group)
        shifted = logits - peak.unsqueeze(-1)
        total = shifted.exp().sum(dim=-1)
        mine = (targets >= first_row) & (targets < first_row + logits.size(-1))
        column = (targets - first_row).clamp(0, logits.size(-1) - 1)
        chosen = torch.where(mine, shifted.gather(-1, column.unsqueeze(-1)).squeeze(-1), torch.zeros_like(total))
        torch.distributed.all_reduce(total, group=group)
        torch.distributed.all_reduce(chosen, group=group)
        ctx.save_for_backward((shifted - total.log().unsqueeze(-1)).exp_(), mine, column)
        return chosen - total.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """d logp / d logit = onehot(target) - softmax."""
        probabilities, mine, column = ctx.saved_tensors
        (grad,) = grads
        grad_logits = -probabilities * grad.unsqueeze(-1)
        grad_logits.scatter_add_(-1, column.unsqueeze(-1), (grad * mine).unsqueeze(-1))
        return grad_logits, None, None, None


def vocab_parallel_logps(logits: Tensor, targets: Tensor, vocab_size: int, group: Any) -> Tensor:
    """Log-probs [N] (nats) of ``targets`` [N] under vocabulary-parallel ``logits`` [N, V].

    Rows at or beyond ``vocab_size`` (padding of the vocabulary for TP) are -inf: a zero row would take probability mass.
    """
    rows = logits.size(-1)
    first_row = rows * torch.distributed.get_rank(group)
    logits = logits.float()
    if first_row + rows > vocab_size:
        logits = logits.masked_fill(torch.arange(first_row, first_row + rows, device=logits.device) >= vocab_size, float("-inf"))
    return _VocabParallelLogProb.apply(logits, targets, first_row, group)


def response_logps(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: ScoredTargets,
    config: Any,
    vocab_size: int,
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
    # float32, because bfloat16 logits of 16 to 32 are 0.125 apart: policy and reference would differ by rounding alone.
    logits = torch.nn.functional.linear(hidden.squeeze(1).index_select(0, context.positions).float(), weight.float())
    logps = vocab_parallel_logps(logits, context.targets, vocab_size, parallel_state.get_tensor_model_parallel_group())
    return sum_by_response(logps, context)
