"""The data job as users start it: with bash on one machine, and with sbatch on a real SLURM of two nodes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).parents[2]
JOB = Path("toolkits/lpo_data_preprocessing/scripts/gene_lpo_lam_cand.sh")
MADE = ("records.jsonl", "candidates.jsonl", "train.jsonl", "valid.jsonl", "train.bin", "train.idx", "train.meta.npz", "valid.bin")
pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 problems (three blocks of candidates) and a tiny model; a copy of the repository, whose folders may be written to."""
    folder = tmp_path_factory.mktemp("job")

    def script(name: str, *words: object) -> None:
        subprocess.run([sys.executable, ROOT / f"scripts/{name}.py", *map(str, words)], check=True, cwd=ROOT, capture_output=True)

    script("make_word_problems", "--output", folder / "problems", "--train", 150, "--heldout", 10)
    sizes = ("--layers", 1, "--hidden", 16, "--ffn", 24, "--heads", 2, "--kv-groups", 1)
    script("make_tiny_qwen", "--input", folder / "problems/train.jsonl", "--output", folder / "model", *sizes)
    for name in ("megatron_patch", "toolkits", "scripts", "examples"):
        shutil.copytree(ROOT / name, folder / "repository" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def environment(work: Path, output: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the job is told; nothing of a SLURM around this test reaches it."""
    ours = {
        "INPUT": str(work / "problems/train.jsonl"), "HF_PATH": str(work / "model"), "OUTPUT": str(output), "DEVICE": "cpu", "N": "2",
        "MAX_NEW_TOKENS": "8", "MAX_LENGTH": "160", "VALID_FRACTION": "0.1", "PYTHON": sys.executable,
    }  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return kept | ours | dict(more or {})


def start(work: Path, output: Path, **more: str) -> subprocess.Popen[str]:
    """The job with plain bash."""
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", str(ROOT / JOB)], env=environment(work, output, more), cwd=work, stdout=pipe, stderr=pipe, text=True)


def run(work: Path, output: Path, **more: str) -> tuple[int, str, str]:
    """Exit code and what was shown."""
    job = start(work, output, **more)
    out, errors = job.communicate(timeout=300)
    return job.returncode, out, errors


@pytest.fixture(scope="module")
def plain(work: Path) -> Path:
    """What the job makes on one machine."""
    code, out, errors = run(work, work / "plain")
    assert code == 0, out + errors
    assert out.startswith("[plan] normalise candidates select build_pairs reference_logps: ")
    return work / "plain"


def test_what_it_makes(plain: Path) -> None:
    manifest = json.loads((plain / "train.json").read_text())
    reference = np.load(plain / "train.ref.npy")
    assert reference.shape == (manifest["count"], 2) and (reference < 0).all()
    prompts = [{json.loads(line)["id"] for line in (plain / f"{side}.jsonl").read_text().splitlines()} for side in ("train", "valid")]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) > 100


def test_a_second_call_makes_nothing(work: Path, plain: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in plain.iterdir() if path.name != "logs"}
    code, out, errors = run(work, plain)
    assert code == 0, out + errors
    assert out.count("kept") == 7  # two stores, twice
    assert {path: path.stat().st_mtime_ns for path in plain.iterdir() if path.name != "logs"} == before


def test_damaged_stores_are_made_again(work: Path, plain: Path, tmp_path: Path) -> None:
    """A file that is gone, and four bytes of one: the requeued job heals both."""
    output = tmp_path / "out"
    shutil.copytree(plain, output)
    (output / "train.bin").unlink()
    with open(output / "valid.bin", "r+b") as file:
        file.write(b"\xff\xff\xff\x7f")
    code, out, errors = run(work, output, STAGES="build_pairs")
    assert code == 0 and "kept ->" not in out, out + errors
    for name in MADE:
        assert (output / name).read_bytes() == (plain / name).read_bytes(), name


def test_another_option_makes_what_depends_on_it(work: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "out")
    code, out, errors = run(work, tmp_path / "out", MAX_LENGTH="60", STAGES="normalise candidates select build_pairs")
    assert code == 0, out + errors
    assert [line.split(":")[0] for line in out.splitlines() if "kept ->" in line] == ["normalise", "candidates", "select"]
    assert json.loads((tmp_path / "out/train.json").read_text())["limits"] == {"max_length": 60}


def test_another_sampling_option_is_refused(work: Path, plain: Path, tmp_path: Path) -> None:
    """Samples cost hours: they are not made again because a number was mistyped."""
    shutil.copytree(plain, tmp_path / "out")
    code, _, errors = run(work, tmp_path / "out", TEMPERATURE="0.9")
    assert code == 2 and "made with another temperature" in errors and len(errors.splitlines()) == 1
    assert (tmp_path / "out/candidates.jsonl").read_bytes() == (plain / "candidates.jsonl").read_bytes()


def test_a_failing_stage_s_exit_code(work: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "1+1?"')
    code, _, errors = run(work, tmp_path / "out", INPUT=str(tmp_path / "bad.jsonl"))
    assert code == 2 and errors.startswith("[error] normalise: ") and "bad.jsonl:1" in errors
    code, _, errors = run(work, tmp_path / "out", STAGES="normalise bake")
    assert code == 2 and "[error] STAGES: unknown stage 'bake'" in errors


def test_flags_of_single_stages(work: Path, tmp_path: Path) -> None:
    """Bad lines left out, and pairs made of noise: neither candidates nor a model on the way."""
    lines = [json.dumps({"question": f"{i}?", "answer": f"the answer is {i} and no other"}) for i in range(20)]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, '{"question": ']) + "\n")
    choices = {"INPUT": str(tmp_path / "bad.jsonl"), "STAGES": "normalise select", "VALID_FRACTION": "0"}
    flags = {"NORMALISE_FLAGS": "--drop-invalid --format question_answer", "SELECT_FLAGS": "--method perturb -n 2 --noise-ratio 0.4"}
    code, out, errors = run(work, tmp_path / "out", **choices, **flags)
    assert code == 0 and "21 records read, 20 kept, 1 dropped" in out, out + errors
    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and max(len(row["rejected"]) for row in rows) == 2
    code, _, errors = run(work, tmp_path / "again", **choices)
    assert code == 2 and "bad.jsonl:21" in errors and "--drop-invalid" in errors
    code, _, errors = run(work, tmp_path / "out", **(choices | {"STAGES": "select"}))
    assert code == 2 and "field 'candidates' is missing" in errors  # the default, --method lppc, wants them


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks_of_the_reference_pass(processes: Iterable[psutil.Process], output: Path) -> int:
    """How many there are; torchrun has the same words on its command line."""
    found = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):  # one that has just ended
            words = {*process.cmdline()}
            entry, store = "toolkits.lpo_data_preprocessing.reference_logps", str(output / "train")
            found += {entry, store} <= words and "torch.distributed.run" not in words
    return found


@pytest.mark.full
@pytest.mark.parametrize("stage", ["candidates", "reference_logps"])
def test_preempted_it_goes_on(work: Path, plain: Path, tmp_path: Path, stage: str) -> None:
    """SIGTERM to the shell: the stage ends, the job says 75, and the same command makes the same bytes."""
    output = tmp_path / "out"
    job = start(work, output)
    first_block = output / "candidates.jsonl.blocks/000000.jsonl"
    below = psutil.Process(job.pid)

    def is_there() -> bool:
        return first_block.exists() if stage == "candidates" else ranks_of_the_reference_pass(below.children(recursive=True), output) > 0

    wait_for(is_there)
    job.send_signal(signal.SIGTERM)
    started = time.monotonic()
    out, errors = job.communicate(timeout=120)
    assert job.returncode == 75 and time.monotonic() - started < 30, out + errors
    assert not list(output.rglob(".*tmp-*"))
    code, out, errors = run(work, output)
    assert code == 0, out + errors
    assert_same(output, plain)


def assert_same(output: Path, plain: Path) -> None:
    for name in MADE:
        assert (output / name).read_bytes() == (plain / name).read_bytes(), name
    assert np.abs(np.load(output / "train.ref.npy") - np.load(plain / "train.ref.npy")).max() < 1e-4  # nats a response: another layout


def sbatch(work: Path, output: Path, slurm: dict[str, str], script: Path, cwd: Path, **more: str) -> tuple[int, str]:
    """Submit to both nodes and wait; exit code and what the job wrote in the folder it was submitted from."""
    cwd.mkdir(exist_ok=True)
    command = ["sbatch", "--wait", "--parsable", "-N", "2", str(script)]
    done = subprocess.run(command, env=environment(work, output, slurm | more), cwd=cwd, capture_output=True, text=True, timeout=300)
    written = cwd / f"slurm-lpo-data-{done.stdout.strip()}.out"
    return done.returncode, done.stderr + (written.read_text() if written.exists() else f"no {written}")


def test_two_nodes_make_the_same(work: Path, plain: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    repository = work / "repository"
    code, shown = sbatch(work, tmp_path / "out", slurm, JOB, repository)
    assert code == 0, shown
    assert "2 node(s), 0 GPU(s) each" in shown and "2 shard(s)" in shown and "2 processes, TP 1 x PP 1 x CP 1 x DP 2" in shown
    assert_same(tmp_path / "out", plain)
    code, shown = sbatch(work, tmp_path / "out", slurm, JOB, repository)
    assert code == 0 and shown.count("kept") == 9, shown  # both shards of candidates, and their merge


@pytest.mark.full
@pytest.mark.parametrize("stage", ["candidates", "reference_logps"])
def test_preempted_by_slurm(work: Path, plain: Path, slurm: dict[str, str], tmp_path: Path, stage: str) -> None:
    """SIGTERM to every process of the step, and to nobody else: the job leaves, goes back into the queue and makes the same."""
    output = tmp_path / "out"

    def told(*words: str) -> str:
        where = environment(work, output, slurm)
        return subprocess.run(words, env=where, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout

    job = told("sbatch", "--parsable", "-N", "2", str(work / "repository" / JOB)).strip()
    first_block = output / "candidates.jsonl.blocks/000000.jsonl"
    wait_for(first_block.exists if stage == "candidates" else lambda: ranks_of_the_reference_pass(psutil.process_iter(), output) == 2)
    told("sbatch", "--partition=urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_for(lambda: "Restarts=1" in told("scontrol", "show", "job", job))
    assert "DUE TO PREEMPTION" not in (shown := (tmp_path / f"slurm-lpo-data-{job}.out").read_text()), shown  # it did not wait to be ended
    wait_for(lambda: "JobState=COMPLETED" in told("scontrol", "show", "job", job), seconds=300)
    assert_same(output, plain)


@pytest.mark.parametrize("place", ["its own folder", "an absolute path"])
def test_submitted_from_elsewhere(work: Path, slurm: dict[str, str], tmp_path: Path, place: str) -> None:
    """SLURM runs a copy in its spool; the first test submits from the repository's root."""
    script = work / "repository" / JOB
    where, name = (script.parent, Path(script.name)) if place == "its own folder" else (tmp_path / "elsewhere", script)
    code, shown = sbatch(work, tmp_path / "out", slurm, name, where, STAGES="normalise")
    assert code == 0 and "150 records read" in shown, shown


def test_a_job_s_exit_code(work: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("[]")
    code, shown = sbatch(work, tmp_path / "out", slurm, work / "repository" / JOB, tmp_path, INPUT=str(tmp_path / "bad.jsonl"))
    assert code == 2 and "[error] normalise" in shown, shown
