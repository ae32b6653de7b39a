"""What workers are given to do in tests: importable, as a worker imports it."""

import os
import signal
import time


def slow_square(first_seconds: float):
    """Squares; the number 0 takes its time, so that others are ready before it."""

    def square(number: int) -> int:
        time.sleep(first_seconds if number == 0 else 0)
        return number * number

    return square


def refuse(number: int):
    """Refuses one number."""

    def same(given: int) -> int:
        if given == number:
            raise ValueError(f"{given} is refused")
        return given

    return same


def killed_at(number: int):
    """Killed, as the kernel kills when memory is short, at one number."""

    def same(given: int) -> int:
        if given == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return given

    return same


def fails_to_start():
    """A worker that cannot be made."""
    raise ValueError("no tokenizer here")


def leaves():
    """A worker that ends before it has said anything."""
    os._exit(3)
