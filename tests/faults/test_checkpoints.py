"""Checkpoints that were damaged, cut short or could not be written: the run goes on to the uninterrupted run's end, or says what to do.

The judge is a run that nothing happened to: losses and gradient norms of every step, and every exported tensor.
"""

import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_patch.checkpoint import saved
from tests.distributed import harness
from tests.distributed.materials import Bench, tensors
from tests.small_disk import resize, small_disk

SAVES = ("--save-interval", 3)  # of ten steps: after 3, 6, 9 and 10

ASYNCHRONOUS = ("--async-save",)


@pytest.fixture
def uninterrupted(bench: Bench) -> Path:
    """Ten steps in one process."""
    return bench.train("one", bench.reference(), *SAVES, alter="recorded")


def assert_same_end(save: Path, judge: Path) -> None:
    """Every step once, with the judge's numbers, and the judge's weights."""
    rows, expected = harness.metrics(save), harness.metrics(judge)
    assert [row["iteration"] for row in rows] == list(range(1, 11))
    for name in ("loss", "grad_norm", "learning_rate", "consumed_samples", "logps/chosen"):
        assert [row[name] for row in rows] == [row[name] for row in expected], name
    found, wanted = tensors(save / "hf"), tensors(judge / "hf")
    assert not [name for name, tensor in wanted.items() if not torch.equal(tensor, found[name])]


def killed_after(bench: Bench, whole: Path, last: int) -> Path:
    """What a run leaves that was killed after its save at step ``last``."""
    save = bench.folder(f"killed-after-{last}")
    save.mkdir()
    for step in saved.steps(whole):
        if step <= last:
            shutil.copytree(saved.folder_of(whole, step), saved.folder_of(save, step))
    saved.write_tracker(save, last)
    shutil.copy(whole / "metrics.jsonl", save)
    return save


def resume(bench: Bench, save: Path, *flags: object) -> harness.Run:
    """The same command again."""
    return bench.attempt("one", save, bench.reference(), *SAVES, "--load", save, *flags, alter="")


