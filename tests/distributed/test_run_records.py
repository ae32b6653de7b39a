"""What a run leaves behind: console, metrics.jsonl and TensorBoard say the same; evaluation is one full pass; passes resume."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_patch.checkpoint import saved
from megatron_patch.checkpoint.hf_files import weights_fingerprint
from megatron_patch.data.pair_store import PairStore
from tests.distributed import harness
from tests.distributed.materials import BATCH, PAIRS, Bench, copy_store, reference, response_lengths


@pytest.fixture(scope="module")
def evaluated(bench: Bench) -> tuple[Path, str]:
    """Four steps at PP 2 with an evaluation after the second and the fourth: save folder and output."""
    data, save = bench.reference(), bench.folder("evaluated")
    flags = ("--train-iters", 4, "--valid-pair-data", data, "--eval-interval", 2)
    run = bench.attempt("pp2", save, data, *flags)
    assert run.ok, run.output[-4000:]
    return save, run.output


def rows(save: Path) -> list[dict[str, float]]:
    """Every row of metrics.jsonl."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_console_shows_every_step_once_and_negative_values(evaluated: tuple[Path, str]) -> None:
    save, output = evaluated
    steps = re.findall(r"^\[xpo\] step (\d+)/4 \| (.*)$", output, flags=re.MULTILINE)
    assert [int(step) for step, _ in steps] == [1, 2, 3, 4]
    for (_, shown), row in zip(steps, harness.metrics(save), strict=True):
        assert f"rejected_logratio {row['lpo/rejected_logratio']:.4f}" in shown and f"loss {row['loss']:.4f}" in shown
        for name, unit in (("pairs_per_second", "samples/s"), ("tokens_per_second", "tokens/s"), ("seconds/data", "data")):
            (value,) = re.findall(rf"([\d.]+) {unit}(?:\W|$)", shown)
            assert float(value) == pytest.approx(row[name], abs=0.51), name
        assert row["imbalance"] >= 1 and row["peak_memory_bytes"] > 2**27
        parts = [row[f"seconds/{phase}"] for phase in ("data", "forward_backward", "optimizer", "other")]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(row["seconds"], rel=0.2)
    assert any("rejected_logratio -0." in shown or "chosen_logratio -0." in shown for _, shown in steps)


def test_tensorboard_has_what_the_file_has(evaluated: tuple[Path, str]) -> None:
    save, _ = evaluated
    events = EventAccumulator(str(save / "tensorboard")).Reload()
    speed = ("pairs_per_second", "tokens_per_second", "tflops_per_device", "peak_memory_bytes", "imbalance", "seconds", "seconds/data")
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "lpo/chosen_logratio", "lpo/anchor_active", *speed):
        written = {event.step: event.value for event in events.Scalars(name)}
        assert written == pytest.approx({row["iteration"]: row[name] for row in harness.metrics(save)}, rel=1e-6), name
    shown = {event.step: event.value for event in events.Scalars("eval_loss")}
    assert shown == pytest.approx({row["iteration"]: row["eval_loss"] for row in rows(save) if "eval_loss" in row}, rel=1e-6)


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The messages of a ``.wandb`` file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; checksum, length, type)."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.ci
def test_weights_and_biases_has_what_the_file_has(bench: Bench) -> None:
    """Offline: the run's own file."""
    from wandb.proto.wandb_internal_pb2 import Record

    save = bench.folder("wandb")
    flags = ("--train-iters", 2, "--wandb-project", "preferences")
    argv = [*bench.flags(bench.reference(), *flags), "--save", save]
    run = bench.launch("one", harness.TRAIN, argv, Path(f"{save}.log"), WANDB_MODE="offline", WANDB_SILENT="true")
    assert run.ok, run.output[-4000:]
    (file,) = save.glob("wandb/wandb/offline-run-*/*.wandb")
    history, names = dict[int, dict[str, float]](), set[str]()
    for record in map(Record.FromString, wandb_records(file.read_bytes())):
        if record.HasField("run"):
            names |= {record.run.project, record.run.display_name}
        if record.HasField("history"):
            values = {item.key or item.nested_key[-1]: json.loads(item.value_json) for item in record.history.item}
            history.setdefault(int(values["_step"]), {}).update(values)
    assert names >= {"preferences", save.name}
    for row in harness.metrics(save):
        for name in ("loss", "rewards/margins", "pairs_per_second", "tflops_per_device", "padding_fraction"):
            assert history[row["iteration"]][name] == pytest.approx(row[name], rel=1e-6), name


@pytest.mark.ci
def test_an_earlier_checkpoint_is_evaluated_and_nothing_is_written(bench: Bench) -> None:
    """``--skip-train`` says what training said after that step, and leaves the run's folder to training."""
    data, save = bench.reference(), bench.folder("evaluated-again")
    flags = ("--train-iters", 4, "--save-interval", 2, "--valid-pair-data", data, "--eval-interval", 2, "--best-metric", "eval_loss")
    trained = bench.attempt("one", save, data, *flags, alter="")
    assert trained.ok, trained.output[-4000:]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in save.rglob("*")}
    chosen = (*flags, "--load", save, "--skip-train", "--ckpt-step", 2)
    run = bench.launch("one", harness.TRAIN, bench.flags(data, *chosen), bench.folder("evaluation").with_suffix(".log"), "")
    said = re.compile(r"^\[xpo\] evaluation at step 2 .*$", re.MULTILINE)
    assert run.ok and said.findall(run.output) == said.findall(trained.output) != [], run.output[-4000:]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in save.rglob("*")} == before
    (error,) = bench.attempt("one", save, data, *chosen, alter="").errors
    assert "--skip-train only evaluates" in error


