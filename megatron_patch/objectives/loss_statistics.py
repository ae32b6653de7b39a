"""Running statistics of losses that look beyond the batch: bco's mean reward, alpha-dpo's mean and deviation, spo's best likelihood.

A step uses those of the steps before it: its own batch's do not exist when its first micro-batch runs backward. They are reduced
once per step over all ranks, so every rank holds the same numbers, and travel in checkpoints as one JSON string.
"""

import json
from collections.abc import Callable
from typing import Any

import torch

from megatron_patch.preference.inputs import PairLogps, Surroundings
from megatron_patch.preference.losses import LossSum, statistics_of, terms_of


class LossStatistics:
    """The running statistics of a weighted sum of losses.

    Args:
        options: the losses. changed: told the new state after every step (``state``), to put it where checkpoints are made from.
    """

    def __init__(self, options: LossSum, changed: Callable[[str], None] = lambda state: None) -> None:
        self.needed, self.changed = statistics_of(options), changed
        self._losses = [[part.options.loss_type, part.options.beta, part.options.length_normalised] for part in options]
        self.values = {statistic.name: statistic.initial for statistic, _ in self.needed}
        self._sums: torch.Tensor | None = None

    @property
    def state(self) -> str:
        """The values as JSON, with what gives them their scale: losses, beta and unit."""
        return json.dumps({"losses": self._losses, "values": self.values})

    def restore(self, state: str | None) -> bool:
        """Take the values from ``state``, the one in a checkpoint; False when they are missing or of other losses, and ours stay."""
        saved = json.loads(state) if state else {}
        fits = saved.get("losses") == self._losses and set(saved.get("values", {})) == set(self.values)
        if fits:
            self.values |= saved["values"]
        return fits or not self.values

    def observe(self, logps: PairLogps) -> None:
        """Remember one micro-batch of a training step: float64 sums over its pairs, and their number. No synchronisation."""
        if not self.needed:
            return
        with torch.no_grad():
            around = Surroundings(statistics=self.values)
            sums = [statistic.of(terms_of(logps, options, around), options).double().sum() for statistic, options in self.needed]
            here = torch.stack([*sums, torch.full_like(sums[0], float(len(logps.policy_chosen)))])
        self._sums = here if self._sums is None else self._sums + here

    def wrap(self, finalize_model_grads: Callable, skipped: Callable[[], bool] = lambda: False) -> Callable:
        """``finalize_model_grads``, the last call before the optimizer steps, followed by the update. Collective: all ranks.

        ``skipped`` says whether the step is left out: its pairs may be NaN, and change nothing.
        """

        def followed(model: list[Any], *args: Any, **kwargs: Any) -> Any:
            result = finalize_model_grads(model, *args, **kwargs)
            if skipped():
                self._sums = None
            else:
                self.update()
            return result

        return followed if self.needed else finalize_model_grads

    def update(self) -> None:
        """Reduce what was observed over all ranks and move the statistics by it.

        Tensor-parallel ranks hold the same pairs and other pipeline stages none: sums and counts are off by the same factor.
        """
        device = torch.cuda.current_device()
        sums = torch.zeros(len(self.needed) + 1, dtype=torch.float64, device=device) if self._sums is None else self._sums
        self._sums = None
        torch.distributed.all_reduce(sums)
        *totals, count = sums.tolist()
        for (statistic, options), total in zip(self.needed, totals, strict=True):
            self.values[statistic.name] = statistic.update(self.values[statistic.name], total / count, options)
        self.changed(self.state)
