"""Losses that look at the policy's own log-probabilities: without a reference, or with the chosen response's likelihood beside a margin.

Symbols: inputs.py.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from megatron_patch.preference.families.margin import sigmoid
from megatron_patch.preference.inputs import LossOptions, PairTerms

ALPHA_MARGIN = "alpha-dpo/margin"  # running statistics: mean of b h over a global batch, and of its square
ALPHA_SQUARE = "alpha-dpo/margin_square"
LEAST_DEVIATION = 1e-3  # of b h: below it margins are all the same and their standardised value would be rounding
NEAREST_ONE = -1e-6  # largest log-prob per token that the odds see: at probability 1 they are infinite, and float32 may round above it


def simpo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """SimPO (Meng et al., arXiv 2405.14734, Eq. 6), g = margin.

    L = -ls(z), z = b (p1 - p2) - g.  dL/dp1 = -b s(-z), dL/dp2 = b s(-z).  Identity: depends on the pair.
    """
    return -logsigmoid(options.beta * (pairs.p1 - pairs.p2) - options.margin)


def alpha_dpo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """alpha-DPO (Wu et al., arXiv 2410.10148, Eq. 12): SimPO whose margin follows the pair's own log-ratio margin, g = margin, a = alpha.

    L = -ls(z), z = b (p1 - p2) - sg(g + a M*), M* = (b h - mean) / deviation.  dL/dp1 = -b s(-z), dL/dp2 = b s(-z).
    Identity: SimPO's, until the statistics move. Mean and deviation of b h are those of the global batches before this one
    (exponential averages of it and of its square, which start at 0 and 1). a = 0 is SimPO. The authors' code multiplies its alpha (0.05
    to 0.2 in their scripts) by b, which the paper and this function do not: theirs times b is ours.
    """
    mean, square = pairs.statistics.get(ALPHA_MARGIN, 0.0), pairs.statistics.get(ALPHA_SQUARE, 1.0)
    deviation = max(math.sqrt(max(square - mean * mean, 0.0)), LEAST_DEVIATION)
    target = options.margin + options.alpha * (log_ratio_margin(pairs, options).detach() - mean) / deviation
    return -logsigmoid(options.beta * (pairs.p1 - pairs.p2) - target)


def log_ratio_margin(pairs: PairTerms, options: LossOptions) -> Tensor:
    """b h of each pair [P], what alpha-dpo standardises."""
    return options.beta * (pairs.x1 - pairs.x2)


def log_ratio_margin_square(pairs: PairTerms, options: LossOptions) -> Tensor:
    """(b h)^2 of each pair [P]."""
    return log_ratio_margin(pairs, options) ** 2


def stapo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """Two-sided contrastive loss ("Stable Preference Optimization via Two-sided Contrastive Learning", no arXiv number known).

    L = -ls(b (p1 - p2 - ml)) - ls(b (mr - (p1 - p2))), ml = margin, mr = upper_margin: a smooth valley around (ml + mr) / 2.
    dL/dp1 = -b s(-b (p1-p2-ml)) + b s(-b (mr-(p1-p2))), dL/dp2 = -dL/dp1.  Identity: depends on the pair.
    """
    gap = pairs.p1 - pairs.p2
    return -logsigmoid(options.beta * (gap - options.margin)) - logsigmoid(options.beta * (options.upper_margin - gap))


def slic(pairs: PairTerms, options: LossOptions) -> Tensor:
    """SLiC-HF (Zhao et al., arXiv 2305.10425, Eq. 1), regularised on the chosen response: d = margin, w = sft_weight.

    L = [d - p1 + p2]+ - w p1.  dL/dp1 = -1[d > p1 - p2] - w, dL/dp2 = 1[d > p1 - p2].  Identity: depends on the pair.
    """
    return relu(options.margin - pairs.p1 + pairs.p2) - options.sft_weight * pairs.p1


def orpo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """ORPO (Hong et al., arXiv 2403.07691, Eq. 6-7); b is the paper's lambda, p per token.

    L = n - b ls(o), o = logit(e^p1) - logit(e^p2).  dL/dp1 = dn/dp1 - b s(-o) / (1 - e^p1), dL/dp2 = b s(-o) / (1 - e^p2);
    dn/dp1 = -1 per token.  Identity: depends on the pair.
    """
    return pairs.nll - options.beta * logsigmoid(_log_odds(pairs.p1) - _log_odds(pairs.p2))


def cpo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """CPO (Xu et al., arXiv 2401.08417, Eq. 6), w = sft_weight.

    L = -ls(z) + w n, z = b (p1 - p2).  dL/dp1 = -b s(-z) + w dn/dp1, dL/dp2 = b s(-z).  Identity: depends on the pair.
    """
    return -logsigmoid(options.beta * (pairs.p1 - pairs.p2)) + options.sft_weight * pairs.nll


def rpo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """RPO by adversarial SFT (Liu et al., arXiv 2405.16436, Eq. 4.1), e = sft_weight: DPO plus the chosen response's likelihood.

    L = -ls(b h) - e b p1.  dL/dx1 = -b s(-b h) - e b, dL/dx2 = b s(-b h).  Identity: ln 2 - e b p1.  e = 0 is DPO.
    Two other methods are called RPO: `irpo`, and NVIDIA's reward-aware one, which is not here.
    """
    return sigmoid(pairs, options) - options.sft_weight * options.beta * pairs.p1


def irpo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """Iterative RPO (Pang et al., arXiv 2404.19733, Eq. 1), a = sft_weight: DPO plus the chosen response's likelihood per token.

    L = -ls(b h) + a n.  dL/dx1 = -b s(-b h) + a dn/dx1, dL/dx2 = b s(-b h); dn/dX1 = -1 / length.  Identity: ln 2 + a n.
    """
    return sigmoid(pairs, options) + options.sft_weight * pairs.nll


def sft(pairs: PairTerms, options: LossOptions) -> Tensor:
    """The chosen response's negative log-likelihood: fine-tuning, alone or as a part of a weighted sum (arXiv 2411.10442, Eq. 1).

    L = -p1.  dL/dp1 = -1, dL/dp2 = 0.  Identity: depends on the pair. Each pair counts the same, however long its response.
    """
    return -pairs.p1


def _log_odds(logp: Tensor) -> Tensor:
    """log(e^p / (1 - e^p)) of p < 0; log(1 - e^p) as in Maechler's "Accurately computing log(1 - exp(-|a|))"."""
    below_one = logp.clamp(max=NEAREST_ONE)
    half = -math.log(2.0)
    small = torch.log(-torch.expm1(below_one.clamp(min=half)))
    large = torch.log1p(-torch.exp(below_one.clamp(max=half)))
    return below_one - torch.where(below_one > half, small, large)
