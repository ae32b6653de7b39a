"""What launch.sh makes of its environment: device, GPUs, precision; with an nvidia-smi that says there are four GPUs."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHOW = 'source scripts/launch.sh; echo "$GPUS $NPROC_PER_NODE $PRECISION $CUDA_DEVICE_MAX_CONNECTIONS"'


def settings(tmp_path: Path, gpus: int = 4, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch.sh, sourced on a machine with ``gpus`` GPUs."""
    lines = "\n".join(f"GPU {number}: NVIDIA H100 (UUID: GPU-{number})" for number in range(gpus))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{lines}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    fixed = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ROOT": str(ROOT), "HOME": str(tmp_path)}
    command = ["bash", "-c", f"set -euo pipefail; {SHOW}"]
    return subprocess.run(command, cwd=ROOT, env=fixed | environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({}, "4 4 bf16 1"),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, "2 2 bf16 1"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-3"}, "1 1 bf16 1"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "0 1 fp32 1"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "0 1 fp32 1"),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, "1 1 bf16 1"),
        ({"DEVICE": "cpu"}, "0 1 fp32 1"),
        ({"DEVICE": "cuda", "NPROC_PER_NODE": "2", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "4 2 bf16 8"),
    ],
)
def test_settings(tmp_path: Path, environment: dict[str, str], shown: str) -> None:
    done = settings(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == shown


def test_no_gpu_whatever_is_listed(tmp_path: Path) -> None:
    assert settings(tmp_path, gpus=0, CUDA_VISIBLE_DEVICES="0,1").stdout.strip() == "0 1 fp32 1"


def test_unknown_device(tmp_path: Path) -> None:
    done = settings(tmp_path, DEVICE="tpu")
    assert done.returncode == 2 and done.stderr == "[error] DEVICE: 'tpu' is none of auto, cuda, cpu\n"


STAND_IN = """#!/bin/sh
case "$*" in
  *terminal.py) cat ;;
  *) echo "$*" ;;
esac
"""


@pytest.mark.parametrize(("device", "passed"), [("cpu", "--device cpu --seed 3"), ("auto", "--seed 3")])
def test_the_device_reaches_the_entry(tmp_path: Path, device: str, passed: str) -> None:
    """The check in one process and the job itself; a flag of the user's stands after ours."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    fixed = {"PATH": os.environ["PATH"], "ROOT": str(ROOT), "HOME": str(tmp_path), "PYTHON": str(tmp_path / "python"), "DEVICE": device}
    command = ["bash", "-c", f"set -euo pipefail; source scripts/launch.sh; PRECISION=fp32 launch job {tmp_path}/run entry.py --seed 3"]
    done = subprocess.run(command, cwd=ROOT, env=fixed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/logs/job.log").read_text().strip().endswith(f"entry.py {passed}")


def test_quickstart_stops_where_it_can(tmp_path: Path) -> None:
    environment = {**os.environ, "QUICKSTART_OUT": str(tmp_path / "new"), "QUICKSTART_UNTIL": "lunch"}
    done = subprocess.run(["bash", "scripts/quickstart.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == "[error] QUICKSTART_UNTIL: 'lunch' is none of pairs, report\n"
    assert not (tmp_path / "new").exists()


def test_quickstart_removes_only_what_a_quickstart_made(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    environment = {**os.environ, "QUICKSTART_OUT": str(tmp_path / "mine")}
    done = subprocess.run(["bash", "scripts/quickstart.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"[error] {tmp_path}/mine exists and no quickstart made it")
    assert (tmp_path / "mine/thesis.txt").exists()
