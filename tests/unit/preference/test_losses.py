"""Preference losses against numbers and formulas that were not made by them."""

import itertools
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron_patch.preference.inputs import PairLogps, Surroundings
from megatron_patch.preference.losses import LOSSES, loss_options, preference_loss

ORACLE = json.loads((Path(__file__).parents[2] / "data" / "loss_oracle.json").read_text())
SIDED = ("lpo-r", "lpo-ste", "lpo-ste-paper")
FIELDS = [field.name for field in fields(PairLogps)]
SCORE_GAP = 3.0
# An option that is not its default, so that a formula cannot agree by leaving the option out.
TRIED = {
    "label_smoothing": 0.15, "r1": 0.7, "r2": 1.9, "margin": 0.4, "upper_margin": 0.9, "sft_weight": 0.3, "dpop_lambda": 3.0,
    "alpha": 0.35, "discopop_tau": 0.6, "desirable_weight": 1.3, "undesirable_weight": 0.6,
}  # fmt: skip


def tried(name, **given):
    """Options of a loss with everything that it uses moved off its default."""
    moved = {"beta": 0.3, **TRIED, **given}
    return loss_options(name, **{option: value for option, value in moved.items() if option in LOSSES[name].defaults})


def pairs(x1, x2, lengths=(1.0, 1.0), dtype=torch.float64):
    """Pairs whose policy log-probabilities are the log-ratios themselves (the reference is zero)."""
    chosen = torch.tensor(x1, dtype=dtype, requires_grad=True)
    rejected = torch.tensor(x2, dtype=dtype, requires_grad=True)
    zero = torch.zeros_like(chosen).detach()
    lengths = [torch.full_like(zero, length) for length in lengths]
    return PairLogps(chosen, rejected, zero, zero, *lengths, zero + SCORE_GAP, zero)


def value_and_gradients(logps, options, around=None):
    losses = preference_loss(logps, options, around)
    gradients = torch.autograd.grad(losses.sum(), (logps.policy_chosen, logps.policy_rejected), allow_unused=True)
    return losses.detach(), *(torch.zeros_like(losses) if g is None else g for g in gradients)


@pytest.mark.parametrize("dtype,rtol", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", ORACLE["cases"], ids=[f"{case['loss_type']}: {case['source']}" for case in ORACLE["cases"]])
def test_oracle_values_and_gradients(case, dtype, rtol):
    for name, point in ORACLE["points"].items():
        logps = PairLogps(**{field: torch.tensor([point[field]], dtype=dtype) for field in FIELDS})
        for policy in (logps.policy_chosen, logps.policy_rejected):
            policy.requires_grad_()
        around = Surroundings(statistics=case.get("statistics", {}))
        got = torch.cat(value_and_gradients(logps, loss_options(case["loss_type"], **case["options"]), around))
        expected = torch.tensor(case["expected"][name], dtype=dtype)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-7 if dtype is torch.float32 else 1e-12)


def test_oracle_covers_every_loss():
    """All but the fine-tuning term, whose formula is a sign."""
    assert {case["loss_type"] for case in ORACLE["cases"]} == set(LOSSES) - {"sft"}


def sgn(value):
    return (value > 0) - (value < 0)


def s(value):
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def slope(value):
    return s(value) * s(-value)


def expected_gradients(o, x1, x2, length=1.0):
    """The docstrings' formulas with plain floats: (dL/dx1, dL/dx2) without the anchor, for a pair alone whose reference is zero.

    ``length``: tokens of the chosen response in a unit of x1, for the terms that are always per token.
    """
    b, h, e = o.beta, x1 - x2, o.label_smoothing
    dpo = b * (s(b * h) - (1 - e))
    one_sided = {
        "sigmoid": dpo, "sigmoid-norm": dpo, "aot": dpo, "aot-unpaired": dpo,
        "robust": -b * ((1 - e) * s(-b * h) + e * s(b * h)) / (1 - 2 * e),
        "ipo": 2 * (h - 1 / (2 * b)),
        "hinge": -b if b * h < 1 else 0.0,
        "odpo": -b * s(-(b * h - o.margin * math.log(SCORE_GAP))),
        "exo": b * slope(b * h) * (b * h - math.log((1 - e) / e)) if e else 0.0,
        "discopop": b * discopop_slope(b * h, o.discopop_tau),
        "simpo": -b * s(-(b * h - o.margin)),
        "alpha-dpo": -b * s(-(b * h - o.margin - o.alpha * b * h)),
        "stapo": -b * s(-b * (h - o.margin)) + b * s(-b * (o.upper_margin - h)),
    }  # fmt: skip
    if o.loss_type in one_sided:
        return one_sided[o.loss_type], -one_sided[o.loss_type]
    return linear_gradients(o, h, x1, x2) if o.loss_type.startswith("lpo") else uneven_gradients(o, h, x1, x2, length)


