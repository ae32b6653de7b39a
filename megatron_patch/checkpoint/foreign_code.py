"""No checkpoint runs code: what upstream would unpickle is looked at first, and everything else is read weights-only.

A torch_dist checkpoint's ``.metadata`` is a pickle that torch loads as it is (torch/distributed/checkpoint/filesystem.py:930), and its
objects are loaded with ``weights_only=False`` (default_planner.py:387). The names a pickle asks for are read here without running it; for
the objects ``FORCE`` makes every ``torch.load`` of the process weights-only, with megatron-core's list of safe classes.
"""

import os
import pickle  # to refuse with: nothing is unpickled that is not on the list
from pathlib import Path
from typing import Any

import torch

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
    """What in a checkpoint would run code when it is loaded, in a few words; None when nothing would. OSError if it cannot be read."""
    path = checkpoint / ".metadata"
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            _Known(file).load()
    except OSError:
        raise  # which says nothing about what is in it
    except Exception as error:  # whatever a damaged pickle brings about
        return f".metadata cannot be read: {error}"
    return None


def forbid() -> None:
    """From now on every ``torch.load`` of this process is weights-only."""
    os.environ[FORCE] = "1"
