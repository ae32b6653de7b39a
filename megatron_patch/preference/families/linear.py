"""The lpo family: a distance from a margin instead of a log-sigmoid, with the two sides' gradients apart (symbols: inputs.py)."""

from torch import Tensor

from megatron_patch.preference.inputs import LossOptions, PairTerms


def lpo(pairs: PairTerms, options: LossOptions) -> Tensor:
    """LPO (arXiv 2508.14947, Eq. 6) in the scale of its authors' released code, which is twice the paper's.

    L = 4 b |h - m|.  dL/dx1 = 4 b sgn(h - m), dL/dx2 = -dL/dx1.  Identity: 4 b m, that is 2.
    """
    return 4.0 * options.beta * (pairs.x1 - pairs.x2 - target(options)).abs()


def lpo_paper(pairs: PairTerms, options: LossOptions) -> Tensor:
    """LPO (arXiv 2508.14947, Eq. 6 and 7) in the paper's scale.

    L = 2 b |h - m|.  dL/dx1 = 2 b sgn(h - m), dL/dx2 = -dL/dx1.  Identity: 2 b m, that is 1.
    """
    return 2.0 * options.beta * (pairs.x1 - pairs.x2 - target(options)).abs()


def lpo_r(pairs: PairTerms, options: LossOptions) -> Tensor:
    """LPO with weighted log-ratios; only in the authors' released code (arXiv 2508.14947 has no equation for it).

    L = 4 b |g - m| with g = r1 x1 - r2 x2.  dL/dx1 = 4 b r1 sgn(g - m), dL/dx2 = -4 b r2 sgn(g - m).  Identity: 4 b m, that is 2.
    The weights also move the target, so that values with different r2 cannot be compared.
    """
    return 4.0 * options.beta * (options.r1 * pairs.x1 - options.r2 * pairs.x2 - target(options)).abs()


def lpo_ste(pairs: PairTerms, options: LossOptions) -> Tensor:
    """LPO with a straight-through split of the two sides (arXiv 2508.14947, Eq. 11-12, as released: r1 and r2 once, not squared).

    L = 4 b / (r1+r2) (r1 |x1 - sg(x2) - m| + r2 |sg(x1) - x2 - m|), whose value is lpo's for every r1, r2.
    dL/dx1 = 4 b r1/(r1+r2) sgn(h - m), dL/dx2 = -4 b r2/(r1+r2) sgn(h - m).  Identity: 4 b m, that is 2.
    """
    chosen_side, rejected_side = _one_sided_distances(pairs, options)
    scale = 4.0 * options.beta / (options.r1 + options.r2)
    return scale * (options.r1 * chosen_side + options.r2 * rejected_side)


def lpo_ste_paper(pairs: PairTerms, options: LossOptions) -> Tensor:
    """LPO with the straight-through split exactly as printed (arXiv 2508.14947, Eq. 11-12): r1 and r2 act twice.

    L = 4 b / (r1+r2) (r1^2 |x1 - sg(x2) - m| + r2^2 |sg(x1) - x2 - m|); its anchor is `anchors.ste_paper`.
    dL/dx1 = 4 b r1^2/(r1+r2) sgn(h - m), dL/dx2 = -4 b r2^2/(r1+r2) sgn(h - m).  Identity: 4 b m (r1^2 + r2^2) / (r1 + r2).
    """
    chosen_side, rejected_side = _one_sided_distances(pairs, options)
    scale = 4.0 * options.beta / (options.r1 + options.r2)
    return scale * (options.r1**2 * chosen_side + options.r2**2 * rejected_side)


def lpo_ste_dynamic(pairs: PairTerms, options: LossOptions) -> Tensor:
    """LPO-ste with r1 = 1 and r2 = exp(sg(x2 - x1)) for each pair; only in the authors' released code (arXiv 2508.14947).

    L = 4 b (s(sg h) |x1 - sg(x2) - m| + s(-sg h) |sg(x1) - x2 - m|): the normalised weights are logistic functions of the margin,
    which stay finite where the ratio of exponentials does not.
    dL/dx1 = 4 b s(h) sgn(h - m), dL/dx2 = -4 b s(-h) sgn(h - m): the rejected side is left alone as the margin grows.
    Identity: 4 b m, that is 2.
    """
    chosen_side, rejected_side = _one_sided_distances(pairs, options)
    margin = (pairs.x1 - pairs.x2).detach()
    return 4.0 * options.beta * (margin.sigmoid() * chosen_side + (-margin).sigmoid() * rejected_side)


def target(options: LossOptions) -> float:
    """m: the given offset, or 1 / (2 b)."""
    return 1.0 / (2.0 * options.beta) if options.offset is None else options.offset


def _one_sided_distances(pairs: PairTerms, options: LossOptions) -> tuple[Tensor, Tensor]:
    """|h - m| twice, [P] each: first with its gradient to x1 only, then with its gradient to x2 only."""
    m = target(options)
    return (pairs.x1 - pairs.x2.detach() - m).abs(), (pairs.x1.detach() - pairs.x2 - m).abs()
