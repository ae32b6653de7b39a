"""Losses of the margin h between the two log-ratios alone: what moves the chosen response up moves the rejected one down as much.

Symbols: inputs.py. dL/dx2 = -dL/dx1 unless it is said. `aot` and `aot_unpaired` look at the margins of a whole micro-batch.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from megatron_patch.preference.inputs import LossOptions, PairTerms


def sigmoid(pairs: PairTerms, options: LossOptions) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, Eq. 7), conservative with label_smoothing e (Mitchell's cDPO note).

    L = -(1-e) ls(b h) - e ls(-b h).  dL/dx1 = b (s(b h) - (1-e)).  Identity: ln 2.
    """
    return _smoothed(options.beta * (pairs.x1 - pairs.x2), options.label_smoothing)


def robust(pairs: PairTerms, options: LossOptions) -> Tensor:
    """Robust DPO (Ray Chowdhury et al., arXiv 2403.00409, Eq. 12): unbiased for DPO's loss when labels are flipped with probability e.

    L = (-(1-e) ls(b h) + e ls(-b h)) / (1-2e).  dL/dx1 = -b ((1-e) s(-b h) + e s(b h)) / (1-2e).  Identity: ln 2.
    Not bounded below: it falls like -e b h / (1-2e).
    """
    logits, e = options.beta * (pairs.x1 - pairs.x2), options.label_smoothing
    return (-(1.0 - e) * logsigmoid(logits) + e * logsigmoid(-logits)) / (1.0 - 2.0 * e)


def ipo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """IPO (Azar et al., arXiv 2310.12036, Eq. 17); b is the paper's tau, averaged over tokens as its authors advise.

    L = (h - 1/(2b))^2.  dL/dx1 = 2 (h - 1/(2b)).  Identity: 1/(2b)^2.
    """
    return (pairs.x1 - pairs.x2 - 1.0 / (2.0 * options.beta)) ** 2


def hinge(pairs: PairTerms, options: LossOptions) -> Tensor:
    """Hinge on the log-ratio margin (Liu et al., RSO, arXiv 2309.06657, "hinge-norm").

    L = [1 - b h]+.  dL/dx1 = -b while b h < 1, else 0.  Identity: 1.
    """
    return relu(1.0 - options.beta * (pairs.x1 - pairs.x2))


def dpop(pairs: PairTerms, options: LossOptions) -> Tensor:
    """DPO-positive, Smaug (Pal et al., arXiv 2402.13228, Eq. 3): a penalty inside the sigmoid while the chosen response loses.

    L = -ls(z), z = b (h - l [-x1]+), l = dpop_lambda.  dL/dx1 = -b (1 + l 1[x1 < 0]) s(-z), dL/dx2 = b s(-z).  Identity: ln 2.
    """
    penalty = options.dpop_lambda * relu(-pairs.x1)
    return -logsigmoid(options.beta * (pairs.x1 - pairs.x2 - penalty))


def odpo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """DPO with an offset (Amini et al., arXiv 2402.10571, Eq. 8 with f = log): better pairs need a larger margin.

    L = -ls(z), z = b h - a log(score_chosen - score_rejected), a = margin; the gap of the scores must be > 0.
    dL/dx1 = -b s(-z).  Identity: -ls(-a log(gap)) = log(1 + gap^a).
    """
    assert pairs.logps.score_chosen is not None and pairs.logps.score_rejected is not None, "odpo needs scored pairs"
    gap = (pairs.logps.score_chosen - pairs.logps.score_rejected).to(pairs.x1)
    return -logsigmoid(options.beta * (pairs.x1 - pairs.x2) - options.margin * gap.log())


