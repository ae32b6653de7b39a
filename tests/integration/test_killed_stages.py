"""Any stage killed at random moments and started again: the same bytes as one that was left alone.

Stages are forked from a server that has imported everything, so that the moments fall into the work and not into the imports. SIGKILL
leaves what there is; SIGTERM, SLURM's preemption, ends a stage with exit code 75 and without temporary files, while it imports too.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server
from toolkits.lpo_data_preprocessing import preemption

ROOT = Path(__file__).parents[2]
TOOLKIT = "toolkits.lpo_data_preprocessing"
# A word behind a stage's name is a variant of it. The reference pass comes last: it wants a server of its own.
CASES = ("normalise", "candidates", "select", "build_pairs", "build_pairs workers", "extend_vocab", "reference_logps")
pytestmark = pytest.mark.ci

_context = multiprocessing.get_context("forkserver")
_STAGES = list(dict.fromkeys(case.split()[0] for case in CASES if case != "reference_logps"))
MODULES = [*(f"{TOOLKIT}.{stage}" for stage in _STAGES), "transformers.models.qwen2.modeling_qwen2"]
MEGATRON = ["tests.distributed.preloaded", f"{TOOLKIT}.reference_logps"]


@dataclass(frozen=True)
class Materials:
    """Inputs of every stage, made by the stages themselves, undisturbed."""

    folder: Path
    model: Path
    whole: dict[str, tuple[dict[str, bytes], float]] = field(default_factory=dict)
    """By case: what an undisturbed stage makes, and its seconds."""

    def argv(self, case: str, folder: Path) -> list[str]:
        """The stage in ``folder``, reading what the undisturbed stage before it made."""
        if case == "reference_logps":
            sizes = ["--seq-length", 100, "--block-pairs", 20, "--max-tokens-per-micro-batch", 1000, "--device", "cpu"]
            return [str(word) for word in ("--hf-path", self.model, "--pair-data", folder / "store", *sizes)]
        inputs = {
            "normalise": "in.jsonl", "candidates": "few.jsonl", "select": "sampled.jsonl", "build_pairs": "pairs.jsonl",
            "build_pairs workers": "many.jsonl", "extend_vocab": "model",
        }  # fmt: skip
        tokenise = ["--tokenizer", self.model, "--max-length", 100]
        more = {
            "candidates": ["--model", self.model, "-n", 2, "--max-new-tokens", 6, "--device", "cpu"],
            "select": ["--valid-fraction", 0.1, "--valid-output", folder / "valid"],
            "build_pairs": tokenise,
            "build_pairs workers": [*tokenise, "--workers", 2],
            "extend_vocab": ["--tokens", 500, "--pattern", "<|audio_{}|>"],
        }.get(case, [])
        return [str(word) for word in ("--input", self.folder / inputs[case], "--output", folder / "out", "--update", *more)]

    def prepare(self, case: str, folder: Path) -> None:
        """What a stage finds in its folder: the reference pass works beside its store."""
        if not folder.exists():
            folder.mkdir()
            for path in self.folder.glob("store.*") if case == "reference_logps" else ():
                shutil.copy(path, folder)


def run_stage(stage: str, argv: list[str], ready: Connection) -> None:
    """In a forked process: the stage, quietly."""
    preemption.end_at_once()  # as where "python -m" begins; the stage's own handler follows
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.argv = [stage, *argv]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    ready.send(True)
    sys.exit(importlib.import_module(f"{TOOLKIT}.{stage}").main(argv))


def start(materials: Materials, case: str, folder: Path) -> Any:
    """The stage's process, which has just begun."""
    materials.prepare(case, folder)
    fork_server.use(MEGATRON if case == "reference_logps" else MODULES)
    ready, theirs = _context.Pipe()
    process = _context.Process(target=run_stage, args=(case.split()[0], materials.argv(case, folder), theirs))
    process.start()
    assert ready.recv()
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
    pairs = [record | {"rejected": [text["text"] for text in texts[:2]]} for record, texts in both]
    write(folder / "pairs.jsonl", pairs[:300])
    write(folder / "many.jsonl", pairs)
    start(made, "build_pairs", folder / "stored").join()
    for suffix in (".bin", ".idx", ".meta.npz", ".json"):
        shutil.copy(folder / f"stored/out{suffix}", folder / f"store{suffix}")
    yield made


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def finish(materials: Materials, case: str, folder: Path) -> tuple[dict[str, bytes], float]:
    """What the stage makes, and the seconds it takes once it has begun."""
    process = start(materials, case, folder)
    started = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return contents(folder), time.monotonic() - started


def stop(materials: Materials, case: str, folder: Path, after: float, number: signal.Signals) -> int | None:
    """The exit code of a stage that gets a signal after so many seconds."""
    process = start(materials, case, folder)
    process.join(after)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(20)
    return process.exitcode


def check_end(folder: Path, code: int | None, number: signal.Signals) -> None:
    """Preempted, a stage says so and leaves nothing for others to clean up."""
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 75
        assert not [name for name in contents(folder) if ".tmp-" in name or ".partial/" in name]


def plan() -> Iterator[Any]:
    """(case, signal, times); both signals of a stage in turn, so that the servers change once."""
    fewer = {"build_pairs workers": (1, 1), "reference_logps": (2, 1)}  # which take seconds to begin
    for case in CASES:
        for number, times in zip((signal.SIGKILL, signal.SIGTERM), fewer.get(case, (3, 3)), strict=True):
            yield pytest.param(case, number, times, id=f"{case}-{number.name}")
        yield pytest.param(case, signal.SIGKILL, 20, id=f"{case}-full", marks=pytest.mark.full)


@pytest.mark.parametrize(("case", "number", "times"), plan())
def test_stopped(materials: Materials, tmp_path: Path, case: str, number: signal.Signals, times: int) -> None:
    """Stopped so many times, each in a new folder, and started again there. A stage that was faster than the signal does not count."""
    if case not in materials.whole:
        materials.whole[case] = finish(materials, case, tmp_path / "whole")
    expected, seconds = materials.whole[case]
    assert expected
    moments, stopped = random.Random(f"{case}{times}"), 0
    for attempt in range(4 * times):
        place = tmp_path / f"{attempt:02d}"
        code = stop(materials, case, place, moments.uniform(0, seconds), number)
        if code != 0:
            check_end(place, code, number)
            assert finish(materials, case, place)[0] == expected
            stopped += 1
        else:
            seconds /= 2  # measured while the machine was busier
        shutil.rmtree(place)
        if stopped == times:
            return
    raise AssertionError(f"{stopped} of {times} signals came in time")


@pytest.mark.parametrize("stage", ["build_pairs", "reference_logps"])
def test_preempted_while_it_imports(stage: str) -> None:
    """As it is started by users, torch and transformers being imported."""
    process = subprocess.Popen([sys.executable, "-m", f"{TOOLKIT}.{stage}"], cwd=ROOT, stderr=subprocess.DEVNULL)
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 60
    while "numpy" not in maps.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
