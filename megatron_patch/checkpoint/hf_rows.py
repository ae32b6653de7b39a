"""More vocabulary rows in a Hugging Face checkpoint, written file by file, without ever holding a whole tensor.

Only the embedding and an untied output layer change. Their old rows and every other tensor travel as bytes, so they are equal to the last
bit in whatever dtype they are stored; a file that holds neither of the two is copied. Memory stays at some blocks of `BLOCK_BYTES`, so that
a 72B checkpoint needs no more than a small one.

A new row is drawn, in float64, from what the rows of known tokens are like: per column their mean, and `noise` times their standard
deviation times a standard normal number. With the mean a new token starts with about the probability of an average one and disturbs the
old ones little (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"); the noise tells new tokens apart.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_patch.checkpoint.hf_files import DTYPES, INDEX_FILE, StoredTensor, flushed, read_checkpoint, write_json
from megatron_patch.checkpoint.hf_mapping import EMBEDDING, OUTPUT, ModelShape

BLOCK_BYTES = 16 * 2**20
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
Tell = Callable[[int], object]
"""Called with the number of bytes written since the last call."""


@dataclass(frozen=True)
class NewRows:
    """Which rows a checkpoint gets, and what they are drawn from."""

    first: int
    """Rows before it belong to tokens that the model knows: they are kept, and say what new ones are like."""
    new: int
    """Rows from `first` on that are drawn; those between them and the checkpoint's end, if any, are kept."""
    total: int
    """Rows afterwards: config.json's new vocab_size."""
    noise: float
    """Standard deviation of the noise, relative to that of the known rows, per column."""
    seed: int


