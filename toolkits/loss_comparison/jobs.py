"""Several trainings at a time, each followed by its measurement; the terminal gets one line when one is done.

A worker process trains in a subprocess and measures in itself, so transformers is imported once a worker. A failure does not stop the
others: they finish and are kept, and the comparison ends with the failed ones named.
"""

import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import psutil

from toolkits.loss_comparison.plan import SFT
from toolkits.loss_comparison.trials import Bench, Diverged, Subject, TrialFailed


class JobsFailed(Exception):
    """Some trainings failed; each has been shown."""


@dataclass(frozen=True)
class Job:
    """Train ``subject`` unless it is trained already, and measure it on a split."""

    subject: Subject
    split: str

    def is_done(self, bench: Bench) -> bool:
        """Whether the numbers are there, or cannot be."""
        return bench.measured(self.subject, self.split) is not None or bench.is_diverged(self.subject)


def run_jobs(bench: Bench, stage: str, jobs: Sequence[Job], workers: int) -> None:
    """Do what is not done yet; ``stage`` opens every line. A training that diverged is done.

    Raises:
        JobsFailed: after all others have finished.
    """
    todo, failed = [job for job in jobs if not job.is_done(bench)], 0
    say(f"{stage}: {len(jobs)} to measure, {len(jobs) - len(todo)} finished before")
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context, initializer=_prepare_worker) as pool:
        futures = {pool.submit(_carry_out, bench, job): job for job in todo}
        for number, future in enumerate(as_completed(futures), start=1):
            try:
                say(f"{stage} {number}/{len(todo)}: {future.result()}")
            except Diverged as failure:
                sys.stderr.write(f"{failure}\n")
                say(f"{stage} {number}/{len(todo)}: {futures[future].subject}: diverged")
            except TrialFailed as failure:
                failed += 1
                sys.stderr.write(f"{failure}\n")
            except BrokenProcessPool:
                end_children()
                raise JobsFailed(f"{stage} {number}/{len(todo)}: a worker was killed (out of memory?); what has finished is kept") from None
            except Exception as failure:  # one subject's damaged file must not hide how the others end
                failed += 1
                subject = futures[future].subject or SFT
                sys.stderr.write(f"[failed] {subject} ({futures[future].split}): {type(failure).__name__}: {failure}\n")
    if failed:
        raise JobsFailed(f"{failed} of {len(todo)} failed; the others are kept: the same command goes on with what is missing")


def say(line: str) -> None:
    """One line on the terminal, at once."""
    sys.stdout.write(f"[compare] {line}\n")
    sys.stdout.flush()


def _carry_out(bench: Bench, job: Job) -> str:
    started, trained = time.monotonic(), False
    if job.subject is not None and not bench.is_trained(job.subject):
        bench.train(job.subject)
        trained = True
    bench.measure(job.subject, job.split)
    numbers = bench.measured(job.subject, job.split)
    assert numbers is not None
    what = "trained and measured" if trained else "measured"
    accuracy = f"greedy accuracy {numbers['greedy_accuracy']:.3f} ({job.split} problems)"
    return f"{job.subject or SFT}: {accuracy}, {what} in {time.monotonic() - started:.0f} s"


def _prepare_worker() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends everything


def end_children() -> None:
    """End everything this process started, torchrun's workers included."""
    for child in psutil.Process().children(recursive=True):
        child.terminate()


def end_together() -> None:
    """When this process is asked to end, everything it started ends first: torchrun's workers would outlive it."""

    def end(number: int, _: Any) -> None:
        end_children()
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
