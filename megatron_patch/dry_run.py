"""``--dry-run``: what a job would be, on any machine and without weights, data or GPUs; and layouts that fit where this one does not."""

import argparse
import copy
from collections.abc import Callable, Iterator
from itertools import product
from math import prod

from megatron_patch.built_model import model_config, precision_name
from megatron_patch.checkpoint.hf_mapping import hf_tensors, misfit
from megatron_patch.memory_plan import StageMemory, as_rank, plan_stage
from megatron_patch.model.qwen2 import read_qwen2_config
from megatron_patch.refusals import check_arguments
from megatron_patch.run import TrainingRun

GIB = 2**30
USABLE = 0.9
"""Part of a GPU's memory that a plan may fill: CUDA's context, NCCL's buffers and the allocator's gaps are not in it (an assumption)."""
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_LONGEST_LIST = 3
_DOUBLINGS = 6
_STEPS = 8  # looked at for the number of micro-batches


def show_plan(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Say what these arguments come to.

    Raises:
        ValueError: they cannot work; with ``--gpu-memory-gb`` also when they need more memory, with what would fit.
    """
    args.check = True
    _refuse_uncounted(args)
    run = TrainingRun(args, "cpu") if args.pair_data else None
    if run is None:
        check_arguments(args)
    slots = _micro_batches(args, run)
    for line in (_model_line(args), _layout_line(args), _step_line(args, run, slots)):
        say(line)
    most = max(slots, default=args.global_batch_size // args.data_parallel_size)
    stages = [plan_stage(args, model_config(args, []), stage, most) for stage in range(args.pipeline_model_parallel_size)]
    for line in table(stages):
        say(line)
    _judge(args, max(stage.total for stage in stages))
    say("nothing was started (--dry-run)")


def _refuse_uncounted(args: argparse.Namespace) -> None:
    """ValueError for what changes the state of a rank in ways that are not counted here."""
    asked = {
        "--optimizer": args.optimizer != "adam",
        "--num-distributed-optimizer-instances": args.num_distributed_optimizer_instances > 1,
        "--use-precision-aware-optimizer": args.use_precision_aware_optimizer,
        "--optimizer-cpu-offload": args.optimizer_cpu_offload,
    }
    for flag, given in asked.items():
        if given:
            raise ValueError(f"--dry-run does not count what {flag} makes of the memory: leave it out for the plan")


def _micro_batches(args: argparse.Namespace, run: TrainingRun | None) -> list[int]:
    """Of each of the first steps; none without data."""
    if run is None:
        return []
    with as_rank(args, 0):
        plan = run.train_stream().plan
    return [len(plan.step(position)) for position in range(0, min(_STEPS, args.train_iters or 1) * plan.batch, plan.batch)]


def _model_line(args: argparse.Namespace) -> str:
    model = read_qwen2_config(args.hf_path)
    parameters = sum(prod(shape) for shape in hf_tensors(model).values())
    tied = "tied" if model.tied else "untied"
    return f"model: {parameters:,} parameters, {model.layers} layers, hidden size {model.hidden}, vocabulary {model.vocab:,}, {tied}"


def _layout_line(args: argparse.Namespace) -> str:
    sizes = f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size} x CP {args.context_parallel_size}"
    ranks = f"{args.world_size} process{'es' * (args.world_size > 1)}"
    said = f"layout: {ranks}, {sizes} x DP {args.data_parallel_size}, {precision_name(args)}"
    if args.virtual_pipeline_model_parallel_size:
        said += f", {args.virtual_pipeline_model_parallel_size} virtual stages a rank"
    for flag in ("sequence_parallel", "use_distributed_optimizer", "share_prompt"):
        said += f", --{flag.replace('_', '-')}" if getattr(args, flag) else ""
    return said + (f", recompute {args.recompute_granularity}" if args.recompute_granularity else "")


def _step_line(args: argparse.Namespace, run: TrainingRun | None, slots: list[int]) -> str:
    said = f"a step: {args.global_batch_size} samples, {args.global_batch_size // args.data_parallel_size} on each data-parallel rank"
    if run is None:
        return said + f", micro-batches of up to {args.max_tokens_per_micro_batch:,} tokens (no --pair-data given)"
    tokens = run.train.tokens.mean() * args.global_batch_size
    many = f"{min(slots)}" if min(slots) == max(slots) else f"{min(slots)} to {max(slots)}"
    said += f", {tokens:,.0f} tokens, in {many} micro-batches of up to {args.max_tokens_per_micro_batch:,}"
    return said + (f"; {args.train_iters} steps, {len(run.train):,} samples in the stores" if args.train_iters else "")


def table(stages: list[StageMemory]) -> Iterator[str]:
    """Lines: GiB of a rank of every pipeline stage; stages that need the same share a line."""
    yield "GiB a rank        weights gradients optimizer | activations + logits or update |   total   (left: counted; middle: estimated)"
    first = 0
    for number, stage in enumerate(stages):
        if number + 1 < len(stages) and stages[number + 1] == stage:
            continue
        name = f"stage {first}" if first == number else f"stages {first}-{number}"
        counted = " ".join(f"{amount / GIB:9.2f}" for amount in (stage.weights, stage.gradients, stage.optimizer))
        estimated = f"{stage.activations / GIB:11.2f} {stage.logits / GIB:8.2f} {stage.update / GIB:9.2f}"
        yield f"{name:14} {counted} | {estimated} | {stage.total / GIB:7.2f}   {stage.parameters:,} parameters"
        first = number + 1


def _judge(args: argparse.Namespace, needed: int) -> None:
    if args.gpu_memory_gb is None or fits(args, needed):
        return
    raise ValueError(
        f"--gpu-memory-gb {args.gpu_memory_gb:g}: a rank needs {needed / GIB:.1f} GiB and may fill {USABLE:.0%} of it; "
        + (", or ".join(fitting(args)) or f"no layout of so many processes fits: {with_more_processes(args)}")
    )


def needs(args: argparse.Namespace) -> int:
    """Bytes of the fullest rank, from the two ends: most micro-batches in flight, or the output layer."""
    ends, most = {0, args.pipeline_model_parallel_size - 1}, args.global_batch_size // args.data_parallel_size
    return max(plan_stage(args, model_config(args, []), stage, most).total for stage in ends)


def fits(args: argparse.Namespace, needed: int) -> bool:
    """Whether so many bytes are within the usable part of ``--gpu-memory-gb``."""
    return needed <= USABLE * args.gpu_memory_gb * GIB


def fitting(args: argparse.Namespace) -> list[str]:
    """Up to three nearest ways, in words, to make it fit."""
    found: list[str] = []
    for words, other in _others(args):
        needed = needs(other)
        if fits(other, needed):
            found.append(f"{words} needs {needed / GIB:.1f} GiB")
        if len(found) == _LONGEST_LIST:
            break
    return found


def with_more_processes(args: argparse.Namespace) -> str:
    """Twice, four times, ... as many, cut as far as they can be and with everything recomputed: the first that fits, in words."""
    for times in (2**doublings for doublings in range(1, _DOUBLINGS + 1)):
        more = altered(args, world_size=times * args.world_size)
        if cuts := layouts(more):
            tp, pp = max(cuts, key=lambda sizes: (prod(sizes), sizes[0]))
            other = recomputed(with_layout(more, tp, pp))
            if fits(other, needed := needs(other)):
                return f"{more.world_size} with TP={tp} PP={pp} {RECOMPUTE} need {needed / GIB:.1f} GiB each"
    return "a smaller --max-tokens-per-micro-batch"


def _others(args: argparse.Namespace) -> Iterator[tuple[str, argparse.Namespace]]:
    if not args.recompute_granularity:
        yield RECOMPUTE, recomputed(args)
    if args.max_tokens_per_micro_batch >= 4096:
        half = args.max_tokens_per_micro_batch // 2
        yield f"--max-tokens-per-micro-batch {half}", altered(args, max_tokens_per_micro_batch=half)
    now = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    plain = ", all stages alike" if args.virtual_pipeline_model_parallel_size or args.decoder_first_pipeline_num_layers else ""
    larger = [(f"TP={tp} PP={pp}{plain}", with_layout(args, tp, pp)) for tp, pp in layouts(args) if tp * pp > now]
    yield from larger
    if not args.recompute_granularity:
        yield from ((f"{words} with {RECOMPUTE}", recomputed(other)) for words, other in larger)


def layouts(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(TP, PP) that these processes, this model and this batch can be cut into, least model parallelism first; TP stays within a node."""
    model, ranks = read_qwen2_config(args.hf_path), args.world_size // args.context_parallel_size
    stages = [size for size in range(1, model.layers + 1) if model.layers % size == 0]
    return sorted(
        (
            (tp, pp)
            for tp, pp in product((1, 2, 4, 8), stages)
            if ranks % (tp * pp) == 0 and args.global_batch_size % (ranks // (tp * pp)) == 0 and misfit(model, tp) is None
        ),
        key=lambda sizes: (prod(sizes), sizes[1]),
    )


def with_layout(args: argparse.Namespace, tp: int, pp: int) -> argparse.Namespace:
    """The same job, cut otherwise: into stages of as many layers, without virtual ones."""
    return altered(
        args,
        tensor_model_parallel_size=tp,
        tensor_parallel_num_weight_shards=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=None,
        num_layers_per_virtual_pipeline_stage=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        pipeline_model_parallel_layout=None,
        sequence_parallel=tp > 1,
        data_parallel_size=args.world_size // (tp * pp * args.context_parallel_size),
        padded_vocab_size=read_qwen2_config(args.hf_path).padded_vocab(tp),
    )


def recomputed(args: argparse.Namespace) -> argparse.Namespace:
    """The same job with the flags ``RECOMPUTE``."""
    return altered(args, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def altered(args: argparse.Namespace, **changes: object) -> argparse.Namespace:
    """A copy with other values."""
    other = copy.copy(args)
    vars(other).update(changes)
    return other
