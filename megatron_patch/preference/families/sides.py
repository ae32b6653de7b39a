"""Losses that hold each response against a target of its own: chosen and rejected are pulled apart, not against each other.

Symbols: inputs.py.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_patch.preference.inputs import LossOptions, PairTerms

BCO_REWARD = "bco/reward"  # running statistic: mean reward b (x1 + x2) / 2 of a global batch


def kto(pairs: PairTerms, options: LossOptions) -> Tensor:
    """KTO (Ethayarajh et al., arXiv 2402.01306, Eq. 8) with a pair's two responses as one desirable and one undesirable example.

    L = (w1 (1 - s(b (x1 - z0))) + w2 (1 - s(b (z0 - x2)))) / 2, w1 = desirable_weight, w2 = undesirable_weight.
    z0 = [mean of x over all responses of the micro-batch on all data-parallel ranks]+, without gradient: an estimate of the KL from
    the reference. The paper and TRL estimate it on mismatched prompts and responses, which costs one more forward pass.
    dL/dx1 = -w1 b s'(b (x1 - z0)) / 2, dL/dx2 = w2 b s'(b (z0 - x2)) / 2, s' = s (1 - s).  Identity: (w1 + w2) / 4.
    """
    everyone = pairs.peers
    z0 = _mean(torch.cat((everyone.x1, everyone.x2))).clamp(min=0)
    chosen = options.desirable_weight * (options.beta * (z0 - pairs.x1)).sigmoid()
    rejected = options.undesirable_weight * (options.beta * (pairs.x2 - z0)).sigmoid()
    return (chosen + rejected) / 2


def kto_pair(pairs: PairTerms, options: LossOptions) -> Tensor:
    """KTO's paired form (arXiv 2402.01306; the loss TRL had until 0.28): each side against the other side's mean.

    L = (1 - s(b (x1 - z2)) + 1 - s(b (z1 - x2))) / 2, zi = [mean of xi over the micro-batch on all data-parallel ranks]+, without
    gradient (the released LPO code lets one through).
    dL/dx1 = -b s'(b (x1 - z2)) / 2, dL/dx2 = b s'(b (z1 - x2)) / 2.  Identity: 1/2.
    """
    everyone = pairs.peers
    chosen_kl, rejected_kl = _mean(everyone.x1).clamp(min=0), _mean(everyone.x2).clamp(min=0)
    return ((options.beta * (rejected_kl - pairs.x1)).sigmoid() + (options.beta * (pairs.x2 - chosen_kl)).sigmoid()) / 2


def bco(pairs: PairTerms, options: LossOptions) -> Tensor:
    """BCO on pairs (Jung et al., arXiv 2404.04656, Eq. 9): a binary classifier of rewards around their running mean d.

    L = -ls(b x1 - d) - ls(-(b x2 - d)).  dL/dx1 = -b s(d - b x1), dL/dx2 = b s(b x2 - d).  Identity: 2 ln 2 at d = 0.
    d is the exponential average, over the global batches before this one, of the mean of b x over chosen and rejected; it starts at 0,
    the reward of the reference. The batch's own mean does not exist yet when its first micro-batch runs backward.
    """
    delta = pairs.statistics.get(BCO_REWARD, 0.0)
    return -logsigmoid(options.beta * pairs.x1 - delta) - logsigmoid(delta - options.beta * pairs.x2)


def reward_mean(pairs: PairTerms, options: LossOptions) -> Tensor:
    """b (x1 + x2) / 2 of each pair [P], what bco's running mean is made of."""
    return options.beta * (pairs.x1 + pairs.x2) / 2


def nca(pairs: PairTerms, options: LossOptions) -> Tensor:
    """NCA on pairs (Chen et al., arXiv 2402.05369, Eq. 12): noise contrast, which keeps the chosen response's absolute likelihood up.

    L = -ls(b x1) - ls(-b x1) / 2 - ls(-b x2) / 2.  dL/dx1 = b (-s(-b x1) + s(b x1) / 2), dL/dx2 = b s(b x2) / 2.  Identity: 2 ln 2.
    """
    chosen, rejected = options.beta * pairs.x1, options.beta * pairs.x2
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def apo_zero(pairs: PairTerms, options: LossOptions) -> Tensor:
    """Anchored preference optimisation, zero (D'Oosterlinck et al., arXiv 2408.06266, Eq. 7): chosen up, rejected down.

    L = 1 - s(b x1) + s(b x2).  dL/dx1 = -b s'(b x1), dL/dx2 = b s'(b x2).  Identity: 1.
    """
    return (-options.beta * pairs.x1).sigmoid() + (options.beta * pairs.x2).sigmoid()


def apo_down(pairs: PairTerms, options: LossOptions) -> Tensor:
    """Anchored preference optimisation, down (arXiv 2408.06266, Eq. 8): for a policy better than its chosen responses.

    L = s(b x1) + 1 - s(b h).  dL/dx1 = b s'(b x1) - b s'(b h), dL/dx2 = b s'(b h).  Identity: 1.
    """
    return (options.beta * pairs.x1).sigmoid() + (options.beta * (pairs.x2 - pairs.x1)).sigmoid()


def sppo_hard(pairs: PairTerms, options: LossOptions) -> Tensor:
    """SPPO with hard labels (Wu et al., arXiv 2405.00675, Eq. 4.7 with win rates 1 and 0): both log-ratios are drawn to +-1/(2b).

    L = (x1 - 1/(2b))^2 + (x2 + 1/(2b))^2.  dL/dx1 = 2 (x1 - 1/(2b)), dL/dx2 = 2 (x2 + 1/(2b)).  Identity: 1/(2 b^2).
    """
    goal = 1.0 / (2.0 * options.beta)
    return (pairs.x1 - goal) ** 2 + (pairs.x2 + goal) ** 2


def _mean(values: Tensor) -> Tensor:
    """Mean of [B], 0 when B = 0 (an empty micro-batch of all ranks)."""
    return values.sum() / max(1, len(values))
