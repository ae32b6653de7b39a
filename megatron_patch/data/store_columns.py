"""What a store holds beside the tokens: per document its id, group, scores and line, few bytes on disk and in memory.

On disk an .npz with deflated members: most columns are nearly constant once differences are taken, an id takes what its random part takes.
A group is the number of the first document of the same prompt, not the prompt's hash: eight random bytes a pair would be the largest.
While a store is written the columns are plain arrays, and ids and groups are recognised by 64 bits of their hash: two of ten million
different ids share them with a probability of 3e-6. Read again, an id is decoded when it is asked for: of a million, a batch needs few.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

_BLOCK = 65536  # strings read at a time when all are asked for


class Strings(Sequence[str]):
    """Strings that stay UTF-8 bytes; equal to any sequence of the same strings."""

    def __init__(self, utf8: np.ndarray, ends: np.ndarray) -> None:
        """`utf8`: uint8, all of them end to end; `ends`: int64 [strings], where each ends."""
        self._utf8, self._ends = utf8, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        position = range(len(self))[i]  # IndexError beyond the ends, and negative numbers count from the last
        start = int(self._ends[position - 1]) if position else 0
        return self._utf8[start : int(self._ends[position])].tobytes().decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), _BLOCK):
            ends = self._ends[first : first + _BLOCK].tolist()
            begin, data = start, self._utf8[start : ends[-1]].tobytes()
            for end in ends:
                yield data[start - begin : end - begin].decode("utf-8")
                start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self[:10])[:-1] + (", ...]" if len(self) > 10 else "]")


@dataclass(frozen=True)
class Columns:
    """Per-document columns, in the order of the documents (N of them)."""

    id: Sequence[str]
    """Unique within the store."""
    group: np.ndarray
    """int64 [N]: number of the first document of the same prompt (its own, if there is none before), -1 where the maker gave no group."""
    scores: np.ndarray
    """float64 [N, 2]: chosen, rejected; NaN where unscored."""
    source_line: np.ndarray
    """int64 [N]: 1-based line of the input file, -1 where unknown."""

    @classmethod
    def load(cls, path: Path) -> "Columns":
        """Read what `ColumnBuilder.save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            ids = Strings(arrays["id_utf8"], np.cumsum(arrays["id_bytes"], dtype=np.int64))
            back = arrays["group_back"]
            group = np.where(back < 0, -1, np.arange(len(back)) - back)
            return cls(ids, group, arrays["scores"], np.cumsum(arrays["source_line_steps"], dtype=np.int64))


class ColumnBuilder:
    """Columns that grow: in memory some 40 bytes a document for the columns and as much to recognise ids and groups."""

    def __init__(self) -> None:
        self._ids, self._id_bytes = bytearray(), array("i")
        self._groups, self._scores, self._source_lines = array("q"), array("d"), array("q")
        self._known, self._first = FirstSeen(), FirstSeen()

    def __len__(self) -> int:
        return len(self._id_bytes)

    def add(self, id: str, group: str, scores: tuple[float, float] | None, source_line: int) -> None:
        """Append a document's; ValueError for an id that is there already."""
        number = len(self)
        encoded = id.encode("utf-8")
        if self._known.first(encoded, number) != number:
            raise ValueError(f"id {id!r} is in the store already")
        self._ids += encoded
        self._id_bytes.append(len(encoded))
        self._groups.append(self._first.first(group.encode("utf-8"), number) if group else -1)
        self._scores.extend((float("nan"), float("nan")) if scores is None else (float(scores[0]), float(scores[1])))
        self._source_lines.append(source_line)

    def save(self, path: Path) -> None:
        """Write the columns as an .npz."""
        group, source_line = (np.frombuffer(column, dtype=np.int64) for column in (self._groups, self._source_lines))
        with open(path, "wb") as stream:
            np.savez_compressed(
                stream,
                id_utf8=np.frombuffer(self._ids, dtype=np.uint8),
                id_bytes=np.frombuffer(self._id_bytes, dtype=np.int32),
                group_back=np.where(group < 0, -1, np.arange(len(group)) - group),
                scores=np.frombuffer(self._scores, dtype=np.float64).reshape(-1, 2),
                source_line_steps=np.diff(source_line, prepend=0),
            )


class FirstSeen:
    """key -> number of its first use: a hash table of 12 bytes a slot, at most two thirds full (a dict takes ten times that)."""

    def __init__(self) -> None:
        self._used = 0
        self._resize(64)

    def _resize(self, slots: int) -> None:
        self._mask = slots - 1
        self._hashes, self._numbers = array("Q", bytes(8 * slots)), array("i", bytes(4 * slots))

    def first(self, key: bytes, number: int) -> int:
        """The number with which `key` came first; `number` if it is new, and then that is remembered."""
        found = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") or 1  # 0 marks a free slot
        slot = self._slot(found)
        if self._hashes[slot] == found:
            return self._numbers[slot]
        self._hashes[slot], self._numbers[slot] = found, number
        self._used += 1
        if self._used * 3 > len(self._hashes) * 2:
            self._grow()
        return number

    def _slot(self, found: int) -> int:
        """Where a hash is, or would be."""
        slot = found & self._mask
        while self._hashes[slot] not in (0, found):
            slot = (slot + 1) & self._mask
        return slot

    def _grow(self) -> None:
        hashes, numbers = self._hashes, self._numbers
        self._resize(2 * len(hashes))
        for found, number in zip(hashes, numbers, strict=True):
            if found:
                slot = self._slot(found)
                self._hashes[slot], self._numbers[slot] = found, number
