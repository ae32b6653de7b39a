"""What a run refuses before there is a model: flags that do not go together or not with this project, and stores that do not fit.

A row of ``REFUSED`` is a question about the flags and the one line that answers a yes. docs/support.md has the pairs of features.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from megatron_patch.arguments import given_losses
from megatron_patch.checkpoint import saved
from megatron_patch.checkpoint.hf_io import refuse_foreign_folder
from megatron_patch.data.pair_dataset import SampleSet
from megatron_patch.preference.losses import LossSum, loss_entry


def uses_torch_spec(args: argparse.Namespace) -> bool:
    """Whether layers are made of torch modules, as they are by default, and not Transformer Engine's."""
    return args.transformer_impl != "transformer_engine"


def _same(one: str | None, other: str | None) -> bool:
    return bool(one and other) and Path(str(one)).resolve() == Path(str(other)).resolve()


def _decay_steps(args: argparse.Namespace) -> int:
    return args.lr_decay_iters or args.train_iters or 0


REFUSED: tuple[tuple[Callable[[argparse.Namespace], object], str], ...] = (
    (lambda args: not args.pair_data and not args.dry_run, "--pair-data is required: the stores to work on"),
    (
        lambda args: args.iterations_to_skip,
        "--iterations-to-skip hangs in megatron-core 0.19.2; drop the pairs instead (or --skip-bad-batches)",
    ),
    (
        lambda args: args.micro_batch_size != 1,
        "--micro-batch-size {micro_batch_size}: micro-batches are planned from tokens; use --max-tokens-per-micro-batch",
    ),
    (
        lambda args: args.step_batch_size_schedule or args.rampup_batch_size or args.decrease_batch_size_if_needed,
        "--step-batch-size-schedule, --rampup-batch-size and --decrease-batch-size-if-needed: a step is always --global-batch-size pairs",
    ),
    (lambda args: args.logps_chunk_tokens < 1, "--logps-chunk-tokens {logps_chunk_tokens}: needs at least one token at a time"),
    (
        lambda args: args.use_torch_fsdp2 or args.use_megatron_fsdp,
        "--use-torch-fsdp2 and --use-megatron-fsdp are not supported: --use-distributed-optimizer shards gradients and optimizer state",
    ),
    (lambda args: args.keep_last is not None and args.keep_last < 1, "--keep-last {keep_last}: at least one checkpoint has to stay"),
    (
        lambda args: args.skip_train and args.save,
        "--skip-train only evaluates, and {save} is for what training writes: give --load DIR (and --ckpt-step N), no --save",
    ),
    (
        lambda args: args.save and not args.load and saved.steps(Path(args.save)),
        "--save {save} holds checkpoints; --load {save} goes on from them, or give another folder",
    ),
    (
        lambda args: (args.ckpt_step or args.finetune or args.override_ckpt_iteration is not None) and _same(args.load, args.save),
        "--ckpt-step, --finetune and --override-ckpt-iteration in the run's own folder: every start of the job would begin there again; "
        "to go back once, write a step's number into {save}/" + saved.TRACKER,
    ),
    (
        lambda args: args.async_save and args.async_strategy != "mcore",
        "--async-strategy {async_strategy} is not supported: what makes asynchronous saves safe here is made for mcore's",
    ),
    (
        lambda args: args.use_checkpoint_args or args.pretrained_checkpoint or args.non_persistent_ckpt_type,
        "--use-checkpoint-args, --pretrained-checkpoint and --non-persistent-ckpt-type are not supported: only --load looks through "
        "a checkpoint before it is used",
    ),
    (lambda args: args.ckpt_format != "torch_dist", "--ckpt-format {ckpt_format}: checkpoints are torch_dist"),
    (
        lambda args: _same(args.export_hf, args.hf_path),
        "--export-hf {export_hf} is --hf-path: the weights that the run started from would be replaced",
    ),
    (
        lambda args: any(name and not name.startswith("eval_") for name in (args.best_metric, args.early_stop_metric)),
        "--best-metric and --early-stop-metric: metrics of evaluations have names that start with eval_ (docs/metrics.md)",
    ),
    (lambda args: args.early_stop_patience < 1, "--early-stop-patience {early_stop_patience}: at least one evaluation"),
    (
        lambda args: (args.best_metric or args.early_stop_metric) and not args.valid_pair_data,
        "--best-metric and --early-stop-metric look at evaluations: give --valid-pair-data",
    ),
    (lambda args: args.skip_bad_batches < 0, "--skip-bad-batches {skip_bad_batches}: a number of steps"),
    (lambda args: args.fp16, "--fp16 is not supported: its loss scaler needs overflows that our checks stop at; use --bf16"),
    (
        lambda args: args.hierarchical_context_parallel_sizes,
        "--hierarchical-context-parallel-sizes is not supported: keys and values are gathered in one group",
    ),
    (
        lambda args: args.share_prompt and args.train_mode != "xpo",
        "--share-prompt: --train-mode {train_mode} has one sequence a sample, so nothing to share",
    ),
    (
        lambda args: args.share_prompt and args.context_parallel_size > 1,
        "--share-prompt with --context-parallel-size > 1 is not supported: prompts are not split over ranks",
    ),
    (
        lambda args: args.share_prompt and not uses_torch_spec(args),
        "--share-prompt needs the torch layer spec: Transformer Engine's attention knows no shared prompts",
    ),
    (
        lambda args: not uses_torch_spec(args) and not args.allow_untested,
        "--transformer-impl transformer_engine: no test has run these layers; --allow-untested goes on",
    ),
    (
        lambda args: args.optimizer_cpu_offload and not args.allow_untested,
        "--optimizer-cpu-offload: needs a GPU, and no test has run it; --allow-untested goes on",
    ),
    (
        lambda args: not uses_torch_spec(args) and importlib.util.find_spec("transformer_engine") is None,
        "--transformer-impl transformer_engine: the package is not installed (requirements-gpu.txt)",
    ),
    (
        lambda args: not args.skip_train and not args.train_iters and not args.dry_run,
        "--train-iters or --epochs is required: how long to train",
    ),
    (
        lambda args: args.train_iters and not args.skip_train and args.lr_warmup_iters >= _decay_steps(args),
        "--lr-warmup-iters {lr_warmup_iters} must be below {decay_steps}, the steps the learning rate decays over",
    ),
)


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be refused without a model, in one process or in many: layout, flags, checkpoint.

    Raises:
        ValueError: one line that names the flag or the file.
    """
    for asked, message in REFUSED:
        if asked(args):
            raise ValueError(message.format_map({**vars(args), "decay_steps": _decay_steps(args)}))
    if args.export_hf:
        refuse_foreign_folder(Path(args.export_hf))
    given_losses(args)


def check_scores(losses: LossSum, samples: SampleSet) -> None:
    """ValueError if a loss compares scores and the pairs have none, or not in their order."""
    needing = [part.options.loss_type for part in losses if loss_entry(part.options.loss_type).needs_scores]
    unfit = samples.without_score_gap() if needing else []
    if unfit:
        raise ValueError(
            f"loss {needing[0]} needs pairs whose chosen_score is greater than their rejected_scores (fields of the records that "
            f"build_pairs reads); {len(unfit)} are not, the first is {unfit[0]}"
        )
