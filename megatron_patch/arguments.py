"""Our flags: one dataclass field each, with unit and source; and the defaults that make Megatron's 800 flags optional.

``add_arguments`` is the ``extra_args_provider`` of every entry. It sees Megatron's full parser, so the checkpoint's
``config.json`` and the device can fill in everything that a user would otherwise have to type; every default can still be
overridden on the command line. A preset is a file of flags, read as ``@examples/qwen2_5/presets/math.args``.
"""

import argparse
import glob
import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch

from megatron_patch.preference.inputs import LossOptions
from megatron_patch.preference.losses import ANCHOR_CONSTANTS, LOSSES, LossSum, loss_sum

TRAIN_MODES = ("finetune", "pretrain", "xpo")
DEVICES = ("auto", "cuda", "cpu")


def _flag(default: Any, help: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(frozen=True)
class PatchArguments:
    """The flags of this project. ``None`` means "not given": the loss's own default holds (``--help-losses``)."""

    device: str = _flag("auto", "where to compute; auto refuses to fall back to the CPU when the machine has GPUs", choices=DEVICES)
    train_mode: str = _flag(
        "xpo", "finetune: cross-entropy of the responses; pretrain: of plain text; xpo: preference optimisation", choices=TRAIN_MODES
    )
    hf_path: str | None = _flag(None, "Hugging Face folder of the initial weights (and the reference); also gives the model's shape")
    export_hf: str | None = _flag(None, "write the final weights as a Hugging Face folder in the training precision")
    pair_data: list[str] | None = _flag(None, "training stores: PREFIX... or WEIGHT PREFIX WEIGHT PREFIX...", nargs="+")
    valid_pair_data: list[str] | None = _flag(None, "validation stores; an evaluation is one full pass over them", nargs="+")
    best_metric: str | None = _flag(None, "keep the checkpoint of the best evaluation by this metric, e.g. eval_loss", metavar="NAME")
    early_stop_metric: str | None = _flag(None, "end training when this metric of evaluations gets no better", metavar="NAME")
    early_stop_patience: int = _flag(3, "evaluations without a better value before the end", type=int, metavar="N")
    epochs: float | None = _flag(None, "set --train-iters to this many passes over the training stores", type=float)
    max_tokens_per_micro_batch: int = _flag(
        8192, "tokens one micro-batch may hold; the number of micro-batches of a step follows from it", type=int
    )
    share_prompt: bool = _flag(False, "compute each prompt once for all its responses in a micro-batch", action="store_true")
    pad_micro_batches: bool = _flag(
        False, "pad every micro-batch to --max-tokens-per-micro-batch: pipeline stages exchange no shapes", action="store_true"
    )
    logps_chunk_tokens: int = _flag(
        1024, "response tokens whose logits are held at a time: x vocabulary / TP x 4 bytes of memory", type=int
    )
    loss_type: tuple[str, ...] = _flag(("lpo-ste",), "preference loss, or several to add up; see --help-losses", nargs="+", metavar="NAME")
    loss_weights: list[float] | None = _flag(None, "weight of each of several losses; 1 where not given", type=float, nargs="+")
    beta: float | None = _flag(None, "strength of the preference term (arXiv 2305.18290; LPO: 2508.14947 Eq. 6)", type=float)
    gamma: float | None = _flag(
        None, "the papers' name: --anchor-weight for the lpo family (2508.14947 Table 9), --margin for simpo and alpha-dpo", type=float
    )
    r1: float | None = _flag(None, "weight of the chosen response's gradient (2508.14947 Eq. 11)", type=float)
    r2: float | None = _flag(None, "weight of the rejected response's gradient (2508.14947 Eq. 11)", type=float)
    offset: float | None = _flag(None, "margin at which the lpo family is content (2508.14947 Eq. 6: 1 / (2 beta))", type=float)
    label_smoothing: float | None = _flag(None, "probability that a preference label is wrong, in [0, 0.5)", type=float)
    margin: float | None = _flag(None, "target margin (simpo, alpha-dpo, slic, stapo's lower end), or its scale (odpo)", type=float)
    upper_margin: float | None = _flag(None, "upper end of stapo's band of margins", type=float)
    sft_weight: float | None = _flag(None, "weight of the chosen response's likelihood (slic, cpo, rpo, irpo)", type=float)
    dpop_lambda: float | None = _flag(None, "dpop's penalty per nat that the chosen response loses (arXiv 2402.13228)", type=float)
    alpha: float | None = _flag(None, "how far alpha-dpo's margin follows the pair's own (arXiv 2410.10148)", type=float)
    discopop_tau: float | None = _flag(None, "discopop's temperature, in (0, 1] (arXiv 2406.08414)", type=float)
    desirable_weight: float | None = _flag(None, "kto's weight of chosen responses (arXiv 2402.01306)", type=float)
    undesirable_weight: float | None = _flag(None, "kto's weight of rejected responses (arXiv 2402.01306)", type=float)
    statistics_decay: float | None = _flag(None, "what a step keeps of bco's and alpha-dpo's running statistics, in [0, 1)", type=float)
    anchor: str | None = _flag(None, "positive term that keeps the chosen response likely", choices=("none", "hinge", "spo"))
    anchor_weight: float | None = _flag(None, "weight of the anchor (lambda of 2508.14947 Eq. 6)", type=float)
    anchor_slack: float | None = _flag(None, "nats per token the chosen response may lose before the anchor acts", type=float)
    anchor_power: float | None = _flag(None, "exponent of the spo anchor's penalty (arXiv 2507.07723, experimental)", type=float)
    anchor_value: str | None = _flag(
        None, "what the spo anchor holds the chosen response against (experimental)", choices=("reference", "running-minimum")
    )
    is_average: bool | None = _flag(
        None, "log-ratios per token instead of sums (--no-is-average: sums)", action=argparse.BooleanOptionalAction
    )
    add_sft_loss: bool | None = _flag(
        None, "the authors' name for --anchor hinge (--no-add-sft-loss: --anchor none)", action=argparse.BooleanOptionalAction
    )
    parity_check: bool = _flag(
        True, "before training, score two pairs with transformers and compare", action=argparse.BooleanOptionalAction
    )
    allow_reference_mismatch: bool = _flag(False, "go on although policy and reference differ at step 0", action="store_true")
    skip_bad_batches: int = _flag(0, "leave out up to N steps whose log-probs or gradients are NaN or infinite", type=int, metavar="N")
    keep_last: int | None = _flag(None, "checkpoints to keep in --save; older ones are removed (default: all)", type=int, metavar="N")
    continue_on_save_failure: bool = _flag(
        False, "go on training when a checkpoint cannot be saved; the earlier one stays", action="store_true"
    )
    verify_data: bool = _flag(
        False, "read every byte of stores and initial weights before training and compare with the recorded sha256", action="store_true"
    )
    allow_untested: bool = _flag(False, "go on with what no test has run: Transformer Engine, --optimizer-cpu-offload", action="store_true")
    dry_run: bool = _flag(False, "show layout, steps and memory of each rank for WORLD_SIZE processes, then exit", action="store_true")
    gpu_memory_gb: float | None = _flag(None, "GiB of a GPU: --dry-run refuses what needs more, and says what would fit", type=float)
    check: bool = _flag(False, "check flags, checkpoint and data in one process, then exit", action="store_true")


class _HelpLosses(argparse.Action):
    """``--help-losses``: print the table of losses and exit, like --help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(describe_losses() + "\n")
        parser.exit()


class _PresetParser(argparse.ArgumentParser):
    """Reads ``@file`` with several flags to a line and ``#`` comments, and ends a user's error in one line and exit code 2."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split one line of a preset as a shell would."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise ValueError(f"{error} in the line {arg_line!r}") from None

    def _read_args_from_files(self, arg_strings: list[str]) -> list[str]:
        """Say which preset a malformed line is in."""
        try:
            return super()._read_args_from_files(arg_strings)  # type: ignore[misc]
        except ValueError as error:
            presets = ", ".join(word[1:] for word in arg_strings if word.startswith("@"))
            raise ValueError(f"{presets}: {error}" if presets else str(error)) from None

    def format_help(self) -> str:
        """Megatron's help texts hold a bare % here and there, which argparse cannot format."""
        for action in self._actions:
            try:
                _ = (action.help or "") % {**vars(action), "prog": self.prog}
            except (ValueError, TypeError, KeyError):
                action.help = (action.help or "").replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> Any:
        """Raise ValueError: the entry prints it in one line."""
        raise ValueError(message)


def add_arguments(parser: argparse.ArgumentParser, device: str, argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser and set the defaults that follow from ``device`` ("cuda" or "cpu") and checkpoint."""
    parser.__class__ = _PresetParser
    parser.fromfile_prefix_chars = "@"
    group = parser.add_argument_group(title="preference optimisation")
    for item in fields(PatchArguments):
        options = dict(item.metadata)
        if options.get("action") != "store_true":
            options["default"] = None if item.default is MISSING else item.default
        group.add_argument("--" + item.name.replace("_", "-"), **options)
    group.add_argument("--help-losses", nargs=0, action=_HelpLosses, help="print every loss with paper, options and defaults")
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**_defaults(known, device))
    return parser


def _defaults(known: argparse.Namespace, device: str) -> dict[str, Any]:
    from megatron_patch.checkpoint.hf_mapping import check_layout
    from megatron_patch.model.qwen2 import megatron_model_arguments, read_qwen2_config

    if known.hf_path is None:
        raise ValueError("--hf-path is required: the Hugging Face folder that gives the model's shape and initial weights")
    tp = known.tensor_model_parallel_size
    config = read_qwen2_config(known.hf_path)
    check_layout(config, tp)
    _check_ranks(known, config.layers)
    shape = megatron_model_arguments(config, tp)
    shape["layernorm_epsilon"] = shape.pop("norm_epsilon")
    seq_length = known.seq_length or 4096
    shape["max_position_embeddings"] = max(shape["max_position_embeddings"], seq_length)
    derived: dict[str, Any] = {"seq_length": seq_length}
    if known.save and not known.dry_run:
        name = os.path.basename(os.path.abspath(known.save))
        derived |= {"tensorboard_dir": os.path.join(known.save, "tensorboard"), "wandb_exp_name": name}
    if known.valid_pair_data:
        derived |= {"eval_iters": 1, "eval_interval": 100}
    if known.epochs is not None:
        derived["train_iters"] = _iterations(known)
    return {**_RUN_DEFAULTS, **shape, **derived, **_device_defaults(device)}


def _check_ranks(known: argparse.Namespace, layers: int) -> None:
    """Upstream's own messages on these do not name the flags to change, or values that would do."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    tp, pp, cp = known.tensor_model_parallel_size, known.pipeline_model_parallel_size, known.context_parallel_size
    if world % (tp * pp * cp):
        cut = f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x --context-parallel-size {cp}"
        raise ValueError(f"{world} processes cannot be cut into {cut}; the product may be {_list(_divisors(world))}")
    uneven = (known.decoder_first_pipeline_num_layers, known.decoder_last_pipeline_num_layers, known.pipeline_model_parallel_layout)
    if layers % pp and not any(uneven):
        raise ValueError(
            f"--pipeline-model-parallel-size {pp} does not divide the model's {layers} layers; sizes that do: {_list(_divisors(layers))}; "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers make uneven stages"
        )
    virtual = known.num_virtual_stages_per_pipeline_rank or 1
    if layers % (pp * virtual) and not any(uneven):
        raise ValueError(
            f"--num-virtual-stages-per-pipeline-rank {virtual} does not divide the {layers // pp} layers of each of {pp} pipeline stages; "
            f"numbers that do: {_list(_divisors(layers // pp))}"
        )
    ranks, batch = world // (tp * pp * cp), known.global_batch_size
    if batch and batch % ranks:
        nearest = _list(size for size in (batch // ranks * ranks, -(-batch // ranks) * ranks) if size)
        raise ValueError(
            f"--global-batch-size {batch} is not a multiple of the {ranks} data-parallel ranks that {world} processes make at TP {tp} x PP "
            f"{pp} x CP {cp}; nearest: {nearest}, or change the layout"
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _iterations(known: argparse.Namespace) -> int:
    """``--epochs`` in steps of ``--global-batch-size`` pairs, rounded up."""
    from megatron_patch.data.pair_dataset import parse_weighted_prefixes
    from megatron_patch.data.pair_store import PairStore

    if known.train_iters is not None:
        raise ValueError(f"--epochs {known.epochs:g} and --train-iters {known.train_iters} contradict each other; give one")
    if not known.pair_data or not known.global_batch_size or known.epochs <= 0:
        raise ValueError(f"--epochs {known.epochs:g}: needs to be > 0, with --pair-data and --global-batch-size")
    pairs = sum(len(PairStore(prefix)) for prefix in parse_weighted_prefixes(known.pair_data)[0])
    return math.ceil(known.epochs * pairs / known.global_batch_size)


# Everything here can be overridden: what packed batches need, and what upstream gets wrong without.
_RUN_DEFAULTS: dict[str, Any] = {
    "transformer_impl": "local",
    "dataloader_type": "external",
    "micro_batch_size": 1,  # nominal: the batch plan decides the real micro-batches
    "calculate_per_token_loss": True,  # the loss is divided once, by the global count
    "tokenizer_type": "NullTokenizer",
    "eval_iters": 0,
    "eval_interval": 1,
    "rerun_mode": "disabled",  # upstream's reaction to NaN saves a poisoned checkpoint
    "check_for_nan_in_loss_and_grad": False,  # ours names the pairs
    "override_opt_param_scheduler": True,  # --train-iters may change on resume
    "dist_ckpt_optim_fully_reshardable": True,
    "verify_integrity": True,
    "async_strategy": "mcore",  # the other one is a package that is not here, and nothing of ours would be in it
    "use_persistent_ckpt_worker": True,  # without it --async-save is left out with a warning
    "exit_signal_handler": True,
    "exit_signal": 10,  # SIGUSR1
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "bias_gelu_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "accumulate_allreduce_grads_in_fp32": True,
    "adam_beta2": 0.95,
    "lr_decay_style": "cosine",
    "log_interval": 1,
    "save_interval": 500,
    "manual_gc": False,
}


def _device_defaults(device: str) -> dict[str, Any]:
    if device == "cuda":
        return {"distributed_backend": "nccl"}
    return {"distributed_backend": "gloo", "disable_jit_fuser": True, "use_cpu_initialization": True, "num_workers": 0}


def machine_has_gpus() -> bool:
    """True when device files or SLURM say that there are GPUs here, whatever torch sees."""
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0")


def choose_device(requested: str) -> str:
    """``cuda`` or ``cpu`` for ``--device``.

    Raises:
        ValueError: "auto" on a machine whose GPUs torch cannot see, or "cuda" where there is none.
    """
    if requested == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if requested == "cuda":
        raise ValueError("--device cuda: torch sees no GPU")
    if machine_has_gpus():
        raise ValueError("--device auto: this machine has GPUs but torch sees none; fix the driver or torch, or say --device cpu")
    return "cpu"


def requested_device(argv: Sequence[str]) -> str:
    """``--device`` of a command line, presets included, without building Megatron's parser (needed before megatron is imported).

    A plan (``--dry-run``) is made on the CPU, whatever it is for.
    """
    parser = _PresetParser(add_help=False, allow_abbrev=False, fromfile_prefix_chars="@")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dry-run", action="store_true")
    known = parser.parse_known_args(list(argv))[0]
    return "cpu" if known.dry_run else known.device


_LOSS_FLAGS = ("gamma", *(item.name for item in fields(LossOptions) if item.name not in ("loss_type", "length_normalised")))


def given_losses(args: argparse.Namespace) -> LossSum:
    """The losses of the command line, with the options the user gave and the losses' defaults for the rest; none when fine-tuning.

    Raises:
        ValueError: unknown loss, an option that no loss uses, contradicting spellings of one option.
    """
    given = {name: getattr(args, name) for name in _LOSS_FLAGS}
    given["length_normalised"] = args.is_average
    if args.add_sft_loss is not None:
        meant = "hinge" if args.add_sft_loss else "none"
        if args.anchor not in (None, meant):
            raise ValueError(f"--anchor {args.anchor} contradicts --{'' if args.add_sft_loss else 'no-'}add-sft-loss")
        given["anchor"] = meant
    if args.train_mode != "xpo":
        idle = [name for name, value in given.items() if value is not None]
        if idle or tuple(args.loss_type) != PatchArguments.loss_type or args.loss_weights:
            raise ValueError(f"--train-mode {args.train_mode} has no preference loss to give {idle[0] if idle else 'a --loss-type'} to")
        return ()
    return loss_sum(args.loss_type, args.loss_weights, **given)


def describe_losses() -> str:
    """The table of losses for ``--help-losses``: name, paper, arXiv number, when to use it, its flags with their defaults."""
    lines: list[str] = []
    for name, entry in LOSSES.items():
        own = {option: default for option, default in entry.defaults.items() if option not in ANCHOR_CONSTANTS}
        if own["anchor"] == "none":
            del own["anchor"]
        paper = f"{entry.paper}, arXiv {entry.arxiv}" if entry.arxiv else entry.paper
        lines += [f"{name}: {paper}", f"    {entry.when}", f"    {_as_flags(own)}"]
        if entry.gamma_fills:
            lines.append(f"    --gamma means --{entry.gamma_fills.replace('_', '-')}")
    lines += [
        "Every loss takes --anchor none, hinge or spo (experimental) and the anchor's constants:",
        f"    {_as_flags(ANCHOR_CONSTANTS)}",
        "Several: --loss-type A B --loss-weights 1 0.5. An option goes to every loss that uses it; the anchor belongs to the first loss",
        "that has one by default, else to the first, and is weighted with it.",
    ]
    return "\n".join(lines)


def _as_flags(options: Mapping[str, Any]) -> str:
    """Options as they are typed."""
    words = []
    for option, default in options.items():
        if option == "length_normalised":
            words.append("--is-average" if default else "--no-is-average")
        else:
            words.append(f"--{option.replace('_', '-')} {'1/(2 beta)' if default is None else default}")
    return " ".join(words)
