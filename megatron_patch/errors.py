"""Errors that say more than ValueError, and the one way to end a process where an error must not wait for anybody."""

import multiprocessing
import os
import sys
from typing import NoReturn


class AgreedError(ValueError):
    """A user's error that every rank raises at the same place: rank 0 speaks for all."""


def end_now(code: int) -> NoReturn:
    """Leave with an exit code, and with the processes that write checkpoints, at once.

    Not ``sys.exit``: a half-initialised process group may wait for ever for the other ranks, and Python for processes that hear no SIGTERM.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
