"""Options of losses, weighted sums, and the table as the command line shows it."""

import math
import re
from dataclasses import fields, replace

import pytest
import torch

from megatron_patch.preference.inputs import LossOptions, PairLogps
from megatron_patch.preference.losses import (
    LOSSES,
    WeightedLoss,
    loss_options,
    loss_sum,
    needs_reference,
    preference_loss,
    statistics_of,
    without_anchor,
)


def one_pair(x1=-0.7, x2=-0.9):
    """A pair of 4 and 5 tokens with a reference of zero, scored 3 and 0."""
    one = torch.ones(1, dtype=torch.float64)
    return PairLogps(x1 * one, x2 * one, 0 * one, 0 * one, 4 * one, 5 * one, 3 * one, 0 * one)


def test_defaults():
    assert loss_options("lpo-ste") == LossOptions("lpo-ste", beta=0.2, anchor="hinge", anchor_weight=10.0, length_normalised=True)
    assert loss_options("sigmoid") == LossOptions("sigmoid", beta=0.1, anchor_weight=10.0, length_normalised=False)
    assert loss_options("ipo").length_normalised and not loss_options("hinge").length_normalised
    for name, entry in LOSSES.items():
        assert (loss_options(name).anchor == "hinge") == name.startswith("lpo")
        assert set(entry.defaults) <= {field.name for field in fields(LossOptions)}


def test_none_means_the_papers_choice():
    logps = one_pair()
    for name in LOSSES:
        options = loss_options(name)
        assert torch.equal(preference_loss(logps, replace(options, length_normalised=None)), preference_loss(logps, options))


def test_given_values_overlay_defaults_and_none_is_not_given():
    options = loss_options("lpo-ste", r2=0.2, beta=None, gamma=None, label_smoothing=None)
    assert (options.r2, options.beta, options.anchor_weight) == (0.2, 0.2, 10.0)
    assert loss_options("lpo-ste", gamma=5.0).anchor_weight == 5.0
    assert loss_options("sigmoid", anchor="hinge", anchor_weight=2.0).anchor_weight == 2.0


