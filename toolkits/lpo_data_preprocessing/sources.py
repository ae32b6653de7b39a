"""Where the first stage reads: files, folders and globs of JSON Lines, JSON arrays and parquet, plain or compressed.

Everything but a JSON array is read in pieces, so memory does not grow with the file. An item comes with its place, the way the user would
look for it, and is not judged yet: one bad line is then one bad line, and the stage decides whether it ends there. What is wrong with a
file as a whole (cut, not what its name says) is an error at once.

    .jsonl           one object a line, UTF-8            file:line, from 1
    .json            one array of objects                file[index], from 0
    .parquet         one object a row                    file:row N, from 1
    .gz, .zst        of .jsonl or .json                  as without
"""

import glob
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from toolkits.lpo_data_preprocessing.records import Record, parse_json, parse_record, read_lines

MAX_ARRAY_BYTES = 2**30
"""A JSON array is read whole, and takes some times this in memory."""
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KNOWN = ".jsonl, .json (each also with .gz or .zst) and .parquet"
_BATCH_ROWS = 256
_BUFFER_BYTES = 2**20


def find_inputs(words: Sequence[str]) -> list[Path]:
    """The files that the words of --input name, each once, in the words' order.

    A word is a file, a folder (all files of a known kind below it, sorted, without hidden ones) or a glob (sorted; ** crosses folders).
    ValueError for a word that names nothing.
    """
    return list(dict.fromkeys(path for word in words for path in _named(word)))


def _named(word: str) -> Iterable[Path]:
    path = Path(word)
    if path.is_file():
        if _kind(path) is None:
            raise ValueError(f"{path}: files of this kind are not known (known: {_KNOWN})")
        return [path]
    if path.is_dir():
        return _not_empty(_below(path), f"{path}: no file of a known kind in this folder (known: {_KNOWN})")
    if not glob.has_magic(word):
        raise ValueError(f"{path}: no such file or folder")
    matches = (Path(match) for match in sorted(glob.glob(word, recursive=True)))
    files = [file for match in matches for file in (_below(match) if match.is_dir() else [match] if _kind(match) else [])]
    return _not_empty(files, f"{word}: matches no file of a known kind (known: {_KNOWN})")


def _below(folder: Path) -> list[Path]:
    below = sorted(path for path in folder.rglob("*") if path.is_file() and _kind(path))
    return [path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _not_empty(files: list[Path], message: str) -> list[Path]:
    if not files:
        raise ValueError(message)
    return files


def _kind(path: Path) -> str | None:
    """".jsonl", ".json" or ".parquet" by the name, or None."""
    kind = path.with_suffix("").suffix if path.suffix in _COMPRESSIONS else path.suffix
    return kind if kind in (".jsonl", ".json") or (kind == ".parquet" and path.suffix == kind) else None


def read_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, item) of a file: a line's bytes, an array's element or a row, for `as_record` to judge.

    ValueError naming the file, and as far as possible the place, for a file that cannot be read on.
    """
    readers = {".jsonl": _lines, ".json": _elements, ".parquet": _rows}
    kind = _kind(path)
    assert kind is not None
    return readers[kind](path)


def as_record(item: Any, where: str) -> Record:
    """An item of `read_items` as a record; ValueError naming `where` if it is none, or holds what JSON cannot (dates, bytes, NaN)."""
    if isinstance(item, bytes):
        return parse_record(item, where)
    if not isinstance(item, dict):
        raise ValueError(f"{where}: a record must be a JSON object, got {type(item).__name__}")
    try:
        json.dumps(item, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: not valid text (half of a surrogate pair, \\ud800 to \\udfff)") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: has no JSON form ({error})") from None
    return item


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed while they are read."""
    compression = _COMPRESSIONS.get(path.suffix)
    if compression is None:
        with open(path, "rb") as plain:
            yield plain
    else:
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            yield io.BufferedReader(stream, _BUFFER_BYTES)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    number = 0
    try:
        with _opened(path) as stream:
            for number, line in read_lines(stream, path):
                yield f"{path}:{number}", line
    except OSError as error:
        raise ValueError(f"{path}: not readable after line {number} ({error})") from None


def _elements(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with _opened(path) as stream:
            data = stream.read(MAX_ARRAY_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error})") from None
    if len(data) > MAX_ARRAY_BYTES:
        raise ValueError(f"{path}: a JSON array is read whole, and this one is over {MAX_ARRAY_BYTES} bytes: make it JSON Lines (.jsonl)")
    if not data.strip():
        return
    try:
        array = parse_json(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        hint = "; one object a line belongs into a .jsonl file" if _is_record(data.splitlines()[0]) else ""
        raise ValueError(f"{path}: not a valid JSON array ({error}){hint}") from None
    if not isinstance(array, list):
        raise ValueError(f"{path}: must be an array of objects, got {type(array).__name__} (one object a line belongs into a .jsonl file)")
    for index, element in enumerate(array):
        yield f"{path}[{index}]", element


def _is_record(line: bytes) -> bool:
    try:
        return bool(parse_record(line, ""))
    except ValueError:
        return False


def _rows(path: Path) -> Iterator[tuple[str, Record]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            for row in _row_groups(file):
                number += 1
                yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as parquet after row {number} ({error})") from None


def _row_groups(file: pyarrow.parquet.ParquetFile) -> Iterator[Record]:
    """All rows, a row group at a time: asked for all of them at once, pyarrow keeps what it has read of every one to the end."""
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group]):
            yield from batch.to_pylist()