def test_evaluation_sees_every_pair_once_each_time(bench: Bench) -> None:
    """At learning rate 0 both evaluations equal the mean over the whole store, which the reference log-probs give directly."""
    data = bench.reference()
    save = bench.train("dp2", data, "--train-iters", 2, "--lr", 0.0, "--valid-pair-data", data, "--eval-interval", 1)
    evaluations = [row for row in rows(save) if "eval_loss" in row]
    assert [row["iteration"] for row in evaluations] == [1, 2]
    chosen, rejected = reference(data).mean(axis=0)
    for row in evaluations:
        assert row["eval_loss"] == pytest.approx(2.0, abs=1e-5)
        assert row["eval_logps/chosen"] == pytest.approx(chosen, rel=1e-6)
        assert row["eval_logps/rejected"] == pytest.approx(rejected, rel=1e-6)


def test_weighted_stores_give_exact_counts(bench: Bench) -> None:
    """3 : 1 over two copies of the store: an epoch of 96 positions holds 72 pairs of the first and 24 of the second."""
    data = bench.reference()
    other = copy_store(data, bench.folder("second-source"))
    flags = ("--pair-data", 3, data, 1, other, "--global-batch-size", 2 * PAIRS, "--train-iters", 1, "--lr", 0.0)
    save = bench.train("one", data, *flags, alter="unsaved,recorded_stores")
    stores = [name for line in Path(f"{save}.batches.0").read_text().splitlines() for name in json.loads(line)["stores"]]
    assert (stores.count(str(data)), stores.count(str(other))) == (72, 24)


def test_reference_pass_goes_on_where_it_stopped(bench: Bench) -> None:
    """What a partial result holds is kept, the rest is computed; a partial result of other weights is not trusted."""
    whole, prefix = bench.reference(), copy_store(bench.pairs, bench.folder("partial"))
    weights = weights_fingerprint(bench.models["tied"])
    for trusted in (weights, "other weights"):
        logps = np.full((PAIRS, 2), np.nan)
        logps[:20] = -1.0
        identity = f"{PairStore(prefix).fingerprint} {trusted} float32"
        np.savez(f"{prefix}.ref.partial.npz", logps=logps, identity=np.array(identity))
        flags = bench.reference_flags("tied", prefix, "--block-pairs", BATCH)
        run = harness.launch(1, harness.REFERENCE, flags, prefix.with_suffix(".log"))
        assert run.ok, run.output[-4000:]
        kept = 20 if trusted == weights else 0
        assert (reference(prefix)[:kept] == -1.0).all()
        worst = np.abs((reference(prefix) - reference(whole)) / response_lengths(prefix))[kept:].max()
        assert worst <= 1e-6
        assert not Path(f"{prefix}.ref.partial.npz").exists()


def test_the_best_checkpoint_is_kept_and_patience_ends_training(bench: Bench) -> None:
    """PP 2, so that not every rank has metrics. At a learning rate that is too high the first evaluation of the loss is the best."""
    data, save = bench.reference(), bench.folder("early-stop")
    flags = ["--train-iters", 30, "--lr", 0.3, "--loss-type", "sigmoid", "--valid-pair-data", data, "--eval-interval", 1]
    flags += ["--save-interval", 100, "--keep-last", 1, "--best-metric", "eval_loss"]
    flags += ["--early-stop-metric", "eval_loss", "--early-stop-patience", 2]
    run = bench.attempt("pp2", save, data, *flags, alter="")
    assert run.ok, run.output[-4000:]
    losses = {row["iteration"]: row["eval_loss"] for row in rows(save) if "eval_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 2 < 30 and "eval_loss got no better in 2 evaluations" in run.output
    assert json.loads((save / "best.json").read_text()) == {"step": best, "metric": "eval_loss", "value": losses[best]}
    assert saved.steps(save) == [best + 2, best] and json.loads((save / "run_state.json").read_text())["state"] == "finished"
    assert (save / "hf").is_dir()
    noted = rows(save)
    again = bench.attempt("pp2", save, data, *flags, "--load", save, alter="")
    assert rows(save) == noted
    assert again.ok and "nothing is left to train" in again.output and f"step {best + 3}/" not in again.output, again.output[-4000:]


def test_an_unknown_metric_is_named(bench: Bench) -> None:
    """All ranks leave with one line that has the names there are."""
    data, save = bench.reference(), bench.folder("unknown-metric")
    run = bench.attempt("pp2", save, data, "--valid-pair-data", data, "--eval-interval", 1, "--best-metric", "eval_accuracy")
    (error,) = run.errors
    assert set(run.codes) == {2} and "'eval_accuracy'" in error and "eval_rewards/accuracies" in error


def test_one_replica_reads_the_weights(bench: Bench) -> None:
    """The other receives them, and a run that goes on reads none; both say what it took."""
    save, flags = bench.folder("reads"), ("--save-interval", 2, "--no-parity-check")
    run = bench.attempt("dp2-do", save, bench.reference(), *flags, "--train-iters", 2, alter="recorded_reads")
    assert run.ok and re.search(r"\[xpo\] weights: [\d.]+ GiB of rank 0 read in [\d.]+ s, sent to its other replicas in", run.output)
    assert re.search(r"\[xpo\] fingerprint of the initial weights: [\d.]+ s", run.output)
    reads = Path(f"{save}.batches.0").read_text().splitlines()
    assert "model.embed_tokens.weight" in reads and not Path(f"{save}.batches.1").exists()
    run = bench.attempt("dp2-do", save, bench.reference(), *flags, "--train-iters", 3, "--load", save, alter="recorded_reads")
    assert run.ok and "[xpo] going on from the checkpoint of step 2 (checksums compared in" in run.output
    assert "[xpo] weights:" not in run.output
    assert Path(f"{save}.batches.0").read_text().splitlines() == reads and not Path(f"{save}.batches.1").exists()
