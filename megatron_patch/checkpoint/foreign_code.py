"""No checkpoint runs code, whichever flag names it and whatever its files are called.

A torch_dist checkpoint's index is a pickle that torch loads as it is, ``.metadata`` or else ``__<rank>.metadata``
(torch/distributed/checkpoint/filesystem.py:930), and its objects are loaded with ``weights_only=False`` (default_planner.py:387). From
``forbid`` on, torch's reader knows the classes of an index alone, and every ``torch.load`` of the process is weights-only, with
megatron-core's list of safe classes.
"""

import os
import pickle  # to refuse with: nothing is unpickled that is not on the list
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_CHECKPOINT = "torch.distributed.checkpoint."
_KNOWN = {
    _CHECKPOINT + "metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    _CHECKPOINT + "planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    _CHECKPOINT + "filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _Known(pickle.Unpickler):
    """Makes what torch's writer makes, and refuses to look up any other name."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is on the list."""
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint has")
        return super().find_class(module, name)


def foreign_code(checkpoint: Path) -> str | None:
    """What in a checkpoint asks for more than an index has, in a few words; None when nothing does. OSError if it cannot be read."""
    for path in sorted(checkpoint.glob("*.metadata")):
        try:
            with path.open("rb") as file:
                _load(file)
        except OSError:
            raise  # which says nothing about what is in it
        except Exception as error:  # whatever a damaged pickle brings about
            return f"{path.name} cannot be read: {error}"
    return None


def _load(file: BinaryIO) -> Any:
    return _Known(file).load()


def forbid() -> None:
    """From now on no load of this process runs code."""
    os.environ[FORCE] = "1"
    filesystem.pickle = SimpleNamespace(load=_load, dump=pickle.dump)  # type: ignore[assignment]
