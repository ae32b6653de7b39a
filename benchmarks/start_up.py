"""What a run reads and writes besides training, per GB: weights, fingerprints, checksums, checkpoints. The constants of docs/scaling.md.

One process and one local disk, files written just before, so mostly read from memory: what the processors make of it, not a disk's or a
network's speed, which on a cluster is the smaller number wherever it is below these.

    python -m benchmarks.start_up --output benchmarks/start_up
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import report
from megatron_patch.checkpoint import hf_files, saved
from megatron_patch.checkpoint.hf_mapping import Piece, hf_tensors
from megatron_patch.data.atomic_files import sha256_file
from megatron_patch.model.qwen2 import read_qwen2_config

CONFIG = report.ROOT / "tests/data/qwen2_5_configs/0.5B.json"
STATES = 4
"""Files of a checkpoint, a quarter each."""


def seconds(action: Callable[[], object]) -> float:
    """One call's."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def make_checkpoint(folder: Path) -> dict[str, tuple[int, ...]]:
    """Qwen2.5 0.5B with random weights in bfloat16; the shapes of its tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG.read_text(encoding="utf-8"), encoding="utf-8")
    shapes = hf_tensors(read_qwen2_config(folder))
    tensors = ((name, torch.randn(shape, dtype=torch.bfloat16)) for name, shape in shapes.items())
    hf_files.write_safetensors(folder / "model.safetensors", shapes, tensors, torch.bfloat16)
    return shapes


def read_all(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Every tensor, copied, as an import does."""
    _, stored = hf_files.read_checkpoint(folder)
    with hf_files.SliceReader(stored) as read:
        for name, shape in shapes.items():
            read(Piece(name, 0, 0, shape[0], 0)).clone()


def measure(repetitions: int) -> dict[str, float]:
    """Medians: GB/s, except the fingerprint's seconds."""
    import torch.distributed.checkpoint as dcp

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "hf"
        shapes = make_checkpoint(folder)
        file = folder / "model.safetensors"
        size = file.stat().st_size / 1e9
        state = {f"part{i}": torch.randn(int(size * 1e9 / 4 / STATES)) for i in range(STATES)}
        found: dict[str, list[float]] = {}
        for number in range(repetitions):
            step = Path(work) / f"iter_{number:07d}"
            timed: dict[str, Callable[[], object]] = {
                "weights, read and copied": lambda: read_all(folder, shapes),
                "fingerprint of weights (seconds)": lambda: hf_files.weights_fingerprint(folder),
                "SHA-256 of one file": lambda: sha256_file(file),
                "checkpoint, written": lambda to=step: dcp.save(state, checkpoint_id=to, no_dist=True),  # type: ignore[misc]
                "checkpoint, its manifest": lambda of=step: saved.write_manifest(of),  # type: ignore[misc]
                "checkpoint, read": lambda of=step: dcp.load(state, checkpoint_id=of, no_dist=True),  # type: ignore[misc]
            }
            for name, action in timed.items():
                took = seconds(action)
                found.setdefault(name, []).append(took if "seconds" in name else size / took)
        return {name: statistics.median(values) for name, values in found.items()} | {"GB": size}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.json and PREFIX.md")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    found, machine = measure(args.repetitions), report.machine("safetensors")
    size = found.pop("GB")
    rows = [[name, f"{value:.2f}" + (" s" if "seconds" in name else " GB/s")] for name, value in found.items()]
    command = f"python -m benchmarks.start_up {' '.join(sys.argv[1:])}"
    lines = ["# Reading and writing, one process", "", f"`{command}`", "", f"{machine}; {size:.2f} GB, medians of {args.repetitions}", ""]
    lines += report.table(["what", "speed"], rows)
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    args.output.with_suffix(".json").write_text(json.dumps({"command": command, "machine": machine, "GB": size, **found}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
