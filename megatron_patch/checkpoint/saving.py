"""Saving checkpoints so that a failure costs no more than the checkpoint at hand, and loading none that is damaged.

What upstream's save does about failures: those of the tensors' files reach every rank as ``CheckpointException`` (state_dict_saver.py:249),
those of the few files that rank 0 alone writes do not, and the other ranks wait for it for ever. Here every failure is known to every rank
after the save: the files of a failed one are removed (on a full disk they are what fills it), the tracker names what it named before, and
the run stops with one line or, with ``--continue-on-save-failure``, goes on.

``loop_hooks.HOOKS`` has the rows that put these functions in upstream's place.
"""

import argparse
import atexit
import multiprocessing.connection
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint import CheckpointException

from megatron_patch.checkpoint import saved
from megatron_patch.checkpoint.foreign_code import foreign_code
from megatron_patch.checkpoint.shared_hashes import gather_own, led_by_rank_zero
from megatron_patch.data.atomic_files import write_json
from megatron_patch.errors import AgreedError, end_now

_preload = FileSystemWriterAsync.preload_tensors  # upstream's: a process that writes asynchronous saves installs no hooks
_CLOSING_S = 2.0
_PROBE_BYTES = 1 << 16  # about what rank 0 writes beside the tensors


_AS_SAVED = {"ckpt_step": None, "override_ckpt_iteration": None, "finetune": False, "no_load_optim": None, "no_load_rng": None}
"""Megatron's flags of loading, for a checkpoint of one's own: its step, and all that it holds."""


