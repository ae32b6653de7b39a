"""A checkpoint of a run as a Hugging Face folder: any that was saved, whatever layout it was trained in.

    python scripts/export_hf.py outputs/math --to outputs/math-hf
    torchrun --nproc-per-node 8 scripts/export_hf.py outputs/math --best --to outputs/math-hf --tensor-model-parallel-size 8

Initial weights (for config.json and the tokenizer), precision and pairs are those of the run's record (run.json); all other flags are
training's. One process holds the whole model unless a layout says otherwise. Afterwards transformers scores eight pairs with what was
written, and the log-probs are compared with the checkpoint's (``--no-parity-check``: they are not).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_patch import cpu_backend
from megatron_patch.arguments import choose_device, requested_device
from megatron_patch.checkpoint import saved
from megatron_patch.data.atomic_files import read_json
from megatron_patch.entry import parse_arguments, user_errors

BEFORE = "--skip-train --train-iters 1 --no-load-optim --no-load-rng".split()


def chosen_step(run: Path, *, step: int | None, best: bool) -> int:
    """The checkpoint to export. ValueError if there is none such."""
    if best:
        step = read_json(run / "best.json", "the best evaluation of a run with --best-metric")["step"]
    chosen = step if step is not None else saved.tracked_step(run)
    if chosen is None:
        raise ValueError(f"{run}: no checkpoint, or none that {saved.TRACKER} names; say --step")
    if chosen not in saved.steps(run):
        raise ValueError(f"{run}: no checkpoint of step {chosen}; there are {', '.join(map(str, saved.steps(run))) or 'none'}")
    return chosen


def training_flags(run: Path, step: int, to: Path) -> list[str]:
    """The flags that load this checkpoint and its run's data."""
    from megatron_patch.run_record import starts

    start = starts(run)[-1]
    settings: dict[str, Any] = start["settings"]
    for word in settings["pair_data"]:
        if word.startswith("-"):
            raise ValueError(f"{run}: its record names {word} as data")
    flags = [*BEFORE, "--load", str(run), "--ckpt-step", str(step), "--export-hf", str(to), "--train-mode", settings["train_mode"]]
    flags += ["--hf-path", start["weights"]["path"], "--global-batch-size", str(settings["global_batch_size"])]
    flags += ["--max-tokens-per-micro-batch", str(settings["max_tokens_per_micro_batch"])]
    return [*flags, "--pair-data", *settings["pair_data"], *(["--bf16"] if settings["bf16"] else [])]


def main(argv: list[str]) -> None:
    """Load, write, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="DIR", help="folder that was given as --save (or OUTPUT)")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write: new, empty or an earlier export")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="default: the last one saved")
    which.add_argument("--best", action="store_true", help="the one that --best-metric kept")
    ours, rest = parser.parse_known_args(argv)
    step = chosen_step(ours.run, step=ours.step, best=ours.best)
    sys.argv[1:] = [*training_flags(ours.run, step, ours.to), *rest]  # what Megatron parses

    device = choose_device(requested_device(sys.argv[1:]))
    if device == "cpu":
        cpu_backend.install()
    from megatron_patch import built_model, loop_hooks, scoring
    from megatron_patch.checkpoint.hf_io import refuse_foreign_folder, save_hf_weights
    from megatron_patch.streams import full_pass, sample_set

    args = parse_arguments(device)
    refuse_foreign_folder(ours.to)

    def say(line: str) -> None:
        if args.rank == 0:
            loop_hooks.print_line(f"[export] {line}")

    chunks = built_model.built_model(args)

    def check(written: Path) -> None:
        """By transformers."""
        if args.parity_check:
            samples, _ = sample_set(args, args.pair_data, with_reference=False)
            scoring.check_export(scoring.Scorer(args, chunks), full_pass(args, samples, args.vocab_size), written, say)

    save_hf_weights(chunks, ours.to, args.hf_path, dtype=built_model.precision(args), check=check)
    say(f"step {step} of {ours.run}: {ours.to}")


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
