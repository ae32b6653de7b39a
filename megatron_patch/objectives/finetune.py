"""``--train-mode finetune``: cross-entropy of the scored tokens, averaged over all scored tokens of a global batch."""

import torch
from torch import Tensor

from megatron_patch.data.packed_batch import PackedBatch

STORE_KIND = "sft"


def finetune_objective(batch: PackedBatch, response_logps: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of -log-probs in nats, int number of scored tokens, metrics as [sum, count])."""
    tokens = batch.lengths.sum().int()
    loss = -response_logps.sum().float()
    return loss, tokens, {"loss": torch.stack((loss.detach(), tokens.float()))}
