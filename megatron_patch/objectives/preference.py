"""``--train-mode xpo``: the mean preference loss over the pairs of a global batch."""

import torch
from torch import Tensor

from megatron_patch.data.packed_batch import PackedBatch
from megatron_patch.preference.losses import LossOptions, PairLogps, preference_loss
from megatron_patch.preference.metrics import preference_metrics

STORE_KIND = "pairs"


def pair_logps(batch: PackedBatch, response_logps: Tensor) -> PairLogps:
    """The pairs of a batch: ``response_logps`` [2P], chosen rows first, with the reference and the lengths beside them."""
    pairs = batch.samples
    return PairLogps(
        policy_chosen=response_logps[:pairs],
        policy_rejected=response_logps[pairs:],
        ref_chosen=batch.reference[:pairs],
        ref_rejected=batch.reference[pairs:],
        chosen_len=batch.lengths[:pairs],
        rejected_len=batch.lengths[pairs:],
    )


def preference_objective(
    batch: PackedBatch, response_logps: Tensor, options: LossOptions
) -> tuple[Tensor, tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Losses [P], and what Megatron takes: (their sum, int number of pairs, metrics as [sum, count]).

    Megatron divides by the global count, once, so the loss is the mean over the global batch whatever the split.
    """
    logps = pair_logps(batch, response_logps)
    losses = preference_loss(logps, options)
    count = torch.tensor(batch.samples, dtype=torch.int, device=losses.device)
    return losses, (losses.sum().float(), count, preference_metrics(logps, options, losses))
