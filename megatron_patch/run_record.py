"""What a run was: command, settings, versions and fingerprints, kept beside its checkpoints (``run.json``) and in each of them."""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_patch.data.atomic_files import read_json, write_json
from megatron_patch.data.pair_store import PairStore, reference_files, reference_record

FILE = "run.json"
PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "numpy", "transformer-engine", "apex")
_ROOT = Path(__file__).parents[1]


def origins(args: argparse.Namespace, train: Sequence[PairStore], valid: Sequence[PairStore]) -> dict[str, Any]:
    """Where a run's numbers come from, settings apart: the same on every rank and at every start, unless something changed."""
    from megatron_patch.streams import initial_weights  # with megatron, for which nobody who reads records should wait

    return {
        "revision": _revision(),
        "versions": {"python": platform.python_version(), **_versions()},
        "weights": {"path": args.hf_path, "fingerprint": initial_weights(args.hf_path)[0]},
        "stores": [_store(store, use) for use, stores in (("training", train), ("validation", valid)) for store in stores],
    }


def of_another_run(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What of two ``origins`` says that a checkpoint is not of the run that is about to go on from it; None if nothing does."""
    if saved["weights"]["fingerprint"] != now["weights"]["fingerprint"]:
        return f"it began with other weights ({saved['weights']['path']})"
    if not same_stores(saved, now):
        return f"it was trained on other stores ({', '.join(store['prefix'] for store in _trained_on(saved))})"
    return None


def same_stores(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether both ``origins`` have the same training stores in the same order."""
    one, other = ([store["fingerprint"] for store in _trained_on(of)] for of in (saved, now))
    return one == other


def _trained_on(of: dict[str, Any]) -> list[dict[str, Any]]:
    return [store for store in of["stores"] if store["use"] == "training"]


def start_record(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """One start of a run: when, how and with which settings."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "data_parallel_size")
    settings = {name: value for name, value in sorted(vars(args).items()) if _is_primitive(value) and name != "origins"}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "mode": args.train_mode,
        "device": device,
        "processes": args.world_size,
        "layout": dict(zip(("tp", "pp", "cp", "dp"), (getattr(args, size) for size in sizes), strict=True)),
        "settings": settings,
    }


def _is_primitive(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or (isinstance(value, list) and all(map(_is_primitive, value)))


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _revision() -> str | None:
    """The repository's commit, with "+changes" where files differ from it; None where there is no repository or no git."""
    try:
        said = [
            subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] + ("+changes" if said[1] else "")


def _store(store: PairStore, use: str) -> dict[str, Any]:
    record = reference_record(store) if reference_files(store.prefix)[-1].exists() else None
    reference = None if record is None else {"weights": record["weights"], "dtype": record["dtype"]}
    return {"use": use, "prefix": str(store.prefix), "samples": len(store), "fingerprint": store.fingerprint, "reference": reference}


def append(save: Path, record: dict[str, Any]) -> None:
    """Add a start to ``<save>/run.json``, atomically."""
    earlier = starts(save) if (save / FILE).exists() else []
    save.mkdir(parents=True, exist_ok=True)
    write_json(save / FILE, json.loads(json.dumps({"starts": [*earlier, record]}, default=str)))


def starts(save: Path) -> list[dict[str, Any]]:
    """Every start of a run, the last one last. ValueError if there is no record."""
    return read_json(save / FILE, "the record of a run's starts")["starts"]
