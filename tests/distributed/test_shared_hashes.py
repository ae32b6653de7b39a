"""Three ranks look through one folder of checkpoints: who reads what, and what all of them know afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

from megatron_patch.checkpoint import saved
from tests.distributed import harness
from tests.unit.checkpoint.test_saved import cut, make

ENTRY = harness.ROOT / "tests/distributed/hashes_entry.py"
RANKS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, of six ranks each."""
    for step in (2, 4):
        make(tmp_path / "run", step, ranks=6)
    return tmp_path / "run"


def look(folder: Path, fault: str = "") -> list[dict[str, Any]]:
    """What each rank says."""
    run = harness.launch(RANKS, ENTRY, [folder, folder.parent, fault], folder.parent / "log")
    assert run.ok, run.output[-4000:]
    return [json.loads((folder.parent / f"{rank}.json").read_text()) for rank in range(RANKS)]


def own(rank: int) -> list[str]:
    """Six ranks' files, of three."""
    others = [".metadata", "metadata.json"] if rank == 0 else []
    return others + [f"__{writer}_0.distcp" for writer in (rank, rank + RANKS)]


def test_each_rank_reads_what_it_wrote(folder: Path) -> None:
    """Once; with fewer ranks than before each has several's."""
    for rank, said in enumerate(look(folder)):
        assert said["recovered"] == [] and said["looked at"] == sorted(own(rank))


def test_damage_is_known_to_all(folder: Path) -> None:
    """The file is another rank's; the checkpoint before is read, too."""
    cut(saved.folder_of(folder, 4) / "__4_0.distcp")
    said = look(folder)
    assert len({json.dumps(each["recovered"]) for each in said}) == 1 and "__4_0.distcp is damaged" in said[0]["recovered"][0]
    assert said[1]["looked at"] == sorted(own(1) * 2) and saved.tracked_step(folder) == 2


def test_what_cannot_be_read_is_not_damaged(folder: Path) -> None:
    """A file system that fails for one node: all ranks leave, and nothing is renamed."""
    assert all("as a test wants it" in said["error"] for said in look(folder, "EIO"))
    assert saved.steps(folder) == [4, 2] and saved.tracked_step(folder) == 4


def test_what_one_node_does_not_see_is_looked_for_on_another(folder: Path) -> None:
    """Shared file systems may show a file to other nodes a little later."""
    said = look(folder, "ENOENT")
    assert [each["recovered"] for each in said] == [[]] * RANKS and set(own(1)) < set(said[0]["looked at"])


def test_manifest_of_what_ranks_have_written(folder: Path) -> None:
    """It is upstream's, and nobody read another's file."""
    newest = saved.folder_of(folder, 4)
    before = json.loads((newest / saved.MANIFEST).read_text())
    said = look(folder, "save")
    assert [each["written"] for each in said] == [sorted(own(rank)) for rank in range(RANKS)]
    assert json.loads((newest / saved.MANIFEST).read_text()) == before
    verify_integrity_manifest(str(newest))
