"""What a store keeps of each document beside its tokens, read where it lies: opening the columns of a million pairs costs no more than ten.

The file is an .npz as numpy writes it, uncompressed, so every array in it can be mapped into memory; numpy's own `mmap_mode` does not reach
into an .npz. Strings are UTF-8 bytes end to end with the offsets where they end, so that one long id does not widen all the others; a
string is decoded when it is asked for.
"""

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

_LOCAL_HEADER = 30
"""Bytes of a ZIP entry's local header before its name; the lengths of name and extra field are its last four (APPNOTE.TXT, 4.3.7)."""
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
    """Unique within the store: the writer sees to it."""
    group: Sequence[str]
    """Samples of one prompt share it; "" where the maker gave none."""
    scores: np.ndarray
    """float64 [N, 2]: chosen, rejected; NaN where unscored."""
    source_line: np.ndarray
    """int64 [N]: 1-based line of the input file, -1 where unknown."""

    def save(self, path: Path) -> None:
        """Write the columns as an uncompressed .npz."""
        with open(path, "wb") as stream:
            np.savez(stream, **_pack("id", self.id), **_pack("group", self.group), scores=self.scores, source_line=self.source_line)

    @classmethod
    def load(cls, path: Path) -> "Columns":
        """What `save` wrote, mapped into memory; the arrays are read-only."""
        arrays = _map_npz(path)
        ids, groups = (Strings(arrays[f"{name}_utf8"], arrays[f"{name}_ends"]) for name in ("id", "group"))
        return cls(ids, groups, arrays["scores"], arrays["source_line"])


def _pack(name: str, strings: Sequence[str]) -> dict[str, Any]:
    encoded = [string.encode("utf-8") for string in strings]
    ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
    return {f"{name}_utf8": np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{name}_ends": ends}


def _map_npz(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of an uncompressed .npz, mapped read-only."""
    with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
        return {entry.filename.removesuffix(".npy"): _map_entry(path, stream, entry) for entry in archive.infolist()}


def _map_entry(path: Path, stream: io.BufferedReader, entry: zipfile.ZipInfo) -> np.ndarray:
    assert entry.compress_type == zipfile.ZIP_STORED, f"{path}: {entry.filename} is compressed"
    stream.seek(entry.header_offset + _LOCAL_HEADER - 4)
    lengths = np.frombuffer(stream.read(4), dtype="<u2")
    stream.seek(int(lengths.sum()), io.SEEK_CUR)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    if 0 in shape:
        return np.empty(shape, dtype)  # nothing to map
    mapped = np.memmap(path, dtype, mode="r", offset=stream.tell(), shape=shape, order="F" if fortran else "C")
    return np.asarray(mapped)  # the same memory; slicing a memmap takes several times as long
