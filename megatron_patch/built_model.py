"""The model of a run: Megatron's config with what is ours in it, and the model itself where nothing is trained."""

import argparse
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training as mt
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.checkpointing import checkpoint_exists
from megatron.training.initialize import initialize_megatron

from megatron_patch import loop_hooks
from megatron_patch.checkpoint.hf_io import load_hf_weights
from megatron_patch.checkpoint.saving import Saving
from megatron_patch.model.layer_specs import qwen2_block_spec
from megatron_patch.model.packed_attention import kernel_name
from megatron_patch.model.packed_rotary import PackedRotary
from megatron_patch.refusals import uses_torch_spec
from megatron_patch.streams import row_shape


def announce(args: argparse.Namespace, mode: str, device: str) -> None:
    """The first line of every run: where and how it computes."""
    if args.rank == 0:
        layout = f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size} x CP {args.context_parallel_size} "
        layout += f"x DP {args.data_parallel_size}"
        kernel = kernel_name(device, precision(args), args.kv_channels) if uses_torch_spec(args) else "Transformer Engine"
        loop_hooks.print_line(f"[{mode}] device: {device}, {args.world_size} processes, {layout}, {precision(args)}, attention: {kernel}")


def precision(args: argparse.Namespace) -> torch.dtype:
    """What the model computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def precision_name(args: argparse.Namespace) -> str:
    """``precision`` without "torch."."""
    return str(precision(args)).removeprefix("torch.")


def model_config(args: argparse.Namespace, chunks: list[Any]) -> Any:
    """Megatron's GPTModelConfig with our layer spec and the import of Hugging Face weights.

    ``chunks`` receives this rank's model chunks, before DDP wraps them.
    """
    if args.pad_micro_batches:
        args.seq_length = row_shape(args).at_least  # what pipeline stages expect from each other
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = qwen2_block_spec
    # No flag reaches this (arguments.py:1232 forces it off); stages must exchange the shapes of packed rows, unless all are alike.
    config.transformer.variable_seq_lengths = not args.pad_micro_batches

    def fill(built: list[Any]) -> list[Any]:
        """Hugging Face weights into the model chunks, unless a checkpoint will be loaded; keeps hold of the chunks."""
        if not checkpoint_exists(args.load):  # asked here, where rank 0 has looked through the folder
            cost = load_hf_weights(built, args.hf_path)
            if args.rank == 0:
                line = f"weights: {cost.size / 2**30:.2f} GiB of rank 0 read in {cost.read:.1f} s"
                loop_hooks.print_line(f"[{args.train_mode}] {line}, sent to its other replicas in {cost.sent:.1f} s")
        if uses_torch_spec(args):
            for chunk in built:
                chunk.rotary_pos_emb = PackedRotary(chunk.rotary_pos_emb)
        chunks.extend(built)
        return built

    config.pre_wrap_hooks = [fill]
    return config


def built_model(args: argparse.Namespace) -> list[Any]:
    """This rank's chunks for forward passes: the weights of ``--hf-path``, or of the checkpoint in ``--load``. Starts Megatron.

    Raises:
        AgreedError: that checkpoint is damaged.
    """
    config = pretrain_cfg_container_from_args(args, model_config(args, []))
    initialize_megatron()
    Saving(args, best=lambda: None, say=lambda line: loop_hooks.print_line(f"[{args.train_mode}] {line}")).before_load()
    args.verify_integrity = False  # upstream would read it all again, on one rank
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, _, _ = mt.setup_model_and_optimizer(ModelType.encoder_or_decoder, cfg_container=config, pg_collection=groups)
    return [chunk.eval() for chunk in model]
