"""What the data job refuses before its first stage, and what it tells the stages; with a Python that prints what it is asked for."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
JOB = ROOT / "toolkits/lpo_data_preprocessing/scripts/gene_lpo_lam_cand.sh"


def job(tmp_path: Path, gpus: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """The job's data stages, recorded; on a machine with ``gpus`` GPUs."""
    bin = tmp_path / "bin"
    bin.mkdir(exist_ok=True)
    listed = "\n".join(f"GPU {number}: NVIDIA H100 (UUID: GPU-{number})" for number in range(gpus))
    for name, body in (("nvidia-smi", f"echo '{listed}'"), ("python", 'shift; echo "$*"')):
        (bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin / name).chmod(0o755)
    fixed = {
        "PATH": f"{bin}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHON": str(bin / "python"), "HF_PATH": "model", "INPUT": "data",
        "OUTPUT": str(tmp_path / "out"), "STAGES": "normalise candidates select build_pairs",
    }  # fmt: skip
    return subprocess.run(["bash", JOB], cwd=tmp_path, env=fixed | environment, capture_output=True, text=True, timeout=60)


def test_what_the_stages_are_told(tmp_path: Path) -> None:
    done = job(tmp_path, VALID_FRACTION=".05")
    assert done.returncode == 0 and done.stderr == ""
    asked = [line for line in done.stdout.splitlines() if not line.startswith("[plan]")]
    assert [line.split()[0].rpartition(".")[2] for line in asked] == ["normalise", "candidates", "select", "build_pairs", "build_pairs"]
    assert f"--valid-fraction .05 --valid-output {tmp_path}/out/valid.jsonl" in asked[2]


@pytest.mark.parametrize("fraction", ["0", "0.0", "0.", ".00"])
def test_no_validation_however_it_is_written(tmp_path: Path, fraction: str) -> None:
    done = job(tmp_path, VALID_FRACTION=fraction)
    assert done.returncode == 0 and "--valid" not in done.stdout and done.stdout.count("build_pairs --input") == 1


@pytest.mark.parametrize(
    ("gpus", "environment", "line"),
    [
        (0, {"VALID_FRACTION": "1"}, "VALID_FRACTION: '1' is no fraction from 0 to below 1, such as 0.05"),
        (0, {"VALID_FRACTION": "5%"}, "VALID_FRACTION: '5%' is no fraction from 0 to below 1, such as 0.05"),
        (8, {"ENGINE_TP": "16"}, "ENGINE_TP: '16' GPUs of a node that has 8"),
        (8, {"ENGINE_TP": "0"}, "ENGINE_TP: '0' GPUs of a node that has 8"),
        (0, {"ENGINE_TP": "two"}, "ENGINE_TP: 'two' GPUs of a node that has 0"),
        (0, {"OUTPUT": "data/pairs"}, "OUTPUT: data/pairs lies in INPUT (data), and would be read as data"),
        (0, {"STAGES": "bake"}, "STAGES: unknown stage 'bake'"),
    ],
)
def test_refused_before_anything_is_done(tmp_path: Path, gpus: int, environment: dict[str, str], line: str) -> None:
    done = job(tmp_path, gpus, **environment)
    assert done.returncode == 2 and done.stderr == f"[error] {line}\n" and "toolkits." not in done.stdout


@pytest.mark.parametrize(("tp", "shards"), [("1", 8), ("4", 2), ("8", 1)])
def test_shards_of_a_node(tmp_path: Path, tp: str, shards: int) -> None:
    done = job(tmp_path, 8, ENGINE_TP=tp, STAGES="candidates")
    assert done.returncode == 0 and f"{shards} shard(s)" in done.stdout
    assert done.stdout.count("--shard auto") == (shards if shards > 1 else 0)


def test_a_validation_store_of_another_split(tmp_path: Path) -> None:
    """Its prompts would be trained on."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/valid.plan.json").write_text("{}")
    done = job(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"[error] VALID_FRACTION: 0 puts prompts of {tmp_path}/out/valid into train: remove valid.*\n"
    assert job(tmp_path, VALID_FRACTION="0.1").returncode == 0
