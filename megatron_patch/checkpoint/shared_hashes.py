"""SHA-256 of a checkpoint's files, by all ranks together: a terabyte of them is too much for one node while the others wait.

A file is read by the rank that wrote it, as its name says, or by another one where there are fewer ranks now. So after a save each node
reads what it still has in memory, and at the start of a job each reads what it is about to load.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_patch.checkpoint.saved import HashFiles, hash_files
from megatron_patch.errors import AgreedError

_WRITER = re.compile(r"__(\d+)_\d+\.distcp$")  # filesystem_async.py:495


def written_by(files: Sequence[Path], rank: int, ranks: int) -> list[Path]:
    """Those of ``files`` that are this rank's to read; what names no rank is rank 0's."""
    return [file for file in files if int(match[1] if (match := _WRITER.search(file.name)) else 0) % ranks == rank]


def led_by_rank_zero[T](work: Callable[[HashFiles], T]) -> T:
    """What ``work`` returns on rank 0, for every rank; what it hashes, all ranks hash. Collective.

    Raises:
        AgreedError: ``work`` raised ValueError or OSError, on all ranks.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if rank:
        while (files := _told(None)) is not None:
            _gather(_attempt(written_by(files, rank, ranks)))
        answer, complaint = _told(None)
    else:
        answer, complaint = None, None
        try:
            answer = work(_by_all)
        except (ValueError, OSError) as error:
            complaint = str(error)
        _told(None)
        _told((answer, complaint))
    if complaint is not None:
        raise AgreedError(complaint)
    return answer


def _by_all(files: Sequence[Path]) -> dict[str, str]:
    """``hash_files`` on rank 0, which all ranks take part in."""
    _told(list(files))
    found: dict[str, str] = {}
    complaints = []
    for hashes, complaint in _gather(_attempt(written_by(files, 0, torch.distributed.get_world_size()))):
        found |= hashes
        complaints += [complaint] if complaint else []
    if complaints:
        raise OSError(complaints[0])
    # A node may not see yet what another has written: only what rank 0 misses too is missing.
    return found | hash_files([file for file in files if file.name not in found])


def gather_own(checkpoint: Path) -> dict[str, str]:
    """On rank 0, the hashes of all files that ranks have just written; elsewhere nothing. Collective.

    What cannot be read is left out.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = [file for file in checkpoint.glob("*__*_*.distcp") if file in written_by([file], rank, ranks)]
    return {name: hash_ for hashes, _ in _gather(_attempt(own)) for name, hash_ in hashes.items()}


def _attempt(files: Sequence[Path]) -> tuple[dict[str, str], str | None]:
    try:
        return hash_files(files), None
    except OSError as error:
        return {}, str(error)


def _told(what: Any) -> Any:
    """What rank 0 says."""
    said = [what]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


def _gather(own: tuple[dict[str, str], str | None]) -> list[tuple[dict[str, str], str | None]]:
    """Every rank's on rank 0, nothing elsewhere."""
    ranks = torch.distributed.get_world_size()
    everywhere: list[Any] | None = [None] * ranks if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(own, everywhere, dst=0)
    return everywhere or []