def truncate_largest(folder: Path) -> None:
    largest = max((file for file in folder.iterdir() if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def flip_a_bit(folder: Path) -> None:
    largest = max((file for file in folder.iterdir() if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@pytest.mark.ci
@pytest.mark.parametrize("harm", [truncate_largest, flip_a_bit, lambda folder: (folder / ".metadata").unlink()])
def test_damaged_newest_checkpoint(bench: Bench, uninterrupted: Path, harm: Callable[[Path], None]) -> None:
    """The one before it is used, the damaged one set aside and named."""
    save = killed_after(bench, uninterrupted, 6)
    harm(saved.folder_of(save, 6))
    run = resume(bench, save)
    assert run.ok, run.output[-4000:]
    assert_same_end(save, uninterrupted)
    assert (save / "iter_0000006.damaged").is_dir()
    assert "iter_0000006 cannot be used" in run.output and f"going on from {saved.folder_of(save, 3)}" in run.output


class Payload:
    """Pickled, it asks for a file to be made when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


def into_the_index(folder: Path, payload: Payload) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def into_an_object(folder: Path, payload: Payload) -> None:
    """In place of every small object that lies among the tensors."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = FileSystemReader(folder).read_metadata()
    written = io.BytesIO()
    torch.save(payload, written)
    for key, place in index.storage_data.items():
        if isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata):
            file = folder / place.relative_path
            index.storage_data[key] = dataclasses.replace(place, offset=file.stat().st_size, length=len(written.getvalue()))
            file.write_bytes(file.read_bytes() + written.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def into_a_ranks_index(folder: Path, payload: Payload) -> None:
    """Which torch reads where the other cannot be read."""
    (folder / "__0.metadata").write_bytes(pickle.dumps(payload))
    (folder / ".metadata").write_bytes(pickle.dumps(None))


@pytest.mark.parametrize("put", [into_the_index, into_a_ranks_index, into_an_object])
def test_code_in_a_checkpoint_does_not_run(bench: Bench, uninterrupted: Path, put: Callable[[Path, Payload], None]) -> None:
    """Its checksums are right: whoever wrote the code wrote those too."""
    save = killed_after(bench, uninterrupted, 6)
    canary = save / "canary"
    put(saved.folder_of(save, 6), Payload(canary))
    saved.write_manifest(saved.folder_of(save, 6))
    run = resume(bench, save)
    assert not canary.exists()
    if put is not into_an_object:
        assert run.ok and "it names posix.system" in run.output and (save / "iter_0000006.damaged").is_dir()
    else:
        assert not run.ok and "Weights only load failed" in run.output


@pytest.mark.parametrize("flag", ["--use-checkpoint-args", "--pretrained-checkpoint"])
def test_code_does_not_run_whoever_reads_it_first(bench: Bench, uninterrupted: Path, flag: str) -> None:
    """These flags are refused, but the first is followed while flags are parsed."""
    other = killed_after(bench, uninterrupted, 3)
    canary = other / "canary"
    into_the_index(saved.folder_of(other, 3), Payload(canary))
    saved.write_manifest(saved.folder_of(other, 3))
    flags = ("--load", other, flag) if flag == "--use-checkpoint-args" else (flag, other)
    run = bench.attempt("one", bench.folder("reads-anothers"), bench.reference(), *flags, alter="")
    assert not run.ok and not canary.exists(), run.output[-4000:]


@pytest.mark.ci
def test_another_run_is_not_gone_on_with(bench: Bench, uninterrupted: Path) -> None:
    """The same folder with another model: its export would be the old one's."""
    save = killed_after(bench, uninterrupted, 6)
    run = bench.attempt("one", save, bench.reference("other"), *SAVES, "--load", save, model="other", alter="")
    (error,) = run.errors
    assert run.codes == [2] and f"{save} holds the checkpoints of another run: it began with other weights" in error
    assert saved.steps(save) == [6, 3] and not (save / "hf").exists()


def test_empty_tracker(bench: Bench, uninterrupted: Path) -> None:
    """Upstream would leave with exit code 0, having trained nothing."""
    save = killed_after(bench, uninterrupted, 6)
    (save / saved.TRACKER).write_text("")
    run = resume(bench, save)
    assert run.ok and "names no checkpoint" in run.output, run.output[-4000:]
    assert_same_end(save, uninterrupted)
    assert "step 7/10" in run.output and "step 6/10" not in run.output


def test_killed_between_manifest_and_tracker(bench: Bench, uninterrupted: Path) -> None:
    """The first save of all was complete but for its tracker."""
    save = killed_after(bench, uninterrupted, 3)
    (save / saved.TRACKER).unlink()
    run = resume(bench, save)
    assert run.ok and "step 3/10" not in run.output, run.output[-4000:]
    assert_same_end(save, uninterrupted)


def test_save_killed_half_way(bench: Bench, uninterrupted: Path) -> None:
    """A folder newer than the tracker says, without its end: the run before it goes on and writes over it."""
    save = bench.folder("killed-while-saving")
    run = bench.attempt("one", save, bench.reference(), *SAVES, alter="killed_while_saving")
    assert run.codes == [-signal.SIGKILL] and saved.steps(save) == [6, 3] and saved.tracked_step(save) == 3
    assert not (saved.folder_of(save, 6) / saved.MANIFEST).exists()
    run = resume(bench, save)
    assert run.ok, run.output[-4000:]
    assert_same_end(save, uninterrupted)
    assert saved.damage(saved.folder_of(save, 6)) is None


@pytest.mark.ci
def test_no_checkpoint_is_whole(bench: Bench, uninterrupted: Path) -> None:
    """Nothing is trained from the start in silence."""
    save = killed_after(bench, uninterrupted, 3)
    truncate_largest(saved.folder_of(save, 3))
    run = resume(bench, save)
    assert run.codes == [2] and run.errors == {line for line in run.errors if "is whole: move it away to start anew" in line}
    assert saved.steps(save) == [3] and not (save / "hf").exists()


def test_another_runs_damaged_checkpoint_is_refused_and_left(bench: Bench, uninterrupted: Path) -> None:
    """``--load`` of a folder that is not this run's."""
    other, save = killed_after(bench, uninterrupted, 6), bench.folder("loads-anothers")
    truncate_largest(saved.folder_of(other, 6))
    run = bench.attempt("one", save, bench.reference(), *SAVES, "--load", other, alter="")
    (error,) = run.errors
    assert run.codes == [2] and "--ckpt-step" in error and "iter_0000006" in error
    assert saved.steps(other) == [6, 3]
    run = bench.attempt("one", save, bench.reference(), *SAVES, "--load", other, "--ckpt-step", 3, alter="")
    assert run.ok, run.output[-4000:]
    judge = [row["loss"] for row in harness.metrics(uninterrupted)][3:]
    assert [row["loss"] for row in harness.metrics(save)] == judge
    shutil.rmtree(saved.folder_of(save, 10))  # as if it had been preempted after step 9, and is started again with the same command
    saved.write_tracker(save, 9)
    run = bench.attempt("one", save, bench.reference(), *SAVES, "--load", other, "--ckpt-step", 3, alter="")
    assert run.ok and f"{save} has checkpoints of this run, so --load {other} is not used" in run.output, run.output[-4000:]
    assert [row["loss"] for row in harness.metrics(save)] == judge and "step 9/10" not in run.output


def test_a_folder_to_load_from_that_has_nothing(bench: Bench, uninterrupted: Path) -> None:
    """A typo: nothing is trained from the initial weights in silence. A step of one's own folder would be gone back to at each start."""
    save = killed_after(bench, uninterrupted, 6)
    for flags, words in (
        (("--load", bench.folder("typo")), ("--load", "no checkpoint is there")),
        (("--load", save, "--ckpt-step", 3), ("--ckpt-step", f"into {save}/{saved.TRACKER}")),
        (("--load", save, "--finetune"), ("--finetune", f"into {save}/{saved.TRACKER}")),
    ):
        run = bench.attempt("one", save if save in flags else bench.folder("fresh"), bench.reference(), *SAVES, *flags, alter="")
        (error,) = run.errors
        assert run.codes == [2] and all(word in error for word in words), error


def test_a_folder_with_checkpoints_is_not_written_over(bench: Bench, uninterrupted: Path) -> None:
    """Without ``--load`` a run would start anew and write its checkpoints over those that are there."""
    save = killed_after(bench, uninterrupted, 3)
    run = bench.attempt("one", save, bench.reference(), *SAVES, alter="")
    (error,) = run.errors
    assert run.codes == [2] and f"--load {save}" in error and saved.damage(saved.folder_of(save, 3)) is None


def test_a_finished_run_started_again_leaves_its_checkpoints(bench: Bench, uninterrupted: Path) -> None:
    """Nothing is left to train: the last checkpoint is not written over, the export is the same."""
    save = killed_after(bench, uninterrupted, 10)
    before = {file: file.stat().st_mtime_ns for file in saved.folder_of(save, 10).iterdir()}
    run = resume(bench, save)
    assert run.ok, run.output[-4000:]
    assert_same_end(save, uninterrupted)
    assert {file: file.stat().st_mtime_ns for file in saved.folder_of(save, 10).iterdir()} == before


@pytest.mark.ci
@pytest.mark.parametrize("layout", ["one", pytest.param("dp2-do", marks=pytest.mark.full)])
def test_asynchronous_saves_overlap_with_steps(bench: Bench, layout: str) -> None:
    """Steps end while the save before them is in flight, and are not in it: a run that was killed goes on from it as from any."""
    judge = bench.train(layout, bench.reference(), *SAVES, alter="recorded")
    flags = (*SAVES, *ASYNCHRONOUS)
    save = bench.folder(f"async-{layout}")
    run = bench.attempt(layout, save, bench.reference(), *flags, alter="slow_writing")
    assert run.ok, run.output[-4000:]
    assert_same_end(save, judge)
    assert not [step for step in (3, 6, 9, 10) if saved.damage(saved.folder_of(save, step))]
    for step in (3, 6) if layout == "one" else ():  # of several ranks the last one shows steps, the first one saves
        later = run.output.index(f"[xpo] step {step + 2}/10 ")
        assert later < run.output.index(f"saved checkpoint from iteration {step:7d}"), "the run waited for the save"
    later = killed_after(bench, save, 6)
    run = bench.attempt(layout, later, bench.reference(), *flags, "--load", later, alter="")
    assert run.ok, run.output[-4000:]
    assert_same_end(later, judge)


def test_newest_checkpoints_are_kept(bench: Bench) -> None:
    """``--keep-last 2`` of four; what stays is whole."""
    save = bench.train("dp2-do", bench.reference(), *SAVES, "--keep-last", 2, alter="recorded")
    assert saved.steps(save) == [10, 9]
    assert [saved.damage(saved.folder_of(save, step)) for step in (10, 9)] == [None, None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """With room for one checkpoint and a half."""
    with small_disk(tmp_path / "disk", "3500k") as folder:
        yield folder


@pytest.mark.ci
@pytest.mark.parametrize("layout", ["one", pytest.param("dp2-do", marks=pytest.mark.full)])
def test_disk_full_while_saving(bench: Bench, disk: Path, layout: str) -> None:
    """One line of all ranks that says so and what to do; the checkpoint before it stays whole; with more room the same command comes to
    the end."""
    save = disk / "run"
    flags = ("--tensorboard-dir", bench.folder("events"))
    run = bench.attempt(layout, save, bench.reference(), *SAVES, *flags, alter="late_to_clear_away")
    (error,) = run.errors
    assert set(run.codes) == {2} and "the checkpoint of step 6" in error, run.output[-4000:]
    assert "; 0 MiB were left on that disk" in error
    assert saved.tracked_step(save) == 3 and saved.steps(save) == [3] and saved.damage(saved.folder_of(save, 3)) is None
    resize(disk, "64m")
    run = bench.attempt(layout, save, bench.reference(), *SAVES, "--load", save, alter="")
    assert run.ok, run.output[-4000:]
    assert_same_end(save, bench.train(layout, bench.reference(), *SAVES, alter="recorded"))


def test_training_goes_on_after_a_save_that_failed(bench: Bench, uninterrupted: Path, disk: Path) -> None:
    """``--continue-on-save-failure``: the same numbers to the end, each failure in one line, the first checkpoint whole."""
    save = disk / "run"
    flags = ("--tensorboard-dir", bench.folder("events"), "--continue-on-save-failure")
    run = bench.attempt("one", save, bench.reference(), *SAVES, *flags, alter="")
    assert run.ok, run.output[-4000:]
    assert [row["loss"] for row in harness.metrics(save)] == [row["loss"] for row in harness.metrics(uninterrupted)]
    assert run.output.count(" MiB were left on that disk. Training goes on") == 3
    assert saved.tracked_step(save) == 3 and saved.steps(save) == [3] and saved.damage(saved.folder_of(save, 3)) is None
    assert all(torch.equal(tensor, tensors(save / "hf")[name]) for name, tensor in tensors(uninterrupted / "hf").items())


@pytest.mark.ci
def test_index_that_does_not_fit(bench: Bench) -> None:
    """Rank 0 alone writes it; the other rank does not wait for ever. Until then and afterwards each rank hashed what it wrote, once."""
    save = bench.folder("no-room-for-the-index")
    run = bench.attempt("dp2-do", save, bench.reference(), *SAVES, alter="unwritable_index,recorded_hashing")
    assert run.codes == [2, 2] and any("No space left on device" in line for line in run.errors), run.output[-4000:]
    assert saved.tracked_step(save) == 3 and saved.steps(save) == [3] and saved.damage(saved.folder_of(save, 3)) is None
    for rank in range(2):
        hashed = [json.loads(line) for line in Path(f"{save}.batches.{rank}").read_text().splitlines()]
        of_third = [name for name in hashed if name.startswith("iter_0000003/")]
        assert of_third and len(set(of_third)) == len(of_third)
        assert {name.split("__")[1].split("_")[0] for name in of_third if "__" in name} == {str(rank)}
    run = bench.attempt("dp2-do", save, bench.reference(), *SAVES, "--load", save, alter="")
    assert run.ok, run.output[-4000:]
    assert_same_end(save, bench.train("dp2-do", bench.reference(), *SAVES, alter="recorded"))


@pytest.mark.full
@pytest.mark.parametrize("flags", [(), ASYNCHRONOUS])
def test_tracker_that_cannot_be_written(bench: Bench, flags: tuple[str, ...]) -> None:
    """By rank 0 alone, while the other rank waits for it in another collective, at once or some steps later."""
    save = bench.folder("no-tracker")
    run = bench.attempt("dp2-do", save, bench.reference(), *SAVES, *flags, alter="unwritable_tracker")
    said = re.compile(r"the checkpoint of step (3 or )?6( or 9)? could not be saved")  # several may be under way
    assert run.codes == [2, 2] and any(map(said.search, run.errors)), run.output[-4000:]
    assert saved.tracked_step(save) == 3 and saved.damage(saved.folder_of(save, 3)) is None
    assert 6 not in saved.steps(save) or saved.damage(saved.folder_of(save, 6)) is None
    run = bench.attempt("dp2-do", save, bench.reference(), *SAVES, "--load", save, alter="")
    assert run.ok, run.output[-4000:]
    assert_same_end(save, bench.train("dp2-do", bench.reference(), *SAVES, alter="recorded"))
