"""What evaluations decide: which checkpoint is the best, and when training has stopped getting better.

Decisions are the same on every rank, since every rank observes the same numbers, and travel in checkpoints as one JSON string: a resumed
run goes on counting where it was. Larger is better, unless a metric is a loss or something of the rejected responses.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass
class Best:
    """The best value so far of one metric, at which step, and how many evaluations ago (0: the last one)."""

    value: float = math.nan
    step: int = 0
    since: int = 0

    def observe(self, name: str, value: float, step: int) -> None:
        """One more evaluation. What is not finite is never better than anything."""
        last = name.rpartition("/")[2]
        falls = "loss" in last or last.startswith("rejected")
        better = value < self.value if falls else value > self.value
        if math.isfinite(value) and (better or math.isnan(self.value)):
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1


class BestSoFar:
    """Follows the metric that says which checkpoint is best and the one that says when to stop; either may be None.

    Args:
        best_metric, stop_metric: names as in metrics.jsonl, e.g. ``eval_loss``.
        patience: evaluations without a better value before the end.
    """

    def __init__(self, best_metric: str | None, stop_metric: str | None, patience: int) -> None:
        self.best_metric, self.stop_metric, self.patience = best_metric, stop_metric, patience
        self.of: dict[str, Best] = {name: Best() for name in (best_metric, stop_metric) if name is not None}

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """One evaluation. ValueError for a metric that it does not have."""
        for name, best in self.of.items():
            if name not in metrics:
                raise ValueError(f"no evaluation has a metric {name!r}; there are {', '.join(sorted(metrics))}")
            best.observe(name, float(metrics[name]), step)

    def improved_at(self, step: int) -> bool:
        """Whether the evaluation at this step was the best one, so that its checkpoint is to be kept."""
        return self.best_metric is not None and self.of[self.best_metric].step == step

    @property
    def stops(self) -> bool:
        """Whether patience is at its end."""
        return self.stop_metric is not None and self.of[self.stop_metric].since >= self.patience

    @property
    def best(self) -> tuple[int, str, float] | None:
        """(step, metric, value) of the best evaluation, None before the first or when nobody asked."""
        if self.best_metric is None or not self.of[self.best_metric].step:
            return None
        found = self.of[self.best_metric]
        return found.step, self.best_metric, found.value

    @property
    def state(self) -> str:
        """What checkpoints keep."""
        return json.dumps({name: asdict(best) for name, best in self.of.items()})

    def restore(self, state: str | None) -> None:
        """Take over what a checkpoint kept of the metrics that are still followed."""
        for name, best in json.loads(state or "{}").items():
            if name in self.of:
                self.of[name] = Best(**best)
