"""What is reported about a micro-batch of pairs: each metric a 2-vector [sum over pairs, pairs].

Sums and counts add up over micro-batches and data-parallel ranks whatever the split, so that a mean is taken once, at the end,
by Megatron's own reduction. Nothing here communicates or synchronises with the device. Names are TRL's where TRL has the
metric (rewards are beta times summed log-ratios, as there); the `lpo/` ones are per token, the units in which LPO is tuned.
"""

import torch
from torch import Tensor

from megatron_patch.preference.anchors import fall
from megatron_patch.preference.inputs import PairLogps, Surroundings
from megatron_patch.preference.losses import LossSum, anchored_part, preference_loss, terms_of, without_anchor


def preference_metrics(
    logps: PairLogps, options: LossSum, losses: Tensor, around: Surroundings, *, with_reference: bool = True
) -> dict[str, Tensor]:
    """Metrics of P pairs, each float32 [sum, P], detached; P = 0 gives zeros.

    Args:
        logps: the pairs that the losses came from.
        options: the losses and their constants; rewards are those of the first (with beta 0.1 where it has none: sft, slic).
        losses: [P], what `preference_loss(logps, options, around)` returned.

    Returns:
        rewards/{chosen,rejected,margins}: beta x summed log-ratio (dimensionless) and the difference of the two;
        rewards/accuracies: 1 where the chosen reward is strictly greater;
        logps/{chosen,rejected}: policy's log-probability of the response, summed over its tokens, nats;
        lpo/{chosen,rejected}_logratio, lpo/margin: nats per token, and their difference;
        lpo/anchor_active: 1 where the anchor contributes (0 without an anchor);
        lpo/loss_without_anchor, loss: loss of the pair without and with its anchor;
        statistics/*: the running statistics that the losses used, if they have any.
        Without a reference (its log-probs are NaN) rewards/* and lpo/* are left out.
    """
    first = options[0].options
    with torch.no_grad():
        chosen, rejected = _log_ratio(logps.policy_chosen, logps.ref_chosen), _log_ratio(logps.policy_rejected, logps.ref_rejected)
        chosen_rate, rejected_rate = chosen / logps.chosen_len, rejected / logps.rejected_len
        per_pair = {
            "rewards/chosen": first.beta * chosen,
            "rewards/rejected": first.beta * rejected,
            "rewards/margins": first.beta * (chosen - rejected),
            "rewards/accuracies": chosen > rejected,
            "logps/chosen": logps.policy_chosen,
            "logps/rejected": logps.policy_rejected,
            "lpo/chosen_logratio": chosen_rate,
            "lpo/rejected_logratio": rejected_rate,
            "lpo/margin": chosen_rate - rejected_rate,
            "lpo/anchor_active": _anchor_active(logps, options, around),
            "lpo/loss_without_anchor": preference_loss(logps, without_anchor(options), around),
            "loss": losses,
            **{f"statistics/{name}": torch.full_like(losses, value) for name, value in around.statistics.items()},
        }
        of_reference = () if with_reference else ("rewards/", "lpo/")
        return {name: _sum_and_count(values) for name, values in per_pair.items() if not name.startswith(of_reference)}


def _log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), torch.float32)
    return policy.to(wide) - reference.to(wide)


def _anchor_active(logps: PairLogps, options: LossSum, around: Surroundings) -> Tensor:
    anchored = anchored_part(options)
    if anchored is None:
        return torch.zeros(logps.policy_chosen.shape, device=logps.policy_chosen.device)
    return fall(terms_of(logps, anchored, around), anchored) > 0


def _sum_and_count(values: Tensor) -> Tensor:
    values = values.detach().to(torch.float32)
    # full() fills on the device; building the count from a Python number would copy it there and wait.
    return torch.stack((values.sum(), torch.full((), float(values.shape[0]), dtype=torch.float32, device=values.device)))
