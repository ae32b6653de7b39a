"""What each pipeline stage's ranks will hold, before anything is started.

Each stage is built as the job would build it, from fake tensors (no memory) under torch's fake process group (no other process). Weights,
gradients and optimizer state are counted: they are the stage's parameters in the layout of Megatron's own buffers. Activations are what
autograd keeps of one micro-batch's forward pass through that stage, and logits those of one chunk: estimates, since the kernels of a GPU
keep something else than the CPU's.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import PerBufferParamLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.training.models.gpt import GPTModelBuilder
from megatron.training.training import get_megatron_ddp_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from megatron_patch.data.pair_dataset import round_up
from megatron_patch.model.packed_attention import PackedLayout
from megatron_patch.model.response_logps import response_logps
from megatron_patch.preference.logps import ScoredTargets


class StageMemory(NamedTuple):
    """Bytes of the fullest rank of a pipeline stage, and how many parameters it has."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    update: int  # what the optimizer needs for itself while it steps, when there are no activations

    @property
    def total(self) -> int:
        """At the fullest moment: in the last micro-batches, or while the optimizer steps."""
        return self.weights + self.gradients + self.optimizer + max(self.activations + self.logits, self.update)


def plan_stage(args: argparse.Namespace, config: Any, stage: int, micro_batches: int) -> StageMemory:
    """One pipeline stage; ``config``: the GPTModelConfig that training would build from; ``micro_batches``: of a step, at most."""
    rank = stage * (args.world_size // args.pipeline_model_parallel_size)
    with as_rank(args, rank) as groups, FakeTensorMode(allow_non_fake_inputs=True):
        chunks = build(args, config, groups)
        parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        weights, gradients, optimizer = state_bytes(args, chunks, stage)
        activations, logits = activation_bytes(args, chunks, stage, micro_batches), logits_bytes(args, stage)
        return StageMemory(parameters, weights, gradients, optimizer, activations, logits, update_bytes(args, optimizer))


@contextmanager
def as_rank(args: argparse.Namespace, rank: int) -> Iterator[ProcessGroupCollection]:
    """Megatron's process groups as this rank of the job would see them, with nobody else there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=args.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            create_gloo_process_groups=False,
        )
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)  # the one that leaves random states alone
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        initialize_rng_tracker(force_reset=True)
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build(args: argparse.Namespace, config: Any, groups: ProcessGroupCollection) -> list[Any]:
    """This rank's model chunks, from torch's modules whatever ``--transformer-impl`` says: the parameters are the same."""
    config.transformer.use_cpu_initialization, config.transformer.perform_initialization = True, False
    config.transformer.transformer_impl = "local"
    config.position_embedding_type = "none"  # turning by positions has no weights, and keeps next to nothing
    virtual = args.virtual_pipeline_model_parallel_size
    return [GPTModelBuilder(config).build_model(groups, vp_stage=chunk) for chunk in (range(virtual) if virtual else (None,))]


def state_bytes(args: argparse.Namespace, chunks: list[Any], stage: int) -> tuple[int, int, int]:
    """(weights, gradients, optimizer) of the fullest data-parallel rank, padding of the buffers included.

    The optimizer holds two float32 moments and, where weights are bfloat16, float32 originals; with ``--use-distributed-optimizer`` each
    rank has those of its part of every bucket (core/optimizer/distrib_optimizer.py:506, buckets: training/models/dist_utils.py:280).
    """
    ddp, ranks = get_megatron_ddp_config(args), args.data_parallel_size * args.context_parallel_size
    weights = gradients = optimizer = 0
    shards = [0] * ranks
    for number, chunk in enumerate(chunks):
        parameters, state = [*chunk.parameters()], 12 if args.bf16 else 8
        optimizer += state * sum(parameter.numel() for parameter in parameters)
        if not ddp.use_distributed_optimizer:
            weights += sum(parameter.numel() * parameter.element_size() for parameter in parameters)
            gradients += sum(parameter.numel() * (4 if ddp.grad_reduce_in_fp32 else parameter.element_size()) for parameter in parameters)
            continue
        for key, layout in _buffers(parameters, ddp, ranks, first=number == 0 and stage == 0).items():
            size = layout.bucket_indices[-1][1]
            weights, gradients = weights + size * key.param_dtype.itemsize, gradients + size * key.grad_dtype.itemsize
            for rank, elements in enumerate(_owned(layout, ranks)):
                shards[rank] += state * elements
    return weights, gradients, max(shards) if ddp.use_distributed_optimizer else optimizer


def update_bytes(args: argparse.Namespace, optimizer: int) -> int:
    """Of torch's AdamW on a GPU, which updates all parameters at once (``foreach``): the roots of their second moments, in float32.

    Transformer Engine's and apex's keep none; a plan is for where they may be missing (core/optimizer/__init__.py:545).
    """
    return 4 * optimizer // (12 if args.bf16 else 8) if args.gpu_memory_gb is not None else 0


def _buffers(parameters: list[Any], ddp: DistributedDataParallelConfig, ranks: int, *, first: bool) -> dict[Any, PerBufferParamLayout]:
    """Where the distributed optimizer puts each parameter of a chunk; only the first chunk of the first stage has several buckets."""
    bucket = ddp.bucket_size or max(40_000_000, 1_000_000 * ranks)
    if ddp.num_buckets is not None:
        bucket = sum(parameter.numel() for parameter in parameters) // ddp.num_buckets
    several = first and ddp.overlap_grad_reduce
    return DistributedOptimizer.compute_full_param_layout(parameters, bucket if several else None, ranks, ddp).layouts


def _owned(layout: PerBufferParamLayout, ranks: int) -> list[int]:
    """Elements of parameters in each rank's part of every bucket."""
    owned = [0] * ranks
    for start, stop, bucket in layout.param_index_map.values():
        begin, end = layout.bucket_indices[bucket]
        part = (end - begin) // ranks
        for rank in range((start - begin) // part, min(ranks, -(-(stop - begin) // part)) if part else 0):
            owned[rank] += min(stop, begin + (rank + 1) * part) - max(start, begin + rank * part)
    return owned


def micro_batches_in_flight(args: argparse.Namespace, stage: int, micro_batches: int) -> float:
    """Micro-batches, as parts of this rank's whole model, whose activations are kept at once (1F1B; interleaved: arXiv 2104.04473, 2.2)."""
    stages, virtual = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    if virtual:
        return min(micro_batches, (2 * (stages - stage - 1) + (virtual - 1) * stages + 1) / virtual)
    return min(micro_batches, stages - stage)


def activation_bytes(args: argparse.Namespace, chunks: list[Any], stage: int, micro_batches: int) -> int:
    """Kept for backward by a rank at its fullest moment, micro-batches as large as ``--max-tokens-per-micro-batch`` allows.

    With full recompute a layer's input is kept, and what is recomputed at a time is whole while it goes back: a unit of
    ``--recompute-num-layers`` layers, or with ``--recompute-method block`` one layer.
    """
    inputs = sum(saved_bytes(args, chunk) for chunk in chunks)
    kept = inputs * micro_batches_in_flight(args, stage, micro_batches)
    if args.recompute_granularity == "full":
        for chunk in chunks:
            chunk.decoder.config.recompute_granularity = None
        whole = sum(saved_bytes(args, chunk) for chunk in chunks) - inputs
        at_a_time = args.recompute_num_layers if args.recompute_method == "uniform" else 1
        kept += whole / sum(len(chunk.decoder.layers) for chunk in chunks) * (at_a_time or 1)
    return int(kept)


def saved_bytes(args: argparse.Namespace, chunk: Any) -> int:
    """What autograd keeps of one micro-batch in one model chunk, the parameters left out; storages counted once."""
    tokens, layout = _packed_row(args)
    hidden, split = chunk.config.hidden_size, args.tensor_model_parallel_size if args.sequence_parallel else 1
    kept: dict[int, Any] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in chunk.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    if not chunk.pre_process:
        given = torch.empty(tokens // split, 1, hidden, dtype=chunk.config.params_dtype, requires_grad=True)
        chunk.set_input_tensor(given)
        keep(given)
    everywhere = torch.zeros(min(tokens, args.logps_chunk_tokens), dtype=torch.long)
    scored = ScoredTargets(everywhere, everywhere, everywhere, 1)
    logps = partial(response_logps, vocab_size=args.vocab_size, chunk=args.logps_chunk_tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        row = torch.zeros(1, tokens, dtype=torch.long)
        chunk(row, None, None, packed_seq_params=layout, output_processor=logps, output_processor_context=scored)
    return sum(storage.nbytes() for storage in kept.values())


def _packed_row(args: argparse.Namespace) -> tuple[int, PackedLayout]:
    """(tokens of this context-parallel rank, their layout): one sequence that fills a micro-batch."""
    ranks = args.context_parallel_size
    tokens = round_up(args.max_tokens_per_micro_batch, 2 * ranks * args.tensor_model_parallel_size)
    with unset_fake_temporarily():  # where tokens are is read from tensors
        layout = PackedLayout.of([tokens], [-1], "cpu", parallel_state.get_context_parallel_group())
        _ = layout.blocks.grids
    return tokens // ranks, layout


def logits_bytes(args: argparse.Namespace, stage: int) -> int:
    """Of one chunk on a rank of the last stage: as much again as its float32 exponentials, for what backward makes of them."""
    if stage != args.pipeline_model_parallel_size - 1:
        return 0
    return 8 * min(args.logps_chunk_tokens, args.max_tokens_per_micro_batch) * args.padded_vocab_size // args.tensor_model_parallel_size