def discopop_slope(z, t):
    blend = s(z / t)
    return -(1 - blend) * s(-z) - blend * math.exp(-z) + blend * (1 - blend) / t * (math.exp(-z) + math.log(s(z)))


def linear_gradients(o, h, x1, x2):
    b, m, total = o.beta, 1 / (2 * o.beta), o.r1 + o.r2
    one, two, at = {
        "lpo": (1.0, 1.0, h - m),
        "lpo-paper": (0.5, 0.5, h - m),
        "lpo-r": (o.r1, o.r2, o.r1 * x1 - o.r2 * x2 - m),
        "lpo-ste": (o.r1 / total, o.r2 / total, h - m),
        "lpo-ste-paper": (o.r1**2 / total, o.r2**2 / total, h - m),
        "lpo-ste-dynamic": (s(h), s(-h), h - m),
    }[o.loss_type]
    return 4 * b * one * sgn(at), -4 * b * two * sgn(at)


def uneven_gradients(o, h, x1, x2, length):
    b, w = o.beta, o.sft_weight
    z0, z1, z2 = max(0.0, (x1 + x2) / 2), max(0.0, x1), max(0.0, x2)
    positive = b * (h - o.dpop_lambda * max(0.0, -x1))
    active = float(o.margin > x1 - x2)
    dpo, odds = b * (s(b * h) - (1 - o.label_smoothing)), log_odds(x1) - log_odds(x2)
    return {
        "dpop": (-b * (1 + o.dpop_lambda * (x1 < 0)) * s(-positive), b * s(-positive)),
        "kto": (-o.desirable_weight * b * slope(b * (x1 - z0)) / 2, o.undesirable_weight * b * slope(b * (z0 - x2)) / 2),
        "kto-pair": (-b * slope(b * (x1 - z2)) / 2, b * slope(b * (z1 - x2)) / 2),
        "bco": (-b * s(-b * x1), b * s(b * x2)),
        "nca": (-b * s(-b * x1) + b * s(b * x1) / 2, b * s(b * x2) / 2),
        "apo-zero": (-b * slope(b * x1), b * slope(b * x2)),
        "apo-down": (b * slope(b * x1) - b * slope(b * h), b * slope(b * h)),
        "sppo-hard": (2 * (x1 - 1 / (2 * b)), 2 * (x2 + 1 / (2 * b))),
        "slic": (-active - w, active),
        "orpo": (-1 / length - b * s(-odds) / -math.expm1(x1), b * s(-odds) / -math.expm1(x2)) if max(x1, x2) < 0 else (0.0, 0.0),
        "cpo": (-b * s(-b * h) - w / length, b * s(-b * h)),
        "rpo": (dpo - w * b, -dpo),
        "irpo": (dpo - w / length, -dpo),
        "sft": (-1.0, 0.0),
    }[o.loss_type]


def log_odds(p):
    return p - math.log(-math.expm1(p)) if p < 0 else 0.0


def expected_anchor_gradient(o, x1, slack):
    scale = 2 * o.r1 / (o.r1 + o.r2) if o.loss_type == "lpo-ste-paper" else 1.0
    return -o.anchor_weight * scale if x1 < -slack else 0.0