def plan_rows(known: int, new: int, shape: ModelShape, *, multiple_of: int, noise: float, seed: int) -> NewRows:
    """The rows for `new` tokens after the `known` ones.

    They take the rows that the checkpoint has beyond its tokenizer's length; where these do not suffice the vocabulary grows to the next
    multiple of `multiple_of`, and rows that no token uses are drawn like the others (a model's softmax runs over them too).

    Raises:
        ValueError: the tokenizer knows more tokens than the checkpoint has rows, or a number is out of range.
    """
    if known > shape.vocab:
        raise ValueError(f"the tokenizer has ids up to {known - 1}, the checkpoint only {shape.vocab} rows (vocab_size in config.json)")
    if multiple_of < 1 or not 0 <= noise < float("inf"):
        raise ValueError(f"--multiple-of must be at least 1 and --noise at least 0, got {multiple_of} and {noise:g}")
    if known + new <= shape.vocab:
        return NewRows(known, new, shape.vocab, noise, seed)
    total = -(-(known + new) // multiple_of) * multiple_of
    return NewRows(known, total - known, total, noise, seed)


class RowWriter:
    """Writes the safetensors files of a checkpoint once more, with the new rows.

    Raises:
        ValueError: as `read_checkpoint` does, or the embedding has a dtype that cannot be computed with.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)
        self.shape, self.stored = read_checkpoint(source)
        self.files = sorted({tensor.file for tensor in self.stored.values()})
        for name in (EMBEDDING, OUTPUT):
            if name in self.stored and self.stored[name].dtype not in _TORCH_DTYPES:
                raise ValueError(f"{self.stored[name].file}: {name} has dtype {self.stored[name].dtype}; known: {', '.join(_TORCH_DTYPES)}")

    def bytes_needed(self, rows: NewRows) -> int:
        """Of the files to be written, but for their headers' growth."""
        added = (rows.total - self.shape.vocab) * sum(_row_bytes(self.stored[n]) for n in (EMBEDDING, OUTPUT) if n in self.stored)
        return sum(file.stat().st_size for file in self.files) + added

    def write(self, folder: Path, rows: NewRows, tell: Tell) -> None:
        """Write every file, and the index where there is one, into `folder`."""
        for file in self.files:
            with flushed(folder / file.name) as target, file.open("rb") as stream:
                if any(tensor.file == file for name, tensor in self.stored.items() if name in (EMBEDDING, OUTPUT)):
                    self._rewrite(stream, target, rows, tell)
                else:
                    _copy(stream, target, 0, file.stat().st_size, tell)
        if (self.source / INDEX_FILE).exists():
            self._write_index(folder, rows)

    def _rewrite(self, stream: BinaryIO, target: BinaryIO, rows: NewRows, tell: Tell) -> None:
        """One file with its tensors in their old order, under a new header."""
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
        text = json.dumps(_renewed(header, rows.total), separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        target.write(len(text).to_bytes(8, "little") + text)
        for name, entry in _in_order(header):
            if name in (EMBEDDING, OUTPUT):
                self._write_rows(name, stream, target, rows, tell)
            else:
                begin, end = (8 + length + at for at in entry["data_offsets"])
                _copy(stream, target, begin, end, tell)

    def _write_rows(self, name: str, stream: BinaryIO, target: BinaryIO, rows: NewRows, tell: Tell) -> None:
        """A tensor's known rows, the new ones, and the rest of its padding. A tied output layer that is stored gets the embedding's."""
        tensor = self.stored[name]
        known = tensor.begin + rows.first * _row_bytes(tensor)
        _copy(stream, target, tensor.begin, known, tell)
        like = EMBEDDING if self.shape.tied else name
        dtype = _TORCH_DTYPES[tensor.dtype]
        for block in drawn_rows(known_rows(self.stored[like], rows.first), rows, salt=int(like == OUTPUT)):
            tell(target.write(block.to(dtype).view(torch.uint8).numpy().data))
        _copy(stream, target, min(tensor.end, known + rows.new * _row_bytes(tensor)), tensor.end, tell)

    def _write_index(self, folder: Path, rows: NewRows) -> None:
        index = json.loads((self.source / INDEX_FILE).read_text(encoding="utf-8"))
        extended = [self.stored[name] for name in (EMBEDDING, OUTPUT) if name in self.stored and name in index["weight_map"]]
        metadata = index.setdefault("metadata", {})
        for field, each in (("total_size", _row_bytes), ("total_parameters", lambda tensor: tensor.shape[1])):
            if field in metadata:
                metadata[field] += (rows.total - self.shape.vocab) * sum(map(each, extended))
        write_json(folder / INDEX_FILE, index)


def _in_order(header: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A file's tensors as their bytes lie."""
    return sorted(((name, entry) for name, entry in header.items() if name != "__metadata__"), key=lambda item: item[1]["data_offsets"])


def _renewed(header: dict[str, Any], rows: int) -> dict[str, Any]:
    """The header of the file whose embedding and output layer have `rows` rows."""
    renewed = {name: entry for name, entry in header.items() if name == "__metadata__"}
    end = 0
    for name, entry in _in_order(header):
        size, shape = entry["data_offsets"][1] - entry["data_offsets"][0], entry["shape"]
        if name in (EMBEDDING, OUTPUT):
            size, shape = size // shape[0] * rows, [rows, *shape[1:]]
        begin, end = end, end + size
        renewed[name] = {**entry, "shape": shape, "data_offsets": [begin, end]}
    return renewed


def known_rows(tensor: StoredTensor, count: int) -> Iterator[Tensor]:
    """The first `count` rows of a stored matrix in float64, in blocks."""
    at_once = max(1, BLOCK_BYTES // (8 * tensor.shape[1]))
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        for start in range(0, count, at_once):
            raw = bytearray(stream.read(min(at_once, count - start) * _row_bytes(tensor)))
            yield torch.frombuffer(raw, dtype=_TORCH_DTYPES[tensor.dtype]).view(-1, tensor.shape[1]).double()


def drawn_rows(known: Iterator[Tensor], rows: NewRows, *, salt: int = 0) -> Iterator[Tensor]:
    """float64 blocks of the new rows; `salt` makes another tensor's noise other noise."""
    mean, spread = column_statistics(known)
    generator = torch.Generator().manual_seed(2 * rows.seed + salt)
    at_once = max(1, BLOCK_BYTES // (8 * len(mean)))
    for start in range(0, rows.new, at_once):
        normal = torch.randn(min(at_once, rows.new - start), len(mean), generator=generator, dtype=torch.float64)
        yield mean + rows.noise * spread * normal


def column_statistics(blocks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of each column over the rows of all blocks; float64 [columns]."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for block in blocks:
        count, total, squares = count + len(block), total + block.sum(0), squares + block.square().sum(0)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


def _row_bytes(tensor: StoredTensor) -> int:
    return (tensor.end - tensor.begin) // tensor.shape[0]


def _copy(stream: BinaryIO, target: BinaryIO, begin: int, end: int, tell: Tell) -> None:
    stream.seek(begin)
    for start in range(begin, end, BLOCK_BYTES):
        tell(target.write(stream.read(min(BLOCK_BYTES, end - start))))
