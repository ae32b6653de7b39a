"""Positive terms: what a loss adds to keep the chosen response likely (symbols: inputs.py; w = anchor_weight)."""

from torch import Tensor
from torch.nn.functional import relu

from megatron_patch.preference.inputs import LossFunction, LossOptions, PairTerms

SPO_EXCESS = "spo/excess"  # running statistic: the least mean of -x1, nats per token, that a global batch has shown, at most 0


def fall(pairs: PairTerms, options: LossOptions) -> Tensor:
    """[P]: how far the chosen response has fallen below what the anchor allows, 0 while it has not."""
    return ANCHORS[options.anchor](pairs, options)


def _hinge(pairs: PairTerms, options: LossOptions) -> Tensor:
    """Keep the chosen response at least as likely as the reference has it (arXiv 2508.14947, Eq. 6, second term).

    A = w [-x1 - slack]+.  dA/dx1 = -w where x1 < -slack, else 0, also at the tie; dA/dx2 = 0.  Identity: 0.
    At policy = reference and slack 0 every pair sits on the kink, where rounding decides between 0 and -w: a small slack avoids it.
    """
    return relu(-pairs.x1 - options.anchor_slack * pairs.unit)


def _spo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """Experimental: the value-function penalty of Stable Preference Optimization (arXiv 2507.07723), around any loss.

    A = w [NLL(chosen) - v - slack]+^p, p = anchor_power, NLL per token whatever the loss's units.  Identity: 0.
    dA/dx1 = -w p [..]^(p-1) per token where it is positive; dA/dx2 = 0.
    The paper's full text could not be read. Known from its abstract: an upper level that is any preference loss, a lower level of
    fine-tuning that bounds it, solved by a penalty on the lower level's optimality gap. Reconstructed here: the fine-tuning data are
    the chosen responses; v, the lower level's best value, is the reference's own NLL of the same response (anchor_value
    "reference": p = 1 is then LPO's hinge) or that NLL plus the least mean of NLL - NLL_ref over a global batch so far
    ("running-minimum": what the policy has once reached it is held to; starts at 0); eps is anchor_slack; p and the weight are free.
    """
    best = pairs.statistics.get(SPO_EXCESS, 0.0) if options.anchor_value == "running-minimum" else 0.0
    return relu(excess(pairs, options) - best - options.anchor_slack) ** options.anchor_power


ANCHORS: dict[str, LossFunction] = {"hinge": _hinge, "spo": _spo}


def weighted(pairs: PairTerms, options: LossOptions) -> Tensor:
    """A = w times the fall."""
    return options.anchor_weight * fall(pairs, options)


def ste_paper(pairs: PairTerms, options: LossOptions) -> Tensor:
    """The anchor inside both sides of arXiv 2508.14947, Eq. 11-12: the rejected side's copy has a value and no gradient.

    A = 2/(r1+r2) (r1 a(x1) + r2 a(sg x1)) with a = `weighted`, in value 2 a(x1).
    dA/dx1 = 2 r1/(r1+r2) da/dx1; dA/dx2 = 0.  Identity: 0.
    """
    term = weighted(pairs, options)
    return 2.0 / (options.r1 + options.r2) * (options.r1 * term + options.r2 * term.detach())


def excess(pairs: PairTerms, options: LossOptions) -> Tensor:
    """-x1 of each pair [P], nats per token, what spo's running minimum is made of."""
    return -pairs.x1 / pairs.unit
