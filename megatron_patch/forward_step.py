"""One micro-batch through the model: batch -> model -> response log-probs -> objective. It only composes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_patch.data.packed_batch import PackedBatch
from megatron_patch.model.packed_attention import PackedLayout
from megatron_patch.model.response_logps import response_logps
from megatron_patch.objectives.finetune import finetune_objective
from megatron_patch.objectives.preference import PreferenceObjective
from megatron_patch.preference.losses import preference_loss
from megatron_patch.step_checks import StepChecks

Objective = Callable[[PackedBatch, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def checked_preference(objective: PreferenceObjective, checks: StepChecks) -> Objective:
    """The objective of ``--train-mode xpo``, reporting to ``checks``. Returns (loss sum, count, metrics) for Megatron."""

    def preference(batch: PackedBatch, response_logps: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        losses, logps, result = objective(batch, response_logps)
        if checks.at_step_zero():
            same = logps.at_identity()
            checks.observe(batch, response_logps, losses, preference_loss(same, objective.options, objective.around(batch, same)))
        else:
            checks.observe(batch, response_logps)
        return result

    return preference


def checked_finetune(checks: StepChecks) -> Objective:
    """The objective of ``--train-mode finetune``, reporting to ``checks``. Returns (loss sum, count, metrics) for Megatron."""

    def finetune(batch: PackedBatch, logps: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        checks.observe(batch, logps)
        return finetune_objective(batch, logps)

    return finetune


class ForwardStep:
    """Megatron's ``forward_step_func``.

    Args:
        objective: ``checked_preference`` or ``checked_finetune``.
        vocab_size: rows of the vocabulary that exist (the padded ones never count).
        chunk: tokens whose logits are held at a time.
        torch_spec: whether the layers are ours (``layer_specs``) and not Transformer Engine's.
    """

    def __init__(self, objective: Objective, vocab_size: int, chunk: int, *, torch_spec: bool = True) -> None:
        self.objective, self.torch_spec = objective, torch_spec
        self.output_processor = partial(response_logps, vocab_size=vocab_size, chunk=chunk)

    def __call__(self, data_iterator: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Callable]:
        """Run this stage; returns its output and the function that turns the last stage's [R] log-probs into a loss."""
        device = torch.cuda.current_device()
        batch = next(data_iterator)
        group = parallel_state.get_context_parallel_group()
        layout = PackedLayout.of(batch.cu_seqlens.diff().tolist(), batch.behind, device, group, one_sequence=self.torch_spec)
        batch = batch.to(device)
        output = model(
            batch.tokens,
            None,
            None,
            packed_seq_params=layout,
            output_processor=self.output_processor,
            output_processor_context=batch.scored,
        )
        return output, partial(self._loss, batch)

    def _loss(self, batch: PackedBatch, logps: Tensor, non_loss_data: bool = False) -> Any:
        if non_loss_data:  # the reference pass: collect_non_loss_data of the forward-only schedule
            return batch.names, logps.view(len(logps) // max(1, batch.samples), batch.samples).T.cpu()
        return self.objective(batch, logps)
