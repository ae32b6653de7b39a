"""One rank that looks through a folder of checkpoints with the others: `hashes_entry.py FOLDER OUT [FAULT]`.

FAULT is what happens when rank 1 reads its file: "EIO", or "ENOENT" for a node that does not see the file yet.
"""

import errno
import json
import os
import sys
from pathlib import Path

import torch

from megatron_patch.checkpoint import saved, shared_hashes
from megatron_patch.errors import AgreedError

folder, out, fault = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
read: list[str] = []
hash_of = saved.sha256_file


def sha256_file(path: Path) -> str:
    """The real one's answer, with a note of what was asked; or the fault."""
    read.append(path.name)
    if rank == 1 and fault in errno.errorcode.values():
        raise OSError(getattr(errno, fault), "as a test wants it", str(path))
    return hash_of(path)


saved.sha256_file = sha256_file
said: dict[str, object] = {}
try:
    said["recovered"] = shared_hashes.led_by_rank_zero(lambda hashes: saved.recover(folder, hashes))
except AgreedError as error:
    said["error"] = str(error)
said["looked at"] = sorted(read)
read.clear()
if fault == "save":
    newest = saved.folder_of(folder, saved.steps(folder)[0])
    own = shared_hashes.gather_own(newest)
    if rank == 0:
        saved.write_manifest(newest, own)
    said["written"] = sorted(read)
(out / f"{rank}.json").write_text(json.dumps(said))
os._exit(0)
