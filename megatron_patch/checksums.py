"""``--verify-data``: every byte of what a run is about to read, compared with the sha256 that was recorded when it was written.

A store's manifest has those of its files. Hugging Face folders record none, so the reference pass notes those of the weights that it
scored with: a shard that was damaged since then is found here, before a model is built from it.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_patch.checkpoint.hf_files import weight_files
from megatron_patch.data.atomic_files import sha256_file
from megatron_patch.data.pair_store import PairStore, reference_files, reference_record


def weight_checksums(hf_path: str) -> dict[str, str]:
    """File name -> sha256 of the weights in a Hugging Face folder, several files at a time."""
    files = weight_files(Path(hf_path))
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip((file.name for file in files), pool.map(sha256_file, files), strict=True))


def verify_data(prefixes: Sequence[str], hf_path: str, say: Callable[[str], None]) -> None:
    """Stores, their reference log-probs and the weights.

    Raises:
        ValueError: the first file that is not what was recorded.
    """
    recorded: dict[str, str] = {}
    for prefix in prefixes:
        store = PairStore(prefix, verify="sha256")
        if reference_files(prefix)[-1].exists():
            recorded |= reference_record(store)["extra"].get("weight_files", {})
    if not recorded:
        say("stores verified; nobody recorded checksums of the weights (the reference pass does)")
        return
    for name, checksum in weight_checksums(hf_path).items():
        if recorded.get(name, checksum) != checksum:
            raise ValueError(f"{Path(hf_path) / name}: its contents changed since the reference log-probs were computed (sha256 differs)")
    unknown = [file.name for file in weight_files(Path(hf_path)) if file.name not in recorded]
    say(f"stores and weights verified{f', except {len(unknown)} files that nobody recorded' if unknown else ''}")
