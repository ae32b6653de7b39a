"""What two ranks of the reference pass do with a partial result that only one of them sees."""

import subprocess
import sys

import numpy as np
from toolkit_helpers import ROOT

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
