"""``--dry-run`` of the run script: what a job would be, from a config.json and from data, and what would fit where it does not."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import jobs

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests/data/qwen2_5_configs"
_SPEC = importlib.util.spec_from_file_location("layout_table", ROOT / "scripts/layout_table.py")
assert _SPEC and _SPEC.loader
layout_table: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(layout_table)
GIB = 2**30


def plan(output: Path, *flags: object, code: int = 0, **environment: str) -> list[str]:
    """What the terminal shows; nothing is written."""
    command = ["bash", str(jobs.SCRIPT), *map(str, flags), "--dry-run"]
    given = {**jobs.environment(output, **environment), "DEVICE": environment.get("DEVICE", "auto")}
    job = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300)
    assert job.returncode == code and not job.stderr and not output.exists(), job.stdout + job.stderr
    return job.stdout.splitlines()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that has Qwen2.5 7B's config.json and nothing else."""
    (tmp_path / "7B").mkdir()
    (tmp_path / "7B/config.json").write_text((CONFIGS / "7B.json").read_text())
    return tmp_path / "7B"


@pytest.mark.ci
def test_a_plan_for_gpus_that_are_not_here(tmp_path: Path, model: Path) -> None:
    lines = plan(tmp_path / "run", "--hf-path", model, "--global-batch-size", 64, GPU_MEMORY_GB="80", NNODES="2", TP="4")
    assert lines[0] == "[plan] model: 7,615,616,512 parameters, 28 layers, hidden size 3584, vocabulary 152,064, untied"
    assert lines[1].startswith("[plan] layout: 16 processes, TP 4 x PP 1 x CP 1 x DP 4, bfloat16, --sequence-parallel, --use-distributed")
    assert lines[2].startswith("[plan] a step: 64 samples, 16 on each data-parallel rank")
    numbers = re.findall(r"[\d,.]+", lines[4].partition("stage 0")[2])
    weights, gradients, optimizer, activations, logits, update, total, parameters = (float(number.replace(",", "")) for number in numbers)
    config = json.loads((CONFIGS / "7B.json").read_text())
    norms = config["hidden_size"] * (2 * config["num_hidden_layers"] + 1)
    assert parameters == pytest.approx((7_615_616_512 - norms) / 4 + norms)  # norms are on every rank
    assert weights == pytest.approx(2 * parameters / GIB, abs=0.01) and gradients == pytest.approx(4 * parameters / GIB, abs=0.01)
    assert optimizer == pytest.approx(12 * parameters / 4 / GIB, abs=0.02) and update == pytest.approx(optimizer / 3, abs=0.01)
    assert total == pytest.approx(weights + gradients + optimizer + max(activations + logits, update), abs=0.03) and total < 72
    assert lines[-1] == "[plan] nothing was started (--dry-run)"


@pytest.mark.ci
def test_what_does_not_fit_is_refused_with_what_does(tmp_path: Path, model: Path) -> None:
    """The first one offered is then accepted."""
    flags = ("--hf-path", model, "--global-batch-size", 64)
    *_, error = plan(tmp_path / "run", *flags, code=2, GPU_MEMORY_GB="80")
    assert error.startswith("[error] --gpu-memory-gb 80: a rank needs ")
    tp, pp, needed = re.search(r"TP=(\d) PP=(\d) needs ([\d.]+) GiB", error).groups()
    assert float(needed) <= 72
    *_, stage, _ = plan(tmp_path / "run", *flags, GPU_MEMORY_GB="80", TP=tp, PP=pp)
    assert f"{float(needed):.1f}" == f"{float(re.search(r'([0-9.]+)   [0-9,]+ parameters', stage)[1]):.1f}"


