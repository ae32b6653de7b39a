"""SIGTERM: SLURM's preemption, a cancelled job, a user's kill. A stage ends with exit code 75, please start again, nothing half-written.

What that takes depends on what the process is doing. While it imports there is nothing to clean up, and it ends at once. A stage's work
ends through an exception, which removes its temporary files (`records.run_stage`). A rank of the reference pass may wait in a collective
for ranks that are gone, where Python runs no handler and no exception gets through: there a thread ends the process between two writes.
"""

import os
import signal
import sys
import threading

PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h."""
writing = threading.Lock()
"""Held while a process that `end_between_writes` writes files."""


def end_at_once() -> None:
    """Until another handler is installed."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(PREEMPTED))


def end_between_writes(message: str) -> None:
    """From now on SIGTERM ends the process whatever its main thread waits for, unless `writing` is held, and then after that.

    The interpreter's own handler, in C, writes the signal's number into a pipe, and a thread reads it.
    """
    mine, signals = os.pipe()
    os.set_blocking(signals, False)
    threading.Thread(target=_end, args=(mine, message), daemon=True).start()
    signal.set_wakeup_fd(signals, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the thread sees to it


def _end(signals: int, message: str) -> None:
    while os.read(signals, 1) != bytes([signal.SIGTERM]):
        pass
    with writing:
        sys.stderr.write(message)
        sys.stderr.flush()
        os._exit(PREEMPTED)
