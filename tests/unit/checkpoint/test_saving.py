"""What a run's saves do to the checkpoints that are there, with a stand-in for the save itself."""

from argparse import Namespace

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


def saving(folder, **flags):
    """Of a run that began anew, unless flags say otherwise."""
    given = {"save": folder, "load": folder, "ckpt_step": None, "keep_last": None, "continue_on_save_failure": False, "iteration": 0}
    return Saving(Namespace(**{**given, "async_save": False, **flags}), spare=tuple, say=lambda line: None)


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
