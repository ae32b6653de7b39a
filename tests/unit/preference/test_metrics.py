"""Metrics of a micro-batch against hand-computed numbers."""

import pytest
import torch

from megatron_patch.preference.inputs import PairLogps, Surroundings
from megatron_patch.preference.losses import LOSSES, WeightedLoss, loss_options, loss_sum, preference_loss
from megatron_patch.preference.metrics import preference_metrics

NAMES = {
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "lpo/chosen_logratio", "lpo/rejected_logratio", "lpo/margin", "lpo/anchor_active", "lpo/loss_without_anchor", "loss",
}  # fmt: skip


def three_pairs():
    """Log-ratios (sums) chosen +2, -4, 0 over 20, 10, 5 tokens; rejected -6, +3, 0 over 30 tokens each."""
    return PairLogps(
        policy_chosen=torch.tensor([-40.0, -46.0, -9.0], requires_grad=True),
        policy_rejected=torch.tensor([-75.0, -66.0, -8.0], requires_grad=True),
        ref_chosen=torch.tensor([-42.0, -42.0, -9.0]),
        ref_rejected=torch.tensor([-69.0, -69.0, -8.0]),
        chosen_len=torch.tensor([20, 10, 5]),
        rejected_len=torch.tensor([30, 30, 30]),
        score_chosen=torch.tensor([1.0, 2.0, 3.0]),
        score_rejected=torch.tensor([0.5, 0.0, 0.0]),
    )


def measure(logps, *options):
    parts = tuple(WeightedLoss(part) for part in options)
    return preference_metrics(logps, parts, preference_loss(logps, parts), Surroundings())


def test_values_by_hand():
    metrics = measure(three_pairs(), loss_options("lpo-ste"))
    # Per token: chosen .1, -.4, 0 and rejected -.2, .1, 0. Loss .8 |h - 2.5| = 1.76, 2.4, 2.0; anchor 10 x .4 for the second pair.
    expected = {
        "rewards/chosen": 0.2 * (2 - 4), "rewards/rejected": 0.2 * (-6 + 3), "rewards/margins": 0.2 * (8 - 7),
        "rewards/accuracies": 1.0, "logps/chosen": -95.0, "logps/rejected": -149.0,
        "lpo/chosen_logratio": -0.3, "lpo/rejected_logratio": -0.1, "lpo/margin": -0.2,
        "lpo/anchor_active": 1.0, "lpo/loss_without_anchor": 1.76 + 2.4 + 2.0, "loss": 1.76 + 2.4 + 2.0 + 4.0,
    }  # fmt: skip
    assert set(metrics) == NAMES == set(expected)
    for name, value in expected.items():
        assert metrics[name].dtype == torch.float32 and not metrics[name].requires_grad
        assert metrics[name].tolist() == pytest.approx([value, 3.0], rel=1e-5, abs=1e-6), name


def test_anchor_activity_follows_slack_and_absence():
    def active(**given):
        return measure(three_pairs(), loss_options("lpo-ste", **given))["lpo/anchor_active"].tolist()

    assert active(anchor_slack=0.39) == [1.0, 3.0]
    assert active(anchor_slack=0.41) == [0.0, 3.0]
    assert active(anchor_slack=0.41, length_normalised=False) == [0.0, 3.0]
    assert active(anchor="none") == [0.0, 3.0]
    assert active(anchor="spo", anchor_slack=0.39) == [1.0, 3.0]


def test_loss_without_anchor_is_the_loss_when_there_is_none():
    metrics = measure(three_pairs(), loss_options("sigmoid"))
    assert torch.equal(metrics["loss"], metrics["lpo/loss_without_anchor"])


def test_rewards_of_a_sum_are_those_of_its_first_loss():
    logps, parts = three_pairs(), loss_sum(["sigmoid", "lpo"], [1.0, 0.5])
    metrics = preference_metrics(logps, parts, preference_loss(logps, parts), Surroundings())
    assert metrics["rewards/margins"].tolist() == pytest.approx([0.1 * (8 - 7), 3.0])
    assert metrics["loss"].tolist() == pytest.approx([preference_loss(logps, parts).sum().item(), 3.0])


@pytest.mark.parametrize("name", [name for name, entry in LOSSES.items() if not entry.needs_peers])
def test_splits_add_up_and_no_pairs_is_zero(name):
    whole, options = three_pairs(), loss_options(name)
    parts = [PairLogps(**{k: v[rows] for k, v in vars(whole).items() if v is not None}) for rows in (slice(0, 1), slice(1, 3), slice(0, 0))]
    split = [measure(part, options) for part in parts]
    for metric, value in measure(whole, options).items():
        torch.testing.assert_close(sum(part[metric] for part in split), value)
        assert split[2][metric].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name):
    """Tensors without data refuse every read on the host, so that whatever runs on them does not synchronise a GPU either."""
    logps = PairLogps(*(torch.zeros(3, device="meta") for _ in range(8)))
    options = loss_options(name, length_normalised=None, anchor="hinge", anchor_slack=0.1)
    assert all(value.shape == (2,) for value in measure(logps, options).values())
