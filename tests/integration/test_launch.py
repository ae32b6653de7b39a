"""The run script as a user starts it: exit codes, what the terminal shows, and a run that is asked to stop and goes on later."""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests import jobs


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and fine-tuning data."""
    return jobs.make_materials(tmp_path_factory.mktemp("launch"))


def start(work: Path, *flags: object) -> subprocess.Popen:
    """run_mcore_qwen_xpo.sh with the sft preset on two processes."""
    command = ["bash", *jobs.command(work / "model", work / "sft", *flags)]
    environment, pipe = jobs.environment(work / "run", NPROC_PER_NODE="2"), subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.ci
def test_users_error_is_one_line_and_code_2(work: Path) -> None:
    job = start(work, "--train-iters", 5)
    shown, errors = job.communicate(timeout=120)
    assert job.returncode == 2 and not errors
    assert [line for line in shown.splitlines() if line.startswith("[error]")] == [
        "[error] --lr-warmup-iters 66 must be below 5, the steps the learning rate decays over"
    ]
    assert not (work / "run/metrics.jsonl").exists()


@pytest.mark.full
def test_usr1_saves_and_the_same_command_goes_on(work: Path) -> None:
    """SLURM's warning before the time limit: saved at the next step, exit code 75, and nothing is trained twice."""
    schedule = ("--lr-warmup-iters", 1, "--lr-decay-iters", 4000)
    job = start(work, "--train-iters", 4000, *schedule)
    jobs.wait_for_step(work / "run", 3)
    job.send_signal(signal.SIGUSR1)
    shown, errors = job.communicate(timeout=120)
    assert job.returncode == 75, shown + errors
    state = json.loads((work / "run/run_state.json").read_text())
    assert state["state"] == "preempted" and (work / f"run/iter_{state['iteration']:07d}").is_dir()

    last = state["iteration"] + 3
    job = start(work, "--train-iters", last, *schedule)
    shown, errors = job.communicate(timeout=120)
    assert job.returncode == 0, shown + errors
    rows = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, last + 1))
    assert json.loads((work / "run/run_state.json").read_text()) == {"state": "finished", "iteration": last}
    assert (work / "run/hf/model.safetensors").exists()
    *_, compared, exported = shown.splitlines()
    assert exported == f"[finetune] Hugging Face checkpoint: {work}/run/hf"
    assert re.fullmatch(r"\[finetune\] parity with transformers: \S+ nats per token on 8 samples of the export", compared)
