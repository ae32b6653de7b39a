"""A function over a stream on several processes: results in the order of the stream, however many processes there are.

`multiprocessing.Pool` reads its whole input ahead and hangs when the kernel kills a worker; `ProcessPoolExecutor` leaves its workers
running when the stage is told to end. Here a worker has one item at a time, at most `AHEAD` results a worker wait for an earlier one, a
worker that is gone is an error, and whatever ends the block ends the workers. Workers are forked from a server (`forkserver`) that has
imported the stage's modules once and has no threads. SIGTERM and SIGINT are for the parent: workers have them blocked, and end with
their pipe.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any

AHEAD = 4
_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM)


def usable_cpus() -> int:
    """CPUs that this process may run on (a container or a SLURM step may have fewer than the machine)."""
    return len(os.sched_getaffinity(0))


def start_server(preload: Sequence[str]) -> None:
    """Start the server that workers are forked from; it imports the modules `preload` while this process goes on."""
    resource_tracker.ensure_running()  # would open the signals again if it started inside the block
    forkserver.set_forkserver_preload(list(preload))
    with _signals_held():
        forkserver.ensure_running()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started inside never get the parent's signals; the parent gets them behind the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """A process and its pipe."""

    def __init__(self, context: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        with _signals_held():
            self.process.start()
        theirs.close()
        self.item = -1
        """The number of the item it has, -1 when it waits for one."""

    def give(self, number: int, item: Any) -> None:
        """Hand over one item. A worker that has ended already says why when its result is taken."""
        with suppress(OSError):
            self.pipe.send(item)
        self.item = number

    def take(self) -> Any:
        """The result of the item it has; an exception is one that the worker raised, and its last."""
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        self.item = -1
        return result

    def end(self) -> None:
        """End it, at once."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _gone(self) -> OSError:
        self.process.join(timeout=10)
        code = self.process.exitcode
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        memory = " (out of memory? --workers 1 needs the least)" if code == -signal.SIGKILL else ""
        return OSError(f"worker process {self.process.pid} {how}{memory}")


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """A worker's life: make the function, answer items until the pipe ends."""
    try:
        function = make(*arguments)
        while True:
            pipe.send(function(pipe.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except Exception as error:
        pipe.send(error)


def ordered_map(
    make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], items: Iterable[Any], workers: int
) -> Generator[Any]:
    """Yield ``make(*arguments)(item)`` for each item, in order; `workers` processes, with 1 in this one.

    Everything must be picklable. OSError if a worker ends by itself. Close the generator to end the workers before the items do.
    """
    if workers == 1:
        yield from map(make(*arguments), items)
        return
    context = multiprocessing.get_context("forkserver")
    team: list[_Worker] = []
    try:
        for _ in range(workers):
            team.append(_Worker(context, make, arguments))
        yield from _in_order(team, iter(items))
    finally:
        for worker in team:
            worker.end()


def _in_order(team: list[_Worker], items: Iterator[Any]) -> Iterator[Any]:
    results: dict[int, Any] = {}
    numbers, due, more = count(), 0, True
    while True:
        for worker in team:
            if more and worker.item < 0 and _within(team, results):
                number, item = next(numbers), next(items, None)
                more = item is not None
                if more:
                    worker.give(number, item)
        busy = [worker for worker in team if worker.item >= 0]
        if not busy:
            return
        ready = connection.wait([worker.pipe for worker in busy])
        for worker in busy:
            if worker.pipe in ready:
                number = worker.item
                results[number] = worker.take()
                more = more and not isinstance(results[number], Exception)
        while due in results:
            result = results.pop(due)
            if isinstance(result, Exception):
                raise result
            yield result
            due += 1


def _within(team: list[_Worker], results: dict[int, Any]) -> bool:
    """Whether another item may be begun: the results that wait for an earlier one are bounded."""
    return len(results) < AHEAD * len(team)
