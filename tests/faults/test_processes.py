"""Processes that die: the whole job is gone within seconds and says who died, and the same command goes on to the same end.

Jobs are started as users start them, with the run script; the judge is the job that nothing happened to.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from megatron_patch.checkpoint import saved
from tests import jobs
from tests.distributed import harness
from tests.distributed.materials import Bench, tensors
from tests.small_disk import small_disk

STEPS = 40
pytestmark = pytest.mark.ci


def start(bench: Bench, output: Path, flags: tuple[object, ...] = (), **more: str) -> subprocess.Popen[str]:
    """The job on two processes, in a session of its own; a checkpoint every ten steps."""
    schedule = ("--train-iters", STEPS, "--lr-warmup-iters", 1, "--save-interval", 10, "--no-parity-check")
    command = ["bash", *jobs.command(bench.models["tied"], bench.sft, *schedule, *flags)]
    environment, pipe = jobs.environment(output, NPROC_PER_NODE="2", **more), subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> Path:
    """The job left alone."""
    output = bench.folder("undisturbed")
    job = start(bench, output)
    shown, errors = job.communicate(timeout=300)
    assert job.returncode == 0, shown + errors
    return output


def ranks(job: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The job's training processes by rank."""
    found = {}
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            if "train_qwen.py" in " ".join(process.cmdline()) and "RANK" in (of := process.environ()) and "LOCAL_WORLD_SIZE" in of:
                found.setdefault(int(of["RANK"]), process)  # after it come processes that it forked
        except psutil.Error:
            continue
    return found


def assert_goes_on(bench: Bench, output: Path, judge: Path) -> None:
    """The same command again: from the last checkpoint, with the judge's numbers to the judge's weights, each step once."""
    before = saved.tracked_step(output)
    assert before is not None and 0 < before < STEPS
    job = start(bench, output)
    shown, errors = job.communicate(timeout=300)
    assert job.returncode == 0, shown + errors
    rows, expected = harness.metrics(output), harness.metrics(judge)
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "learning_rate", "consumed_samples"):
        assert [row[name] for row in rows] == [row[name] for row in expected], name
    found, wanted = tensors(output / "hf"), tensors(judge / "hf")
    assert not [name for name, tensor in wanted.items() if not torch.equal(tensor, found[name])]
    assert json.loads((output / "run_state.json").read_text()) == {"state": "finished", "iteration": STEPS}


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_one_rank_is_killed(bench: Bench, undisturbed: Path, rank: int) -> None:
    """As the kernel does when memory runs out."""
    output = bench.folder(f"rank-{rank}-killed")
    job = start(bench, output)
    jobs.wait_for_step(output, 15)
    everyone = ranks(job)
    assert set(everyone) == {0, 1}
    everyone[rank].kill()
    died = time.monotonic()
    shown, errors = job.communicate(timeout=60)
    assert time.monotonic() - died < 10 and job.returncode == 1, shown + errors
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in everyone.values())
    assert f"[failed] rank {rank}: killed by SIGKILL" in errors and "logs/train.log" in errors, errors
    assert_goes_on(bench, output, undisturbed)


BUSY = """
import os, pathlib, signal, sys, time
from megatron_patch.entry import end_when_torchrun_says
end_when_torchrun_says()
for _ in range(20):
    os.kill(os.getpid(), signal.SIGTERM)  # not torchrun's
time.sleep(0.5)
os.write(1, b"still here\\n")
if os.environ["RANK"] == "0":
    pathlib.Path(sys.argv[1]).touch()
else:
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def test_a_rank_that_waits_for_nobody_ends_too(tmp_path: Path) -> None:
    """SIGTERM, ignored as the run script has it: from others it ends no rank, from torchrun it does."""
    (tmp_path / "busy.py").write_text(BUSY)
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --signals-to-handle=SIGINT --nproc-per-node 2"
    environment = os.environ | {"PYTHONPATH": str(harness.ROOT), "ON_TERM": "USR1"}
    command = ["bash", "-c", f"trap '' TERM; exec {torchrun} {tmp_path}/busy.py {tmp_path}/said"]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert [job.stdout.readline(), job.stdout.readline()] == ["still here\n"] * 2
    died = time.monotonic()
    job.communicate(timeout=60)
    assert job.returncode == 1
    assert time.monotonic() - died < 10, "it waited for torchrun's SIGKILL, 30 seconds later"


ASYNCHRONOUS = ("--async-save",)


@pytest.mark.full
def test_a_writer_of_asynchronous_saves_is_killed(bench: Bench, undisturbed: Path) -> None:
    """It needs memory for a copy of the model."""
    output = bench.folder("writer-killed")
    job = start(bench, output, flags=ASYNCHRONOUS)
    jobs.wait_for_step(output, 15)
    below = ranks(job)[1].children(recursive=True)
    (writer,) = (helper for helper in below if helper.ppid() in {other.pid for other in below})  # a child of its server of processes
    writer.kill()
    died = time.monotonic()
    shown, errors = job.communicate(timeout=60)
    assert time.monotonic() - died < 10 and job.returncode == 1, shown + errors
    assert "[failed] rank 1: RuntimeError: the process that writes asynchronous checkpoints is gone" in errors, errors
    assert_goes_on(bench, output, undisturbed)
    job = start(bench, output, flags=ASYNCHRONOUS)  # finished: its writers are started, and never used
    shown, errors = job.communicate(timeout=60)
    assert job.returncode == 0, shown + errors


@pytest.mark.full
def test_everything_is_killed(bench: Bench, undisturbed: Path) -> None:
    """A node that loses power: nobody says anything any more."""
    output = bench.folder("all-killed")
    job = start(bench, output)
    jobs.wait_for_step(output, 25)
    everyone = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in everyone:
        process.kill()
    job.communicate(timeout=60)
    assert_goes_on(bench, output, undisturbed)


def to_the_job(job: subprocess.Popen[str]) -> None:
    job.send_signal(signal.SIGTERM)


def to_every_process(job: subprocess.Popen[str]) -> None:
    """As SLURM does it to a step."""
    for process in [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.terminate()


@pytest.mark.parametrize("send", [pytest.param(to_the_job, marks=pytest.mark.full), to_every_process])
def test_preempted_without_a_warning(bench: Bench, undisturbed: Path, send: Callable[[subprocess.Popen[str]], None]) -> None:
    """SIGTERM, to one or to all: saved at the next step, exit code 75, and no process left."""
    output = bench.folder("terminated")
    job = start(bench, output, flags=("--wandb-project", "p"), WANDB_MODE="offline", WANDB_SILENT="true")  # a service among the processes
    jobs.wait_for_step(output, 13)
    everyone = ranks(job)
    send(job)
    shown, errors = job.communicate(timeout=60)
    assert job.returncode == 75, shown + errors
    assert saved.tracked_step(output) == json.loads((output / "run_state.json").read_text())["iteration"] >= 13
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in everyone.values())
    assert_goes_on(bench, output, undisturbed)


@pytest.mark.full
def test_warned_before_the_time_limit(bench: Bench, undisturbed: Path) -> None:
    """USR1 to the job's shell: saved at the next step, wherever that is, and however often the ranks hear it until they are gone."""
    output = bench.folder("warned")
    job = start(bench, output)
    jobs.wait_for_step(output, 13)
    everyone = ranks(job)
    job.send_signal(signal.SIGUSR1)
    while job.poll() is None:
        for rank in everyone.values():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
    shown, errors = job.communicate(timeout=60)
    assert job.returncode == 75, shown + errors
    assert saved.tracked_step(output) == json.loads((output / "run_state.json").read_text())["iteration"] >= 13
    assert_goes_on(bench, output, undisturbed)