@pytest.mark.parametrize("anchor", ["none", "hinge"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_autograd_agrees_with_the_documented_gradients(name, normalised, anchor):
    hinge = {"anchor_weight": 3.0, "anchor_slack": 0.01} if anchor == "hinge" else {}
    options = tried(name, length_normalised=normalised, anchor=anchor, **hinge)
    lengths = (4.0, 9.0)
    units = lengths if normalised else (1.0, 1.0)
    for x1, x2 in itertools.product([-3.0, -0.05, -0.02, 0.4, 5.0], [-4.0, -0.3, 0.0, 1.1]):
        if name == "orpo" and max(x1, x2) >= 0:
            continue  # a log-prob, not a ratio
        _, chosen, rejected = value_and_gradients(pairs([x1 * units[0]], [x2 * units[1]], lengths), options)
        d1, d2 = expected_gradients(options, x1, x2, 1.0 if normalised else lengths[0])
        if anchor == "hinge":
            d1 += expected_anchor_gradient(options, x1, options.anchor_slack * lengths[0] / units[0])
        assert chosen.item() * units[0] == pytest.approx(d1, rel=1e-9, abs=1e-12), (x1, x2)
        assert rejected.item() * units[1] == pytest.approx(d2, rel=1e-9, abs=1e-12), (x1, x2)


STOPPED = ("lpo-ste", "lpo-ste-paper", "lpo-ste-dynamic", "kto", "kto-pair", "alpha-dpo", "aot-unpaired")


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in STOPPED])
def test_gradcheck_away_from_kinks(name):
    """Those that stop a gradient on purpose are left out: theirs is not that of their value."""
    x1 = torch.tensor([-0.5, -0.3, -2.0], dtype=torch.float64, requires_grad=True)
    x2 = torch.tensor([-0.4, -1.0, -6.0], dtype=torch.float64, requires_grad=True)

    def loss(chosen, rejected):
        zero, length = torch.zeros_like(x1).detach(), torch.full_like(x1, 3.0).detach()
        return preference_loss(PairLogps(chosen, rejected, zero, zero, length, length, zero + SCORE_GAP, zero), tried(name))

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
    """Three pairs, because some losses of one pair are another loss; log-ratios positive in the mean, because KL estimates are clamped."""
    policy = torch.tensor([[-0.4, -0.2, -3.0], [-0.1, -1.3, -2.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-0.5, -2.2, -2.5], [-2.1, -1.0, -1.0]])
    two, five, gap = torch.full((3,), 2.0), torch.full((3,), 5.0), torch.full((3,), SCORE_GAP)
    logps = PairLogps(*policy.unbind(), *reference, two, five, gap, 0 * gap)
    seen = {}
    for name in LOSSES:
        given = {"r2": 0.5} if name in SIDED else {"beta": 3.0} if name in ("sigmoid-norm", "aot", "aot-unpaired") else {}
        seen[name] = torch.stack(value_and_gradients(logps, loss_options(name, **given)))
    for one, two in itertools.combinations(seen, 2):
        assert not torch.allclose(seen[one], seen[two]), (one, two)


@pytest.mark.parametrize("name", LOSSES)
def test_no_pairs_and_low_precision(name):
    value, chosen, rejected = value_and_gradients(pairs([], [], dtype=torch.float32), loss_options(name))
    assert value.shape == chosen.shape == rejected.shape == (0,)
    x1, x2 = [-2.0, 6.0], [1.0, -3.0]
    low = preference_loss(pairs(x1, x2, (4.0, 8.0), torch.bfloat16), loss_options(name))
    high = preference_loss(pairs(x1, x2, (4.0, 8.0), torch.float64), loss_options(name))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=1e-6)


