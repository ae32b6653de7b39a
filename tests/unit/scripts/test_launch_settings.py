"""What launch.sh makes of its environment: device, GPUs, precision; with an nvidia-smi that says there are four GPUs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHOW = 'source scripts/launch.sh; echo "$GPUS $NPROC_PER_NODE $PRECISION $CUDA_DEVICE_MAX_CONNECTIONS"'


def settings(tmp_path: Path, gpus: int = 4, script: str = SHOW, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch.sh, sourced on a machine with ``gpus`` GPUs."""
    lines = "\n".join(f"GPU {number}: NVIDIA H100 (UUID: GPU-{number})" for number in range(gpus))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{lines}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    fixed = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ROOT": str(ROOT), "HOME": str(tmp_path)}
    command = ["bash", "-c", f"set -euo pipefail; {script}"]
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


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"GPU_MEMORY_GB": "80"}, "8 8 bf16 1"),
        ({"GPU_MEMORY_GB": "80", "NPROC_PER_NODE": "4", "NNODES": "16"}, "4 4 bf16 1"),
        ({"DEVICE": "cuda"}, "8 8 bf16 1"),
        ({"DEVICE": "cpu", "GPU_MEMORY_GB": "80"}, "0 1 fp32 1"),
        ({}, "0 1 fp32 1"),
    ],
)
def test_a_plan_is_for_gpus_that_need_not_be_here(tmp_path: Path, environment: dict[str, str], shown: str) -> None:
    done = settings(tmp_path, gpus=0, script=f"set -- --hf-path m --dry-run; {SHOW}", **environment)
    assert done.stdout.strip() == shown, done.stderr


def test_nodes_without_slurm_are_for_plans(tmp_path: Path) -> None:
    done = settings(tmp_path, NNODES="4")
    assert done.returncode == 2 and done.stderr == "[error] NNODES=4 without SLURM is for --dry-run only: sbatch -N 4\n"


def test_no_gpu_whatever_is_listed(tmp_path: Path) -> None:
    assert settings(tmp_path, gpus=0, CUDA_VISIBLE_DEVICES="0,1").stdout.strip() == "0 1 fp32 1"


@pytest.mark.parametrize("name", ["NNODES", "NPROC_PER_NODE"])
def test_no_number(tmp_path: Path, name: str) -> None:
    done = settings(tmp_path, **{name: "x"})
    assert done.returncode == 2 and done.stderr.startswith("[error] NNODES, NPROC_PER_NODE: '"), done.stderr


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = shell(tmp_path, f"launch job {tmp_path}/file/run entry.py", {})
    assert done.returncode == 2 and done.stderr.endswith(f"[error] OUTPUT: {tmp_path}/file/run cannot be made\n"), done.stderr


STOPPED = """
case "$*" in
  *--check) ;;
  *terminal.py) cat ;;
  *terminal.py*) tee "$2" ;;
  *) echo '{"state": "STATE", "iteration": 3}' >run/run_state.json ;;
esac
"""


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("stopped", 75), ("preempted", 75)])
def test_how_a_run_ended_is_the_exit_code(tmp_path: Path, state: str, code: int) -> None:
    """torchrun's is 0 whenever its ranks left by themselves."""
    done = shell(tmp_path, "launch job run entry.py", {"python3": STOPPED.replace("STATE", state)})
    assert done.returncode == code, done.stderr


def test_a_plan_that_fails_says_why(tmp_path: Path) -> None:
    body = 'case "$*" in *terminal.py) cat ;; *failure.py*) exec $REAL "$@" ;; *) echo "ValueError: 20 by 3"; exit 1 ;; esac'
    script = f"export REAL={sys.executable} ROOT={ROOT}; PLAN=1; launch job run entry.py --dry-run"
    done = shell(tmp_path, script, {"python3": body})
    assert done.returncode == 1 and "[failed] ValueError: 20 by 3" in done.stderr and not (tmp_path / "run").exists(), done.stderr


def test_unknown_device(tmp_path: Path) -> None:
    done = settings(tmp_path, DEVICE="tpu")
    assert done.returncode == 2 and done.stderr == "[error] DEVICE: 'tpu' is none of auto, cuda, cpu\n"


