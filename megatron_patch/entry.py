"""What every entry does around its work: parse, and end a user's error in one line with exit code 2, on all ranks."""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_patch.arguments import add_arguments
from megatron_patch.checkpoint import foreign_code
from megatron_patch.errors import AgreedError

# torchrun ends all ranks as soon as one leaves, also the one that has yet to write the line: the silent ones wait to be ended.
SILENT_WAIT_S = 20


def parse_arguments(
    device: str, add: Callable[[argparse.ArgumentParser], None] = lambda parser: None, *, plans: bool = False
) -> argparse.Namespace:
    """Megatron's and our flags, validated. Upstream's complaints about flags become ValueError like our own.

    ``device`` is what ``choose_device`` said; ``add`` may put an entry's own flags and defaults on the parser; ``plans``: the entry knows
    what to do with ``--dry-run``.
    """
    # Tensor parallelism wants it before Blackwell (training/arguments.py:1437), and CUDA reads it when it is initialised.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    foreign_code.forbid()
    from megatron.training.arguments import parse_and_validate_args

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add(parser)
        return add_arguments(parser, device)

    try:
        args = parse_and_validate_args(extra_args_provider=provider)
    except AssertionError as error:
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ValueError(f"megatron-core refuses these flags: {reason}") from error
    if args.dry_run and not plans:
        raise ValueError("--dry-run is for training: examples/qwen2_5/train_qwen.py")
    return args


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn ValueError into one line that starts with ``[error]`` and exit code 2.

    Before the process group exists all ranks fail alike and rank 0 speaks; after that the failing rank speaks and torchrun
    ends the others. A silent rank leaves last.
    """
    try:
        yield
    except ValueError as error:
        together = torch.distributed.is_initialized()
        speaks = os.environ.get("RANK", "0") == "0" or (together and not isinstance(error, AgreedError))
        if speaks:
            sys.stderr.write(f"[error] {' '.join(str(error).split())}\n")
        if os.environ.get("LPO_TRACEBACK"):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        if not speaks and "TORCHELASTIC_RUN_ID" in os.environ:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the run script has it ignored
            time.sleep(SILENT_WAIT_S)
        os._exit(2)  # not sys.exit: a half-initialised process group may wait for ever for the other ranks
