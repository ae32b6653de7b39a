"""Files that appear whole or not at all: written under a temporary name in the same folder, flushed, then renamed; and whole lines.

The same folder, because a rename is atomic only within one file system. The temporary name is one process's alone, also among the nodes
that share a file system, where process ids repeat: two writers of one file do not spoil each other's bytes, the last rename wins.
"""

import glob
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_START = secrets.token_hex(4)
"""Tells apart processes of one number on one host: in containers, and after a reboot."""


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


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, or leave it as it was. OSError if the disk did not take it."""
    with open(path, "ab", buffering=0) as stream:
        end, left = stream.tell(), (line + "\n").encode()
        try:
            while left:
                left = left[stream.write(left) :]
        except OSError:
            stream.truncate(end)
            raise


def temporary_path(final: Path) -> Path:
    """The hidden name under which this process writes `final`."""
    return final.with_name(f".{final.name}.tmp-{_START}-{os.getpid()}-{socket.gethostname()}")


def remove_stale(final: Path) -> None:
    """Remove what killed writers of `final` left. For the owner of `final` only, the one who writes it from now on: another host's writer
    cannot be asked whether it lives (a job that goes on elsewhere when its node has died is the owner). One that lives here is spared.
    """
    for path in final.parent.glob(f".{glob.escape(final.name)}.tmp-*"):
        _, process, host = [*path.name.rpartition(".tmp-")[2].split("-", 2), "", ""][:3]
        if host != socket.gethostname() or process == str(os.getpid()) or not _lives(process):
            path.unlink(missing_ok=True)


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return True
    return True


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
