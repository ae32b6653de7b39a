"""A disk that is full soon: a tmpfs of a given size, for whoever may mount one."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """``folder``, made, with room for ``size`` (tmpfs counts blocks of 4 KiB)."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs to be allowed to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, size: str) -> None:
    """Give it more room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