FAR = [(1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4), (-300.0, -1e-9), (0.0, 0.0), (-1e-9, -300.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_are_finite(name, dtype):
    """Log-ratios of thousands of nats, probabilities of one: a value or a gradient that overflows would poison the whole step."""
    for options in (loss_options(name), tried(name), tried(name, anchor="spo", anchor_power=4.0, anchor_weight=10.0)):
        for x1, x2 in FAR:
            for values in value_and_gradients(pairs([x1], [x2], dtype=dtype), options):
                assert torch.isfinite(values).all(), (options, x1, x2)


def test_dpo_is_the_special_case_that_the_papers_say():
    x1, x2 = [-0.4, 0.2, 3.0], [0.3, -0.1, -2.0]
    dpo = torch.stack(value_and_gradients(pairs(x1, x2), loss_options("sigmoid")))

    def same(name, **given):
        torch.testing.assert_close(torch.stack(value_and_gradients(pairs(x1, x2), loss_options(name, beta=0.1, **given))), dpo)

    same("rpo", sft_weight=0.0)
    same("irpo", sft_weight=0.0)
    same("robust", label_smoothing=0.0)
    same("dpop", dpop_lambda=0.0)
    same("odpo", margin=0.0)
    same("sigmoid-norm", length_normalised=False)
    same("simpo", length_normalised=False, margin=0.0)  # of a reference whose log-probs are zero
    same("cpo", sft_weight=0.0)
    for name in ("aot", "aot-unpaired"):
        one_by_one = [value_and_gradients(pairs([a], [b]), loss_options(name, beta=0.1)) for a, b in zip(x1, x2, strict=True)]
        torch.testing.assert_close(torch.stack([torch.cat(part) for part in zip(*one_by_one, strict=True)]), dpo)


def test_alpha_dpo_without_alpha_is_simpo():
    logps, given = pairs([-0.4, 0.2], [0.3, -0.1]), {"beta": 2.0, "margin": 0.7}
    simpo = value_and_gradients(logps, loss_options("simpo", **given))
    torch.testing.assert_close(value_and_gradients(logps, loss_options("alpha-dpo", alpha=0.0, **given)), simpo)


def test_alpha_dpo_standardises_with_the_running_statistics():
    logps = pairs([-0.4, 0.2], [0.3, -0.1])
    around = Surroundings(statistics={"alpha-dpo/margin": 0.1, "alpha-dpo/margin_square": 0.1**2 + 0.5**2})
    options = loss_options("alpha-dpo", beta=2.0, margin=0.7, alpha=0.3)
    for got, h in zip(preference_loss(logps, options, around).tolist(), (-0.7, 0.3), strict=True):
        assert got == pytest.approx(-math.log(s(2.0 * h - (0.7 + 0.3 * (2.0 * h - 0.1) / 0.5))))
    # All margins alike: the deviation has a floor, so a run's first steps (policy = reference) do not divide by zero.
    flat = Surroundings(statistics={"alpha-dpo/margin": 0.0, "alpha-dpo/margin_square": 0.0})
    assert all(torch.isfinite(values).all() for values in value_and_gradients(pairs([0.0], [1e-7]), options, flat))


def test_robust_is_unbiased():
    """With labels flipped with probability e its expectation is DPO's loss on the clean ones."""
    e, x1, x2 = 0.2, [-0.4, 0.2, 30.0], [0.3, -0.1, -20.0]
    options = loss_options("robust", label_smoothing=e)
    clean, flipped = preference_loss(pairs(x1, x2), options), preference_loss(pairs(x2, x1), options)
    torch.testing.assert_close((1 - e) * clean + e * flipped, preference_loss(pairs(x1, x2), loss_options("sigmoid")))


@pytest.mark.parametrize(("name", "e"), [("exo", 0.01), ("sigmoid", 0.1)])
def test_a_smoothed_label_has_a_finite_goal(name, e):
    margin = math.log((1 - e) / e) / 0.5
    _, chosen, rejected = value_and_gradients(pairs([margin], [0.0]), loss_options(name, beta=0.5, label_smoothing=e))
    assert chosen.item() == pytest.approx(0, abs=1e-12) and rejected.item() == pytest.approx(0, abs=1e-12)


def test_stapo_is_symmetric_about_its_band():
    options = loss_options("stapo", margin=0.3, upper_margin=0.5)
    torch.testing.assert_close(preference_loss(pairs([0.4 + 0.7], [0.0]), options), preference_loss(pairs([0.4 - 0.7], [0.0]), options))


@pytest.mark.parametrize("name", ["aot", "aot-unpaired"])
def test_aot_is_the_sum_over_sorted_pairs(name):
    """Against sorting everything and letting autograd go through the sort; ties included, and split over three ranks."""
    torch.manual_seed(0)
    values = torch.randn(4, 9, dtype=torch.float64)
    values[:, 5] = values[:, 2]  # the same pair twice
    policy, reference = values[:2].clone().requires_grad_(), values[2:]
    length = torch.ones(9, dtype=torch.float64)
    options = loss_options(name, beta=0.5, label_smoothing=0.1)
    if name == "aot":
        gaps = (policy[0] - policy[1]).sort().values - (reference[0] - reference[1]).sort().values
    else:
        gaps = (policy[0] - reference[0]).sort().values - (policy[1] - reference[1]).sort().values
    ls = torch.nn.functional.logsigmoid
    total = (-0.9 * ls(0.5 * gaps) - 0.1 * ls(-0.5 * gaps)).sum()
    (expected,) = torch.autograd.grad(total, policy)
    everyone = PairLogps(*policy, *reference, length, length)
    for cuts in ([9], [4, 0, 5]):
        first, sums, gradient = 0, 0.0, torch.zeros_like(policy)
        for count in cuts:
            mine = PairLogps(**{field: value[first : first + count] for field, value in vars(everyone).items() if value is not None})
            part = preference_loss(mine, options, Surroundings(everyone, first)).sum()
            sums, gradient = sums + part.item(), gradient + torch.autograd.grad(part, policy)[0]
            first += count
        assert sums == pytest.approx(total.item(), rel=1e-12)
        torch.testing.assert_close(gradient, expected)


def test_kto_compares_with_the_mean_of_all_peers():
    everyone, mine = pairs([1.0, 3.0, 2.0], [0.0, -1.0, 4.0]), pairs([1.0], [0.0])
    z0 = (1 + 3 + 2 + 0 - 1 + 4) / 6
    options = loss_options("kto", beta=0.5, desirable_weight=1.5, undesirable_weight=0.5)
    got = preference_loss(mine, options, Surroundings(everyone, 0))
    assert got.item() == pytest.approx((1.5 * (1 - s(0.5 * (1 - z0))) + 0.5 * (1 - s(0.5 * z0))) / 2)
    got = preference_loss(mine, loss_options("kto-pair", beta=0.5), Surroundings(everyone, 0))
    assert got.item() == pytest.approx((1 - s(0.5 * (1.0 - 1.0)) + 1 - s(0.5 * (2.0 - 0.0))) / 2)


def test_spo_with_the_reference_as_its_value_is_lpos_hinge():
    logps = pairs([-0.4, 0.2, -0.003, 0.0], [0.3, -0.1, 0.2, 0.0], (4.0, 2.0))
    for name in ("lpo-ste", "lpo", "ipo"):
        given = {"anchor_weight": 3.0, "anchor_slack": 0.001}
        hinge = value_and_gradients(logps, loss_options(name, anchor="hinge", **given))
        torch.testing.assert_close(value_and_gradients(logps, loss_options(name, anchor="spo", **given)), hinge)


def test_spo_holds_the_policy_to_the_best_it_has_reached():
    logps, bare = pairs([-0.4, 0.3], [0.0, 0.0]), loss_options("ipo")
    options = loss_options("ipo", anchor="spo", anchor_value="running-minimum", anchor_power=2.0, anchor_weight=3.0)
    around = Surroundings(statistics={"spo/excess": -0.5})
    added = preference_loss(logps, options, around) - preference_loss(logps, bare)
    assert added.tolist() == pytest.approx([3 * 0.9**2, 3 * 0.2**2])
    gradient = value_and_gradients(logps, options, around)[1] - value_and_gradients(logps, bare)[1]
    assert gradient.tolist() == pytest.approx([-3 * 2 * 0.9, -3 * 2 * 0.2])


def test_offset_moves_the_margin_of_the_lpo_family():
    logps = pairs([0.2, 1.0], [0.1, -0.5])
    bare = preference_loss(logps, loss_options("lpo", anchor="none", offset=0.0))
    assert bare.tolist() == pytest.approx([0.8 * 0.1, 0.8 * 1.5])
    _, chosen, _ = value_and_gradients(logps, loss_options("lpo-ste", anchor="none", offset=0.7))
    assert chosen.tolist() == pytest.approx([-0.4, 0.4])


def test_whole_lengths_and_a_wider_reference():
    zero = torch.zeros(2)
    logps = PairLogps(zero, zero, zero.double() - 1.0, zero.double(), torch.tensor([2, 4]), torch.tensor([1, 1]))
    expected = 0.8 * (torch.tensor([0.5, 0.25], dtype=torch.float64) - 2.5).abs()
    torch.testing.assert_close(preference_loss(logps, loss_options("lpo-ste")), expected)


def test_shapes_must_agree():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(AssertionError, match="same shape"):
        PairLogps(two, two, one, two, two, two)