@pytest.mark.full
def test_warned_before_it_began(bench: Bench) -> None:
    """While the flags are checked: nothing is started, and the job is to be started again."""
    output = bench.folder("warned-at-once")
    job = start(bench, output)
    while not (output / "logs/train.log").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    shown, errors = job.communicate(timeout=120)
    assert job.returncode == 75 and not (output / "metrics.jsonl").exists(), shown + errors


@pytest.mark.full
def test_warned_while_ranks_start(bench: Bench) -> None:
    """Nobody listens yet; the warning is repeated until somebody does."""
    output = bench.folder("warned-early")
    job = start(bench, output, flags=("--train-iters", 100_000))
    deadline = time.monotonic() + 60
    while not ranks(job):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    shown, errors = job.communicate(timeout=120)
    assert job.returncode == 75, shown + errors
    state = {"state": "preempted", "iteration": jobs.steps_done(output)}
    assert json.loads((output / "run_state.json").read_text()) == state and saved.tracked_step(output) == state["iteration"]


@pytest.mark.full
def test_the_disk_stays_full(bench: Bench, undisturbed: Path, tmp_path: Path) -> None:
    """Told to go on, the job comes to its end, though it can save nothing, note no step and write no log; otherwise it says why it ends."""
    with small_disk(tmp_path / "disk", "8m") as disk:
        for number, flags in enumerate((("--continue-on-save-failure",), ())):
            output, elsewhere = disk / f"run-{number}", tmp_path / f"hf-{number}"
            job = start(bench, output, flags=(*flags, "--export-hf", elsewhere))
            jobs.wait_for_step(output, 12)
            with suppress(OSError), (disk / "hog").open("wb", buffering=0) as hog:
                while True:
                    hog.write(bytes(4096))
            shown, errors = job.communicate(timeout=120)
            if flags:
                assert job.returncode == 0 and "Training goes on; what was saved before is untouched" in shown, shown + errors
                found, wanted = tensors(elsewhere), tensors(undisturbed / "hf")
                assert not [name for name, tensor in wanted.items() if not torch.equal(tensor, found[name])]
            else:
                assert job.returncode != 0 and "No space left on device" in shown + errors, shown + errors
            assert saved.tracked_step(output) == 10 and saved.damage(saved.folder_of(output, 10)) is None
            (disk / "hog").unlink()
            shutil.rmtree(output)


@pytest.mark.full
def test_torchrun_starts_the_ranks_again(bench: Bench, undisturbed: Path) -> None:
    """``--max-restarts``: nobody has to do anything."""
    output = bench.folder("restarted")
    job = start(bench, output, TORCHRUN_FLAGS="--max-restarts=1")
    jobs.wait_for_step(output, 15)
    ranks(job)[1].kill()
    shown, errors = job.communicate(timeout=300)
    assert job.returncode == 0, shown + errors
    assert [row["loss"] for row in harness.metrics(output)] == [row["loss"] for row in harness.metrics(undisturbed)]


def test_a_node_that_never_comes(tmp_path: Path) -> None:
    """torchrun's own error, and what the terminal makes of it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    command += ["--rdzv-id", "7", "--rdzv-endpoint", "localhost:0", "--rdzv-conf", "join_timeout=3", str(harness.TRAIN)]
    log = tmp_path / "train.log"
    with log.open("w") as file:
        assert subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=120, cwd=harness.ROOT).returncode
    told = subprocess.run([sys.executable, "scripts/failure.py", log], capture_output=True, text=True, cwd=harness.ROOT).stderr
    assert told.startswith("[failed] not all nodes of the job met in time: can they reach the first one")
