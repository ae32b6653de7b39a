"""Writes Megatron's IndexedDataset (.bin, .idx) without megatron.

Upstream's builder takes seconds to import and keeps Python lists of everything, some 300 bytes a pair by the end. The layout, as
`megatron/core/datasets/indexed_dataset.py` of megatron-core 0.19 reads it, all little-endian:

    .bin   the tokens, int32, sequence after sequence
    .idx   9 bytes "MMIDIDX" and two zeros; uint64 1 (version); uint8 4 (int32); uint64 S sequences; uint64 D + 1;
           int32 [S] tokens of each sequence; int64 [S] its place in .bin in bytes; int64 [D + 1] first sequence of each document, then S
"""

import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_HEADER = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 4)
_ITEM = 4  # bytes of an int32


class IndexedFile:
    """A .bin that grows, and its .idx at the end. Keeps 8 bytes a document and 4 a sequence."""

    def __init__(self, path: Path) -> None:
        """`path`: of the .bin."""
        self._stream = open(path, "wb")
        self._lengths, self._documents = array("i"), array("q", [0])
        self.tokens = 0

    def add(self, tokens: np.ndarray, lengths: Sequence[int]) -> None:
        """Append a document: int32 tokens of all its sequences, end to end, and the tokens of each."""
        self._stream.write(tokens.astype("<i4", copy=False).tobytes())
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))
        self.tokens += len(tokens)

    def close(self) -> None:
        """Close the .bin."""
        self._stream.close()

    def finish(self, index: Path) -> None:
        """Close the .bin and write the .idx."""
        self.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        starts = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=starts[1:])
        starts *= _ITEM
        with open(index, "wb") as stream:
            stream.write(_HEADER + struct.pack("<QQ", len(lengths), len(self._documents)))
            for values in (lengths.astype("<i4", copy=False), starts, np.frombuffer(self._documents, dtype=np.int64)):
                stream.write(values.data)