@pytest.mark.full
def test_too_few_processes_are_refused_with_how_many_would_do(tmp_path: Path, model: Path) -> None:
    """The number offered is then accepted, and half of it is not."""
    flags, gpu = ("--hf-path", model, "--global-batch-size", 64), {"GPU_MEMORY_GB": "24"}
    *_, error = plan(tmp_path / "run", *flags, code=2, NPROC_PER_NODE="1", **gpu)
    found = re.search(r"no layout of so many processes fits: (\d+) with TP=(\d) PP=(\d) (--recompute.*) need ([\d.]+) GiB each$", error)
    assert found, error
    processes, tp, pp, recompute, needed = found.groups()
    *_, stage, _ = plan(tmp_path / "run", *flags, *recompute.split(), NPROC_PER_NODE=processes, TP=tp, PP=pp, **gpu)
    assert float(needed) == pytest.approx(float(re.search(r"([0-9.]+)   [0-9,]+ parameters", stage)[1]), abs=0.06) and float(needed) <= 21.6
    *_, error = plan(tmp_path / "run", *flags, code=2, NPROC_PER_NODE=str(int(processes) // 2), **gpu)
    assert "no layout of so many processes fits" in error


@pytest.mark.full
def test_one_layer_is_recomputed_at_a_time_in_blocks_too(tmp_path: Path, model: Path) -> None:
    """Blocks of all layers are what units of one layer are."""
    flags = ("--hf-path", model, "--global-batch-size", 64, "--recompute-granularity", "full")
    plans = [
        plan(tmp_path / "run", *flags, "--recompute-method", *method, GPU_MEMORY_GB="80", NPROC_PER_NODE="8", TP="4")
        for method in (("uniform", "--recompute-num-layers", 1), ("block", "--recompute-num-layers", 28))
    ]
    assert plans[0] == plans[1]


@pytest.mark.full
def test_no_more_micro_batches_are_kept_than_a_step_has(tmp_path: Path, model: Path) -> None:
    """Four stages: the first keeps four where a step has as many, one where it has one."""
    kept = {}
    for batch in (4, 1):
        lines = plan(tmp_path / "run", "--hf-path", model, "--global-batch-size", batch, GPU_MEMORY_GB="160", NPROC_PER_NODE="4", PP="4")
        kept[batch] = float(next(line for line in lines if "] stage 0" in line).split("|")[1].split()[0])
    assert kept[4] == pytest.approx(4 * kept[1], rel=0.01)


@pytest.mark.ci
@pytest.mark.parametrize("flags", [("--optimizer", "sgd"), ("--use-precision-aware-optimizer",)])
def test_what_is_not_counted_is_refused(tmp_path: Path, model: Path, flags: tuple[str, ...]) -> None:
    (error,) = plan(tmp_path / "run", "--hf-path", model, *flags, code=2, GPU_MEMORY_GB="80")
    assert f"--dry-run does not count what {flags[0]} makes" in error


@pytest.mark.full
def test_a_plan_knows_the_data(tmp_path: Path) -> None:
    work = jobs.make_materials(tmp_path / "work")
    flags = ("--hf-path", work / "model", "--pair-data", work / "sft", "--global-batch-size", 8, "--lr-warmup-iters", 1)
    lines = plan(tmp_path / "run", *flags, "--train-iters", 12, "--max-tokens-per-micro-batch", 100, PRESET="sft", DEVICE="cpu")
    assert re.fullmatch(
        r"\[plan\] a step: 8 samples, 8 on each data-parallel rank, [\d,]+ tokens, in \d( to \d)? micro-batches of up to 100; "
        r"12 steps, 48 samples in the stores", lines[2],
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(("size", "gpus"), [("0.5B", 1), ("3B", 1), ("7B", 2), ("7B", 8), ("32B", 16)])
def test_the_table_in_the_readme_is_what_the_script_prints(size: str, gpus: int) -> None:
    """One cell of each kind; all of them take twenty minutes."""
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {size} |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    found = layout_table.asked(CONFIGS / f"{size}.json", gpus, 80)
    assert cells[1 + layout_table.GPUS.index(gpus)] == layout_table.shown(found)