@pytest.mark.parametrize(
    "name,given,message",
    [
        ("lpo", {"r2": 0.2}, "lpo does not use r2 (given: 0.2)"),
        ("lpo-ste-dynamic", {"r1": 1.0}, "does not use r1"),
        ("lpo-ste", {"label_smoothing": 0.1}, "does not use label_smoothing"),
        ("sigmoid", {"gamma": 1.0}, "sigmoid does not use gamma"),
        ("sigmoid", {"anchor_weight": 1.0}, "anchor_weight = 1.0 has no effect"),
        ("lpo-ste", {"anchor": "none", "gamma": 3.0}, "gamma = 3.0 has no effect"),
        ("lpo-ste", {"gamma": 1.0, "anchor_weight": 2.0}, "give one"),
        ("lpo-ste", {"anchor": "sop"}, "anchor = 'sop' is out of range: it must be one of none, hinge, spo"),
        ("lpo-ste", {"anchor_power": 2.0}, "anchor_power = 2.0 has no effect on loss lpo-ste with anchor 'hinge'; give anchor 'spo' too"),
        ("exo", {"label_smoothing": 0.0}, "out of range for exo"),
        ("stapo", {"margin": 0.5}, "upper_margin = 0.5 must be greater than margin = 0.5"),
        ("sft", {"beta": 0.5}, "sft does not use beta"),
        ("discopop", {"discopop_tau": 1.5}, "discopop_tau = 1.5"),
        ("simpo", {"gamma": 1.0, "margin": 2.0}, "give one"),
        ("simpo", {"margin": math.inf}, "margin = inf"),
        ("lpo-ste", {"beta": 0.0}, "beta = 0.0"),
        ("lpo-ste", {"beta": math.nan}, "beta = nan"),
        ("lpo-ste", {"anchor_slack": -0.1}, "anchor_slack = -0.1"),
        ("lpo-ste", {"r1": 0.0, "r2": 0.0}, "r1 + r2"),
        ("sigmoid", {"label_smoothing": 0.5}, "label_smoothing = 0.5"),
        ("sigmoid", {"length_normalised": "yes"}, "length_normalised = 'yes'"),
        ("lpo_ste", {}, "unknown loss 'lpo_ste' (did you mean lpo-ste?); losses: sigmoid, robust"),
        ("zzz", {}, "unknown loss 'zzz'; losses: sigmoid"),
    ],
)
def test_bad_options_are_refused(name, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_options(name, **given)


IDENTITY = {
    "sigmoid": math.log(2), "robust": math.log(2), "sigmoid-norm": math.log(2), "ipo": 25.0, "hinge": 1.0, "dpop": math.log(2),
    "odpo": math.log(4), "exo": 2.76123, "discopop": 0.846574, "aot": math.log(2), "aot-unpaired": math.log(2), "kto": 0.5, "kto-pair": 0.5,
    "bco": 2 * math.log(2), "nca": 2 * math.log(2), "apo-zero": 1.0, "apo-down": 1.0, "sppo-hard": 500_000.0, "lpo-paper": 1.0,
}  # fmt: skip
OF_THE_PAIR = {"simpo", "alpha-dpo", "stapo", "slic", "orpo", "cpo", "rpo", "irpo", "sft"}  # depends on its log-probs


def test_identity_values():
    at_identity = one_pair().at_identity()
    for name in set(LOSSES) - OF_THE_PAIR:
        assert preference_loss(at_identity, loss_options(name)).item() == pytest.approx(IDENTITY.get(name, 2.0), rel=1e-5), name
    paper = loss_options("lpo-ste-paper", r2=0.2)
    assert preference_loss(at_identity, paper).item() == pytest.approx(2 * (1 + 0.04) / 1.2)


def test_gamma_is_the_papers_constant():
    assert loss_options("simpo", gamma=1.5).margin == loss_options("alpha-dpo", gamma=1.5).margin == 1.5
    assert loss_options("lpo", gamma=3.0).anchor_weight == 3.0


def test_a_sum_adds_weighted_losses():
    """TRL's mixed preference optimisation: a given option goes to every part that uses it."""
    parts = loss_sum(["sigmoid", "bco", "sft"], [0.8, 0.2, 1.0], beta=0.3, label_smoothing=0.1)
    assert [part.options.beta for part in parts] == [0.3, 0.3, 0.1] and [part.weight for part in parts] == [0.8, 0.2, 1.0]
    assert [part.options.label_smoothing for part in parts] == [0.1, 0.0, 0.0]
    logps = one_pair()
    alone = [preference_loss(logps, options) for options, _ in parts]
    torch.testing.assert_close(preference_loss(logps, parts), 0.8 * alone[0] + 0.2 * alone[1] + alone[2])
    assert loss_sum(["sigmoid", "sft"], None) == (WeightedLoss(loss_options("sigmoid"), 1.0), WeightedLoss(loss_options("sft"), 1.0))


def test_the_anchor_of_a_sum_belongs_to_the_loss_that_has_one():
    def anchors(names, **given):
        return [(part.options.anchor, part.options.anchor_weight) for part in loss_sum(names, None, **given)]

    assert anchors(["sft", "lpo-ste"], gamma=3.0) == [("none", 10.0), ("hinge", 3.0)] == anchors(["sft", "lpo-ste"], anchor_weight=3.0)
    assert anchors(["lpo-ste", "lpo"], anchor_weight=3.0) == [("hinge", 3.0), ("none", 10.0)] == anchors(["lpo-ste", "lpo"], gamma=3.0)
    assert anchors(["sigmoid", "sft"]) == [("none", 10.0)] * 2
    assert anchors(["sigmoid", "sft"], anchor="spo", anchor_power=2.0) == [("spo", 10.0), ("none", 10.0)]
    assert [part.options.anchor for part in without_anchor(loss_sum(["sft", "lpo-ste"], None))] == ["none", "none"]


def test_an_option_of_a_sum_reaches_only_the_losses_that_mean_it():
    assert [part.options.margin for part in loss_sum(["odpo", "simpo"], None, gamma=0.3)] == [1.0, 0.3]
    assert [part.options.margin for part in loss_sum(["simpo", "alpha-dpo"], None, margin=0.3)] == [0.3, 0.3]


@pytest.mark.parametrize(
    "names,weights,given,message",
    [
        (["sigmoid", "sft"], [1.0], {}, "loss weights [1.0] must be > 0, one for each of sigmoid, sft"),
        (["sigmoid", "sft"], [1.0, 0.0], {}, "loss weights [1.0, 0.0] must be > 0"),
        (["sigmoid", "sft"], [1.0, math.nan], {}, "must be > 0"),
        (["sft", "sft"], None, {}, "each loss can be in a sum once"),
        ([], None, {}, "one for each of no loss"),
        (["sigmoid", "sft"], None, {"r2": 0.5}, "loss sigmoid + sft does not use r2 (given: 0.5); sigmoid uses beta"),
        (["lpo", "simpo"], None, {"gamma": 0.5}, "gives gamma several meanings (anchor_weight, margin)"),
        (["sigmoid", "sft"], None, {"anchor_weight": 2.0}, "has no effect on loss sigmoid with anchor 'none'"),
        (["simpo", "stapo"], None, {"margin": 0.6}, "gives margin several meanings (a reward, stapo); given: 0.6"),
        (["sigmoid", "sft"], [1.0, math.inf], {}, "must be > 0"),
    ],
)
def test_bad_sums_are_refused(names, weights, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_sum(names, weights, **given)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_need_no_reference_do_not_look_at_it(name):
    """Its log-probs may be NaN: neither value nor gradient becomes NaN."""
    logps = one_pair()
    nothing = torch.full_like(logps.ref_chosen, math.nan)
    logps = replace(logps, policy_chosen=logps.policy_chosen.requires_grad_(), ref_chosen=nothing, ref_rejected=nothing)
    parts = loss_sum([name], None, anchor="none")
    loss = preference_loss(logps, parts)
    (gradient,) = torch.autograd.grad(loss.sum(), logps.policy_chosen)
    assert bool(torch.isfinite(loss) & torch.isfinite(gradient)) == (not needs_reference(parts))
    assert needs_reference(loss_sum(["sft"], None, anchor="hinge"))


def test_only_losses_with_a_memory_have_statistics():
    names = {name: [statistic.name for statistic, _ in statistics_of(loss_sum([name], None))] for name in LOSSES}
    assert {name for name, found in names.items() if found} == {"bco", "alpha-dpo"}
    assert names["alpha-dpo"] == ["alpha-dpo/margin", "alpha-dpo/margin_square"]
    spo = loss_sum(["lpo"], None, anchor="spo", anchor_value="running-minimum")
    assert [(statistic.name, statistic.initial) for statistic, _ in statistics_of(spo)] == [("spo/excess", 0.0)]
    assert statistics_of(loss_sum(["lpo"], None, anchor="spo")) == [] == statistics_of(())
