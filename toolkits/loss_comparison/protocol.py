"""The rules a comparison follows, fixed before its runs: which rate a loss gets, and when two losses differ.

No number of the held-out problems or pairs enters a choice; what is reported of them is measured once, at the chosen rates.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkits.loss_comparison.plan import Comparison, Run
from toolkits.loss_comparison.trials import Numbers, Trial

PROTOCOL = (
    "Every loss starts from the same fine-tuned weights and is trained at each of its learning rates with the first seed; a run may take "
    "over the rate of another instead, where what they share should be all but one option.",
    "Its rate is the one with the highest greedy accuracy on the validation problems; of equals the one with the higher preference "
    "accuracy on the validation pairs, then the lower rate. A rate whose training diverged is none.",
    "At the chosen rate it is trained with every seed (the first is not trained twice) and measured on held-out problems and pairs, which "
    "no choice has seen.",
    "A number is the mean over seeds ± half of its 95% interval (Student t); of runs whose intervals overlap nothing is said but "
    '"no difference".',
    "A seed decides the order of the pairs, nothing else: model, pairs and problems are the same for all. So an interval says how a "
    "training varies, not what other problems would give: of n problems a fraction p is known to about sqrt(p (1-p) / n).",
)

# Student's t, 0.975 quantile, for 1 to 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
    2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A number over seeds."""

    values: tuple[float, ...]
    """One a seed, in the order of the seeds."""
    half_width: float | None
    """Of the 95% interval; None where one seed gives none; 0 for what no seed changes."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)


def student_t(degrees: int) -> float:
    """0.975 quantile of Student's t; above 30 degrees of freedom that of 30, which is too wide by 4% at most."""
    return _T[min(degrees, len(_T)) - 1]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval of independent values."""
    count = len(values)
    half_width = student_t(count - 1) * statistics.stdev(values) / count**0.5 if count > 1 else None
    return Estimate(tuple(values), half_width)


def certain(value: float) -> Estimate:
    """Of something that has no seed: the untouched model."""
    return Estimate((value,), 0.0)


def verdict(own: Estimate, other: Estimate) -> str:
    """What may be said of ``own`` against ``other``: higher, lower, no difference, or nothing."""
    if own.half_width is None or other.half_width is None:
        return "one seed"
    if abs(own.mean - other.mean) <= own.half_width + other.half_width:
        return "no difference"
    return "higher" if own.mean > other.mean else "lower"


def selection_trials(comparison: Comparison) -> list[Trial]:
    """What is trained to choose rates: every run's first rate, then every run's second..., so that a mistake in a run shows early."""
    trials = [
        (place, Trial(run, rate, comparison.seeds[0]))
        for run in comparison.runs
        if run.rates_from is None
        for place, rate in enumerate(run.learning_rates)
    ]
    return [trial for _, trial in sorted(trials, key=lambda item: item[0])]


def choose_rates(comparison: Comparison, measured: Mapping[Trial, Numbers | None]) -> dict[str, float]:
    """The learning rate of every run, by name, from the numbers of `selection_trials` on validation problems and pairs.

    Raises:
        ValueError: a run diverged (None) at all of its rates.
    """
    own = {run.name: _best_rate(run, measured) for run in comparison.runs if run.rates_from is None}
    return {run.name: own[run.rates_from or run.name] for run in comparison.runs}


def _best_rate(run: Run, measured: Mapping[Trial, Numbers | None]) -> float:
    tried = {trial.learning_rate: numbers for trial, numbers in measured.items() if trial.run == run and numbers is not None}
    if not tried:
        raise ValueError(f"{run.name} diverged at every learning rate: give it lower ones")
    return max(tried, key=lambda rate: (tried[rate]["greedy_accuracy"], tried[rate]["preference_accuracy"], -rate))


def is_at_the_end(run: Run, rate: float) -> bool:
    """Whether a chosen rate is the lowest or the highest tried, so that a better one may lie outside."""
    return run.rates_from is None and len(run.learning_rates) > 2 and rate in (min(run.learning_rates), max(run.learning_rates))


def final_trials(comparison: Comparison, rates: Mapping[str, float]) -> dict[str, list[Trial]]:
    """What is measured on held-out data: by run, one trial a seed."""
    return {run.name: [Trial(run, rates[run.name], seed) for seed in comparison.seeds] for run in comparison.runs}
