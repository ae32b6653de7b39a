"""Hugging Face checkpoint folders as files: what they hold, slices of it, their fingerprint, and writing them.

A folder is written under a hidden name beside its target and renamed at the end, so that a reader finds all of it or nothing.

Headers are read here rather than through the safetensors library, because names, shapes and byte ranges of a whole model are then known
from a few kilobytes a file, which is all that the checks and the fingerprint need. The slices themselves go through the library.
Nothing here knows Megatron, so that data tools can fingerprint a checkpoint without it.

The format, as safetensors documents it: header length (8 bytes, little-endian), JSON header, then the tensors' bytes.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_patch.checkpoint.hf_mapping import EMBEDDING, OUTPUT, ModelShape, Piece, hf_tensors, is_hf_name_ignored

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
MARKER = "export.json"  # says that a folder was written by this project, so it may be replaced
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_SAMPLE_BYTES = 64 * 1024  # of each end and the middle of a tensor, for the fingerprint


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes [begin, end) of a safetensors file."""

    file: Path
    dtype: str  # safetensors' name: F32, BF16...
    shape: tuple[int, ...]
    begin: int
    end: int


def read_checkpoint(hf_path: str | Path) -> tuple[ModelShape, dict[str, StoredTensor]]:
    """Sizes and stored tensors of a Hugging Face checkpoint, from headers only, checked against each other.

    Raises:
        ValueError: no such folder, a damaged or truncated file, or tensors that are missing, unexpected or of another shape.
    """
    folder = Path(hf_path)
    shape = ModelShape.from_hf(read_config(folder), folder / "config.json")
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors = {name: tensor for name, tensor in _read_header(file).items() if not is_hf_name_ignored(name)}
        for name in tensors.keys() & stored.keys():
            raise ValueError(f"{name} is stored twice: in {stored[name].file} and in {file}")
        stored.update(tensors)
    expected = hf_tensors(shape)
    allowed = {**expected, OUTPUT: expected[EMBEDDING]}  # a tied checkpoint may repeat the embedding
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unexpected": [name for name in stored if name not in allowed],
        "of another shape": [f"{n} {t.shape} instead of {allowed[n]}" for n, t in stored.items() if n in allowed and t.shape != allowed[n]],
    }
    if any(problems.values()):
        raise ValueError(f"{folder}: " + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names))
    return shape, stored


def weights_fingerprint(hf_path: str | Path) -> str:
    """sha256 over name, dtype, shape and the first, middle and last 64 KiB of every tensor, in the mapping's order.

    It does not depend on how the tensors are spread over files, nor on a tied checkpoint repeating its embedding.
    Raises ValueError as `read_checkpoint` does.
    """
    shape, stored = read_checkpoint(hf_path)
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for name in hf_tensors(shape):
            tensor = stored[name]
            if tensor.file not in files:
                files[tensor.file] = stack.enter_context(tensor.file.open("rb"))
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            for begin, end in _samples(tensor.begin, tensor.end):
                files[tensor.file].seek(begin)
                digest.update(files[tensor.file].read(end - begin))
    return digest.hexdigest()


def _samples(begin: int, end: int) -> list[tuple[int, int]]:
    if end - begin <= 3 * _SAMPLE_BYTES:
        return [(begin, end)]
    middle = (begin + end - _SAMPLE_BYTES) // 2
    return [(start, start + _SAMPLE_BYTES) for start in (begin, middle, end - _SAMPLE_BYTES)]


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises ValueError when there is none or it is not JSON."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} is not a Hugging Face checkpoint: it has no config.json")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None


def weight_files(folder: Path) -> list[Path]:
    """The single file, else those of the index, else every safetensors file (transformers' order of preference)."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        files = [folder / name for name in sorted(set(_read_json(folder / INDEX_FILE)["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [file.name for file in files if not file.exists()]
    if absent or not files:
        raise ValueError(f"{folder}: safetensors files missing: {', '.join(absent) or SINGLE_FILE}")
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """A safetensors file is: header length (8 bytes, little-endian), JSON header, tensors (format documented by safetensors)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= size - 8 else b""
    try:
        header = json.loads(text)
        tensors = {
            name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is not a safetensors file") from None
    wanted = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if wanted != size:
        raise ValueError(f"{file} has {size} bytes instead of {wanted}: it is truncated or damaged")
    return tensors


class SliceReader:
    """Reads pieces of stored tensors; each file is mapped once."""

    def __init__(self, stored: dict[str, StoredTensor]) -> None:
        self._stored = stored
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> "SliceReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def __call__(self, piece: Piece) -> Tensor:
        file = self._stored[piece.hf_name].file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        tensor = self._open[file].get_slice(piece.hf_name)
        stop = piece.start + piece.length
        return tensor[piece.start : stop] if piece.dim == 0 else tensor[:, piece.start : stop]


def write_safetensors(file: Path, layout: dict[str, tuple[int, ...]], tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Write one file: header first, from the known shapes, then one tensor after another as they arrive, so that none waits in memory.

    Args:
        layout: name -> shape of the file's tensors, in the order in which `tensors` yields them; more may follow for the next file.
        tensors: whole tensors on any device, cast to dtype as they are written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in layout.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with flushed(file) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in layout.items():
            arrived, tensor = next(tensors)
            assert (arrived, tuple(tensor.shape)) == (name, shape), (arrived, name)
            stream.write(tensor.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write indented JSON and wait until it is on disk."""
    with flushed(file) as stream:
        stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def flushed(file: Path) -> Iterator[BinaryIO]:
    """A new file to write; when the block ends without an exception its bytes are on disk."""
    with file.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on disk: needed around a rename that must survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the generation config and tokenizer files, those that there are."""
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def refuse_foreign_folder(out: Path) -> None:
    """Raise ValueError if ``out`` holds anything but an earlier export, known by its ``export.json``."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).exists())):
        raise ValueError(f"{out} exists, is not empty and is no earlier export (no {MARKER} in it): it is not overwritten")


def temporary_folder(out: Path) -> Path:
    """Where the files of ``out`` are written before it exists."""
    return out.with_name(f".{out.name}.partial")


def make_temporary_folder(out: Path) -> None:
    """Make ``temporary_folder(out)``, empty."""
    temporary = temporary_folder(out)
    if temporary.exists():
        shutil.rmtree(temporary)  # left behind by an export that was killed
    temporary.mkdir(parents=True)


def rejected_folder(out: Path) -> Path:
    """Where an export goes that was found to be wrong."""
    return out.with_name(f"{out.name}.rejected")


def set_aside(out: Path) -> None:
    """Give what was written the name of what is wrong, in place of an earlier one of that name."""
    if rejected_folder(out).exists():
        shutil.rmtree(rejected_folder(out))
    temporary_folder(out).rename(rejected_folder(out))


def publish(out: Path) -> None:
    """The one rename that makes ``out`` exist; an earlier one is moved aside before it and removed after it."""
    temporary = temporary_folder(out)
    sync_folder(temporary)
    earlier = out.with_name(f".{out.name}.replaced")
    if earlier.exists():
        shutil.rmtree(earlier)
    if out.exists():
        out.rename(earlier)
    temporary.rename(out)
    sync_folder(out.parent)
    if earlier.exists():
        shutil.rmtree(earlier)
