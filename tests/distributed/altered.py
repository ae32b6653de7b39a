"""An entry that runs another entry with something altered: ``altered.py NAME[,NAME...] ENTRY [ARGUMENTS...]``.

Alterations observe (``recorded``), save time (``unsaved``) or plant a defect that a check must find. They are made in the rank's
own process, after the fork, so nothing leaks into other runs.
"""

import errno
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

NAN_PAIR = "p007"


def unsaved() -> None:
    """No checkpoints, and no check of the export: half of a short run's time goes into writing them."""
    from megatron.training import training

    from megatron_patch import run

    run.check_export = lambda *_: None
    training.save_checkpoint = lambda *args, **kwargs: None


def recorded() -> None:
    """Append {"step", "names"} of every micro-batch that a rank feeds to its model to ``$BATCH_LOG.<rank>``; the export is not checked."""
    from megatron.training import get_args

    from megatron_patch import run
    from megatron_patch.forward_step import ForwardStep

    run.check_export = lambda *_: None

    original = ForwardStep.__call__
    path = f"{os.environ['BATCH_LOG']}.{os.environ['RANK']}"

    def note(batch: Any) -> Any:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": get_args().curr_iteration + 1, "names": [name.split()[0] for name in batch.names]}) + "\n")
        return batch

    def noted(batches: Any) -> Iterator[Any]:
        yield note(next(batches))

    ForwardStep.__call__ = lambda self, data_iterator, model: original(self, noted(data_iterator), model)


def recorded_stores() -> None:
    """Append {"stores"}, the prefixes that the samples of a micro-batch came from, to ``$BATCH_LOG.<rank>``; the export is not checked."""
    from megatron_patch import run
    from megatron_patch.forward_step import ForwardStep

    run.check_export = lambda *_: None

    original = ForwardStep.__call__
    path = f"{os.environ['BATCH_LOG']}.{os.environ['RANK']}"

    def noted(batches: Any) -> Iterator[Any]:
        batch = next(batches)
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"stores": [name.split("(")[1].rstrip(")") for name in batch.names]}) + "\n")
        yield batch

    ForwardStep.__call__ = lambda self, data_iterator, model: original(self, noted(data_iterator), model)


def shifted_mask() -> None:
    """Off by one: a response token is scored by the logits at its own position instead of the one before."""
    from megatron_patch.data import packed_batch

    original = packed_batch.scored_targets

    def scored_targets(*args: Any) -> Any:
        right = original(*args)
        return right._replace(positions=right.positions + 1)

    packed_batch.scored_targets = scored_targets


def nan_response() -> None:
    """The rejected response of one pair becomes NaN on the way from the model to the loss."""
    from megatron_patch.forward_step import ForwardStep

    original = ForwardStep._loss

    def _loss(self: Any, batch: Any, logps: torch.Tensor, **kwargs: Any) -> Any:
        poison = torch.zeros_like(logps)
        for p, name in enumerate(batch.names):
            if name.split()[0] == NAN_PAIR:
                poison[batch.samples + p] = float("nan")
        return original(self, batch, logps + poison, **kwargs)

    ForwardStep._loss = _loss


def exported_gradients() -> None:
    """``--export-hf`` gets the gradients of the last step instead of the weights: whole tensors under one name each, at any layout."""
    from megatron_patch.run import TrainingRun

    original = TrainingRun.export

    def export(self: TrainingRun) -> None:
        for chunk in self.chunks:
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.main_grad)
        original(self)

    TrainingRun.export = export


def wrong_export() -> None:
    """One tensor is not written as it is: the query biases of the first layer are zero."""
    from megatron_patch.checkpoint import hf_io

    original = hf_io.merge_shards

    def merge_shards(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.zero_() if "layers.0.self_attn.q_proj.bias" in name else tensor) for name, tensor in original(*args))

    hf_io.merge_shards = merge_shards


def too_large() -> None:
    """No model is so small, and no sample so short, that one process can score it."""
    from megatron_patch.evaluation import parity

    parity.MAX_FLOPS = 0.0


