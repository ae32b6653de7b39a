"""The best evaluation and the end of patience, against sequences worked out by hand."""

import math

import pytest

from megatron_patch.best_so_far import BestSoFar


def follow(watch: BestSoFar, name: str, values: list[float]) -> list[tuple[bool, bool]]:
    """(improved, stops) after each evaluation, at steps 10, 20, 30..."""
    seen = []
    for number, value in enumerate(values, 1):
        watch.observe(10 * number, {name: value, "eval_other": 0.0})
        seen.append((watch.improved_at(10 * number), watch.stops))
    return seen


def test_losses_fall_and_everything_else_rises():
    yes, no = (True, False), (False, False)
    assert follow(BestSoFar("eval_loss", None, 1), "eval_loss", [3.0, 2.0, 2.0, 1.0]) == [yes, yes, no, yes]
    assert follow(BestSoFar("eval_rewards/accuracies", None, 1), "eval_rewards/accuracies", [0.5, 0.4, 0.6]) == [yes, no, yes]
    assert follow(BestSoFar("eval_lpo/loss_without_anchor", None, 1), "eval_lpo/loss_without_anchor", [1.0, 2.0]) == [yes, no]
    assert follow(BestSoFar("eval_logps/rejected", None, 1), "eval_logps/rejected", [-3.0, -2.0, -4.0]) == [yes, no, yes]
    assert follow(BestSoFar("eval_logps/chosen", None, 1), "eval_logps/chosen", [-3.0, -2.0, -4.0]) == [yes, yes, no]


def test_patience_counts_evaluations_without_a_better_one():
    stops = [stop for _, stop in follow(BestSoFar(None, "eval_loss", 2), "eval_loss", [3.0, 3.1, 2.9, 3.0, 2.9, 2.0])]
    assert stops == [False, False, False, False, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_better(bad):
    watch = BestSoFar("eval_loss", "eval_loss", 2)
    assert follow(watch, "eval_loss", [bad, 2.0, bad, bad]) == [(False, False), (True, False), (False, False), (False, True)]
    assert watch.best == (20, "eval_loss", 2.0)
    watch = BestSoFar("eval_loss", "eval_loss", 2)
    assert follow(watch, "eval_loss", [bad, bad]) == [(False, False), (False, True)] and watch.best is None


def test_goes_on_after_a_checkpoint():
    watch, after = BestSoFar("eval_loss", "eval_loss", 2), BestSoFar("eval_loss", "eval_loss", 2)
    follow(watch, "eval_loss", [2.0, 2.5])
    after.restore(watch.state)
    after.observe(30, {"eval_loss": 2.4})
    assert after.stops and after.best == (10, "eval_loss", 2.0)
    other = BestSoFar("eval_rewards/margins", None, 2)
    other.restore(watch.state)
    assert other.best is None and not other.stops
    other.restore(None)


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match="'eval_accuracy'; there are eval_loss, eval_rewards/accuracies"):
        BestSoFar(None, "eval_accuracy", 1).observe(1, {"eval_rewards/accuracies": 1.0, "eval_loss": 2.0})
