"""Files that appear whole or not at all: written under a temporary name in the same folder, flushed, then renamed.

The same folder, because a rename is atomic only within one file system. The temporary name carries the process id: two writers of one
file do not spoil each other's bytes, the last rename wins.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(final: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `final`; on success it is flushed to disk and renamed to `final`, else removed.

    Close the file before the block ends.
    """
    temporary = temporary_path(Path(final))
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, final)
        flush(Path(final).parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(final: Path) -> Path:
    """The hidden name under which this process writes `final`."""
    return final.with_name(f".{final.name}.tmp-{os.getpid()}")


def remove_stale(final: Path) -> None:
    """Remove what killed writers of `final` left; nobody may be writing it now."""
    for path in final.parent.glob(f".{glob.escape(final.name)}.tmp-*"):
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """fsync a file or a folder (a folder's fsync is what makes a rename in it durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object, atomically; NaN and infinity are refused."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read one JSON object; ValueError naming the file and `what` it should have been."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: {what} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {what} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {what} is not a JSON object")
    return value