def exo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """EXO on pairs (Ji et al., arXiv 2402.00856, Eq. 16): reverse KL from the policy's preference to a softened label, e = label_smoothing.

    L = q (log q - log(1-e)) + (1-q) (log(1-q) - log e), q = s(b h).  dL/dx1 = b q (1-q) (b h - log((1-e)/e)).
    Identity: -ln 2 - (ln(1-e) + ln e) / 2.
    """
    logits, e = options.beta * (pairs.x1 - pairs.x2), options.label_smoothing
    towards, away = logsigmoid(logits) - math.log1p(-e), logsigmoid(-logits) - math.log(e)
    return logits.sigmoid() * towards + (-logits).sigmoid() * away


def discopop(pairs: PairTerms, options: LossOptions) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (Lu et al., arXiv 2406.08414, Section 4), z = b h, t = discopop_tau.

    L = (1 - s(z/t)) (-ls z) + s(z/t) exp(-z).  dL/dz = -(1-m) s(-z) - m e^-z + m (1-m)/t (e^-z + ls z) with m = s(z/t);
    dL/dx1 = b dL/dz.  Identity: (ln 2 + 1) / 2, where dL/dz = +0.784 at t = 0.05: the first step lowers the margin.
    exp(-z) alone overflows at very negative z, where s(z/t) vanishes faster (t <= 1): their product is one exponential.
    """
    z = options.beta * (pairs.x1 - pairs.x2)
    blend = z / options.discopop_tau
    return -(-blend).sigmoid() * logsigmoid(z) + (logsigmoid(blend) - z).exp()


def aot(pairs: PairTerms, options: LossOptions) -> Tensor:
    """Alignment by optimal transport, paired (Melnyk et al., arXiv 2406.05882): the policy's margins against the reference's, both sorted.

    With u = log pi(chosen) - log pi(rejected) and v the same of the reference, over the B pairs of a micro-batch on all data-parallel
    ranks: L_k = DPO's loss with b (u_(k) - v_(k)) instead of b h, e = label_smoothing. Each pair answers for the rank k of its own u,
    so dL/du = b (s(b d) - (1-e)) with d = u_(k) - v_(k).  Identity: ln 2.  One pair alone: DPO.
    """
    everyone = pairs.peers
    policy = everyone.p1 - everyone.p2
    reference = policy - (everyone.x1 - everyone.x2)
    opposite = _at_rank_of(policy, reference)[pairs.own]
    return _smoothed(options.beta * (pairs.p1 - pairs.p2 - opposite), options.label_smoothing)


def aot_unpaired(pairs: PairTerms, options: LossOptions) -> Tensor:
    """Alignment by optimal transport, unpaired (Melnyk et al., arXiv 2406.05882): chosen log-ratios against rejected ones, both sorted.

    L_k = DPO's loss with x1_(k) - x2_(k) over the B pairs of a micro-batch on all data-parallel ranks. A pair's value is that of the
    rank of its chosen response; its rejected response answers for its own rank, with a gradient and no value.
    dL/dx1 = b (s(b d1) - (1-e)), dL/dx2 = -b (s(b d2) - (1-e)) with the d of their own ranks.  Identity: ln 2.  One pair alone: DPO.
    """
    everyone = pairs.peers
    below = _at_rank_of(everyone.x1, everyone.x2)[pairs.own]
    above = _at_rank_of(everyone.x2, everyone.x1)[pairs.own]
    chosen_side = _smoothed(options.beta * (pairs.x1 - below), options.label_smoothing)
    rejected_side = _smoothed(options.beta * (above - pairs.x2), options.label_smoothing)
    return chosen_side + (rejected_side - rejected_side.detach())


def _smoothed(logits: Tensor, e: float) -> Tensor:
    """-(1-e) ls(z) - e ls(-z)."""
    return -(1.0 - e) * logsigmoid(logits) - e * logsigmoid(-logits)


def _at_rank_of(values: Tensor, others: Tensor) -> Tensor:
    """For each of ``values`` [B] the element of ``others`` [B] of the same rank; equal values rank in the order they stand in."""
    rank = torch.argsort(torch.argsort(values, stable=True))
    return torch.sort(others).values[rank]
