"""The table that names every preference loss, and what is done with it: options, value of each pair, weighted sums.

A loss sees log-probability sums and lengths of pairs, nothing else: no argument object, no collective, no host synchronisation.
Whatever happens around it (shift, mask, parallelism, averaging over the batch) is somebody else's work, so each function of
`families` can be read beside the equation of its paper. Adding a loss means adding one function and one row of `LOSSES`.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_patch.preference import anchors
from megatron_patch.preference.families import likelihood, linear, margin, sides
from megatron_patch.preference.inputs import LossFunction, LossOptions, PairLogps, PairTerms, Surroundings, pair_terms

Setting = float | bool | str | None
Settings = dict[str, Setting]


class Statistic(NamedTuple):
    """A number carried from one global batch to the next: the mean over its pairs of a function of each, averaged or minimised."""

    name: str
    of: LossFunction
    initial: float
    update: Callable[[float, float, LossOptions], float]  # (old value, mean over the global batch, options) -> new value


@dataclass(frozen=True)
class LossEntry:
    """One row of `LOSSES`."""

    function: LossFunction
    paper: str
    arxiv: str  # "" where no number is known
    defaults: Settings  # exactly the options that this loss uses
    when: str  # one sentence: when to choose it
    anchor_function: LossFunction = field(default=anchors.weighted)
    gamma_fills: str | None = None  # the option that a given `gamma` means
    statistics: tuple[Statistic, ...] = ()
    needs_peers: bool = False  # looks at the whole micro-batch on all data-parallel ranks
    needs_whole_batch: bool = False  # is defined on the global batch: refuses more than one micro-batch a step
    needs_scores: bool = False
    uses_reference: bool = True


def _average(old: float, mean: float, options: LossOptions) -> float:
    return options.statistics_decay * old + (1.0 - options.statistics_decay) * mean


def _minimum(old: float, mean: float, _: LossOptions) -> float:
    return min(old, mean)


_SPO = (Statistic(anchors.SPO_EXCESS, anchors.excess, 0.0, _minimum),)
_BCO = (Statistic(sides.BCO_REWARD, sides.reward_mean, 0.0, _average),)
_ALPHA = (
    Statistic(likelihood.ALPHA_MARGIN, likelihood.log_ratio_margin, 0.0, _average),
    Statistic(likelihood.ALPHA_SQUARE, likelihood.log_ratio_margin_square, 1.0, _average),
)

ANCHOR_CONSTANTS: Settings = {"anchor_weight": 10.0, "anchor_slack": 0.0, "anchor_power": 1.0, "anchor_value": "reference"}
_SUMS: Settings = {"beta": 0.1, "length_normalised": False, "anchor": "none", **ANCHOR_CONSTANTS}
_PER_TOKEN: Settings = {**_SUMS, "length_normalised": True}
_LPO: Settings = {"beta": 0.2, "offset": None, "length_normalised": True, "anchor": "hinge", **ANCHOR_CONSTANTS}
_SIDES: Settings = {"r1": 1.0, "r2": 1.0}


def _without_beta(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name != "beta"}


def _lpo(function: LossFunction, when: str, sided: bool, anchor_function: LossFunction = anchors.weighted) -> LossEntry:
    defaults = {**_LPO, **(_SIDES if sided else {})}
    return LossEntry(function, "Linear Preference Optimization", "2508.14947", defaults, when, anchor_function, "anchor_weight")


LOSSES: dict[str, LossEntry] = {
    "sigmoid": LossEntry(
        margin.sigmoid, "Direct Preference Optimization", "2305.18290", {**_SUMS, "label_smoothing": 0.0},
        "The baseline everyone knows; with --label-smoothing (conservative DPO) for labels that are sometimes wrong."),
    "robust": LossEntry(
        margin.robust, "Provably Robust DPO", "2403.00409", {**_SUMS, "label_smoothing": 0.1},
        "When a known share of the labels is flipped: its expectation is DPO's loss on clean labels."),
    "sigmoid-norm": LossEntry(
        margin.sigmoid, "Length-normalised DPO (Tulu 3)", "2411.15124", {**_PER_TOKEN, "beta": 5.0, "label_smoothing": 0.0},
        "DPO on log-ratios per token, when long responses dominate."),
    "ipo": LossEntry(
        margin.ipo, "A General Theoretical Paradigm (IPO)", "2310.12036", _PER_TOKEN,
        "When DPO overfits: the margin is drawn to a target instead of to infinity."),
    "hinge": LossEntry(
        margin.hinge, "Statistical Rejection Sampling (RSO)", "2309.06657", _SUMS,
        "When pairs that are already separated should stop contributing."),
    "dpop": LossEntry(
        margin.dpop, "Smaug, DPO-Positive", "2402.13228", {**_SUMS, "dpop_lambda": 50.0},
        "When chosen and rejected differ in a few tokens and DPO makes both unlikely."),
    "odpo": LossEntry(
        margin.odpo, "DPO with an Offset", "2402.10571", {**_SUMS, "margin": 1.0},
        "When the pairs carry scores: a larger gap asks for a larger margin.", needs_scores=True),
    "exo": LossEntry(
        margin.exo, "Efficient Exact Optimization", "2402.00856", {**_SUMS, "label_smoothing": 1e-3},
        "The reverse KL of the alignment objective on pairs, when DPO's forward KL spreads too wide."),
    "discopop": LossEntry(
        margin.discopop, "DiscoPOP", "2406.08414", {**_SUMS, "beta": 0.05, "discopop_tau": 0.05},
        "To try the loss that a language model discovered; it is not convex around policy = reference."),
    "aot": LossEntry(
        margin.aot, "Alignment via Optimal Transport", "2406.05882", {**_SUMS, "beta": 0.01, "label_smoothing": 0.0},
        "When the distribution of margins matters more than each pair; one micro-batch a step (in evaluation each is sorted alone).",
        needs_peers=True, needs_whole_batch=True),
    "aot-unpaired": LossEntry(
        margin.aot_unpaired, "Alignment via Optimal Transport", "2406.05882", {**_SUMS, "beta": 0.01, "label_smoothing": 0.0},
        "As aot when chosen and rejected responses do not belong to the same prompts; one micro-batch a step.",
        needs_peers=True, needs_whole_batch=True),
    "kto": LossEntry(
        sides.kto, "Kahneman-Tversky Optimization", "2402.01306", {**_SUMS, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "When good and bad responses should weigh differently; its KL estimate is that of a micro-batch.", needs_peers=True),
    "kto-pair": LossEntry(
        sides.kto_pair, "Kahneman-Tversky Optimization", "2402.01306", _SUMS,
        "KTO on pairs: each side against the other side's mean over a micro-batch.", needs_peers=True),
    "bco": LossEntry(
        sides.bco, "Binary Classifier Optimization", "2404.04656", {**_SUMS, "beta": 0.01, "statistics_decay": 0.9},
        "When responses were rated good or bad rather than compared.", statistics=_BCO),
    "nca": LossEntry(
        sides.nca, "Noise Contrastive Alignment", "2402.05369", {**_SUMS, "beta": 0.01},
        "When the chosen response's own likelihood must not fall."),
    "apo-zero": LossEntry(
        sides.apo_zero, "Anchored Preference Optimization", "2408.06266", _SUMS,
        "When the chosen responses are better than what the model writes."),
    "apo-down": LossEntry(
        sides.apo_down, "Anchored Preference Optimization", "2408.06266", _SUMS,
        "When the model already writes better than the chosen responses."),
    "sppo-hard": LossEntry(
        sides.sppo_hard, "Self-Play Preference Optimization", "2405.00675", {**_SUMS, "beta": 1e-3},
        "In rounds of self-play: both sides have a finite goal of their own."),
    "simpo": LossEntry(
        likelihood.simpo, "SimPO", "2405.14734", {**_PER_TOKEN, "beta": 2.0, "margin": 0.5},
        "Without the reference in the loss: likelihood per token, as generation ranks it.", gamma_fills="margin", uses_reference=False),
    "alpha-dpo": LossEntry(
        likelihood.alpha_dpo, "alpha-DPO", "2410.10148",
        {**_PER_TOKEN, "beta": 2.5, "margin": 1.5, "alpha": 0.2, "statistics_decay": 0.9},
        "SimPO with a margin that follows each pair's log-ratio.", gamma_fills="margin", statistics=_ALPHA),
    "stapo": LossEntry(
        likelihood.stapo, "Stable Preference Optimization via Two-sided Contrastive Learning", "",
        {**_PER_TOKEN, "beta": 10.0, "margin": 0.3, "upper_margin": 0.5},
        "A smooth relative of LPO's distance: the margin is kept in a band.", uses_reference=False),
    "slic": LossEntry(
        likelihood.slic, "SLiC-HF", "2305.10425", {**_without_beta(_SUMS), "margin": 1.0, "sft_weight": 0.1},
        "Without the reference in the loss: a hinge on log-probs with a fine-tuning term.", uses_reference=False),
    "orpo": LossEntry(
        likelihood.orpo, "ORPO", "2403.07691", _PER_TOKEN,
        "Fine-tuning and preference in one stage, from a base model.", uses_reference=False),
    "cpo": LossEntry(
        likelihood.cpo, "Contrastive Preference Optimization", "2401.08417", {**_SUMS, "sft_weight": 1.0},
        "Without the reference in the loss: DPO with a uniform reference and a fine-tuning term.", uses_reference=False),
    "rpo": LossEntry(
        likelihood.rpo, "RPO by adversarial SFT", "2405.16436",
        {**_SUMS, "beta": 0.05, "label_smoothing": 0.0, "sft_weight": 0.005},
        "DPO with a small fine-tuning term on sums, against over-optimisation."),
    "irpo": LossEntry(
        likelihood.irpo, "Iterative Reasoning Preference Optimization", "2404.19733",
        {**_SUMS, "label_smoothing": 0.0, "sft_weight": 1.0},
        "Reasoning, in rounds: DPO with a fine-tuning term per token."),
    "sft": LossEntry(
        likelihood.sft, "Fine-tuning term (Mixed Preference Optimization)", "2411.10442",
        _without_beta(_PER_TOKEN),
        "As a part of a weighted sum, or as the baseline that sees only the chosen responses.", uses_reference=False),
    "lpo": _lpo(linear.lpo, "Plain linear loss in the scale of the released code; the base of the family's ablations.", sided=False),
    "lpo-paper": _lpo(linear.lpo_paper, "Eq. 6 as printed: half of lpo's preference term against the same anchor.", sided=False),
    "lpo-r": _lpo(linear.lpo_r, "To study weighted log-ratios without the straight-through split.", sided=True),
    "lpo-ste": _lpo(linear.lpo_ste, "The default: r2/r1 sets how hard rejected responses are pushed down.", sided=True),
    "lpo-ste-paper": _lpo(
        linear.lpo_ste_paper, "Eq. 11-12 as printed: r2/r1 acts squared.", sided=True, anchor_function=anchors.ste_paper),
    "lpo-ste-dynamic": _lpo(linear.lpo_ste_dynamic, "When no r2 is known: it decays by itself as the margin grows.", sided=False),
}  # fmt: skip


class WeightedLoss(NamedTuple):
    """One part of a weighted sum of losses."""

    options: LossOptions
    weight: float = 1.0


LossSum = tuple[WeightedLoss, ...]  # what training minimises; at most one part has an anchor, which is weighted with it


def preference_loss(logps: PairLogps, options: LossOptions | LossSum, around: Surroundings | None = None) -> Tensor:
    """The loss of each pair, shape [P], anchor included, not averaged; of several losses their weighted sum.

    Computed in the widest type among the log-probabilities, and never below float32.

    Args:
        around: what some losses know beyond the pair; by default the given pairs are the whole batch and nothing came before.

    Raises:
        ValueError: a `loss_type` is not in `LOSSES`.
    """
    around = around or Surroundings()
    if isinstance(options, LossOptions):
        return _one_loss(logps, options, around)
    return torch.stack([part.weight * _one_loss(logps, part.options, around) for part in options]).sum(dim=0)


def _one_loss(logps: PairLogps, options: LossOptions, around: Surroundings) -> Tensor:
    entry = loss_entry(options.loss_type)
    terms = terms_of(logps, options, around)
    loss = entry.function(terms, options)
    return loss if options.anchor == "none" else loss + entry.anchor_function(terms, options)


def terms_of(logps: PairLogps, options: LossOptions, around: Surroundings | None = None) -> PairTerms:
    """The symbols of the formulas in the units that this loss uses."""
    normalised = options.length_normalised
    if normalised is None:
        normalised = bool(loss_entry(options.loss_type).defaults["length_normalised"])
    return pair_terms(logps, normalised, around or Surroundings())


def loss_options(loss_type: str, **given: Setting) -> LossOptions:
    """Options of a loss: its defaults from `LOSSES`, overlaid by what the user gave; None means "not given".

    `gamma` is accepted as the name that the loss's paper gives to one of its options (lpo family: anchor_weight; simpo, alpha-dpo: margin).

    Raises:
        ValueError: unknown loss, an option was given that the loss does not use, or a value is out of range.
    """
    return loss_sum([loss_type], None, **given)[0].options


def loss_sum(loss_types: Sequence[str], weights: Sequence[float] | None, **given: Setting) -> LossSum:
    """Options of a weighted sum: a given option goes to every part that uses it.

    The anchor belongs to the first part that has one by default (the lpo family), else to the first part.

    Raises:
        ValueError: as `loss_options`; also weights that do not fit, one loss named twice, an option with several meanings.
    """
    entries = [loss_entry(loss_type) for loss_type in loss_types]
    weights = [1.0] * len(entries) if weights is None else weights
    if not entries or len(weights) != len(entries) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"loss weights {list(weights)} must be > 0, one for each of {', '.join(loss_types) or 'no loss'}")
    if len(set(loss_types)) != len(loss_types):
        raise ValueError(f"each loss can be in a sum once, got {', '.join(loss_types)}")
    chosen: Settings = {name: value for name, value in given.items() if value is not None}
    anchored = next((i for i, entry in enumerate(entries) if entry.defaults["anchor"] != "none"), 0)
    takers = {name: _takers(name, value, loss_types, entries, anchored) for name, value in chosen.items()}
    parts = []
    for i, (loss_type, entry) in enumerate(zip(loss_types, entries, strict=True)):
        mine: Settings = {name: value for name, value in chosen.items() if i in takers[name]}
        values: Settings = {**entry.defaults, **_without_gamma(mine, entry)}
        if i != anchored:
            values["anchor"] = "none"
        _refuse_idle(loss_type, mine, entry, values)
        parts.append(WeightedLoss(LossOptions(loss_type=loss_type, **values), float(weights[i])))  # type: ignore[arg-type]
    return tuple(parts)


def _takers(name: str, value: Setting, loss_types: Sequence[str], entries: Sequence[LossEntry], anchored: int) -> list[int]:
    """Which parts of a sum a given option is for; ValueError when it is for none, or means something else in each of several."""
    sum_of = " + ".join(loss_types)
    if name == "gamma":
        takers = [i for i, entry in enumerate(entries) if entry.gamma_fills is not None]
        meanings = {entries[i].gamma_fills for i in takers}
    else:
        takers = [i for i, entry in enumerate(entries) if name in entry.defaults]
        # simpo's and alpha-dpo's margin is one thing; that of odpo, slic and stapo is another in each.
        meanings = {"a reward" if entries[i].gamma_fills == name else loss_types[i] for i in takers} if name == "margin" else {name}
    if not takers:
        uses = "; ".join(f"{loss_type} uses {', '.join(e.defaults)}" for loss_type, e in zip(loss_types, entries, strict=True))
        raise ValueError(f"loss {sum_of} does not use {name} (given: {value!r}); {uses}")
    if len(meanings) > 1:
        raise ValueError(f"loss {sum_of} gives {name} several meanings ({', '.join(sorted(map(str, meanings)))}); given: {value!r}")
    return [anchored] if name.startswith("anchor") or meanings == {"anchor_weight"} else takers


def _without_gamma(given: Settings, entry: LossEntry) -> Settings:
    """``gamma`` under the name of the option that it means."""
    if "gamma" not in given or entry.gamma_fills is None:
        return given
    if entry.gamma_fills in given:
        raise ValueError(
            f"gamma = {given['gamma']!r} and {entry.gamma_fills} = {given[entry.gamma_fills]!r} mean the same thing here: give one"
        )
    return {entry.gamma_fills if name == "gamma" else name: value for name, value in given.items()}


def _refuse_idle(loss_type: str, given: Settings, entry: LossEntry, values: Settings) -> None:
    """An anchor's constants without the anchor that uses them, in the user's spelling."""
    needed = {"anchor_weight": ("hinge", "spo"), "anchor_slack": ("hinge", "spo"), "anchor_power": ("spo",), "anchor_value": ("spo",)}
    for name, value in given.items():
        kinds = needed.get(str(entry.gamma_fills) if name == "gamma" else name)
        if kinds and values["anchor"] not in kinds:
            without = f"has no effect on loss {loss_type} with anchor {values['anchor']!r}"
            raise ValueError(f"{name} = {value!r} {without}; give anchor {kinds[0]!r} too")


def loss_entry(loss_type: str) -> LossEntry:
    """The row of `LOSSES` for a name. Raises ValueError with all names and the closest one when there is none."""
    if loss_type in LOSSES:
        return LOSSES[loss_type]
    close = difflib.get_close_matches(loss_type, LOSSES, n=1, cutoff=0.4)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"unknown loss {loss_type!r}{hint}; losses: {', '.join(LOSSES)}")


def anchored_part(options: LossSum) -> LossOptions | None:
    """The options of the part that has an anchor."""
    return next((part.options for part in options if part.options.anchor != "none"), None)


def statistics_of(options: LossSum) -> list[tuple[Statistic, LossOptions]]:
    """The running statistics that a sum of losses needs, each with the options it belongs to."""
    needed = [(statistic, part.options) for part in options for statistic in loss_entry(part.options.loss_type).statistics]
    anchored = anchored_part(options)
    if anchored is not None and anchored.anchor == "spo" and anchored.anchor_value == "running-minimum":
        needed += [(statistic, anchored) for statistic in _SPO]
    return needed


def needs_peers(options: LossSum) -> bool:
    """Whether any of the losses looks at the whole micro-batch."""
    return any(loss_entry(part.options.loss_type).needs_peers for part in options)


def needs_reference(options: LossSum) -> bool:
    """Whether any of the losses, or the anchor, looks at reference log-probs."""
    return any(loss_entry(part.options.loss_type).uses_reference or part.options.anchor != "none" for part in options)


def without_anchor(options: LossSum) -> LossSum:
    """The same losses with the anchor switched off."""
    return tuple(part._replace(options=replace(part.options, anchor="none")) for part in options)