class Saving:
    """One run's checkpoints.

    Args:
        args: ``--save`` (one's own folder), ``--load`` (that one, or another run's to begin with), ``--ckpt-step`` of another run's,
            ``--keep-last`` and ``--continue-on-save-failure``. Those of loading change when there is something to go on from.
        best: step, metric and value of the best evaluation, whose checkpoint stays whatever ``--keep-last`` says. say: prints one line.
    """

    def __init__(self, args: argparse.Namespace, best: Callable[[], tuple[int, str, float] | None], say: Callable[[str], None]) -> None:
        self.args = args
        self.folder, self.load = (Path(path) if path else None for path in (args.save, args.load))
        self.keep, self.go_on = args.keep_last, args.continue_on_save_failure
        self.best, self.say = best, say
        self.own = self.folder is not None and self.load is not None and self.folder.resolve() == self.load.resolve()
        self._verified: set[Path] = set()
        self._complaint: str | None = None  # of a write that rank 0 does alone
        self._hashes: dict[str, str] = {}  # on rank 0: of the files that the save at hand has written
        self._saved: set[int] = set()  # steps whose saves did not fail, finished or not
        self._writing: list[int] = []  # steps whose saves have not come to their end

    def before_load(self) -> None:
        """What will be loaded is whole. AgreedError if it cannot be. Collective."""
        started = time.perf_counter()
        folder, chosen, lines = led_by_rank_zero(self._look)
        if folder is not None and folder == self.folder and not self.own:  # what was said about loading is of the other run
            vars(self.args).update(_AS_SAVED, load=str(folder))
            self.load, self.own = folder, True
        if folder is not None and chosen is not None:
            self._verified.add(saved.folder_of(folder, chosen).resolve())
            lines = [*lines, f"going on from the checkpoint of step {chosen} (checksums compared in {time.perf_counter() - started:.1f} s)"]
        for line in lines if torch.distributed.get_rank() == 0 else ():
            self.say(line)

    def _look(self, hashes: saved.HashFiles) -> tuple[Path | None, int | None, list[str]]:
        """The folder and step that will be loaded, no step if there is no checkpoint, and what was not as it should be.

        A run that began with another one's checkpoint goes on from its own as soon as it has one: a requeued job says ``--load`` again.
        """
        lines: list[str] = []
        if self.load is None:
            return None, None, lines
        if self.folder is not None:
            lines = saved.recover(self.folder, hashes)
            step = saved.tracked_step(self.folder)
            if step is not None and not self.own:
                lines.append(f"{self.folder} has checkpoints of this run, so --load {self.load} is not used")
            if step is not None or self.own:
                return self.folder, step, lines
        saved.check_loadable(self.load, self.args.ckpt_step, hashes)
        return self.load, self.args.ckpt_step or saved.tracked_step(self.load), lines

    def verify(self, checkpoint: str) -> None:
        """In place of upstream's check, which reads one file after another; what was checked at the start is not read again."""
        if Path(checkpoint).resolve() in self._verified:
            return
        complaint = led_by_rank_zero(lambda hashes: saved.damage(Path(checkpoint), hashes))
        if complaint:
            raise AgreedError(f"{checkpoint} cannot be loaded: {complaint}")

    def hashed(self, upstream: Callable) -> Callable:
        """Upstream's ``save_state_dict_async_finalize``, which writes ``.metadata``; then each rank hashes what it has written."""

        def save_state_dict_async_finalize(writer: Any, *args: Any, **kwargs: Any) -> None:
            """The same. Collective."""
            writer.finish = self.kept(writer.finish)  # rank 0 alone calls it, and the others wait for what comes after
            upstream(writer, *args, **kwargs)
            if torch.distributed.get_rank() == 0 and self._complaint is None:
                self.kept(self._look_into)(Path(writer.path))
            self._hashes = gather_own(Path(writer.path))

        return save_state_dict_async_finalize

    def _look_into(self, checkpoint: Path) -> None:
        """An index that could not be read later is a save that failed now."""
        self._complaint = foreign_code(checkpoint)

    def write_manifest(self, checkpoint: str) -> None:
        """In place of upstream's, which reads one file after another, on rank 0; none, if a file before it could not be written."""
        hashes, self._hashes = self._hashes, {}
        if self._complaint is None:
            saved.write_manifest(Path(checkpoint), hashes)

    def kept(self, write: Callable[..., None]) -> Callable[..., None]:
        """``write``, done by rank 0 alone, with its failure kept for ``guarded`` rather than raised: others wait behind it."""

        def attempted(*args: Any, **kwargs: Any) -> None:
            """Never raises OSError."""
            try:
                write(*args, **kwargs)
            except OSError as error:
                self._complaint = str(error)

        return attempted

    def later(self, upstream: Callable) -> Callable:
        """Upstream's ``AsyncRequest.add_finalize_fn``: the tracker of an asynchronous save, too, is rank 0's alone."""
        return lambda request, finalize: upstream(request, self.kept(finalize))

    def guarded(self, upstream: Callable) -> Callable:
        """Upstream's ``save_checkpoint``, with a failure of any rank told to all."""

        def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> None:
            """Saved, or cleared away again. Collective."""
            if self._holds(iteration):
                return  # nothing was trained since this checkpoint was saved or loaded: it is not written over
            self._prune()
            before = self._tracked()
            self._writing.append(iteration)
            complaint = self._agreed(self._probe(iteration)) or self._agreed(self._attempt(lambda: upstream(iteration, *args, **kwargs)))
            if complaint:
                self._writing.remove(iteration)
                self._failed([iteration], before, complaint)
            else:
                self._saved.add(iteration)
            self._forget_finished()
            self.note_best()
            self._prune()

        return save_checkpoint

    def finalized(self, upstream: Callable) -> Callable:
        """Upstream's ``maybe_finalize_async_save``, with a failure of any rank told to all."""

        def maybe_finalize_async_save(*args: Any, **kwargs: Any) -> None:
            """The same of one that is under way. Collective."""
            if not _unfinished():
                upstream(*args, **kwargs)
                return
            before = self._tracked()
            complaint = self._agreed(self._attempt(lambda: upstream(*args, **kwargs)))
            if complaint:
                self._failed(self._writing, before, complaint)
            self._forget_finished()
            self.note_best()
            self._prune()

        return maybe_finalize_async_save

    def _holds(self, step: int) -> bool:
        """Whether this start of the run saved or loaded the checkpoint of a step."""
        return step in self._saved or (self.own and step == self.args.iteration)

    def _forget_finished(self) -> None:
        self._writing = self._writing[len(self._writing) - _unfinished() :]

    def _tracked(self) -> int | None:
        assert self.folder is not None
        return saved.tracked_step(self.folder) if torch.distributed.get_rank() == 0 else None

    def _probe(self, iteration: int) -> str | None:
        """Rank 0 makes the folder and sees whether it can write there: what upstream would fail at on rank 0 alone."""
        if torch.distributed.get_rank() != 0 or self.folder is None:
            return None
        target = saved.folder_of(self.folder, iteration)
        try:
            target.mkdir(parents=True, exist_ok=True)
            (target / "probe").write_bytes(b"\0" * _PROBE_BYTES)
            (target / saved.MANIFEST).unlink(missing_ok=True)  # of a checkpoint that a user went back from
        except OSError as error:
            return str(error)
        finally:
            (target / "probe").unlink(missing_ok=True)
        return None

    def _attempt(self, save: Callable[[], None]) -> str | None:
        """What went wrong on this rank, None if nothing did."""
        self._complaint = None
        try:
            save()
        except CheckpointException as error:
            return _root_cause(error)
        except OSError as error:  # of the tracker, on rank 0 alone: the barrier at the end is all that upstream has left
            torch.distributed.barrier()
            return str(error)
        return self._complaint

    def _agreed(self, complaint: str | None) -> str | None:
        """What any rank complains of, with detail if one has it. Collective."""
        everywhere: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, complaint)
        return max(filter(None, everywhere), key=lambda told: told != _NO_DETAIL, default=None)

    def _failed(self, written: Sequence[int], before: int | None, complaint: str) -> None:
        """Clear away what is there of saves that failed; stop, or say that the run goes on. All ranks say the same, when it is done."""
        assert self.folder is not None
        if torch.distributed.get_rank() == 0:
            complaint += f"; {shutil.disk_usage(self.folder).free / 2**20:.0f} MiB were left on that disk"
            for folder in (saved.folder_of(self.folder, step) for step in written):
                if not (folder / saved.MANIFEST).exists():  # otherwise it is whole, and its tracker is what failed
                    shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # a tracker that names what is gone is mended at the next start
                if before is None:
                    (self.folder / saved.TRACKER).unlink(missing_ok=True)
                elif saved.tracked_step(self.folder) != before:
                    saved.write_tracker(self.folder, before)
        told = [complaint]
        torch.distributed.broadcast_object_list(told, src=0)
        complaint = told[0]
        self._saved -= {*written}
        which = f"the checkpoint of step {' or '.join(map(str, written))}"
        if not self.go_on:
            raise AgreedError(
                f"{which} could not be saved in {self.folder}: {complaint}. What was saved before is untouched: mend that and start the "
                "same job again; --continue-on-save-failure would have gone on"
            )
        if torch.distributed.get_rank() == 0:
            self.say(f"{which} could not be saved: {complaint}. Training goes on; what was saved before is untouched")

    def note_best(self) -> None:
        """``best.json`` names the checkpoint of the best evaluation as soon as it is whole; until then, the best one before it."""
        best = self.best()
        if self.folder is None or best is None or torch.distributed.get_rank() or not self._holds(best[0]):
            return
        named = dict(zip(("step", "metric", "value"), best, strict=True))
        with self._said(f"{saved.BEST} could not be written"):
            if named != saved.best(self.folder) and (saved.folder_of(self.folder, best[0]) / saved.MANIFEST).exists():
                write_json(self.folder / saved.BEST, named)

    def _prune(self) -> None:
        if self.keep is None or self.folder is None or torch.distributed.get_rank():
            return
        best = self.best()
        with self._said("an old checkpoint could not be removed"):
            saved.keep_newest(self.folder, self.keep, {saved.best(self.folder).get("step"), best[0] if best else None})

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """An OSError of rank 0 alone that should end no run is a line."""
        try:
            yield
        except OSError as error:
            self.say(f"{what}: {error}")


