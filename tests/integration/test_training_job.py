"""The training job on a real SLURM of two nodes: the same losses as one process, and back to work after whatever ends it early."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron_patch.checkpoint import saved
from tests import jobs
from tests.distributed import harness

STEPS = 120
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, fine-tuning data, and the losses of one process."""
    folder = jobs.make_materials(tmp_path_factory.mktemp("training-job"))
    done = subprocess.run(
        ["bash", *command(folder)], env=jobs.environment(folder / "alone"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def command(work: Path, steps: int = STEPS) -> list[str]:
    """Of every job here; a checkpoint every ten steps."""
    return jobs.command(work / "model", work / "sft", "--train-iters", steps, "--lr-warmup-iters", 1, "--save-interval", 10)


class Job:
    """TP 2 x PP 2, on one node or on two."""

    def __init__(self, work: Path, output: Path, slurm: dict[str, str], *options: str, steps: int = STEPS, nodes: int = 2) -> None:
        self.output, self.nodes = output, nodes
        self.environment = jobs.environment(output, **slurm, NPROC_PER_NODE=str(4 // nodes), TP="2", PP="2")
        output.mkdir()
        self.submit(work, *options, steps=steps)

    def submit(self, work: Path, *options: str, steps: int = STEPS) -> None:
        """Into the queue."""
        options = ("-N", str(self.nodes), f"--output={self.output}/slurm.out", *options)
        self.id = self("sbatch", "--parsable", *options, *command(work, steps)).strip()

    def __call__(self, program: str, *words: str) -> str:
        done = subprocess.run([program, *words], env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def facts(self) -> dict[str, str]:
        """What SLURM says of it."""
        words = self("scontrol", "show", "job", self.id, "--oneliner").split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, for_what: Callable[[], bool], seconds: float = 150) -> None:
        """Until something is so."""
        deadline = time.monotonic() + seconds
        while not for_what():
            assert time.monotonic() < deadline, f"{self.facts()}\n{self.shown()}"
            time.sleep(0.2)

    def step(self) -> int:
        """Steps recorded."""
        return jobs.steps_done(self.output)

    def shown(self) -> str:
        """What it wrote to its terminal."""
        written = self.output / "slurm.out"
        return written.read_text() if written.exists() else ""

    def assert_same_end(self, work: Path) -> None:
        """Completed, and every step once with one process's losses."""
        self.wait(lambda: self.facts()["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"))
        assert self.facts()["JobState"] == "COMPLETED", self.shown()
        rows, expected = harness.metrics(self.output), harness.metrics(work / "alone")
        assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
        assert json.loads((self.output / "run_state.json").read_text()) == {"state": "finished", "iteration": STEPS}


def test_two_nodes_train_as_one_process(work: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    job = Job(work, tmp_path / "out", slurm)
    job.assert_same_end(work)
    assert "4 processes, TP 2 x PP 2 x CP 1 x DP 1" in job.shown()
    assert (tmp_path / "out/hf/config.json").exists() and list((tmp_path / "out/hf").glob("*.safetensors"))


def test_warned_of_the_time_limit(work: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    """What ``--signal=B:USR1@300`` sends: saved, back into the queue, and on from there."""
    job = Job(work, tmp_path / "out", slurm)
    job.wait(lambda: job.step() >= 13)
    job("scancel", "--batch", "--signal=USR1", job.id)
    job.wait(lambda: job.facts()["Restarts"] == "1")
    first = saved.tracked_step(job.output)
    assert first is not None and 13 <= first < STEPS
    job.assert_same_end(work)


def test_the_time_limit_itself(work: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    """SLURM's own warning, 30 seconds or more before two minutes are over: no node is held to the end, and no step is lost."""
    job = Job(work, tmp_path / "out", slurm, "--time=2", "--signal=B:USR1@30", steps=100_000)
    job.wait(lambda: job.facts()["Restarts"] == "1", seconds=180)
    first = saved.tracked_step(job.output)
    assert first is not None and first > 10
    job.wait(lambda: job.step() >= first + 5)
    job("scancel", job.id)
    job.wait(lambda: job.facts()["JobState"] == "CANCELLED")
    assert [row["iteration"] for row in harness.metrics(job.output)][: first + 5] == list(range(1, first + 6))
    assert "DUE TO TIME LIMIT" not in job.shown()


@pytest.mark.parametrize("nodes", [1, 2])
def test_preempted(work: Path, slurm: dict[str, str], tmp_path: Path, nodes: int) -> None:
    """A more urgent job comes: SLURM sends SIGTERM to all processes of the step. No step is lost, and the job does not wait to be ended."""
    job = Job(work, tmp_path / "out", slurm, nodes=nodes)
    job.wait(lambda: job.step() >= 13)
    urgent = job("sbatch", "--parsable", "--partition=urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap=true").strip()
    job.wait(lambda: job.facts()["Restarts"] == "1", seconds=50)  # of 60 that the partition gives
    assert saved.tracked_step(job.output) == job.step() >= 13
    job.wait(lambda: "JobState=COMPLETED" in job("scontrol", "show", "job", urgent))
    job.assert_same_end(work)


def test_a_node_fails(work: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    """SLURM takes the job from the other one and starts it again when both are there."""
    job = Job(work, tmp_path / "out", slurm)
    job.wait(lambda: job.step() >= 23)
    job("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    job.wait(lambda: job.facts()["Restarts"] == "1")
    job("sh", "-c", "scontrol update nodename=n2 state=resume || scontrol show node n2 | grep -q State=IDLE")  # it may be back by itself
    job.assert_same_end(work)


def ranks_of(job: Job) -> dict[int, psutil.Process]:
    """The job's training processes on both nodes, which are this machine."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error):
            if "train_qwen.py" in " ".join(process.info["cmdline"] or ()) and (of := process.environ()).get("SLURM_JOB_ID") == job.id:
                if "LOCAL_WORLD_SIZE" in of:
                    found.setdefault(int(of["RANK"]), process)
    return found


def test_a_rank_of_the_second_node_is_killed(work: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    """The other node's ranks go too, and the rank is named; the same job again goes on."""
    job = Job(work, tmp_path / "out", slurm)
    job.wait(lambda: job.step() >= 13)
    everyone = ranks_of(job)
    assert set(everyone) == {0, 1, 2, 3}
    everyone[3].kill()
    job.wait(lambda: not any(map(alive, everyone.values())), seconds=15)
    job.wait(lambda: job.facts()["JobState"] == "FAILED", seconds=30)
    assert job.facts()["ExitCode"] == "1:0" and "[failed] rank 3: killed by SIGKILL" in job.shown(), job.shown()
    job.submit(work)
    job.assert_same_end(work)


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_node_that_never_comes(work: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    """The first one's torchrun waits as long as ``TORCHRUN_FLAGS`` says, and the terminal says what that means."""
    late = f'#!/bin/sh\ncase "${{SLURM_NODEID:-0}} $*" in 1*torch.distributed.run*) sleep 300 ;; esac\nexec {sys.executable} "$@"\n'
    (tmp_path / "python").write_text(late)
    (tmp_path / "python").chmod(0o755)
    job = Job(work, tmp_path / "out", slurm | {"PYTHON": str(tmp_path / "python"), "TORCHRUN_FLAGS": "--rdzv-conf=join_timeout=5"})
    job.wait(lambda: job.facts()["JobState"] == "FAILED")
    assert job.facts()["ExitCode"] == "1:0" and "[failed] not all nodes of the job met in time" in job.shown(), job.shown()
    assert not ranks_of(job)


def test_cancelled_and_submitted_again(work: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    """``scancel``: nothing is left running; the same job again goes on."""
    job = Job(work, tmp_path / "out", slurm)
    job.wait(lambda: job.step() >= 13)
    job("scancel", job.id)
    job.wait(lambda: job.facts()["JobState"] == "CANCELLED")
    job.submit(work)
    job.assert_same_end(work)
