"""Preference losses against numbers and formulas that were not made by them."""

import itertools
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron_patch.preference.losses import (
    LOSSES,
    LossOptions,
    PairLogps,
    describe_losses,
    identity_value,
    loss_options,
    preference_loss,
)

ORACLE = json.loads((Path(__file__).parents[2] / "data" / "loss_oracle.json").read_text())
STE_FAMILY = ("lpo-ste", "lpo-ste-paper")
SIDED = ("lpo-r", *STE_FAMILY)
POINT_FIELDS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len")


def pairs(x1, x2, lengths=(1.0, 1.0), dtype=torch.float64):
    """Pairs whose policy log-probabilities are the log-ratios themselves (the reference is zero)."""
    chosen = torch.tensor(x1, dtype=dtype, requires_grad=True)
    rejected = torch.tensor(x2, dtype=dtype, requires_grad=True)
    zero = torch.zeros_like(chosen).detach()
    return PairLogps(chosen, rejected, zero, zero, torch.full_like(zero, lengths[0]), torch.full_like(zero, lengths[1]))


def value_and_gradients(logps, options):
    losses = preference_loss(logps, options)
    gradients = torch.autograd.grad(losses.sum(), (logps.policy_chosen, logps.policy_rejected), allow_unused=True)
    return losses.detach(), *(torch.zeros_like(losses) if g is None else g for g in gradients)


@pytest.mark.parametrize("dtype,rtol", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", ORACLE["cases"], ids=[case["source"] for case in ORACLE["cases"]])
def test_oracle_values_and_gradients(case, dtype, rtol):
    tensors = {name: torch.tensor([point[name] for point in ORACLE["points"].values()], dtype=dtype) for name in POINT_FIELDS}
    logps = PairLogps(**tensors)
    for policy in (logps.policy_chosen, logps.policy_rejected):
        policy.requires_grad_()
    got = torch.stack(value_and_gradients(logps, loss_options(case["loss_type"], **case["options"])), dim=1)
    expected = torch.tensor([case["expected"][name] for name in ORACLE["points"]], dtype=dtype)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-7 if dtype is torch.float32 else 1e-12)


def test_oracle_covers_every_loss():
    assert {case["loss_type"] for case in ORACLE["cases"]} == set(LOSSES)


def sgn(value):
    return (value > 0) - (value < 0)


def s(value):
    return 1 / (1 + math.exp(-value))


def expected_gradients(o, x1, x2):
    """The docstrings' formulas with plain floats: (dL/dx1, dL/dx2) without the anchor."""
    b, h, m = o.beta, x1 - x2, 1 / (2 * o.beta)
    both = {
        "sigmoid": b * (s(b * h) - (1 - o.label_smoothing)),
        "ipo": 2 * (h - m),
        "hinge": -b if b * h < 1 else 0.0,
        "lpo": 4 * b * sgn(h - m),
        "lpo-paper": 2 * b * sgn(h - m),
    }
    if o.loss_type in both:
        return both[o.loss_type], -both[o.loss_type]
    total = o.r1 + o.r2
    one, two, at = {
        "lpo-r": (o.r1, o.r2, o.r1 * x1 - o.r2 * x2 - m),
        "lpo-ste": (o.r1 / total, o.r2 / total, h - m),
        "lpo-ste-paper": (o.r1**2 / total, o.r2**2 / total, h - m),
        "lpo-ste-dynamic": (s(h), s(-h), h - m),
    }[o.loss_type]
    return 4 * b * one * sgn(at), -4 * b * two * sgn(at)


def expected_anchor_gradient(o, x1, slack):
    scale = 2 * o.r1 / (o.r1 + o.r2) if o.loss_type == "lpo-ste-paper" else 1.0
    return -o.anchor_weight * scale if x1 < -slack else 0.0


