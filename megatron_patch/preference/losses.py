"""Preference losses as pure functions of log-probabilities, and the table that names them.

A loss sees four log-probability sums per pair and two lengths, nothing else: no argument object, no collective, no host
synchronisation. Whatever happens around it (shift, mask, parallelism, averaging over the batch) is somebody else's work, so
each function below can be read beside the equation of its paper. Adding a loss means adding one function and one row of `LOSSES`.

Symbols used in every docstring:

    X1, X2  log-ratios of the chosen and of the rejected response, log pi(y) - log pi_ref(y), summed over its tokens (nats)
    x1, x2  what the loss is given: X1 and X2, divided by the response's length (nats per token) when `length_normalised`
    h       x1 - x2
    b       beta
    m       1 / (2 b), the margin at which the linear and quadratic losses are content
    s(.)    the logistic function;  sg(.) stops the gradient;  [z]+ = max(z, 0);  sgn(0) = 0

Gradients are given with respect to x1 and x2. The reference is constant, so d/dX = d/d log pi(y), and d/dX = (d/dx) / length
when normalised. "Identity" is the value where policy = reference, that is x1 = x2 = 0.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


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


@dataclass(frozen=True)
class LossOptions:
    """Which loss, and its constants. Build it with `loss_options`, which knows each loss's defaults and refuses what it does not use.

    Raises:
        ValueError: a value is out of its range.
    """

    loss_type: str  # a name of LOSSES
    beta: float  # strength of the preference term: 1/nat, or tokens/nat when length-normalised; > 0
    label_smoothing: float = 0.0  # probability that a label is flipped (sigmoid: conservative DPO), in [0, 0.5)
    r1: float = 1.0  # weight of the chosen side (lpo family), >= 0
    r2: float = 1.0  # weight of the rejected side (lpo family), >= 0
    anchor: str = "none"  # "none", or "hinge": penalise chosen responses less likely than under the reference
    anchor_weight: float = 0.0  # the paper's lambda, its Table 9's gamma: loss per nat (per token when length-normalised), >= 0
    anchor_slack: float = 0.0  # fall of the chosen log-ratio that costs nothing, nats per token, >= 0
    length_normalised: bool | None = None  # log-ratios per token instead of sums; None: what the loss's paper does

    def __post_init__(self) -> None:
        for name, (is_valid, meaning) in _RANGES.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise ValueError(f"{name} = {value!r} is out of range: it must be {meaning}")
        if self.r1 + self.r2 <= 0:
            raise ValueError(f"r1 + r2 must be > 0, got r1 = {self.r1!r}, r2 = {self.r2!r}")


@dataclass(frozen=True)
class LogRatios:
    """What a loss function works on; tensors of shape [P], float32 or wider."""

    x1: Tensor  # chosen log-ratio, nats (per token when length-normalised)
    x2: Tensor  # rejected log-ratio, likewise
    slack: Tensor  # options.anchor_slack in the units of x1
    logps: PairLogps  # for losses that need more than the ratios


def sigmoid(ratios: LogRatios, options: LossOptions) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, Eq. 7), conservative with label_smoothing e (Mitchell's cDPO note).

    L = -(1-e) log s(b h) - e log s(-b h).  dL/dx1 = b (s(b h) - (1-e)), dL/dx2 = -dL/dx1.  Identity: ln 2.
    """
    logits = options.beta * (ratios.x1 - ratios.x2)
    return -(1.0 - options.label_smoothing) * logsigmoid(logits) - options.label_smoothing * logsigmoid(-logits)


def ipo(ratios: LogRatios, options: LossOptions) -> Tensor:
    """IPO (Azar et al., arXiv 2310.12036, Eq. 17); b is the paper's tau, averaged over tokens as its authors advise.

    L = (h - m)^2.  dL/dx1 = 2 (h - m), dL/dx2 = -dL/dx1.  Identity: m^2.
    """
    return (ratios.x1 - ratios.x2 - _target(options)) ** 2


def hinge(ratios: LogRatios, options: LossOptions) -> Tensor:
    """Hinge on the log-ratio margin (Liu et al., RSO, arXiv 2309.06657, "hinge-norm").

    L = [1 - b h]+.  dL/dx1 = -b while b h < 1, else 0; dL/dx2 = -dL/dx1.  Identity: 1.
    """
    return relu(1.0 - options.beta * (ratios.x1 - ratios.x2))


