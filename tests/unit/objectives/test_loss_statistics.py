"""Running statistics of losses: by hand, without processes (the sum over ranks is played by a factor); and what a checkpoint gives back."""

import json
from unittest import mock

import pytest
import torch

from megatron_patch.objectives.loss_statistics import LossStatistics
from megatron_patch.preference.inputs import PairLogps
from megatron_patch.preference.losses import loss_sum


def pairs(x1, x2):
    """Pairs of two tokens each whose reference is zero."""
    chosen, rejected = torch.tensor(x1, dtype=torch.float64), torch.tensor(x2, dtype=torch.float64)
    zero, two = torch.zeros_like(chosen), torch.full_like(chosen, 2.0)
    return PairLogps(chosen, rejected, zero, zero, two, two)


def update(statistics, ranks=1):
    """A step of ``ranks`` ranks that all observed the same."""
    with mock.patch("torch.distributed.all_reduce", lambda sums: sums.mul_(ranks)), mock.patch("torch.cuda.current_device", lambda: "cpu"):
        statistics.update()


@pytest.mark.parametrize("ranks", [1, 4])
def test_an_update_is_the_mean_over_pairs_not_over_micro_batches(ranks):
    states = []
    statistics = LossStatistics(loss_sum(["bco"], None, beta=0.5, statistics_decay=0.75), changed=states.append)
    statistics.observe(pairs([1.0], [3.0]))
    statistics.observe(pairs([], []))
    statistics.observe(pairs([5.0, 2.0], [1.0, 0.0]))
    assert statistics.values == {"bco/reward": 0.0}, "a step uses those of the steps before"
    update(statistics, ranks)
    first = 0.25 * 0.5 * (4.0 + 6.0 + 2.0) / 2 / 3
    assert statistics.values["bco/reward"] == pytest.approx(first) and states == [statistics.state]
    statistics.observe(pairs([-2.0], [0.0]))
    update(statistics, ranks)
    assert statistics.values["bco/reward"] == pytest.approx(0.75 * first + 0.25 * 0.5 * -1.0)


def test_alpha_dpo_keeps_mean_and_square():
    statistics = LossStatistics(loss_sum(["alpha-dpo"], None, beta=2.0, statistics_decay=0.5))
    statistics.observe(pairs([1.0, 0.0], [0.0, 1.0]))  # per token: margins +1 and -1 with beta
    statistics.observe(pairs([4.0], [0.0]))  # +4
    update(statistics)
    assert statistics.values == pytest.approx({"alpha-dpo/margin": 0.5 * 4 / 3, "alpha-dpo/margin_square": 0.5 + 0.5 * (1 + 1 + 16) / 3})


def test_spo_keeps_the_least():
    statistics = LossStatistics(loss_sum(["ipo"], None, anchor="spo", anchor_value="running-minimum"))
    for x1, expected in (([-2.0], 0.0), ([4.0, 0.0], -1.0), ([1.0], -1.0)):
        statistics.observe(pairs(x1, x1))
        update(statistics)
        assert statistics.values == {"spo/excess": expected}


def test_a_checkpoint_gives_them_back_to_the_same_losses_only():
    def fresh(beta=0.5, name="bco"):
        return LossStatistics(loss_sum([name], None, beta=beta))

    saved = fresh()
    saved.observe(pairs([1.0], [3.0]))
    update(saved)
    again = fresh()
    assert again.restore(saved.state) and again.values == saved.values
    for other in (fresh(beta=0.1), fresh(name="alpha-dpo"), LossStatistics(loss_sum(["bco"], None, beta=0.5, length_normalised=True))):
        before = dict(other.values)
        assert not other.restore(saved.state) and other.values == before
        assert not other.restore(None) and not other.restore(json.dumps({}))
    assert fresh(name="sigmoid").restore(saved.state) and fresh(name="sigmoid").restore(None), "nothing to start anew"
    assert LossStatistics(()).restore(None)


def test_losses_without_statistics_cost_nothing():
    statistics = LossStatistics(loss_sum(["sigmoid"], None))
    statistics.observe(pairs([1.0], [3.0]))
    finalize = object()
    assert statistics.wrap(finalize) is finalize and statistics.values == {}
