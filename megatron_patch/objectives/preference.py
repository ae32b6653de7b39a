"""``--train-mode xpo``: the mean preference loss over the pairs of a global batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_patch.data.packed_batch import PackedBatch
from megatron_patch.objectives.loss_statistics import LossStatistics
from megatron_patch.preference.inputs import PairLogps, Surroundings
from megatron_patch.preference.losses import LossSum, needs_peers, preference_loss
from megatron_patch.preference.metrics import preference_metrics

STORE_KIND = "pairs"
_FIELDS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len")


def pair_logps(batch: PackedBatch, response_logps: Tensor) -> PairLogps:
    """The pairs of a batch: ``response_logps`` [2P], chosen rows first, with reference, lengths and scores beside them."""
    pairs = batch.samples
    return PairLogps(
        policy_chosen=response_logps[:pairs],
        policy_rejected=response_logps[pairs:],
        ref_chosen=batch.reference[:pairs],
        ref_rejected=batch.reference[pairs:],
        chosen_len=batch.lengths[:pairs],
        rejected_len=batch.lengths[pairs:],
        score_chosen=batch.scores[:pairs],
        score_rejected=batch.scores[pairs:],
    )


class PreferenceObjective:
    """Losses of a micro-batch, and what Megatron takes.

    Args:
        options: the weighted sum of losses. statistics: their running statistics. group: gives the data-parallel process group, for
            losses that look at the micro-batch of all its ranks. with_reference: whether batches have reference log-probs (else NaN).
    """

    def __init__(
        self, options: LossSum, statistics: LossStatistics, group: Callable[[], Any] = lambda: None, with_reference: bool = True
    ) -> None:
        self.options, self.statistics, self.group, self.with_reference = options, statistics, group, with_reference
        self._needs_peers = needs_peers(options)

    def __call__(self, batch: PackedBatch, response_logps: Tensor) -> tuple[Tensor, PairLogps, tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """(losses [P], the pairs, what Megatron takes: the sum of the losses, int number of pairs, metrics as [sum, count]).

        Megatron divides by the global count, once, so the loss is the mean over the global batch whatever the split.
        """
        logps = pair_logps(batch, response_logps)
        around = self.around(batch, logps)
        losses = preference_loss(logps, self.options, around)
        if torch.is_grad_enabled():
            self.statistics.observe(logps)
        count = torch.full((), batch.samples, dtype=torch.int, device=losses.device)
        metrics = preference_metrics(logps, self.options, losses, around, with_reference=self.with_reference)
        return losses, logps, (losses.sum().float(), count, metrics)

    def around(self, batch: PackedBatch, logps: PairLogps) -> Surroundings:
        """What the losses may know beyond each pair. Collective over the data-parallel group where a loss needs its peers."""
        if not self._needs_peers or len(batch.samples_by_rank) == 1:
            return Surroundings(statistics=self.statistics.values)
        group = self.group()
        peers = gather_pairs(logps, batch.samples_by_rank, group)
        first = sum(batch.samples_by_rank[: torch.distributed.get_rank(group)])
        return Surroundings(peers, first, self.statistics.values)


def gather_pairs(logps: PairLogps, samples_by_rank: Sequence[int], group: Any) -> PairLogps:
    """The pairs of all ranks of ``group``, in the order of its ranks, without gradient or scores.

    Args:
        samples_by_rank: P of each rank; all ranks know it from the batch plan, so no sizes are exchanged.
    """
    longest = max(samples_by_rank)
    mine = torch.zeros(len(_FIELDS), longest, dtype=torch.float64, device=logps.policy_chosen.device)
    mine[:, : len(logps.policy_chosen)] = torch.stack([getattr(logps, name).detach().double() for name in _FIELDS])
    parts = [torch.empty_like(mine) for _ in samples_by_rank]
    torch.distributed.all_gather(parts, mine, group=group)
    together = torch.cat([part[:, :pairs] for part, pairs in zip(parts, samples_by_rank, strict=True)], dim=1)
    return PairLogps(**dict(zip(_FIELDS, together, strict=True)))
