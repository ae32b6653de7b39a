"""The stores of a run and their micro-batches: the one way from disk to a rank, for training, evaluation and the reference pass."""

import argparse
import time
from functools import cache
from math import lcm

import numpy as np
from megatron.core import parallel_state

from megatron_patch.checkpoint.hf_files import weights_fingerprint
from megatron_patch.data.batch_plan import BatchPlan, PairOrder, Shared
from megatron_patch.data.pair_dataset import MicroBatchStream, RowShape, SampleSet, Work, parse_weighted_prefixes, round_up
from megatron_patch.data.tokenizer_identity import folder_tokenizer_fingerprint
from megatron_patch.model.qwen2 import Qwen2Config, read_qwen2_config
from megatron_patch.objectives import finetune, preference, pretrain
from megatron_patch.throughput import useful_flops

STORE_KINDS = {"xpo": preference.STORE_KIND, "finetune": finetune.STORE_KIND, "pretrain": pretrain.STORE_KIND}


@cache
def initial_weights(hf_path: str) -> tuple[str, float]:
    """Their fingerprint, taken once a process, and the seconds that took."""
    started = time.perf_counter()
    return weights_fingerprint(hf_path), time.perf_counter() - started


def sample_set(args: argparse.Namespace, words: list[str], with_reference: bool) -> tuple[SampleSet, list[float] | None]:
    """The stores behind ``--pair-data`` or ``--valid-pair-data``, and their weights."""
    prefixes, weights = parse_weighted_prefixes(words)
    fingerprint = None if args.allow_reference_mismatch or not with_reference else initial_weights(args.hf_path)[0]
    kind = STORE_KINDS[args.train_mode]
    tokenizer = folder_tokenizer_fingerprint(args.hf_path)
    samples = SampleSet(prefixes, kind, with_reference=with_reference, weights_fingerprint=fingerprint, tokenizer=tokenizer)
    tokens = row_shape(args).tokens(samples)
    worst = int(tokens.argmax())
    if tokens[worst] > args.max_tokens_per_micro_batch:
        raise ValueError(
            f"pair {samples[worst].name} has {tokens[worst]} tokens, more than --max-tokens-per-micro-batch "
            f"{args.max_tokens_per_micro_batch}"
        )
    return samples, weights


def stream(
    args: argparse.Namespace, samples: SampleSet, order: PairOrder, batch: int, vocab_size: int, together: bool = False
) -> MicroBatchStream:
    """The micro-batches of this data-parallel rank, G = ``batch`` pairs a step; ``together``: see ``split_by_cost``."""
    virtual = args.virtual_pipeline_model_parallel_size is not None
    shape, model = row_shape(args), read_qwen2_config(args.hf_path)
    plan = BatchPlan(
        order,
        shape.tokens(samples),
        batch=batch,
        ranks=args.data_parallel_size,
        max_tokens=args.max_tokens_per_micro_batch,
        multiple_of=args.pipeline_model_parallel_size if virtual else 1,
        together=together,
        cost=useful_flops(model, samples.work(shape.share_prompts)),
        shared=shared_prompts(samples, model) if shape.share_prompts else None,
    )
    return MicroBatchStream(
        samples,
        plan,
        rank=parallel_state.get_data_parallel_rank(),
        vocab_size=vocab_size,
        shape=shape,
        context_rank=parallel_state.get_context_parallel_rank(),
    )


def shared_prompts(samples: SampleSet, model: Qwen2Config) -> Shared:
    """What pairs of one prompt save in one micro-batch: the prompt."""
    prompts = samples.prompts()
    return Shared(samples.prompt_keys(), prompts, useful_flops(model, Work(prompts, np.square(prompts), np.zeros_like(prompts))))


def row_shape(args: argparse.Namespace) -> RowShape:
    """What packed rows must be like under this layout; with ``--pad-micro-batches`` all as long as the budget."""
    ranks = args.context_parallel_size
    multiple = lcm(2 * ranks if ranks > 1 else 1, ranks * args.tensor_model_parallel_size if args.sequence_parallel else 1)
    least = round_up(args.max_tokens_per_micro_batch, multiple) if args.pad_micro_batches else 1
    return RowShape(multiple, ranks, least, args.share_prompt)


def full_pass(args: argparse.Namespace, samples: SampleSet, vocab_size: int, together: bool = False) -> MicroBatchStream:
    """Every sample once, in store order, as one global batch: evaluation and the reference pass."""
    return stream(args, samples, PairOrder(samples.sizes, seed=0, shuffle=False), len(samples), vocab_size, together)
