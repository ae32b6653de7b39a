"""What a preference loss is given: log-probabilities of pairs, its constants, and the terms that formulas are written in.

Symbols used in every loss's docstring:

    X1, X2  log-ratios of the chosen and of the rejected response, log pi(y) - log pi_ref(y), summed over its tokens (nats)
    x1, x2  what the loss is given: X1 and X2, divided by the response's length (nats per token) when `length_normalised`
    p1, p2  log pi(y) of the two responses in the same units as x1, x2
    n       -log pi(chosen) per token, always: its negative log-likelihood
    h       x1 - x2
    b       beta
    m       `offset` of the lpo family, by default 1 / (2 b): the margin at which the linear and quadratic losses are content
    s(.)    the logistic function;  ls = log s;  sg(.) stops the gradient;  [z]+ = max(z, 0);  sgn(0) = 0

Gradients are given with respect to x1 and x2 (p1, p2 where there is no reference). The reference is constant, so d/dX =
d/d log pi(y), and d/dX = (d/dx) / length when normalised. "Identity" is the value where policy = reference, that is x1 = x2 = 0.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """What is known of P pairs; every field is a tensor of shape [P].

    Log-probabilities are sums over the response's tokens, in nats. Lengths count the same tokens and are at least 1: they are
    checked on the CPU where the batch is made, because looking at them here would synchronise the device.
    """

    policy_chosen: Tensor  # log pi(chosen), nats; carries the gradient
    policy_rejected: Tensor  # log pi(rejected), nats; carries the gradient
    ref_chosen: Tensor  # log pi_ref(chosen), nats
    ref_rejected: Tensor  # log pi_ref(rejected), nats
    chosen_len: Tensor  # tokens scored in the chosen response
    rejected_len: Tensor  # tokens scored in the rejected response
    score_chosen: Tensor | None = None  # an outside judge's score, if the data has one
    score_rejected: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = [value for value in vars(self).values() if value is not None]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        assert len(shapes) == 1 and len(next(iter(shapes))) == 1, f"fields of PairLogps must all have the same shape [P], got {shapes}"

    def at_identity(self) -> "PairLogps":
        """The same pairs as they are when the policy is its reference."""
        return replace(self, policy_chosen=self.ref_chosen, policy_rejected=self.ref_rejected)


@dataclass(frozen=True)
class LossOptions:
    """Which loss, and its constants. Build it with `loss_options`, which knows each loss's defaults and refuses what it does not use.

    Raises:
        ValueError: a value is out of its range.
    """

    loss_type: str  # a name of LOSSES
    beta: float = 0.1  # strength of the preference term: 1/nat, or tokens/nat when length-normalised; > 0
    label_smoothing: float = 0.0  # probability that a label is flipped (exo: how soft its target is), in [0, 0.5)
    r1: float = 1.0  # weight of the chosen side (lpo family), >= 0
    r2: float = 1.0  # weight of the rejected side (lpo family), >= 0
    offset: float | None = None  # margin h at which the lpo family is content, >= 0; None: 1 / (2 beta), as in the paper
    anchor: str = "none"  # "none"; "hinge": penalise chosen responses less likely than under the reference; "spo": see anchors.py
    anchor_weight: float = 0.0  # the paper's lambda, its Table 9's gamma: loss per nat (per token when length-normalised), >= 0
    anchor_slack: float = 0.0  # fall of the chosen log-ratio that costs nothing, nats per token, >= 0
    anchor_power: float = 1.0  # spo: exponent p of the penalty, in [1, 4]
    anchor_value: str = "reference"  # spo: what the chosen response's likelihood is held against, "reference" or "running-minimum"
    length_normalised: bool | None = None  # per token instead of sums; None: what the loss's paper does
    margin: float = 0.0  # simpo, alpha-dpo: target reward margin; slic: target log-prob margin; odpo: scale of the offset; stapo: lower end
    upper_margin: float = 0.0  # stapo: upper end of the band of margins, > margin
    sft_weight: float = 0.0  # weight of the chosen response's negative log-likelihood, >= 0
    dpop_lambda: float = 0.0  # dpop: penalty inside the sigmoid per nat the chosen response loses, >= 0
    alpha: float = 0.0  # alpha-dpo: how far the margin follows the pair's own standardised log-ratio margin, >= 0
    discopop_tau: float = 0.05  # discopop: temperature of the blend, in (0, 1]
    desirable_weight: float = 1.0  # kto: weight of the chosen responses, >= 0
    undesirable_weight: float = 1.0  # kto: weight of the rejected responses, >= 0
    statistics_decay: float = 0.9  # bco, alpha-dpo: what a step keeps of its running statistics, in [0, 1)

    def __post_init__(self) -> None:
        for name, (is_valid, meaning) in _RANGES.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise ValueError(f"{name} = {value!r} is out of range: it must be {meaning}")
        if self.r1 + self.r2 <= 0:
            raise ValueError(f"r1 + r2 must be > 0, got r1 = {self.r1!r}, r2 = {self.r2!r}")
        if self.loss_type == "stapo" and self.upper_margin <= self.margin:
            raise ValueError(f"upper_margin = {self.upper_margin!r} must be greater than margin = {self.margin!r}")
        if self.loss_type == "exo" and self.label_smoothing == 0:
            raise ValueError("label_smoothing = 0 is out of range for exo: its target would be log 0; the usual value is 0.001")


@dataclass(frozen=True)
class Surroundings:
    """What a loss may know beyond its own pair. The default, nothing, suits losses of single pairs and single batches.

    peers: the pairs of this micro-batch on all data-parallel ranks; None: the given pairs are all there are.
    first: where among the peers the given pairs begin.
    statistics: running statistics by name, as of the steps before this one; a missing one has its initial value.
    """

    peers: PairLogps | None = None
    first: int = 0
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PairTerms:
    """The symbols above for P pairs: tensors of shape [P], float32 or wider."""

    x1: Tensor  # chosen log-ratio, nats (per token when length-normalised)
    x2: Tensor  # rejected log-ratio, likewise
    p1: Tensor  # chosen policy log-prob, likewise
    p2: Tensor  # rejected policy log-prob, likewise
    nll: Tensor  # -log pi(chosen), nats per token
    unit: Tensor  # one nat per token of the chosen response in the units of x1
    logps: PairLogps  # for losses that need more
    statistics: Mapping[str, float]  # see Surroundings
    gathered: "PairTerms | None"  # the terms of all data-parallel ranks; None: these pairs are all there are
    own: slice  # where these pairs are among them

    @property
    def peers(self) -> "PairTerms":
        """The terms of the whole micro-batch, B pairs over all data-parallel ranks, without gradient."""
        return self.gathered if self.gathered is not None else detached(self)


def pair_terms(logps: PairLogps, length_normalised: bool, around: Surroundings) -> PairTerms:
    """Terms of ``logps`` in the widest type among the log-probabilities, and never below float32."""
    wide = torch.promote_types(torch.promote_types(logps.policy_chosen.dtype, logps.ref_chosen.dtype), torch.float32)
    policy_chosen, policy_rejected = logps.policy_chosen.to(wide), logps.policy_rejected.to(wide)
    chosen_len, rejected_len = logps.chosen_len.to(wide), logps.rejected_len.to(wide)
    none = torch.ones_like(chosen_len)
    one, two = (chosen_len, rejected_len) if length_normalised else (none, none)
    peers = None if around.peers is None else detached(pair_terms(around.peers, length_normalised, Surroundings()))
    return PairTerms(
        x1=(policy_chosen - logps.ref_chosen.to(wide)) / one,
        x2=(policy_rejected - logps.ref_rejected.to(wide)) / two,
        p1=policy_chosen / one,
        p2=policy_rejected / two,
        nll=-policy_chosen / chosen_len,
        unit=chosen_len / one,
        logps=logps,
        statistics=around.statistics,
        gathered=peers,
        own=slice(around.first, around.first + len(chosen_len)),
    )


def detached(terms: PairTerms) -> PairTerms:
    """The same numbers without their gradient."""
    return replace(terms, **{name: getattr(terms, name).detach() for name in ("x1", "x2", "p1", "p2", "nll")})


LossFunction = Callable[[PairTerms, LossOptions], Tensor]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at_least(low: float) -> tuple[Callable[..., bool], str]:
    return lambda v: _is_number(v) and v >= low, f"a number >= {low:g}"


def _one_of(*names: str) -> tuple[Callable[..., bool], str]:
    return lambda v: v in names, f"one of {', '.join(names)}"


_RANGES: dict[str, tuple[Callable[..., bool], str]] = {
    "beta": (lambda v: _is_number(v) and v > 0, "a number > 0"),
    "label_smoothing": (lambda v: _is_number(v) and 0 <= v < 0.5, "in [0, 0.5)"),
    "r1": _at_least(0),
    "r2": _at_least(0),
    "offset": (lambda v: v is None or (_is_number(v) and v >= 0), "a number >= 0"),
    "anchor": _one_of("none", "hinge", "spo"),
    "anchor_weight": _at_least(0),
    "anchor_slack": _at_least(0),
    "anchor_power": (lambda v: _is_number(v) and 1 <= v <= 4, "in [1, 4]"),
    "anchor_value": _one_of("reference", "running-minimum"),
    "length_normalised": (lambda v: v is None or isinstance(v, bool), "True, False or None"),
    "margin": (_is_number, "a number"),
    "upper_margin": (_is_number, "a number"),
    "sft_weight": _at_least(0),
    "dpop_lambda": _at_least(0),
    "alpha": _at_least(0),
    "discopop_tau": (lambda v: _is_number(v) and 0 < v <= 1, "in (0, 1]"),
    "desirable_weight": _at_least(0),
    "undesirable_weight": _at_least(0),
    "statistics_decay": (lambda v: _is_number(v) and 0 <= v < 1, "in [0, 1)"),
}