def lpo(ratios: LogRatios, options: LossOptions) -> Tensor:
    """LPO (arXiv 2508.14947, Eq. 6) in the scale of its authors' released code, which is twice the paper's.

    L = 4 b |h - m|.  dL/dx1 = 4 b sgn(h - m), dL/dx2 = -dL/dx1.  Identity: 2.
    """
    return 4.0 * options.beta * (ratios.x1 - ratios.x2 - _target(options)).abs()


def lpo_paper(ratios: LogRatios, options: LossOptions) -> Tensor:
    """LPO (arXiv 2508.14947, Eq. 6 and 7) in the paper's scale.

    L = 2 b |h - m|.  dL/dx1 = 2 b sgn(h - m), dL/dx2 = -dL/dx1.  Identity: 1.
    """
    return 2.0 * options.beta * (ratios.x1 - ratios.x2 - _target(options)).abs()


def lpo_r(ratios: LogRatios, options: LossOptions) -> Tensor:
    """LPO with weighted log-ratios; only in the authors' released code (arXiv 2508.14947 has no equation for it).

    L = 4 b |g - m| with g = r1 x1 - r2 x2.  dL/dx1 = 4 b r1 sgn(g - m), dL/dx2 = -4 b r2 sgn(g - m).  Identity: 2.
    The weights also move the target, so that values with different r2 cannot be compared.
    """
    return 4.0 * options.beta * (options.r1 * ratios.x1 - options.r2 * ratios.x2 - _target(options)).abs()


def lpo_ste(ratios: LogRatios, options: LossOptions) -> Tensor:
    """LPO with a straight-through split of the two sides (arXiv 2508.14947, Eq. 11-12, as released: r1 and r2 once, not squared).

    L = 4 b / (r1+r2) (r1 |x1 - sg(x2) - m| + r2 |sg(x1) - x2 - m|), whose value is lpo's for every r1, r2.
    dL/dx1 = 4 b r1/(r1+r2) sgn(h - m), dL/dx2 = -4 b r2/(r1+r2) sgn(h - m).  Identity: 2.
    """
    chosen_side, rejected_side = _one_sided_distances(ratios, options)
    scale = 4.0 * options.beta / (options.r1 + options.r2)
    return scale * (options.r1 * chosen_side + options.r2 * rejected_side)


def lpo_ste_paper(ratios: LogRatios, options: LossOptions) -> Tensor:
    """LPO with the straight-through split exactly as printed (arXiv 2508.14947, Eq. 11-12): r1 and r2 act twice.

    L = 4 b / (r1+r2) (r1^2 |x1 - sg(x2) - m| + r2^2 |sg(x1) - x2 - m|); its anchor is `ste_paper_anchor`.
    dL/dx1 = 4 b r1^2/(r1+r2) sgn(h - m), dL/dx2 = -4 b r2^2/(r1+r2) sgn(h - m).  Identity: 2 (r1^2 + r2^2) / (r1 + r2).
    """
    chosen_side, rejected_side = _one_sided_distances(ratios, options)
    scale = 4.0 * options.beta / (options.r1 + options.r2)
    return scale * (options.r1**2 * chosen_side + options.r2**2 * rejected_side)


def lpo_ste_dynamic(ratios: LogRatios, options: LossOptions) -> Tensor:
    """LPO-ste with r1 = 1 and r2 = exp(sg(x2 - x1)) for each pair; only in the authors' released code (arXiv 2508.14947).

    L = 4 b (s(sg h) |x1 - sg(x2) - m| + s(-sg h) |sg(x1) - x2 - m|): the normalised weights are logistic functions of the margin,
    which stay finite where the ratio of exponentials does not.
    dL/dx1 = 4 b s(h) sgn(h - m), dL/dx2 = -4 b s(-h) sgn(h - m): the rejected side is left alone as the margin grows.  Identity: 2.
    """
    chosen_side, rejected_side = _one_sided_distances(ratios, options)
    margin = (ratios.x1 - ratios.x2).detach()
    return 4.0 * options.beta * (margin.sigmoid() * chosen_side + (-margin).sigmoid() * rejected_side)


def hinge_anchor(ratios: LogRatios, options: LossOptions) -> Tensor:
    """Keep the chosen response at least as likely as the reference has it (arXiv 2508.14947, Eq. 6, second term).

    A = w [-x1 - slack]+ with w = anchor_weight.  dA/dx1 = -w where x1 < -slack, else 0, also at the tie; dA/dx2 = 0.  Identity: 0.
    At policy = reference and slack 0 every pair sits on the kink, where rounding decides between 0 and -w: a small slack avoids it.
    """
    return options.anchor_weight * relu(-ratios.x1 - ratios.slack)


