"""The reference pass's partial result: of which two ranks see one, at SIGTERM, and after SIGKILL."""

import subprocess
import sys
import time

import numpy as np
import pytest
from toolkit_helpers import ROOT, files

from megatron_patch.data.atomic_files import temporary_path

RANK = """
import sys
import torch.distributed as dist
from toolkits.lpo_data_preprocessing.reference_logps import PartialResult

rank, rendezvous, prefix = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=2)
partial = PartialResult(prefix, 6, {"store": "s", "weights": "w", "dtype": "float32"})
print(partial.missing().tolist(), partial.finished)
dist.destroy_process_group()
"""


def test_all_ranks_have_the_work_list_of_rank_0(tmp_path):
    """Each rank is given a folder of its own, as if the file system showed them different states: rank 0's counts."""
    for rank, scored in ((0, 4), (1, 1)):
        (tmp_path / str(rank)).mkdir()
        logps = np.full((6, 2), np.nan)
        logps[:scored] = -1.0
        np.savez(tmp_path / f"{rank}/train.ref.partial.npz", logps=logps, identity=np.array("s w float32"))
    commands = [[sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet"), str(tmp_path / str(rank) / "train")] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for command in commands]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["[4, 5] False\n"] * 2


SAVING = """
import os, signal, sys, time
import numpy as np
from toolkits.lpo_data_preprocessing import reference_logps
from toolkits.lpo_data_preprocessing.preemption import end_between_writes

end_between_writes("")
print("ready", flush=True)
while sys.argv[1] == "waiting":  # as in a collective
    time.sleep(60)
os.fsync = lambda _: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.5)) if sys.argv[1] == "saving" else None
partial = object.__new__(reference_logps.PartialResult)
partial.path, partial.logps, partial.identity = reference_logps.Path(sys.argv[2]), np.zeros((2, 2)), "s w float32"
partial.save()
time.sleep(60)
"""


@pytest.mark.parametrize("moment", ["waiting", "saving"])
def test_sigterm_ends_it_at_once_but_not_within_a_write(tmp_path, moment):
    command = [sys.executable, "-c", SAVING, moment, str(tmp_path / "x.npz")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    if moment == "waiting":
        time.sleep(0.2)
        process.terminate()
    assert process.wait(20) == 75
    assert files(tmp_path) == ([] if moment == "waiting" else ["x.npz"])


def test_what_a_killed_one_left_is_removed(tmp_path):
    """By rank 0, which alone writes."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    for suffix in ("ref.partial.npz", "ref.npy", "ref.json"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.getpid", lambda: gone.pid)
            temporary_path(tmp_path / f"train.{suffix}").touch()
    commands = [[sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet"), str(tmp_path / "train")] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert not list(tmp_path.glob(".train.*"))