_NO_DETAIL = "a write failed"


def staged(upstream: Callable, state: Any) -> staticmethod:
    """In place of upstream's ``preload_tensors``, of asynchronous saves: a step waits for it, and not for the writing that follows."""
    return staticmethod(copied_from_memory if state.saving and state.saving.args.async_save else upstream)


def copied_from_memory(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    """Upstream's copies of what is on a GPU, and copies of what is in host memory: all of a run on the CPU, elsewhere what torch's AdamW
    counts its steps with. Upstream leaves these shared with the training process, whose next steps would go into the checkpoint.

    Args:
        write_buckets: (file, key, (bytes, [(item, tensor)])) for each file. non_blocking: copy from a GPU through pinned memory.
    """
    copied = [
        (file, key, (others, [(item, tensor.clone() if tensor.device.type == "cpu" else tensor) for item, tensor in tensors]))
        for file, key, (others, tensors) in write_buckets
    ]
    return _preload(copied, non_blocking)


def watched(start: Callable) -> staticmethod:
    """In place of upstream's ``PersistentAsyncCaller._get_process``, whose process may be killed (it needs memory for a copy of the
    model): then this rank ends too. It would wait for an answer for ever, and the others for it. And at its end nobody waits for that
    process, which hears no SIGTERM (entry.py) and is there also where nothing was saved. The save at the end of training has another."""

    def _get_process(*args: Any, **kwargs: Any) -> Any:
        """The same."""
        known = PersistentAsyncCaller._persistent_process
        writer, leaving = start(*args, **kwargs), threading.Event()
        if writer is not known:
            threading.Thread(target=_end_with, args=(writer, leaving), daemon=True).start()
            atexit.register(writer.kill)
            atexit.register(leaving.set)  # the last one registered is called first
        return writer

    return staticmethod(_get_process)


def _end_with(writer: Any, leaving: threading.Event) -> None:
    """Its exit code says nothing: whoever of two threads asks first gets it. Upstream forgets a process that it closed."""
    multiprocessing.connection.wait([writer.sentinel])
    if not leaving.wait(_CLOSING_S) and PersistentAsyncCaller._persistent_process is writer:
        rank, what = torch.distributed.get_rank(), "the process that writes asynchronous checkpoints"
        lines = ("Traceback (most recent call last):", f"RuntimeError: {what} is gone (killed? the machine's memory may have run out)")
        sys.stderr.writelines(f"[rank{rank}]: {line}\n" for line in lines)  # as torch writes those of exceptions
        end_now(1)


def _unfinished() -> int:
    """Asynchronous saves that are under way; the same on all ranks."""
    from megatron.training import async_utils

    queue = async_utils._async_calls_queue
    return 0 if queue is None else queue.get_num_unfinalized_calls()


def _root_cause(error: CheckpointException) -> str:
    """What failed on the first rank that is named; only the coordinator's exception names any."""
    return next((str(cause) for cause, _ in error.failures.values()), _NO_DETAIL)