def ste_paper_anchor(ratios: LogRatios, options: LossOptions) -> Tensor:
    """The anchor inside both sides of arXiv 2508.14947, Eq. 11-12: the rejected side's copy has a value and no gradient.

    A = 2/(r1+r2) (r1 a(x1) + r2 a(sg x1)) with a = `hinge_anchor`, in value 2 a(x1).
    dA/dx1 = -2 r1/(r1+r2) w where x1 < -slack, else 0; dA/dx2 = 0.  Identity: 0.
    """
    term = hinge_anchor(ratios, options)
    return 2.0 / (options.r1 + options.r2) * (options.r1 * term + options.r2 * term.detach())


LossFunction = Callable[[LogRatios, LossOptions], Tensor]
Settings = dict[str, float | bool | str]


@dataclass(frozen=True)
class LossEntry:
    """One row of `LOSSES`."""

    function: LossFunction
    paper: str
    arxiv: str
    defaults: Settings  # exactly the options that this loss uses
    when: str  # one sentence: when to choose it
    anchor_function: LossFunction = field(default=hinge_anchor)
    gamma_fills: str | None = None  # the option that a given `gamma` means


_FREE: Settings = {"anchor": "none", "anchor_weight": 10.0, "anchor_slack": 0.0}
_LPO: Settings = {"beta": 0.2, "length_normalised": True, "anchor": "hinge", "anchor_weight": 10.0, "anchor_slack": 0.0}
_SIDES: Settings = {"r1": 1.0, "r2": 1.0}
_SUMS: Settings = {"beta": 0.1, "length_normalised": False, **_FREE}


def _lpo_entry(function: LossFunction, when: str, sided: bool, anchor_function: LossFunction = hinge_anchor) -> LossEntry:
    defaults = {**_LPO, **(_SIDES if sided else {})}
    return LossEntry(function, "Linear Preference Optimization", "2508.14947", defaults, when, anchor_function, "anchor_weight")


LOSSES: dict[str, LossEntry] = {
    "sigmoid": LossEntry(
        sigmoid, "Direct Preference Optimization", "2305.18290", {**_SUMS, "label_smoothing": 0.0},
        "The baseline everyone knows; with --label-smoothing for labels that are sometimes wrong."),
    "ipo": LossEntry(
        ipo, "A General Theoretical Paradigm (IPO)", "2310.12036", {**_SUMS, "length_normalised": True},
        "When DPO overfits: the margin is drawn to a target instead of to infinity."),
    "hinge": LossEntry(
        hinge, "Statistical Rejection Sampling (RSO)", "2309.06657", _SUMS,
        "When pairs that are already separated should stop contributing."),
    "lpo": _lpo_entry(lpo, "Plain linear loss in the scale of the released code; the base of the family's ablations.", sided=False),
    "lpo-paper": _lpo_entry(lpo_paper, "Eq. 6 as printed: half of lpo's preference term against the same anchor.", sided=False),
    "lpo-r": _lpo_entry(lpo_r, "To study weighted log-ratios without the straight-through split.", sided=True),
    "lpo-ste": _lpo_entry(lpo_ste, "The default: r2/r1 sets how hard rejected responses are pushed down.", sided=True),
    "lpo-ste-paper": _lpo_entry(lpo_ste_paper, "Eq. 11-12 as printed: r2/r1 acts squared.", True, ste_paper_anchor),
    "lpo-ste-dynamic": _lpo_entry(lpo_ste_dynamic, "When no r2 is known: it decays by itself as the margin grows.", sided=False),
}  # fmt: skip

_ANCHORS = ("none", "hinge")
_RANGES: dict[str, tuple[Callable[..., bool], str]] = {
    "beta": (lambda v: _is_number(v) and v > 0, "a number > 0"),
    "label_smoothing": (lambda v: _is_number(v) and 0 <= v < 0.5, "in [0, 0.5)"),
    "r1": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "r2": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "anchor": (lambda v: v in _ANCHORS, f"one of {', '.join(_ANCHORS)}"),
    "anchor_weight": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "anchor_slack": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "length_normalised": (lambda v: v is None or isinstance(v, bool), "True, False or None"),
}


def preference_loss(logps: PairLogps, options: LossOptions) -> Tensor:
    """The loss of each pair, shape [P], anchor included, not averaged.

    Computed in the widest type among the log-probabilities, and never below float32.

    Raises:
        ValueError: `options.loss_type` is not in `LOSSES`.
    """
    entry = loss_entry(options.loss_type)
    ratios = _log_ratios(logps, options)
    loss = entry.function(ratios, options)
    return loss + entry.anchor_function(ratios, options) if options.anchor == "hinge" else loss


