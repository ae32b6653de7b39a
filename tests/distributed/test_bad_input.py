"""A user's mistake: one line that names what and where, exit code 2, every rank gone, nothing half-written."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.distributed import harness
from tests.distributed.materials import LAYOUTS, Bench, copy_store, make_store, tensors

TRAIN, REFERENCE = harness.TRAIN, harness.REFERENCE


@dataclass(frozen=True)
class Mistake:
    """Flags (they stand last, so they win) and what the error line must hold."""

    flags: tuple[object, ...]
    says: tuple[str, ...]


def _model_without(bench: Bench, name: str) -> Path:
    folder = bench.folder("incomplete-model")
    folder.mkdir()
    (folder / "config.json").write_text((bench.models["tied"] / "config.json").read_text())
    save_file({key: tensor for key, tensor in tensors(bench.models["tied"]).items() if key != name}, folder / "model.safetensors")
    return folder


def _truncated(bench: Bench) -> Path:
    prefix = copy_store(bench.pairs, bench.folder("truncated"))
    data = Path(f"{prefix}.bin")
    os.truncate(data, data.stat().st_size - 1)
    return prefix


def _preset(bench: Bench, text: str) -> str:
    path = bench.folder("preset.args")
    path.write_text(text)
    return f"@{path}"


def unknown_loss(bench: Bench) -> Mistake:
    """A name close to a real one is suggested."""
    return Mistake(("--loss-type", "lpo-stee"), ("unknown loss 'lpo-stee'", "did you mean lpo-ste?"))


def option_of_another_loss(bench: Bench) -> Mistake:
    """Only because the user gave it."""
    return Mistake(("--loss-type", "sigmoid", "--r2", 0.5), ("sigmoid", "r2", "0.5"))


def heads_not_divisible(bench: Bench) -> Mistake:
    """4 heads at TP 3."""
    return Mistake(("--tensor-model-parallel-size", 3), ("4", "3", "heads"))


def missing_weights(bench: Bench) -> Mistake:
    """One tensor of layer 2 removed."""
    name = "model.layers.2.mlp.down_proj.weight"
    folder = _model_without(bench, name)
    return Mistake(("--hf-path", folder), (str(folder), name))


def truncated_store(bench: Bench) -> Mistake:
    """One byte less."""
    prefix = _truncated(bench)
    return Mistake(("--pair-data", prefix), (f"{prefix}.bin", "bytes"))


def missing_store(bench: Bench) -> Mistake:
    """A prefix that does not exist."""
    return Mistake(("--pair-data", bench.root / "nowhere/pairs"), ("nowhere/pairs.json",))


def store_of_another_kind(bench: Bench) -> Mistake:
    """Fine-tuning data where pairs are needed."""
    return Mistake(("--pair-data", bench.sft), ("sft.json", "kind"))


def malformed_preset(bench: Bench) -> Mistake:
    """A quote that is never closed."""
    preset = _preset(bench, "--lr 1e-3\n--beta '0.2\n")
    return Mistake((preset,), (preset[1:], "quotation"))


def unknown_flag_in_preset(bench: Bench) -> Mistake:
    """A flag nobody knows."""
    preset = _preset(bench, "--learning-speed 1e-3  # a comment\n")
    return Mistake((preset,), ("--learning-speed",))


def missing_preset(bench: Bench) -> Mistake:
    """The file is not there."""
    return Mistake(("@nowhere/math.args",), ("nowhere/math.args",))


def missing_model(bench: Bench) -> Mistake:
    """A folder without config.json."""
    return Mistake(("--hf-path", bench.root / "nowhere"), ("--hf-path", "nowhere/config.json"))


def wrong_tokenizer(bench: Bench) -> Mistake:
    """The model's folder has a tokenizer, and the store was made with another one."""
    folder = bench.folder("with-tokenizer")
    shutil.copytree(bench.models["tied"], folder)
    make_tokenizer = runpy.run_path(str(harness.ROOT / "scripts/make_tiny_qwen.py"))["make_tokenizer"]
    make_tokenizer(["one and two are three"], 400, "You count.").save_pretrained(folder)
    return Mistake(("--hf-path", folder), ("another tokenizer", f"{bench.pairs.name}.json"))


def pair_too_long(bench: Bench) -> Mistake:
    """The longest pair has 80 tokens, its prompt counted twice."""
    return Mistake(("--max-tokens-per-micro-batch", 79), ("p001", "80", "79", "--max-tokens-per-micro-batch"))


