"""The checkpoints a run leaves: which one is whole, which are damaged, and which may go.

Upstream writes a checkpoint's files, then ``integrity.json`` (SHA-256 of each), then the step's number into the tracker. So a folder whose
files match its manifest is whole whatever the tracker says, and a folder without a manifest is a save that did not finish. Upstream looks
at neither before it loads: an empty tracker ends it with exit code 0 and nothing trained (checkpointing.py:366), a damaged newest
checkpoint ends it although older ones are good. Nothing here knows Megatron.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.foreign_code import foreign_code
from megatron_patch.data.atomic_files import atomic_path, read_json, sha256_file

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "integrity.json"
BEST = "best.json"
_THREADS = min(16, os.cpu_count() or 1)
HashFiles = Callable[[Sequence[Path]], dict[str, str]]


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; upstream's name for it."""
    return folder / f"iter_{step:07d}"


def steps(folder: Path) -> list[int]:
    """Steps with a checkpoint, whole or not, the newest first."""
    matches = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in folder.glob("iter_*") if path.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def tracked_step(folder: Path) -> int | None:
    """What the tracker names; None without a tracker or when it holds no number."""
    try:
        return int((folder / TRACKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_tracker(folder: Path, step: int) -> None:
    """Name a step, atomically."""
    with atomic_path(folder / TRACKER) as temporary:
        temporary.write_text(str(step), encoding="utf-8")


def best(folder: Path) -> dict[str, Any]:
    """Step, metric and value of the best evaluation whose checkpoint was whole; empty before there is one."""
    try:
        return read_json(folder / BEST, "the best evaluation of a run")
    except ValueError:
        return {}


def hash_files(files: Sequence[Path]) -> dict[str, str]:
    """Name -> SHA-256 of the files that are there; as many at a time as there are processors.

    Raises:
        OSError: one that is there cannot be read. Nothing follows from that about what it holds.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return {file.name: found for file, found in zip(files, pool.map(_hash_of, files), strict=True) if found is not None}


def _hash_of(file: Path) -> str | None:
    try:
        return sha256_file(file)
    except FileNotFoundError:
        return None


def write_manifest(checkpoint: Path, known: Mapping[str, str] | None = None) -> None:
    """SHA-256 of every file, in upstream's format; what is ``known`` is not read again."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != MANIFEST)
    hashes = hash_files([path for path in files if path.name not in (known or {})]) | dict(known or {})
    listed = {path.name: hashes[path.name] for path in files}
    with atomic_path(checkpoint / MANIFEST) as temporary:
        temporary.write_text(json.dumps({"algorithm": hashlib.sha256().name, "files": listed}, indent=1), encoding="utf-8")


def damage(checkpoint: Path, hashes: HashFiles = hash_files) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when its files are those that were saved."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not (checkpoint / MANIFEST).exists():
        return f"it has no {MANIFEST}: the save did not finish, or it is none of ours"
    try:
        recorded: dict[str, str] = read_json(checkpoint / MANIFEST, "the list of a checkpoint's files")["files"]
    except (ValueError, KeyError):
        recorded = {}
    if not isinstance(recorded, dict) or ".metadata" not in recorded:
        return f"{MANIFEST} is damaged"
    found = hashes([checkpoint / name for name in recorded])
    wrong = [f"{name} is {'damaged' if name in found else 'missing'}" for name in recorded if found.get(name) != recorded[name]]
    if not wrong:
        return foreign_code(checkpoint)
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def check_loadable(folder: Path, step: int | None = None, hashes: HashFiles = hash_files) -> None:
    """For a folder that belongs to another run: ValueError unless the checkpoint that will be loaded is whole."""
    tracked = tracked_step(folder)
    if tracked is None:
        if steps(folder) or (folder / TRACKER).exists():
            raise ValueError(f"{folder / TRACKER} names no checkpoint; write the number of one into it ({_listed(steps(folder))})")
        raise ValueError(f"--load {folder}: no checkpoint is there")
    chosen = step or tracked
    complaint = damage(folder_of(folder, chosen), hashes)
    if complaint:
        raise ValueError(
            f"{folder_of(folder, chosen)} cannot be loaded: {complaint}; say --ckpt-step with another ({_listed(steps(folder))})"
        )


def _listed(found: Collection[int]) -> str:
    return f"there {'is' if len(found) == 1 else 'are'} {', '.join(map(str, found)) or 'none'}"


def recover(folder: Path, hashes: HashFiles = hash_files) -> list[str]:
    """For a run's own folder: afterwards its tracker names the newest whole checkpoint, and nothing damaged has a checkpoint's name.

    What the tracker names is taken if it is whole, so that a user may go back by editing it. Otherwise the newest whole one before it is
    (the newest of all where there is none before it or the tracker names nothing), and the tracker rewritten; damaged ones, renamed to
    ``<name>.damaged``, stay for whoever wants to look at them. A newer folder than the one taken, whole or not, is left for the run to
    write over.

    Returns:
        One line for each thing that was not as it should be.

    Raises:
        ValueError: the tracker says that there are checkpoints, and none is whole.
        OSError: one cannot be read, which does not make it damaged; nothing was changed.
    """
    found, named = steps(folder), tracked_step(folder)
    if not found and not (folder / TRACKER).exists():
        return []
    lines = [] if named is not None else [f"{folder / TRACKER} names no checkpoint"]
    damaged: list[Path] = []
    order = found if named is None else sorted({named, *found}, key=lambda step: (step != named, step > named, -step))
    for step in order:
        complaint = damage(folder_of(folder, step), hashes)
        if complaint is None:
            break
        lines.append(f"{folder_of(folder, step)} cannot be used: {complaint}")
        damaged += [folder_of(folder, step)] if step in found else []
    else:
        if not (folder / TRACKER).exists():
            return [f"{folder}: the first save did not finish, so this run starts from its beginning"]
        raise ValueError("; ".join(lines) + f"; no checkpoint in {folder} is whole: move it away to start anew")
    for path in damaged:
        path.rename(_free_name(path))
    if step != named:
        write_tracker(folder, step)
        lines.append(f"going on from {folder_of(folder, step)}; what is damaged was renamed to *.damaged")
    return lines


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{suffix}") for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(name for name in names if not name.exists())


def keep_newest(folder: Path, count: int, spare: Collection[int | None] = ()) -> None:
    """Remove all but ``count`` checkpoints up to the tracked one; those in ``spare`` stay besides.

    Raises:
        OSError: some could not be removed; all others were.
    """
    tracked = tracked_step(folder)
    saved = [step for step in steps(folder) if tracked is not None and step <= tracked]
    failures: list[OSError] = []
    for doomed in (folder_of(folder, step) for step in set(saved[count:]) - set(spare)):
        try:
            (doomed / MANIFEST).unlink(missing_ok=True)  # first: a removal that is cut short leaves no whole checkpoint
            shutil.rmtree(doomed)
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]
