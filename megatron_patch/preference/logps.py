"""The label shift and the response mask, once, for the policy and the reference alike.

Token t of a response is scored by the logits at position t - 1. The first response token counts, the end token counts, the
prompt and the padding never do. Both passes go through ``scored_targets``; the released LPO code had two copies of this
convention and they drifted apart by one token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# T packed tokens, N scored tokens, R responses.


class ScoredTargets(NamedTuple):
    """Where to predict, what to predict, and which response it belongs to: int64 [N] each, in token order; and how many (R)."""

    positions: Tensor
    targets: Tensor
    response: Tensor
    responses: int


def scored_targets(tokens: Tensor, response_of_token: Tensor, responses: int, before: Tensor | None = None) -> ScoredTargets:
    """Turn a packed row into prediction positions and targets.

    Args:
        tokens: int64 [T], sequences end to end.
        response_of_token: int64 [T], the response a token is scored for, or -1. The first token of a sequence must be -1:
            nothing in its own sequence predicts it (data/packed_batch.py refuses empty prompts).
        responses: R.
        before: int64 [T], the position of the token before each; None: the one on its left, as it is unless responses share a prompt.
    """
    scored = torch.nonzero(response_of_token >= 0).squeeze(1)
    positions = scored - 1 if before is None else before[scored]
    return ScoredTargets(positions, tokens[scored], response_of_token[scored], responses)


def sum_by_response(token_logps: Tensor, scored: ScoredTargets) -> Tensor:
    """Sum token log-probs [N] (nats) into [R] float64 sums; differentiable.

    float64, because a log-ratio is the small difference of two large sums: in float32 a sum of -1000 nats is only known to
    6e-5. R numbers cost nothing.
    """
    sums = torch.zeros(scored.responses, dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, scored.response, token_logps.double())
