"""What every entry does around its work: parse, and end a user's error in one line with exit code 2, on all ranks."""

import argparse
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_patch.arguments import add_arguments
from megatron_patch.checkpoint import foreign_code
from megatron_patch.errors import AgreedError, end_now

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
    _alone()
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


def end_when_torchrun_says() -> None:
    """SIGTERM ends this process if it is torchrun's, which sends it where another rank failed, whatever the main thread waits for.

    Others send it too: SLURM to every process of a step that it preempts, and what follows from that comes as SIGUSR1 (scripts/launch.sh,
    which has SIGTERM ignored and says so in ON_TERM). Blocked, it also leaves alone what is started from here: writers of checkpoints,
    W&B's service. To be called before there are other threads, which would not have it blocked.
    """
    if os.environ.get("ON_TERM") != "USR1":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        end_now(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _alone() -> None:
    """What a launcher says to a rank, where there is none: the only one."""
    if "MASTER_ADDR" not in os.environ:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            os.environ.setdefault(name, str(value))


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn ValueError into one line that starts with ``[error]`` and exit code 2; any other error is shown as it is, exit code 1.

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
        sys.stderr.flush()
        if not speaks and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(SILENT_WAIT_S)
        end_now(2)
    except Exception:
        sys.excepthook(*sys.exc_info())  # torch's, once there is a process group: it names the rank
        end_now(1)
