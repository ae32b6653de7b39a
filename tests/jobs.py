"""The training job as users start it, for the tests of whole jobs: its command, its environment, and how far it has come."""

import os
import time
from pathlib import Path

from tests.distributed.materials import make_model, make_store

SCRIPT = Path(__file__).parents[1] / "examples/qwen2_5/run_mcore_qwen_xpo.sh"


def make_materials(folder: Path) -> Path:
    """A small model and fine-tuning data, in a folder."""
    make_model(folder / "model", tied=True, seed=0)
    make_store(folder / "sft", "sft")
    return folder


def command(model: Path, data: Path, *flags: object) -> list[str]:
    """Script and flags of a fine-tuning job of eight samples a step."""
    words = (SCRIPT, "--hf-path", model, "--pair-data", data, "--seq-length", 128, "--global-batch-size", 8, *flags)
    return [str(word) for word in words]


def environment(output: Path, **more: str) -> dict[str, str]:
    """On the CPU, whatever a SLURM around this test says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {**kept, "PRESET": "sft", "OUTPUT": str(output), "DEVICE": "cpu", **more}


def steps_done(output: Path) -> int:
    """Rows of metrics.jsonl."""
    metrics = output / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def wait_for_step(output: Path, step: int) -> None:
    """Until a step is recorded."""
    deadline = time.monotonic() + 120
    while steps_done(output) < step:
        assert time.monotonic() < deadline, f"the run did not come to step {step}"
        time.sleep(0.05)
