"""Run an entry point on N ranks as torchrun would, without paying the imports each time.

A fork server imports megatron once; every rank is forked from it, gets torchrun's environment and runs the entry file as
``__main__``. The ranks are real processes that talk over gloo; a rank that dies takes the others with it, as under torchrun.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import fork_server

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "examples/qwen2_5/train_qwen.py"
REFERENCE = ROOT / "toolkits/lpo_data_preprocessing/reference_logps.py"
ALTERED = ROOT / "tests/distributed/altered.py"
TIMEOUT_S = 180

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Run:
    """Exit codes by rank, the joined output, and the seconds from the first rank's end to the last's."""

    codes: list[int | None]
    output: str
    seconds_to_end: float

    @property
    def errors(self) -> set[str]:
        """The distinct ``[error]`` lines."""
        return {line for line in self.output.splitlines() if line.startswith("[error]")}

    @property
    def ok(self) -> bool:
        """True when every rank left with 0."""
        return all(code == 0 for code in self.codes)


def launch(ranks: int, entry: Path, argv: Sequence[Any], log: Path, environment: Mapping[str, str] | None = None) -> Run:
    """Run ``entry`` with ``argv`` on ``ranks`` processes; output goes to ``log`` and comes back.

    ``environment`` is added to the ranks'; without ``LPO_TRACEBACK`` in it tracebacks of user errors are shown, "" hides them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(a) for a in argv]
    processes = [
        _context.Process(target=_rank, args=(rank, ranks, port, str(entry), words, f"{log}.{rank}", dict(environment or {})))
        for rank in range(ranks)
    ]
    fork_server.use(["tests.distributed.preloaded"])
    for process in processes:
        process.start()
    try:
        spread = _wait(processes)
    finally:
        _end_orphans(processes)
    output = "".join(Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(ranks) if Path(f"{log}.{rank}").exists())
    return Run([p.exitcode for p in processes], output, spread)


def _wait(processes: list[Any]) -> float:
    """Wait for all; once one fails give the others ten seconds, as torchrun's agent would end them at once."""
    deadline, first_end = time.monotonic() + TIMEOUT_S, None
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if first_end is None and any(p.exitcode is not None for p in processes):
            first_end = time.monotonic()
        if first_end is not None and any(p.exitcode for p in processes):
            deadline = min(deadline, first_end + 10)
        time.sleep(0.02)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    return 0.0 if first_end is None else time.monotonic() - first_end


def _end_orphans(processes: list[Any]) -> None:
    """Ranks that end at once leave helper processes, half a gigabyte each, some of which keep the fork server alive."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _rank(rank: int, ranks: int, port: int, entry: str, argv: list[str], log: str, environment: dict[str, str]) -> None:
    os.setpgrp()  # a group of its own, which its helpers stay in
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **{"LPO_TRACEBACK": "1", **environment},
    )  # fmt: skip
    sys.argv = [entry, *argv, "--device", "cpu"]  # also on a machine with GPUs
    os.chdir(ROOT)
    runpy.run_path(entry, run_name="__main__")
    sys.stdout.flush()


def train(ranks: int, save: Path, argv: Sequence[Any]) -> Run:
    """``train_qwen.py --save save ...``; the log lies beside ``save``."""
    return launch(ranks, TRAIN, [*argv, "--save", save], save.with_suffix(".log"))


def metrics(save: Path) -> list[dict[str, Any]]:
    """The training rows of a run's metrics.jsonl, in order."""
    rows = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "grad_norm" in row]