def token_outside_vocabulary(bench: Bench) -> Mistake:
    """Ids of a larger vocabulary, in a store that does not say with which tokenizer it was made."""
    prefix = make_store(bench.folder("large-ids") / "pairs", "pairs", vocabulary=600)
    return Mistake(("--pair-data", prefix, "--tensor-model-parallel-size", 2), ("token id", "501", str(prefix)))


def missing_reference(bench: Bench) -> Mistake:
    """The reference pass was forgotten."""
    return Mistake(("--pair-data", bench.pairs), (f"{bench.pairs}.ref.json",))


def not_a_number(bench: Bench) -> Mistake:
    """argparse's own complaint."""
    return Mistake(("--lr", "fast"), ("--lr", "fast"))


def upstream_refuses(bench: Bench) -> Mistake:
    """An assertion of megatron-core about flags."""
    return Mistake(("--bf16", "--fp16"), ("megatron-core refuses",))


def too_few_ranks(bench: Bench) -> Mistake:
    """2 stages on one process."""
    return Mistake(("--pipeline-model-parallel-size", 2), ("1 processes", "--pipeline-model-parallel-size 2"))


def odd_ranks_for_context(bench: Bench) -> Mistake:
    """3 processes cannot be cut into groups of 2 that share their sequences."""
    return Mistake(("--context-parallel-size", 2), ("3 processes", "--context-parallel-size 2"))


def no_data(bench: Bench) -> Mistake:
    """A weight without a prefix."""
    return Mistake(("--pair-data", "0.5"), ("0.5", "prefix"))


def warm_up_longer_than_the_run(bench: Bench) -> Mistake:
    """A preset's warm-up on a short run."""
    return Mistake(("--lr-warmup-iters", 66, "--lr-decay-iters", 10), ("--lr-warmup-iters 66", "10"))


def indivisible_batch(bench: Bench) -> Mistake:
    """3 pairs a step over 2 data-parallel ranks."""
    return Mistake(("--global-batch-size", 3), ("--global-batch-size 3", "2 data-parallel ranks"))


def plan_of_a_pass(bench: Bench) -> Mistake:
    """Only training has plans; nothing is computed that was not asked for."""
    return Mistake(("--dry-run",), ("--dry-run is for training",))


BOTH: list[tuple[Callable[[Bench], Mistake], int]] = [
    (heads_not_divisible, 3), (missing_weights, 2), (truncated_store, 2), (missing_store, 1), (store_of_another_kind, 1),
    (malformed_preset, 1), (unknown_flag_in_preset, 1), (missing_preset, 1), (missing_model, 2), (pair_too_long, 2), (upstream_refuses, 1),
    (not_a_number, 1), (too_few_ranks, 1), (odd_ranks_for_context, 3), (no_data, 1), (wrong_tokenizer, 2),
]  # fmt: skip
TRAIN_ONLY: list[tuple[Callable[[Bench], Mistake], int]] = [
    (unknown_loss, 2),
    (option_of_another_loss, 1),
    (missing_reference, 2),
    (indivisible_batch, 2),
    (warm_up_longer_than_the_run, 1),
]
CASES = [pytest.param(TRAIN, *case, id=f"train-{case[0].__name__}") for case in BOTH + TRAIN_ONLY]
REFERENCE_ONLY: list[tuple[Callable[[Bench], Mistake], int]] = [(token_outside_vocabulary, 2), (plan_of_a_pass, 1)]
CASES += [pytest.param(REFERENCE, *case, id=f"reference-{case[0].__name__}") for case in BOTH + REFERENCE_ONLY]


def assert_one_line(run: harness.Run, says: tuple[str, ...]) -> None:
    """Exit code 2 everywhere, one distinct error line with all of ``says``, no traceback, all ranks gone at once."""
    assert set(run.codes) == {2}, run.output[-4000:]
    (line,) = run.errors
    assert all(word in line for word in says), line
    assert "Traceback" not in run.output
    assert run.seconds_to_end < 10


@pytest.mark.parametrize(("entry", "mistake", "ranks"), CASES)
def test_mistake_is_one_line(bench: Bench, entry: Path, mistake: Callable[[Bench], Mistake], ranks: int) -> None:
    """Both entries, on as many ranks as the mistake needs."""
    made = mistake(bench)
    save = bench.folder("refused")
    data = bench.reference() if entry == TRAIN else copy_store(bench.pairs, bench.folder("to-score"))
    argv = [*bench.flags(data), "--save", save, "--export-hf", save / "hf"] if entry == TRAIN else bench.reference_flags("tied", data)
    before = sorted(data.parent.iterdir())
    run = harness.launch(ranks, entry, [*argv, *made.flags], Path(f"{save}.log"), {"LPO_TRACEBACK": ""})
    assert_one_line(run, made.says)
    assert sorted(data.parent.iterdir()) == before
    assert not list(save.rglob("*.safetensors")) and not list(save.glob("iter_*")) and not (save / "metrics.jsonl").exists()