def loss_options(loss_type: str, **given: float | bool | str | None) -> LossOptions:
    """Options of a loss: its defaults from `LOSSES`, overlaid by what the user gave; None means "not given".

    `gamma` is accepted as the name that the loss's paper gives to one of its options (the lpo family: anchor_weight).

    Raises:
        ValueError: unknown loss, an option was given that the loss does not use, or a value is out of range.
    """
    entry = loss_entry(loss_type)
    chosen = _resolve_gamma(loss_type, entry, {name: value for name, value in given.items() if value is not None})
    for name, value in chosen.items():
        if name not in entry.defaults:
            raise ValueError(f"loss {loss_type} does not use {name} (given: {value!r}); it uses {', '.join(entry.defaults)}")
    values = {**entry.defaults, **chosen}
    idle = [name for name in ("anchor_weight", "anchor_slack") if name in chosen and values["anchor"] == "none"]
    if idle:
        raise ValueError(f"{idle[0]} = {chosen[idle[0]]!r} has no effect on loss {loss_type} with anchor 'none'; give anchor 'hinge' too")
    return LossOptions(loss_type=loss_type, **values)  # type: ignore[arg-type]  # types are checked with the ranges


def loss_entry(loss_type: str) -> LossEntry:
    """The row of `LOSSES` for a name. Raises ValueError with all names and the closest one when there is none."""
    if loss_type in LOSSES:
        return LOSSES[loss_type]
    close = difflib.get_close_matches(loss_type, LOSSES, n=1, cutoff=0.4)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"unknown loss {loss_type!r}{hint}; losses: {', '.join(LOSSES)}")


def identity_value(options: LossOptions) -> float:
    """The loss of a pair whose policy and reference agree, evaluated in float64: what the first step of a sound run must show."""
    zero = torch.zeros(1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    return preference_loss(PairLogps(zero, zero, zero, zero, one, one), options).item()


def describe_losses() -> str:
    """The table of losses for `--help-losses`: name, paper, arXiv number, when to use it, options with their defaults."""
    lines: list[str] = []
    for name, entry in LOSSES.items():
        settings = " ".join(f"{option}={default}" for option, default in entry.defaults.items())
        lines += [f"{name}: {entry.paper}, arXiv {entry.arxiv}", f"    {entry.when}", f"    {settings}"]
        if entry.gamma_fills:
            lines.append(f"    --gamma means {entry.gamma_fills}")
    return "\n".join(lines)


def without_anchor(options: LossOptions) -> LossOptions:
    """The same loss with its anchor switched off."""
    return replace(options, anchor="none")


def _log_ratios(logps: PairLogps, options: LossOptions) -> LogRatios:
    normalised = options.length_normalised
    if normalised is None:
        normalised = bool(loss_entry(options.loss_type).defaults["length_normalised"])
    wide = torch.promote_types(torch.promote_types(logps.policy_chosen.dtype, logps.ref_chosen.dtype), torch.float32)
    chosen = logps.policy_chosen.to(wide) - logps.ref_chosen.to(wide)
    rejected = logps.policy_rejected.to(wide) - logps.ref_rejected.to(wide)
    chosen_len, rejected_len = logps.chosen_len.to(wide), logps.rejected_len.to(wide)
    if normalised:
        return LogRatios(chosen / chosen_len, rejected / rejected_len, torch.full_like(chosen_len, options.anchor_slack), logps)
    return LogRatios(chosen, rejected, options.anchor_slack * chosen_len, logps)


def _target(options: LossOptions) -> float:
    return 1.0 / (2.0 * options.beta)


def _one_sided_distances(ratios: LogRatios, options: LossOptions) -> tuple[Tensor, Tensor]:
    """|h - m| twice, [P] each: first with its gradient to x1 only, then with its gradient to x2 only."""
    target = _target(options)
    return (ratios.x1 - ratios.x2.detach() - target).abs(), (ratios.x1.detach() - ratios.x2 - target).abs()


def _resolve_gamma(loss_type: str, entry: LossEntry, given: Settings) -> Settings:
    if "gamma" not in given:
        return given
    given = dict(given)
    gamma = given.pop("gamma")
    if entry.gamma_fills is None:
        raise ValueError(f"loss {loss_type} does not use gamma (given: {gamma!r})")
    if entry.gamma_fills in given:
        raise ValueError(f"gamma = {gamma!r} and {entry.gamma_fills} = {given[entry.gamma_fills]!r} mean the same thing here: give one")
    return {**given, entry.gamma_fills: gamma}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
