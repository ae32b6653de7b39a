"""Which checkpoint of a folder is used, what becomes of damaged ones, and which are removed: all with files that upstream would write."""

import errno
import json
import pickle  # what upstream's .metadata is
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import save_integrity_manifest, verify_integrity_manifest
from torch.distributed.checkpoint.metadata import Metadata

from megatron_patch.checkpoint import saved


def make(folder: Path, step: int, *, by_upstream: bool = False, tracked: bool = True, ranks: int = 1) -> Path:
    checkpoint = saved.folder_of(folder, step)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, planner_data=str(step))))
    tensors = [f"__{rank}_0.distcp" for rank in range(ranks)] if ranks > 1 else ["__0_0.distcp", "__0_1.distcp"]
    for name in ("metadata.json", *tensors):
        (checkpoint / name).write_bytes(f"{name} of {step}".encode() * 1000)
    (save_integrity_manifest if by_upstream else saved.write_manifest)(checkpoint)  # type: ignore[arg-type]
    if tracked:
        (folder / saved.TRACKER).write_text(str(step))
    return checkpoint


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_manifest_is_upstreams(tmp_path):
    ours, theirs = make(tmp_path / "a", 3), make(tmp_path / "b", 3, by_upstream=True)
    assert json.loads((ours / saved.MANIFEST).read_text()) == json.loads((theirs / saved.MANIFEST).read_text())
    verify_integrity_manifest(str(ours))
    assert saved.damage(theirs) is None
    cut(ours / "__0_1.distcp")
    with pytest.raises(CheckpointingException):
        verify_integrity_manifest(str(ours))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda c: cut(c / "__0_1.distcp"), "__0_1.distcp is damaged"),
        (lambda c: (c / ".metadata").unlink(), ".metadata is missing"),
        (lambda c: (c / saved.MANIFEST).unlink(), "the save did not finish"),
        (lambda c: (c / saved.MANIFEST).write_text('{"files":'), "integrity.json is damaged"),
        (lambda c: [cut(file) for file in c.iterdir() if file.name != saved.MANIFEST], "and 1 more"),
    ],
)
def test_damage_is_named(tmp_path, harm, words):
    checkpoint = make(tmp_path, 2)
    harm(checkpoint)
    assert words in (saved.damage(checkpoint) or "")


def test_what_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    def fails(path):
        raise OSError(errno.EIO, "Input/output error")

    make(tmp_path, 2)
    monkeypatch.setattr(saved, "sha256_file", fails)
    with pytest.raises(OSError, match="Input/output"):
        saved.recover(tmp_path)
    assert saved.steps(tmp_path) == [2]


def test_nothing_to_recover(tmp_path):
    assert saved.recover(tmp_path / "absent") == []
    make(tmp_path, 2)
    make(tmp_path, 4)
    assert saved.recover(tmp_path) == []


def test_newest_whole_one_is_taken_and_the_damaged_set_aside(tmp_path):
    for step in (2, 4, 6):
        make(tmp_path, step)
    cut(saved.folder_of(tmp_path, 6) / "__0_0.distcp")
    (saved.folder_of(tmp_path, 4) / saved.MANIFEST).unlink()
    lines = saved.recover(tmp_path)
    assert saved.tracked_step(tmp_path) == 2 and saved.steps(tmp_path) == [2]
    assert {p.name for p in tmp_path.glob("*.damaged")} == {"iter_0000004.damaged", "iter_0000006.damaged"}
    assert any("iter_0000006" in line and "__0_0.distcp is damaged" in line for line in lines)
    assert any("iter_0000004" in line and "did not finish" in line for line in lines)
    assert any("going on from" in line and "iter_0000002" in line for line in lines)


@pytest.mark.parametrize("text", ["", "six", None])
def test_damaged_tracker_is_written_anew(tmp_path, text):
    make(tmp_path, 2)
    make(tmp_path, 6)
    (tmp_path / saved.TRACKER).unlink()
    if text is not None:
        (tmp_path / saved.TRACKER).write_text(text)
    assert "names no checkpoint" in saved.recover(tmp_path)[0]
    assert (tmp_path / saved.TRACKER).read_text() == "6"


def test_a_tracker_set_back_by_hand_is_obeyed(tmp_path):
    make(tmp_path, 2)
    make(tmp_path, 6)
    (tmp_path / saved.TRACKER).write_text("2")
    assert saved.recover(tmp_path) == [] and saved.tracked_step(tmp_path) == 2


def test_nothing_whole_is_an_error_and_touches_nothing(tmp_path):
    cut(make(tmp_path, 2) / ".metadata")
    with pytest.raises(ValueError, match=r"iter_0000002 cannot be used: \.metadata is damaged; no checkpoint in .* is whole"):
        saved.recover(tmp_path)
    assert saved.steps(tmp_path) == [2] and saved.tracked_step(tmp_path) == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / saved.TRACKER).write_text("9")
    with pytest.raises(ValueError, match="iter_0000009 cannot be used: there is no such folder"):
        saved.recover(tmp_path / "b")


def test_a_first_save_that_did_not_finish_is_no_loss(tmp_path):
    (make(tmp_path, 2, tracked=False) / saved.MANIFEST).unlink()
    assert "starts from its beginning" in saved.recover(tmp_path)[0]
    assert saved.steps(tmp_path) == [2] and not (tmp_path / saved.TRACKER).exists()


def test_a_second_damaged_one_of_a_name_gets_another(tmp_path):
    make(tmp_path, 2)
    for _ in range(2):
        cut(make(tmp_path, 6) / ".metadata")
        saved.recover(tmp_path)
    assert {p.name for p in tmp_path.glob("*.damaged*")} == {"iter_0000006.damaged", "iter_0000006.damaged-2"}


def test_another_runs_folder_is_only_judged(tmp_path):
    with pytest.raises(ValueError, match=r"--load .*absent: no checkpoint is there"):
        saved.check_loadable(tmp_path / "absent")
    make(tmp_path, 2)
    cut(make(tmp_path, 6) / ".metadata")
    with pytest.raises(ValueError, match=r"iter_0000006 cannot be loaded: \.metadata is damaged; say --ckpt-step .*\(there are 6, 2\)"):
        saved.check_loadable(tmp_path)
    saved.check_loadable(tmp_path, 2)
    assert saved.tracked_step(tmp_path) == 6 and saved.steps(tmp_path) == [6, 2]
    (tmp_path / saved.TRACKER).write_text("")
    with pytest.raises(ValueError, match="names no checkpoint"):
        saved.check_loadable(tmp_path, 2)  # upstream reads the tracker first and would leave with exit code 0


def test_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    make(tmp_path, 10, tracked=False)  # being written
    saved.keep_newest(tmp_path, 2, spare=[2])
    assert saved.steps(tmp_path) == [10, 8, 6, 2]
    saved.keep_newest(tmp_path, 2)
    assert saved.steps(tmp_path) == [10, 8, 6]
