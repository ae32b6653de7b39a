"""An entry that writes the logits of every packed sequence: ``logits_entry.py OUT [flags of the reference pass]``.

The model and the schedule are those of the reference pass; only what the last stage returns differs: upstream's own output layer
instead of our log-prob sums. ``OUT.<rank>`` holds [(tokens int64 [L], logits float32 [L, vocabulary])] on the last stage's TP rank 0.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from megatron_patch.entry import parse_arguments
from toolkits.lpo_data_preprocessing import reference_logps


def logits_step(vocab: int, found: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable:
    """A forward step that appends every real sequence of the batch to ``found``."""
    from megatron.core import parallel_state

    from megatron_patch.model.packed_attention import PackedLayout

    def collect(batch: Any, logits: torch.Tensor, non_loss_data: bool = False) -> None:
        shards = [torch.empty_like(logits) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
        torch.distributed.all_gather(shards, logits.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        whole = torch.cat(shards, dim=-1)[0, :, :vocab]
        bounds = batch.cu_seqlens.tolist()
        for start, stop in list(itertools.pairwise(bounds))[: 2 * batch.samples]:
            found.append((batch.tokens[0, start:stop], whole[start:stop]))

    def step(batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable]:
        batch = next(batches)
        layout = PackedLayout.of(batch.cu_seqlens.diff().tolist(), batch.behind, "cpu", parallel_state.get_context_parallel_group())
        logits = model(batch.tokens, None, None, packed_seq_params=layout)
        return logits, lambda output, non_loss_data=False: collect(batch, output)

    return step


def main(out: str) -> None:
    """Run all pairs of the store through the model."""
    from megatron.core import parallel_state

    from megatron_patch.built_model import built_model
    from megatron_patch.scoring import Scorer
    from megatron_patch.streams import full_pass, sample_set

    args = parse_arguments("cpu", reference_logps._add_flags)
    scorer = Scorer(args, built_model(args))
    samples, _ = sample_set(args, args.pair_data, with_reference=False)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    stream = full_pass(args, samples, args.vocab_size)
    slots = stream.plan.split(np.arange(len(samples)))
    data = (stream.batch(slot) for slot in slots)
    with torch.no_grad():
        scorer.schedule(
            forward_step_func=logits_step(args.vocab_size, found), data_iterator=data, model=scorer.chunks, num_microbatches=len(slots),
            seq_length=args.seq_length, micro_batch_size=1, forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
    if found and parallel_state.get_tensor_model_parallel_rank() == 0:
        torch.save([(tokens.clone(), logits.clone()) for tokens, logits in found], f"{out}.{args.rank}")


if __name__ == "__main__":
    out = sys.argv.pop(1)
    main(out)
