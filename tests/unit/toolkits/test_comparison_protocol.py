"""The choice of rates on invented numbers, and intervals against integrals of Student's density."""

import math
from pathlib import Path

import numpy as np
import pytest

from toolkits.loss_comparison.plan import Comparison, Run
from toolkits.loss_comparison.protocol import (
    certain,
    choose_rates,
    estimate,
    final_trials,
    is_at_the_end,
    selection_trials,
    student_t,
    verdict,
)
from toolkits.loss_comparison.trials import Numbers, Trial


def run(name: str, rates: tuple[float, ...] = (1e-5, 2e-5, 4e-5), rates_from: str | None = None) -> Run:
    return Run(name, Path("p.args"), (), rates, 10, None, rates_from, None, "")


def comparison(*runs: Run, seeds: tuple[int, ...] = (1, 2, 3)) -> Comparison:
    return Comparison("t", Path("m"), seeds, 5, None, None, False, runs, {})


def measured(trials: list[Trial], *numbers: tuple[float, float]) -> dict[Trial, Numbers]:
    both = zip(trials, numbers, strict=True)
    return {trial: {"greedy_accuracy": greedy, "preference_accuracy": preference} for trial, (greedy, preference) in both}


def student_cdf(t: float, degrees: int) -> float:
    """Trapezoids under the density, from 0."""
    points = np.linspace(0, t, 200_001)
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    return 0.5 + float(np.trapezoid(scale * (1 + points**2 / degrees) ** (-(degrees + 1) / 2), points))


@pytest.mark.parametrize("degrees", range(1, 31))
def test_quantiles(degrees: int) -> None:
    assert student_cdf(student_t(degrees), degrees) == pytest.approx(0.975, abs=3e-5)


def test_many_seeds_get_too_wide_an_interval_never_too_narrow() -> None:
    assert 1.96 < student_t(1000) <= 1.96 * 1.05


def test_interval_by_hand() -> None:
    """1, 2, 3: mean 2, standard deviation 1, so 4.303 / sqrt(3)."""
    three = estimate([1.0, 2.0, 3.0])
    assert three.mean == 2.0 and three.half_width == pytest.approx(4.303 / 3**0.5)
    assert estimate([0.5]).half_width is None and estimate([0.5, 0.5]).half_width == 0.0


def test_verdicts() -> None:
    low, high, wide = estimate([0.50, 0.51, 0.52]), estimate([0.80, 0.81, 0.82]), estimate([0.3, 0.6, 0.9])
    assert verdict(low, high) == "lower" and verdict(high, low) == "higher"
    assert verdict(wide, high) == verdict(high, wide) == "no difference"
    assert verdict(estimate([0.1]), high) == "one seed"
    assert verdict(certain(0.4), high) == "lower" and verdict(certain(0.4), wide) == "no difference"


def test_touching_intervals_overlap() -> None:
    left, right = estimate([1.0, 3.0]), estimate([1.0, 3.0])
    assert left.half_width is not None
    moved = estimate([value + 2 * left.half_width for value in right.values])
    assert verdict(left, right) == "no difference" and verdict(moved, certain(2.0 + left.half_width)) == "no difference"


def test_first_rates_of_all_runs_come_first() -> None:
    trials = selection_trials(comparison(run("a"), run("b", (1e-3,)), run("c", rates_from="a")))
    assert [(trial.run.name, trial.learning_rate) for trial in trials] == [("a", 1e-5), ("b", 1e-3), ("a", 2e-5), ("a", 4e-5)]
    assert {trial.seed for trial in trials} == {1}


@pytest.mark.parametrize(
    ("numbers", "chosen"),
    [
        (((0.3, 0.9), (0.5, 0.6), (0.4, 0.9)), 2e-5),  # greedy accuracy decides
        (((0.5, 0.6), (0.4, 0.9), (0.5, 0.7)), 4e-5),  # then preference accuracy
        (((0.4, 0.9), (0.5, 0.7), (0.5, 0.7)), 2e-5),  # then the lower rate
    ],
)
def test_choice(numbers: tuple[tuple[float, float], ...], chosen: float) -> None:
    plan = comparison(run("a"), run("b", rates_from="a"))
    assert choose_rates(plan, measured(selection_trials(plan), *numbers)) == {"a": chosen, "b": chosen}


def test_a_diverged_rate_is_none() -> None:
    plan = comparison(run("a"))
    trials = selection_trials(plan)
    best = {"greedy_accuracy": 0.9, "preference_accuracy": 0.9}
    assert choose_rates(plan, {trials[0]: best, trials[1]: None, trials[2]: None}) == {"a": 1e-5}
    with pytest.raises(ValueError, match="a diverged at every learning rate"):
        choose_rates(plan, dict.fromkeys(trials))


def test_the_choice_is_the_first_seed() -> None:
    plan = comparison(run("a"), seeds=(7, 8))
    tried = selection_trials(plan)
    final = final_trials(plan, {"a": 2e-5})["a"]
    assert [trial.seed for trial in final] == [7, 8] and final[0] in tried and final[1] not in tried


def test_a_choice_at_the_end_of_its_rates_is_known_as_one() -> None:
    """A better rate may lie outside; two rates, or another run's, are no grid to have an end."""
    assert [is_at_the_end(run("a"), rate) for rate in (1e-5, 2e-5, 4e-5)] == [True, False, True]
    assert not is_at_the_end(run("a", (1e-5, 2e-5)), 2e-5)
    assert not is_at_the_end(run("a", rates_from="b"), 4e-5)
