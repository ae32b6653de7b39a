"""What a run's saves do to the checkpoints that are there, with a stand-in for the save itself."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_patch.checkpoint import saved
from megatron_patch.checkpoint.saving import Saving
from megatron_patch.errors import AgreedError
from tests.unit.checkpoint.test_saved import make


@pytest.fixture(autouse=True)
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


def saving(folder, best=lambda: None, say=lambda line: None, **flags):
    """Of a run that began anew, unless flags say otherwise."""
    given = {"save": folder, "load": folder, "ckpt_step": None, "keep_last": None, "continue_on_save_failure": False, "iteration": 0}
    return Saving(Namespace(**{**given, "async_save": False, **flags}), best, say)


def test_a_step_is_saved_once(tmp_path):
    """The best evaluation and the end of training may ask for the same checkpoint."""
    written = []
    save = saving(tmp_path).guarded(lambda step: written.append(make(tmp_path, step)))
    for step in (5, 10, 10):
        save(step)
    assert [path.name for path in written] == ["iter_0000005", "iter_0000010"]


def test_a_save_that_failed_is_tried_again(tmp_path):
    def fails(step):
        raise OSError("no space")

    keeps = saving(tmp_path, continue_on_save_failure=True)
    make(tmp_path, 5)
    keeps.guarded(fails)(10)
    assert saved.steps(tmp_path) == [5] and saved.tracked_step(tmp_path) == 5
    keeps.guarded(lambda step: make(tmp_path, step))(10)
    assert saved.steps(tmp_path) == [10, 5] and saved.damage(saved.folder_of(tmp_path, 10)) is None


def test_only_the_save_that_failed_is_cleared_away(tmp_path, monkeypatch):
    """An asynchronous one, found to have failed later; a user had gone back to step 5, and what is newer stays."""
    for step in (5, 10, 15):
        make(tmp_path, step)
    saved.write_tracker(tmp_path, 5)
    keeps = saving(tmp_path, async_save=True, iteration=5)
    monkeypatch.setattr("megatron_patch.checkpoint.saving._unfinished", lambda: 1)
    for step in (6, 7):
        keeps.guarded(lambda step: saved.folder_of(tmp_path, step).mkdir(exist_ok=True))(step)
    make(tmp_path, 6, tracked=False)  # has come to its end in the meantime

    def fails():
        raise OSError("no space")

    with pytest.raises(AgreedError, match=r"the checkpoint of step 7 could not be saved in .*no space.*untouched"):
        keeps.finalized(fails)()
    assert saved.steps(tmp_path) == [15, 10, 6, 5] and saved.tracked_step(tmp_path) == 5


def test_a_failed_one_among_asynchronous_saves_is_the_one_that_is_named(tmp_path, monkeypatch):
    """There is no room to begin that of step 7 while that of 6 is under way: then 6 fails, too."""
    said = []
    keeps = saving(tmp_path, say=said.append, async_save=True, continue_on_save_failure=True)
    monkeypatch.setattr("megatron_patch.checkpoint.saving._unfinished", lambda: 1)
    keeps.guarded(lambda step: saved.folder_of(tmp_path, step).mkdir(exist_ok=True))(6)
    monkeypatch.setattr(keeps, "_probe", lambda step: "no space")
    keeps.guarded(lambda step: None)(7)
    assert saved.steps(tmp_path) == [6]

    def fails():
        raise OSError("no space")

    keeps.finalized(fails)()
    assert [line.partition(" could not be saved")[0] for line in said] == ["the checkpoint of step 7", "the checkpoint of step 6"]
    assert saved.steps(tmp_path) == []


def test_a_failed_save_over_an_old_checkpoint_leaves_nothing(tmp_path):
    """A user had gone back from it; what is half written is no checkpoint, and its bytes are what fills the disk."""
    make(tmp_path, 5)
    make(tmp_path, 10)
    saved.write_tracker(tmp_path, 5)

    def fails(step):
        (saved.folder_of(tmp_path, step) / "__0_0.distcp").write_bytes(b"half")
        raise OSError("no space")

    saving(tmp_path, continue_on_save_failure=True, iteration=5).guarded(fails)(10)
    assert saved.steps(tmp_path) == [5] and saved.tracked_step(tmp_path) == 5


def test_the_best_stays_until_a_better_one_is_whole(tmp_path):
    """``--keep-last 1``: best after 2, better after 6, whose first save fails."""
    best = (2, "eval_loss", 0.5)
    keeps = saving(tmp_path, best=lambda: best, keep_last=1, continue_on_save_failure=True)

    def fails(step):
        raise OSError("no space")

    for step in (2, 4):
        keeps.guarded(lambda step: make(tmp_path, step))(step)
    best = (6, "eval_loss", 0.4)
    keeps.note_best()
    keeps.guarded(fails)(6)
    assert saved.steps(tmp_path) == [4, 2] and saved.best(tmp_path)["step"] == 2
    keeps.guarded(lambda step: make(tmp_path, step))(6)
    assert saved.steps(tmp_path) == [6] and saved.best(tmp_path)["step"] == 6


def test_what_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    said = []
    keeps = saving(tmp_path, say=said.append, keep_last=1)

    def fails(*_):
        raise OSError("stale file handle")

    monkeypatch.setattr("shutil.rmtree", fails)
    for step in (2, 4, 6):
        keeps.guarded(lambda step: make(tmp_path, step))(step)
    assert any("an old checkpoint could not be removed: stale file handle" in line for line in said)
    assert not [step for step in (2, 4) if (saved.folder_of(tmp_path, step) / saved.MANIFEST).exists()], "one kept the other from its turn"


def test_a_run_that_began_with_anothers_goes_on_from_its_own(tmp_path):
    """As a requeued job does, whose command is the same."""
    said, own, other = [], tmp_path / "own", tmp_path / "other"
    make(other, 7)
    flags = {"load": other, "ckpt_step": 7, "finetune": True, "no_load_optim": True, "no_load_rng": True, "override_ckpt_iteration": 5}
    began = saving(own, **flags)
    began.before_load()
    assert not began.own and began.args.load == other and began.args.finetune
    make(own, 3)
    goes_on = saving(own, say=said.append, **flags)
    goes_on.before_load()
    args = goes_on.args
    assert goes_on.own and args.load == str(own) and not any(getattr(args, name) for name in flags if name != "load")
    assert f"{own} has checkpoints of this run, so --load {other} is not used" in said
    assert any("going on from the checkpoint of step 3" in line for line in said)


WRITERS = """
import sys, time
import torch
from megatron_patch import cpu_backend
if __name__ == "__main__":
    cpu_backend.install()
if __name__ == "__mp_main__":
    cpu_backend.install_in_helper()
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, PersistentAsyncCaller
from megatron_patch.checkpoint.saving import watched

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    setattr(PersistentAsyncCaller, "_get_process", watched(PersistentAsyncCaller._get_process))
    AsyncCallsQueue.warmup_persistent_caller(0)
    first = PersistentAsyncCaller()
    first.process = PersistentAsyncCaller._get_process(0)
    first.close()  # as training does at its end
    print("closed", flush=True)
    second = PersistentAsyncCaller._get_process(0)  # of a save after it
    second.kill()
    time.sleep(120)
"""


def test_the_writer_of_the_last_save_is_watched_too(tmp_path):
    (tmp_path / "writers.py").write_text(WRITERS)
    root = Path(__file__).parents[3]
    command, environment = [sys.executable, tmp_path / "writers.py"], os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=170)
    assert done.stdout.endswith("closed\n"), done.stdout + done.stderr
    assert done.returncode == 1 and "the process that writes asynchronous checkpoints is gone" in done.stderr, done.stderr
