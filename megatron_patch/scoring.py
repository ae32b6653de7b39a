"""Log-probs of stored samples by a model that is built, forward only: the reference pass, and the check of an export."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_patch.built_model import precision_name
from megatron_patch.checkpoint.hf_files import rejected_folder
from megatron_patch.data.pair_dataset import MicroBatchStream
from megatron_patch.errors import AgreedError
from megatron_patch.evaluation import parity
from megatron_patch.forward_step import ForwardStep
from megatron_patch.refusals import uses_torch_spec

EXPORT_SAMPLES = 8


class Scorer:
    """A model and the schedule that takes micro-batches through it; ``chunks`` are this rank's, wrapped or not."""

    def __init__(self, args: argparse.Namespace, chunks: Sequence[Any]) -> None:
        self.args, self.chunks = args, list(chunks)
        self.schedule = get_forward_backward_func()
        self.forward_step = ForwardStep(
            lambda batch, logps: (logps.sum(), batch.lengths.sum(), {}),
            args.vocab_size,
            args.logps_chunk_tokens,
            torch_spec=uses_torch_spec(args),
        )

    def score(self, stream: MicroBatchStream, numbers: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(sample numbers, float64 [samples, responses] log-probs) of all ranks, on every rank, in no order. Collective."""
        everywhere: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(everywhere, self._own(stream, numbers))
        return [part for parts in everywhere for part in parts]

    def _own(self, stream: MicroBatchStream, numbers: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Those of this rank; empty off the last stage, TP rank 0 and CP rank 0."""
        slots = stream.plan.split(numbers)

        def micro_batches() -> Iterator[Any]:
            return (stream.batch(slot) for slot in slots)

        data = micro_batches() if len(self.chunks) == 1 else [micro_batches() for _ in self.chunks]
        with torch.no_grad():
            collected = self.schedule(
                forward_step_func=self.forward_step,
                data_iterator=data,
                model=self.chunks,
                num_microbatches=len(slots),
                seq_length=self.args.seq_length,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        copies = parallel_state.get_tensor_model_parallel_rank() + parallel_state.get_context_parallel_rank()
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True) or copies:
            return []
        parts = zip((slot[stream.rank] for slot in slots), collected, strict=True)
        return [(which, logps.numpy()) for which, (_, logps) in parts if len(which)]  # a slot may hold no sample


def check_export(scorer: Scorer, stream: MicroBatchStream, folder: Path, say: Callable[[str], None]) -> None:
    """Compare this model with what transformers makes of its export in ``folder``, and say the largest difference.

    On the eight shortest samples, or as many of them as one process can score while the others wait. Collective; rank 0 asks
    transformers, and all have its answer.

    Raises:
        AgreedError: they differ by more than the tolerance of the training precision.
    """
    samples, dtype = stream.samples, precision_name(scorer.args)
    numbers = np.argsort(samples.tokens, kind="stable")[:EXPORT_SAMPLES]
    own = np.zeros((len(numbers), samples.responses_per_sample))
    for which, logps in scorer.score(stream, numbers):
        own[[int(np.flatnonzero(numbers == number)[0]) for number in which]] = logps
    verdict: list[Any] = [(0, 0.0)]
    if torch.distributed.get_rank() == 0 and (compared := parity.affordable(folder, samples.tokens[numbers])):
        numbers = numbers[:compared]
        chosen = [samples[int(number)] for number in numbers]
        judge = parity.sequence_logps(folder, [list(zip(sample.sequences, sample.scored, strict=True)) for sample in chosen])
        verdict = [(compared, float(np.abs((judge - own[:compared]) / samples.scored_lengths[numbers]).max()))]
    torch.distributed.broadcast_object_list(verdict, src=0)
    compared, difference = verdict[0]
    if not compared:
        return say("the export was not compared with transformers: one process would need too much memory or time for it")
    if not difference <= parity.TOLERANCE[dtype]:
        raise AgreedError(
            f"transformers' log-probs of this export differ from the model's by {difference:.3g} nats per token (allowed "
            f"{parity.TOLERANCE[dtype]:g} in {dtype}): it was left in {rejected_folder(Path(scorer.args.export_hf))}; an earlier export "
            "and the checkpoints are as they were"
        )
    say(f"parity with transformers: {difference:.2g} nats per token on {compared} samples of the export")
