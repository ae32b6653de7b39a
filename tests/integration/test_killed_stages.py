"""Any stage killed at random moments and started again: the same bytes as one that was left alone.

Stages are forked from a server that has imported everything, so that the moments fall into the work and not into the imports. SIGKILL
leaves what there is; SIGTERM, SLURM's preemption, ends a stage with exit code 75 and without temporary files.
"""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server

ROOT = Path(__file__).parents[2]
STAGES = ("normalise", "candidates", "select", "build_pairs")
TIMES = {"ci": 3, "full": 20}
pytestmark = pytest.mark.ci

_context = multiprocessing.get_context("forkserver")
MODULES = [*(f"toolkits.lpo_data_preprocessing.{name}" for name in STAGES), "transformers.models.qwen2.modeling_qwen2"]


@dataclass(frozen=True)
class Materials:
    """Inputs of every stage, made by the stages themselves, undisturbed."""

    folder: Path
    model: Path

    def argv(self, stage: str, folder: Path) -> list[str]:
        """The stage in ``folder``, reading what the undisturbed stage before it made."""
        inputs = {"normalise": "in.jsonl", "candidates": "few.jsonl", "select": "sampled.jsonl", "build_pairs": "pairs.jsonl"}
        more = {
            "candidates": ["--model", self.model, "-n", 2, "--max-new-tokens", 6, "--device", "cpu"],
            "select": ["--valid-fraction", 0.1, "--valid-output", folder / "valid"],
            "build_pairs": ["--tokenizer", self.model, "--max-length", 100],
        }.get(stage, [])
        return [str(word) for word in ("--input", self.folder / inputs[stage], "--output", folder / "out", "--update", *more)]


def run_stage(stage: str, argv: list[str]) -> None:
    """In a forked process: the stage, quietly."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.exit(importlib.import_module(f"toolkits.lpo_data_preprocessing.{stage}").main(argv))


def start(materials: Materials, stage: str, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    fork_server.use(MODULES)
    process = _context.Process(target=run_stage, args=(stage, materials.argv(stage, folder)))
    process.start()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones and folders' included; a path in a manifest is its folder's."""
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Materials]:
    """2,000 word problems, a tiny model, and candidates that nobody sampled."""
    folder = tmp_path_factory.mktemp("stages")

    def script(name: str, *words: object) -> None:
        subprocess.run([sys.executable, ROOT / f"scripts/{name}.py", *map(str, words)], check=True, cwd=ROOT, capture_output=True)

    script("make_word_problems", "--output", folder / "problems", "--train", 2000, "--heldout", 10)
    rows = (folder / "problems/train.jsonl").read_text().splitlines()
    (folder / "in.jsonl").write_text("\n".join(rows) + "\n")
    sizes = ("--layers", 1, "--hidden", 16, "--ffn", 24, "--heads", 2, "--kv-groups", 1)
    script("make_tiny_qwen", "--input", folder / "in.jsonl", "--output", folder / "model", *sizes)
    made = Materials(folder, folder / "model")
    whole = folder / "records"
    process = start(made, "normalise", whole)
    process.join()
    records = [json.loads(line) for line in (whole / "out").read_text().splitlines()]
    write(folder / "few.jsonl", records[:200])
    answers = [[{"text": record["chosen"][:-1] + end, "finish_reason": "stop"} for end in "0123456789"] for record in records]
    both = list(zip(records, answers, strict=True))
    write(folder / "sampled.jsonl", [record | {"candidates": texts} for record, texts in both[:300]])
    write(folder / "pairs.jsonl", [record | {"rejected": [text["text"] for text in texts[:2]]} for record, texts in both[:300]])
    yield made


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def undisturbed(materials: Materials, stage: str, folder: Path) -> tuple[dict[str, bytes], float]:
    """What the stage makes, and the seconds it takes."""
    started = time.monotonic()
    process = start(materials, stage, folder)
    process.join()
    assert process.exitcode == 0
    return contents(folder), time.monotonic() - started


def stopped(materials: Materials, stage: str, folder: Path, after: float, number: signal.Signals) -> int | None:
    """The exit code of a stage that gets a signal after so many seconds."""
    process = start(materials, stage, folder)
    process.join(after)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(20)
    return process.exitcode


Check = Callable[[Path, int | None], None]


def disturb(materials: Materials, stage: str, folder: Path, times: int, check: Check, number: signal.Signals) -> int:
    """Stop the stage ``times`` times, each in a new folder, and let it end; returns how often it was really stopped."""
    expected, seconds = undisturbed(materials, stage, folder / "whole")
    assert expected
    moments, hit = random.Random(f"{stage}{times}"), 0
    for attempt in range(times):
        place = folder / f"{attempt:02d}"
        code = stopped(materials, stage, place, moments.uniform(0, seconds), number)
        check(place, code)
        hit += code != 0
        again, _ = undisturbed(materials, stage, place)
        assert again == {name: data.replace(b"/whole", f"/{place.name}".encode()) for name, data in expected.items()}
        shutil.rmtree(place)
    return hit


def nothing(_: Path, code: int | None) -> None:
    assert code in (0, -signal.SIGKILL)


def clean(folder: Path, code: int | None) -> None:
    """Also when the signal falls between the process's start and the stage's."""
    assert code in (0, 75, -signal.SIGTERM)
    assert code == -signal.SIGTERM or not [name for name in contents(folder) if ".tmp-" in name]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tier", ["ci", pytest.param("full", marks=pytest.mark.full)])
def test_killed(materials: Materials, tmp_path: Path, stage: str, tier: str) -> None:
    assert disturb(materials, stage, tmp_path, TIMES[tier], nothing, signal.SIGKILL) > 0


@pytest.mark.parametrize("stage", STAGES)
def test_preempted(materials: Materials, tmp_path: Path, stage: str) -> None:
    assert disturb(materials, stage, tmp_path, 3, clean, signal.SIGTERM) > 0