STAND_IN = """#!/bin/sh
case "$*" in
  *terminal.py) cat ;;
  *terminal.py*) tee "$2" ;;
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


def shell(tmp_path: Path, script: str, stubs: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A script after launch.sh, among stand-ins for programs; each stand-in's body is bash."""
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    fixed = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ROOT": "/repository", "HOME": str(tmp_path), "DEVICE": "cpu", "PYTHON": "python3"}
    source = f"set -euo pipefail; source {ROOT}/scripts/launch.sh; {script}"
    return subprocess.run(["bash", "-c", source], cwd=tmp_path, env=fixed | environment, capture_output=True, text=True)


IN_IMAGE = "--container-image=a.sqsh --container-mounts=/repository:/repository,HERE:HERE --container-workdir=HERE"
RECORD = 'echo "$(basename "$0") $*"'
PYXIS = {"srun": f'[ "$1" = --help ] && {{ echo "      --container-image=IMAGE"; exit; }}\n{RECORD}', "apptainer": RECORD}


@pytest.mark.parametrize(
    ("stubs", "image", "environment", "shown"),
    [
        (PYXIS, "", {}, "work 1"),
        (PYXIS, "", {"SLURM_JOB_ID": "7"}, "srun --ntasks=1 --ntasks-per-node=1 work 1"),
        (PYXIS, "a.sqsh", {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"},
         f"srun --ntasks=2 --ntasks-per-node=1 {IN_IMAGE} work 1"),
        (PYXIS, "a.sqsh", {"SLURM_JOB_ID": "7", "CONTAINER_MOUNTS": "/data:/data"},
         "srun --ntasks=1 --ntasks-per-node=1 --container-image=a.sqsh --container-mounts=/data:/data work 1"),
        (PYXIS, "a.sif", {}, "apptainer exec --nv --bind /repository:/repository,HERE:HERE a.sif work 1"),
        ({"srun": RECORD, "apptainer": RECORD}, "a.sif", {"SLURM_JOB_ID": "7", "CONTAINER_MOUNTS": "/data:/data"},
         "srun --ntasks=1 --ntasks-per-node=1 apptainer exec --nv --bind /data:/data a.sif work 1"),
    ],
)  # fmt: skip
def test_in_an_image(tmp_path: Path, stubs: dict[str, str], image: str, environment: dict[str, str], shown: str) -> None:
    """Stand-ins that print their arguments: no container was ever run here."""
    done = shell(tmp_path, f"in_image '{image}'; spread 1 work 1", {**stubs, "work": RECORD}, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == shown.replace("HERE", str(tmp_path))


TORCHRUN = "python3 -m torch.distributed.run --standalone --nproc-per-node 1 entry"
STEP = f"--ntasks-per-node=1 --kill-on-bad-exit=1 {IN_IMAGE}"
MEETING = "--nnodes 2 --rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint n1:20007"


@pytest.mark.parametrize(
    ("image", "environment", "shown"),
    [
        ("", {}, TORCHRUN),
        ("a.sif", {}, f"apptainer exec --nv --bind /repository:/repository,HERE:HERE a.sif {TORCHRUN}"),
        ("a.sqsh", {"SLURM_JOB_ID": "7"},
         f"srun --ntasks=1 {STEP} /repository/scripts/on_node.sh {TORCHRUN}"),
        ("a.sqsh", {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n1,n2"},
         f"srun --ntasks=2 {STEP} /repository/scripts/on_node.sh python3 -m torch.distributed.run {MEETING} --nproc-per-node 1 entry"),
    ],
)  # fmt: skip
def test_training_in_an_image(tmp_path: Path, image: str, environment: dict[str, str], shown: str) -> None:
    stubs = PYXIS | {"python3": RECORD, "scontrol": "echo n1"}
    done = shell(tmp_path, f"in_image '{image}'; run_torch entry", stubs, **environment)
    assert done.stdout.strip() == shown.replace("HERE", str(tmp_path)), done.stderr


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
def test_a_port_that_is_taken(tmp_path: Path, family: int, address: str) -> None:
    """The next one is tried, unless this one was asked for."""
    with socket.socket(family) as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = shell(tmp_path, f"MASTER_PORT={port} rendezvous_port", {})
        assert done.returncode == 2 and done.stderr.startswith(f"[error] MASTER_PORT: somebody listens on port {port} of ")
        job = "SLURM_JOB_ID=5; listens() { grep -q $1 <<<'20005 20006'; }; rendezvous_port"  # 20000 + 5
        assert shell(tmp_path, job, {}).stdout == "20007\n"
    assert shell(tmp_path, f"MASTER_PORT={port} rendezvous_port", {}).stdout == f"{port}\n"


@pytest.mark.parametrize(
    ("environment", "outside"),
    [
        ({}, "python3"),
        ({"PYTHON": "of-both"}, "of-both"),
        ({"PYTHON": "of-the-image"}, "python3"),
        ({"HOST_PYTHON": "mine"}, "mine"),
        ({"HOST_PYTHON": "missing"}, "python3"),
    ],
)
def test_what_shows_the_lines_of_an_image(tmp_path: Path, environment: dict[str, str], outside: str) -> None:
    """A Python of the host, which on_node.sh inherits where it runs outside."""
    stubs = {"mine": RECORD, "of-both": RECORD, "python3": RECORD}
    words = "in_image a.sif; show; env | grep HOST_PYTHON || true"
    for kind, seen in (({"apptainer": ""}, f"HOST_PYTHON={outside}\n"), (PYXIS, "")):
        done = shell(tmp_path, words, {**stubs, **kind}, **environment, **({"SLURM_JOB_ID": "7"} if kind is PYXIS else {}))
        assert done.stdout == f"{outside} /repository/scripts/terminal.py\n{seen}", done.stderr


def test_a_host_without_a_python_for_images(tmp_path: Path) -> None:
    done = shell(tmp_path, "in_image a.sif", {"python3": "exit 1", "apptainer": ""})
    assert done.returncode == 2 and done.stderr.endswith("3.10 or later: say HOST_PYTHON\n")


def test_the_engines_image_is_of_the_candidates_alone(tmp_path: Path) -> None:
    stubs = {"python3": f"{RECORD} >>$HOME/calls", "apptainer": f"{RECORD} >>$HOME/calls"}
    choices = {"INPUT": "none.jsonl", "HF_PATH": "sft", "OUTPUT": "out", "CANDIDATES_CONTAINER": "a.sif"}
    script = f"bash {ROOT}/toolkits/lpo_data_preprocessing/scripts/gene_lpo_lam_cand.sh"
    done = shell(tmp_path, script, stubs, **choices, STAGES="candidates reference_logps")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line.split()[0] for line in calls if ".candidates " in line] == ["apptainer"]
    assert {line.split()[0] for line in calls if ".reference_logps " in line} == {"python3"}


def test_an_image_that_nothing_can_run(tmp_path: Path) -> None:
    done = shell(tmp_path, "in_image a.sif; spread 1 work", {"work": RECORD})
    assert done.returncode == 2 and done.stderr == "[error] an image (a.sif) needs pyxis or apptainer, and neither is here\n"


def test_spread_numbers_its_processes(tmp_path: Path) -> None:
    done = shell(tmp_path, "spread 3 work", {"work": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE"'})
    assert sorted(done.stdout.splitlines()) == ["0 0 3", "1 1 3", "2 2 3"]


def test_shards_are_put_together_by_one_more(tmp_path: Path) -> None:
    stubs = {"python3": RECORD, "other": RECORD}
    assert shell(tmp_path, "sharded 1 other stage x", stubs).stdout == "other stage x\n"
    lines = shell(tmp_path, "sharded 2 other stage x", stubs).stdout.splitlines()
    assert lines == ["other stage x --shard auto"] * 2 + ["python3 stage x --merge"]


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_failing_share_is_the_whole_s_failure(tmp_path: Path, failing: str) -> None:
    done = shell(tmp_path, "sharded 2 work stage; echo done", {"work": f'[ "$RANK" != {failing} ] || exit 7'})
    assert done.returncode == 7 and done.stdout == ""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("trap '' TERM; kill -TERM $PPID; sleep 0.3", 75), ("kill -TERM $PPID; sleep 9", 75),
        ("trap 'exit 3' TERM; kill -TERM $PPID; sleep 0.3", 3),
    ],
)  # fmt: skip
def test_told_to_stop_it_starts_nothing_more(tmp_path: Path, end: str, code: int) -> None:
    """Whatever the command that runs makes of SIGTERM, unless it fails otherwise: preempted."""
    done = shell(tmp_path, "supervise work; echo next", {"work": end})
    assert (done.returncode, done.stdout) == (code, "")


def test_a_file_of_choices(tmp_path: Path) -> None:
    (tmp_path / "job.env").write_text("# choices\n\nN=4\nINPUT=/data/a b.jsonl\nDEVICE=cuda\nEMPTY=1")
    done = shell(tmp_path, 'echo "$N|$INPUT|$DEVICE|$EMPTY"', {}, CONFIG="job.env", EMPTY="")
    assert done.returncode == 0 and done.stdout == "4|/data/a b.jsonl|cpu|\n", done.stderr
    (tmp_path / "job.env").write_text("N=4\nrm -rf x\n")
    done = shell(tmp_path, "echo here", {}, CONFIG="job.env")
    assert done.returncode == 2 and done.stderr == "[error] job.env:2: not NAME=VALUE: rm -rf x\n" and done.stdout == ""
    assert shell(tmp_path, "echo here", {}, CONFIG="nowhere.env").stderr == "[error] CONFIG: no file nowhere.env\n"


def test_slurm_s_cpus_reach_srun(tmp_path: Path) -> None:
    assert shell(tmp_path, 'echo "${SRUN_CPUS_PER_TASK:-none}"', {}).stdout == "none\n"
    assert shell(tmp_path, "env | grep ^SRUN_CPUS_PER_TASK", {}, SLURM_CPUS_PER_TASK="6").stdout == "SRUN_CPUS_PER_TASK=6\n"


@pytest.mark.parametrize(
    ("tasks", "asked", "here", "cpus"),
    [
        (1, {"SLURM_CPUS_PER_TASK": "96"}, "1", "96"), (8, {"SLURM_CPUS_PER_TASK": "96"}, "2", "12"),
        (8, {"SLURM_CPUS_PER_TASK": "4"}, "1", "1"), (8, {"SLURM_CPUS_PER_TASK": "12", "SLURM_NTASKS_PER_NODE": "8"}, "1", "12"),
        (8, {}, "1", "none"),
    ],
)  # fmt: skip
def test_a_node_s_cpus_are_its_tasks_together(tmp_path: Path, tasks: int, asked: dict[str, str], here: str, cpus: str) -> None:
    """srun would ask for that number as often as a node has tasks; the step after it has one task a node."""
    stubs = {"srun": 'echo "${SRUN_CPUS_PER_TASK:-none}"', "scontrol": "echo n1"}
    script = f"spread {tasks} work; NNODES=2 run_torch entry"
    done = shell(tmp_path, script, stubs, SLURM_JOB_ID="7", SLURM_NNODES=here, SLURM_JOB_NODELIST="n1", **asked)
    a_node = int(asked.get("SLURM_CPUS_PER_TASK", 0)) * int(asked.get("SLURM_NTASKS_PER_NODE", 1))
    assert done.stdout.split() == [cpus, str(a_node or "none")], done.stderr


@pytest.mark.parametrize(
    ("name", "path", "below"),
    [
        ("data", "data/out", True), ("data", "data", True), ("data/", "./data/a/b", True), ("data", "data2", False), (".", "out", True),
        ("data/a.jsonl", "data/out", False), ("data/*.jsonl", "data/out", False), ("data/*", "data/out", True),
        ("data/*/raw", "data/x/raw/out", True),
    ],
)  # fmt: skip
def test_lies_in(tmp_path: Path, name: str, path: str, below: bool) -> None:
    assert shell(tmp_path, f"lies_in '{name}' '{path}' && echo yes || echo no", {}).stdout == ("yes\n" if below else "no\n")


def test_the_port_is_the_job_s(tmp_path: Path) -> None:
    """Two jobs on one node do not meet; the first node's address, not its name, is where the others look for it."""
    scontrol = 'case $2 in hostnames) printf "n7\\nn8\\n" ;; node) echo "NodeName=$3 Arch=x NodeAddr=10.0.0.7 NodeHostName=n7" ;; esac'
    stubs = {"scontrol": scontrol, "srun": RECORD}
    environment = {"SLURM_JOB_ID": "41234", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[7-8]"}
    assert "--rdzv-endpoint 10.0.0.7:21234 " in shell(tmp_path, "run_torch entry", stubs, **environment).stdout
