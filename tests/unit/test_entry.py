"""How an entry ends: at once, and with torchrun's or its own words, whatever was started inside."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENTRY = """
import multiprocessing, signal, time
from megatron_patch.entry import user_errors
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the run script has it; what is started from here inherits it
    multiprocessing.get_context("spawn").Process(target=time.sleep, args=(30,), daemon=True).start()
    with user_errors():
        raise ERROR
"""


def ended(tmp_path: Path, error: str) -> subprocess.CompletedProcess[str]:
    """An entry that fails so, with a process that writes checkpoints; Python itself would wait for that one."""
    (tmp_path / "entry.py").write_text(ENTRY.replace("ERROR", error))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "entry.py")]
    with (tmp_path / "out").open("w+") as out:  # no pipe: the process left behind would hold it
        code = subprocess.run(command, env=environment, stdout=out, stderr=out, timeout=25).returncode
        out.seek(0)
        return subprocess.CompletedProcess(command, code, out.read())


def test_a_users_error_is_one_line(tmp_path: Path) -> None:
    done = ended(tmp_path, 'ValueError("--lr: 0\\nis no rate")')
    assert done.returncode == 2 and done.stdout == "[error] --lr: 0 is no rate\n"


def test_any_other_error_is_shown_and_the_process_gone(tmp_path: Path) -> None:
    done = ended(tmp_path, 'RuntimeError("out of memory")')
    assert done.returncode == 1 and done.stdout.startswith("Traceback") and done.stdout.endswith("RuntimeError: out of memory\n")