@pytest.mark.parametrize("anchor", ["none", "hinge"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_autograd_agrees_with_the_documented_gradients(name, normalised, anchor):
    sides = {"r1": 0.7, "r2": 1.9} if name in SIDED else {}
    smoothing = {"label_smoothing": 0.15} if name == "sigmoid" else {}
    hinge = {"anchor_weight": 3.0, "anchor_slack": 0.01} if anchor == "hinge" else {}
    options = loss_options(name, beta=0.3, length_normalised=normalised, anchor=anchor, **sides, **smoothing, **hinge)
    lengths = (4.0, 9.0) if normalised else (1.0, 1.0)
    grid = list(itertools.product([-3.0, -0.02, -0.005, 0.4, 5.0], [-4.0, -0.3, 0.0, 1.1]))
    sums = [(x1 * lengths[0], x2 * lengths[1]) for x1, x2 in grid]
    _, chosen, rejected = value_and_gradients(pairs(*map(list, zip(*sums, strict=True)), lengths), options)
    for k, (x1, x2) in enumerate(grid):
        d1, d2 = expected_gradients(options, x1, x2)
        if anchor == "hinge":
            d1 += expected_anchor_gradient(options, x1, options.anchor_slack)
        assert chosen[k].item() * lengths[0] == pytest.approx(d1, rel=1e-9, abs=1e-12), (x1, x2)
        assert rejected[k].item() * lengths[1] == pytest.approx(d2, rel=1e-9, abs=1e-12), (x1, x2)


@pytest.mark.parametrize("name", [name for name in LOSSES if "-ste" not in name])
def test_gradcheck_away_from_kinks(name):
    """The straight-through losses are left out: their gradient is, on purpose, not that of their value."""
    x1 = torch.tensor([-0.5, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    x2 = torch.tensor([0.4, -1.0, -7.0], dtype=torch.float64, requires_grad=True)
    options = loss_options(name, **({"r1": 1.2, "r2": 0.4} if name in SIDED else {}))

    def loss(chosen, rejected):
        zero, length = torch.zeros_like(x1), torch.full_like(x1, 3.0).detach()
        return preference_loss(PairLogps(chosen, rejected, zero, zero, length, length), options)

    assert torch.autograd.gradcheck(loss, (x1, x2))


@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("lpo")])
def test_anchor_has_no_gradient_at_its_tie(name):
    with_anchor = value_and_gradients(pairs([0.0], [0.0]), loss_options(name))
    without = value_and_gradients(pairs([0.0], [0.0]), loss_options(name, anchor="none"))
    assert all(torch.equal(a, b) for a, b in zip(with_anchor, without, strict=True))
    below = value_and_gradients(pairs([-1e-6], [0.0]), loss_options(name))
    assert below[1].item() - without[1].item() == pytest.approx(-10.0)


@pytest.mark.parametrize("normalised,lengths", [(True, (20.0, 5.0)), (False, (20.0, 5.0))])
def test_anchor_slack_is_in_nats_per_token_for_sums_too(normalised, lengths):
    options = loss_options("lpo-ste", length_normalised=normalised, anchor_slack=0.1)
    bare = replace(options, anchor="none")
    inside, outside = pairs([-1.9], [0.0], lengths), pairs([-2.2], [0.0], lengths)
    assert torch.equal(preference_loss(inside, options), preference_loss(inside, bare))
    extra = (preference_loss(outside, options) - preference_loss(outside, bare)).item()
    assert extra == pytest.approx(10.0 * (0.01 if normalised else 0.2))


def test_lpo_ste_weights_move_gradients_and_never_values():
    x1, x2 = [-0.4, 0.2, 3.0], [0.3, -0.1, -2.0]
    plain = preference_loss(pairs(x1, x2), loss_options("lpo", anchor="none")).detach()
    for r1, r2 in [(1.0, 0.2), (1.0, 2.0), (0.3, 0.9)]:
        value, chosen, rejected = value_and_gradients(pairs(x1, x2), loss_options("lpo-ste", r1=r1, r2=r2, anchor="none"))
        torch.testing.assert_close(value, plain, rtol=1e-12, atol=0)
        torch.testing.assert_close(rejected / chosen, torch.full_like(chosen, -r2 / r1), rtol=1e-12, atol=0)
    torch.testing.assert_close(preference_loss(pairs(x1, x2), loss_options("lpo-ste-dynamic", anchor="none")), plain)


def test_dynamic_stays_finite_where_exponentials_do_not():
    for dtype in (torch.float32, torch.float64):
        for values in value_and_gradients(pairs([900.0, -900.0], [-900.0, 900.0], dtype=dtype), loss_options("lpo-ste-dynamic")):
            assert torch.isfinite(values).all()


def test_every_loss_differs_from_every_other():
    x1, x2 = [-0.4, 0.2, 3.0], [0.3, -0.1, -2.0]
    seen = {}
    for name in LOSSES:
        options = loss_options(name, length_normalised=True, **({"r2": 0.5} if name in SIDED else {}))
        seen[name] = torch.stack(value_and_gradients(pairs(x1, x2), options))
    for one, two in itertools.combinations(seen, 2):
        assert not torch.allclose(seen[one], seen[two]), (one, two)


def test_defaults():
    assert loss_options("lpo-ste") == LossOptions("lpo-ste", 0.2, 0.0, 1.0, 1.0, "hinge", 10.0, 0.0, True)
    assert loss_options("sigmoid") == LossOptions("sigmoid", 0.1, 0.0, 1.0, 1.0, "none", 10.0, 0.0, False)
    assert loss_options("ipo").length_normalised and not loss_options("hinge").length_normalised
    for name, entry in LOSSES.items():
        assert (loss_options(name).anchor == "hinge") == name.startswith("lpo")
        assert set(entry.defaults) <= {field.name for field in fields(LossOptions)}


def test_none_means_the_papers_choice():
    for name in LOSSES:
        options = loss_options(name)
        logps = pairs([-0.7], [0.9], (4.0, 5.0))
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
        ("lpo-ste", {"anchor": "none", "gamma": 3.0}, "anchor_weight = 3.0 has no effect"),
        ("lpo-ste", {"gamma": 1.0, "anchor_weight": 2.0}, "give one"),
        ("lpo-ste", {"anchor": "spo"}, "anchor = 'spo' is out of range: it must be one of none, hinge"),
        ("lpo-ste", {"beta": 0.0}, "beta = 0.0"),
        ("lpo-ste", {"beta": math.nan}, "beta = nan"),
        ("lpo-ste", {"anchor_slack": -0.1}, "anchor_slack = -0.1"),
        ("lpo-ste", {"r1": 0.0, "r2": 0.0}, "r1 + r2"),
        ("sigmoid", {"label_smoothing": 0.5}, "label_smoothing = 0.5"),
        ("sigmoid", {"length_normalised": "yes"}, "length_normalised = 'yes'"),
        ("lpo_ste", {}, "unknown loss 'lpo_ste' (did you mean lpo-ste?); losses: sigmoid, ipo"),
        ("zzz", {}, "unknown loss 'zzz'; losses: sigmoid"),
    ],
)
def test_bad_options_are_refused(name, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_options(name, **given)


def test_identity_values():
    expected = {"sigmoid": math.log(2), "ipo": 25.0, "hinge": 1.0, "lpo-paper": 1.0}
    for name in LOSSES:
        assert identity_value(loss_options(name)) == pytest.approx(expected.get(name, 2.0), rel=1e-12)
    assert identity_value(loss_options("sigmoid", label_smoothing=0.1)) == pytest.approx(math.log(2))
    assert identity_value(loss_options("lpo-ste-paper", r2=0.2)) == pytest.approx(2 * (1 + 0.04) / 1.2)


@pytest.mark.parametrize("name", LOSSES)
def test_no_pairs_and_low_precision(name):
    value, chosen, rejected = value_and_gradients(pairs([], [], dtype=torch.float32), loss_options(name))
    assert value.shape == chosen.shape == rejected.shape == (0,)
    x1, x2 = [-2.0, 6.0], [1.0, -3.0]
    low = preference_loss(pairs(x1, x2, (4.0, 8.0), torch.bfloat16), loss_options(name))
    high = preference_loss(pairs(x1, x2, (4.0, 8.0), torch.float64), loss_options(name))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=1e-6)


def test_whole_lengths_and_a_wider_reference():
    zero = torch.zeros(2)
    logps = PairLogps(zero, zero, zero.double() - 1.0, zero.double(), torch.tensor([2, 4]), torch.tensor([1, 1]))
    expected = 0.8 * (torch.tensor([0.5, 0.25], dtype=torch.float64) - 2.5).abs()
    torch.testing.assert_close(preference_loss(logps, loss_options("lpo-ste")), expected)


def test_shapes_must_agree():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(AssertionError, match="same shape"):
        PairLogps(two, two, one, two, two, two)


def test_help_names_every_loss_option_and_paper():
    text = describe_losses()
    for name, entry in LOSSES.items():
        assert f"{name}: " in text and entry.arxiv in text and entry.when in text
        assert all(f"{option}=" in text for option in entry.defaults)