def two_samples() -> None:
    """One process can score two samples of the export, and no more."""
    from megatron_patch.evaluation import parity

    original = parity.affordable
    parity.affordable = lambda path, tokens: min(2, original(path, tokens))


def unwritable_index() -> None:
    """The file that rank 0 alone writes after the tensors, larger than what is tried beforehand, does not fit: at step 6."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = FileSystemWriterAsync.finish

    def finish(self: Any, *args: Any) -> None:
        if self.path.name == "iter_0000006":
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path / ".metadata"))
        original(self, *args)

    FileSystemWriterAsync.finish = finish


def unwritable_tracker() -> None:
    """What rank 0 writes at the very end of a save fails from step 6 on."""
    from megatron.training import checkpointing

    original = checkpointing.get_checkpoint_tracker_filename

    def get_checkpoint_tracker_filename(folder: str) -> str:
        return os.path.join(folder, "absent", "tracker") if os.path.isdir(os.path.join(folder, "iter_0000006")) else original(folder)

    checkpointing.get_checkpoint_tracker_filename = get_checkpoint_tracker_filename


def late_to_clear_away() -> None:
    """Where a save failed, the first rank comes half a second after the others to what follows from that."""
    from megatron_patch.checkpoint.saving import Saving

    failed = Saving._failed

    def comes_late(*args: Any) -> None:
        time.sleep(0.5 * (os.environ["RANK"] == "0"))
        failed(*args)

    Saving._failed = comes_late  # type: ignore[method-assign]


def slow_writing() -> None:
    """Asynchronous saves are written half a second after they were begun: several steps later."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from tests.distributed.altered import write_later  # this very file, by a name that the process that writes knows

    FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(write_later)


def write_later(*args: Any) -> Any:
    """In the process that writes, where nothing is altered."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    time.sleep(0.5)
    return FileSystemWriterAsync.write_preloaded_data_multithread(*args)


def killed_while_saving() -> None:
    """The process dies, and its helpers with it, between the tensors of step 6 and their index."""
    import psutil
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = FileSystemWriterAsync.finish

    def finish(self: Any, *args: Any) -> None:
        if self.path.name == "iter_0000006":
            for helper in psutil.Process().children():
                helper.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *args)

    FileSystemWriterAsync.finish = finish


def recorded_reads() -> None:
    """Append a line for every slice of a Hugging Face tensor that a rank reads to ``$BATCH_LOG.<rank>``."""
    from megatron_patch.checkpoint.hf_files import SliceReader

    original = SliceReader.__call__
    path = f"{os.environ['BATCH_LOG']}.{os.environ['RANK']}"

    def noted(self: SliceReader, piece: Any) -> torch.Tensor:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(f"{piece.hf_name}\n")
        return original(self, piece)

    SliceReader.__call__ = noted


def recorded_hashing() -> None:
    """Append the name of every file whose SHA-256 a rank computes for a checkpoint to ``$BATCH_LOG.<rank>``."""
    from megatron_patch.checkpoint import saved

    original = saved.sha256_file
    path = f"{os.environ['BATCH_LOG']}.{os.environ['RANK']}"

    def sha256_file(file: Any) -> str:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(f"{file.parent.name}/{file.name}") + "\n")
        return original(file)

    saved.sha256_file = sha256_file


_ALL = (
    unsaved, recorded, recorded_stores, shifted_mask, nan_response, exported_gradients, wrong_export, too_large, two_samples,
    unwritable_index,
    unwritable_tracker, slow_writing, late_to_clear_away, killed_while_saving, recorded_reads, recorded_hashing,
)  # fmt: skip
ALTERATIONS = {alteration.__name__: alteration for alteration in _ALL}

if __name__ == "__mp_main__":  # imported again by the process that writes asynchronous saves, as the entry is
    from megatron_patch import cpu_backend

    cpu_backend.install_in_helper()
if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        ALTERATIONS[name]()
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