@pytest.mark.parametrize("entry", [TRAIN, REFERENCE])
def test_missing_hf_path(bench: Bench, entry: Path) -> None:
    """The one flag that everything else follows from."""
    run = harness.launch(1, entry, ["--pair-data", bench.pairs], bench.folder("no-hf-path"), {"LPO_TRACEBACK": ""})
    assert_one_line(run, ("--hf-path is required",))


def test_finetune_with_missing_weights(bench: Bench) -> None:
    """No reference, no fingerprint: the import itself has to notice, on all ranks and in one line."""
    made, save = missing_weights(bench), bench.folder("refused")
    flags = [*bench.flags(bench.sft), "--train-mode", "finetune", *made.flags, "--save", save]
    assert_one_line(harness.launch(2, TRAIN, flags, Path(f"{save}.log"), {"LPO_TRACEBACK": ""}), made.says)


def test_export_never_overwrites(bench: Bench) -> None:
    """A --export-hf folder that holds something is refused before training, not after it."""
    save, taken = bench.folder("refused"), bench.models["other"]
    flags = [*bench.flags(bench.reference(), "--train-iters", 1), "--save", save, "--export-hf", taken]
    run = harness.launch(2, TRAIN, flags, Path(f"{save}.log"), {"LPO_TRACEBACK": ""})
    assert_one_line(run, (str(taken), "not overwritten"))
    assert not (save / "metrics.jsonl").exists()


def test_empty_tracker_is_refused(bench: Bench) -> None:
    """Upstream would leave with exit code 0, having trained nothing."""
    save = bench.folder("refused")
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("")
    flags = [*bench.flags(bench.reference()), "--save", save, "--load", save]
    run = harness.launch(1, TRAIN, flags, Path(f"{save}.log"), {"LPO_TRACEBACK": ""})
    assert_one_line(run, ("latest_checkpointed_iteration.txt names no checkpoint", "move it away"))
    assert json.loads((save / "run_state.json").read_text())["state"] == "stopped"


@pytest.mark.ci
def test_torchrun_shows_the_line_and_ends(bench: Bench) -> None:
    """The real launcher: torchrun's own exit code is 1, the line is there once, and no rank is left behind."""
    made, save = pair_too_long(bench), bench.folder("torchrun")
    argv = [*bench.flags(bench.reference()), "--save", save, *made.flags]
    done, seconds = torchrun(2, TRAIN, argv)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "[error]" in line]
    assert done.returncode == 1 and len(lines) == 1 and all(word in lines[0] for word in made.says), done.stderr[-3000:]
    assert re.search(r"exitcode\s*:\s*2", done.stderr)
    assert seconds < 60


SLOW_SPEAKER = """
import os, time
from megatron_patch.entry import user_errors
with user_errors():
    time.sleep(3 * (os.environ["RANK"] == "0"))
    raise ValueError("on all ranks")
"""


@pytest.mark.ci
def test_torchrun_waits_for_the_rank_that_speaks(tmp_path: Path) -> None:
    """torchrun ends every rank when the first one leaves: that must not be a silent one."""
    entry = tmp_path / "entry.py"
    entry.write_text(SLOW_SPEAKER)
    done, _ = torchrun(2, entry, [])
    assert done.returncode == 1 and done.stderr.count("[error] on all ranks\n") == 1, done.stderr[-3000:]


@pytest.mark.ci
def test_torchrun_trains_as_the_harness_does(bench: Bench) -> None:
    """What all other tests rest on: forked ranks and torchrun's ranks compute the same."""
    flags = ("--train-iters", 2)
    save = bench.folder("torchrun")
    done, _ = torchrun(2, TRAIN, [*bench.flags(bench.reference(), *flags), *LAYOUTS["tp2-sp"][1], "--save", save])
    assert done.returncode == 0, done.stderr[-3000:]
    judge = harness.metrics(bench.train("tp2-sp", bench.reference(), *flags))
    assert [(row["loss"], row["grad_norm"]) for row in harness.metrics(save)] == [(row["loss"], row["grad_norm"]) for row in judge]


def torchrun(ranks: int, entry: Path, argv: list[object]) -> tuple[subprocess.CompletedProcess, float]:
    """torchrun as the README types it, and the seconds it took."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, entry, *argv]
    environment = {**os.environ, "PYTHONPATH": str(harness.ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("LPO_TRACEBACK", None)
    started = time.monotonic()
    done = subprocess.run(list(map(str, command)), cwd=harness.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return done, time.monotonic() - started
