"""Any checkpoint, from any layout to any, as a Hugging Face folder that transformers reads as the model that was trained."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_patch.checkpoint import saved
from tests.distributed import harness
from tests.distributed.materials import Bench, tensors

EXPORT = harness.ROOT / "scripts/export_hf.py"
pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def trained(bench: Bench) -> Path:
    """Ten steps at TP 2 x PP 2 in bfloat16 with a checkpoint after the fifth, exported at the end."""
    return bench.train("tp2-pp2-sp", bench.reference(), "--bf16", "--allow-reference-mismatch", "--save-interval", 5, alter="recorded")


def export(bench: Bench, layout: str, run: Path, *flags: object, alter: str = "") -> tuple[harness.Run, Path]:
    """scripts/export_hf.py at a layout, and where it was told to write."""
    to = bench.folder(f"export-{layout}")
    return bench.launch(layout, EXPORT, [run, "--to", to, *flags], Path(f"{to}.log"), alter), to


@pytest.mark.parametrize("layout", ["one", "tp2-sp", "pp2", *(pytest.param(name, marks=pytest.mark.full) for name in ("vpp2", "cp2"))])
def test_the_last_checkpoint_is_the_exported_model(bench: Bench, trained: Path, layout: str) -> None:
    """Bit for bit what the training run wrote from its own ranks, in its precision, and checked with transformers."""
    run, to = export(bench, layout, trained)
    assert run.ok, run.output[-4000:]
    found, wanted = tensors(to), tensors(trained / "hf")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    (difference,) = re.findall(r"\[export\] parity with transformers: (\S+) nats per token on 8 samples", run.output)
    assert float(difference) <= 5e-2


def test_without_a_launcher(bench: Bench, trained: Path) -> None:
    """As its own first line says."""
    to = bench.folder("export-alone")
    told = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in told}
    command = [sys.executable, EXPORT, trained, "--to", to, "--device", "cpu", "--no-parity-check"]
    done = subprocess.run(command, cwd=harness.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"[export] step 10 of {trained}: {to}" in done.stdout, done.stdout + done.stderr
    assert all(torch.equal(tensor, tensors(trained / "hf")[name]) for name, tensor in tensors(to).items())


def test_an_earlier_checkpoint(bench: Bench, trained: Path) -> None:
    run, to = export(bench, "one", trained, "--step", 5)
    assert run.ok and f"[export] step 5 of {trained}: {to}" in run.output, run.output[-4000:]
    assert any(not torch.equal(tensor, tensors(trained / "hf")[name]) for name, tensor in tensors(to).items())


def test_an_export_that_is_not_the_model_is_found(bench: Bench) -> None:
    """One bias left out: transformers computes something else than the ranks that wrote it."""
    save = bench.folder("wrong-export")
    run = bench.attempt("tp2", save, bench.reference(), alter="wrong_export")
    (error,) = run.errors
    assert 2 in run.codes and "transformers' log-probs of this export differ from the model's" in error
    assert not (save / "hf").exists() and (save / "hf.rejected/model.safetensors").exists()  # nobody takes it for the model


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        ("too_large", "the export was not compared with transformers: one process would need too much memory or time for it"),
        ("two_samples", "nats per token on 2 samples of the export"),
    ],
)
def test_a_model_that_one_process_can_hardly_score(bench: Bench, trained: Path, alter: str, said: str) -> None:
    """It is exported all the same, and nothing is loaded that is not afforded."""
    run, to = export(bench, "one", trained, alter=alter)
    assert run.ok and said in run.output and (to / "model.safetensors").exists(), run.output[-4000:]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--step", 7), "no checkpoint of step 7; there are 10, 5"),
        (("--best",), "best.json: the best evaluation of a run with --best-metric is missing"),
    ],
)
def test_a_checkpoint_that_is_not_there(bench: Bench, trained: Path, flags: tuple[object, ...], complaint: str) -> None:
    run, to = export(bench, "one", trained, *flags)
    (error,) = run.errors
    assert run.codes == [2] and complaint in error and not to.exists()
    assert saved.steps(trained) == [10, 5]
