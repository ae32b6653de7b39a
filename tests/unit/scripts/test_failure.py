"""What is shown of a failed job's log: the rank that failed first, not the others and not torchrun's summary."""

import importlib.util
from pathlib import Path
from typing import Any

_SPEC = importlib.util.spec_from_file_location("failure", Path(__file__).parents[3] / "scripts/failure.py")
assert _SPEC and _SPEC.loader
failure: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(failure)
explain = failure.explain
SUMMARY = """W1121 09:35:15.718000 28021 /v/torch/distributed/elastic/api.py:1028] Sending process 28026 closing signal SIGTERM
E1121 09:35:15.750000 28021 /v/torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 1 (pid: 28027)
Traceback (most recent call last):
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 28026)  (SIGTERM)
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_09:35:15
  rank      : 1 (local_rank: 1)
  exitcode  : -11 (pid: 28027)  (SIGSEGV)
"""


def traceback(rank: int, error: str, depth: int = 2) -> str:
    """As Python writes one under torch.distributed."""
    frames = [f"  File 'f.py', line {number}, in g" for number in range(depth)]
    return "".join(f"[rank{rank}]: {line}\n" for line in ["Traceback (most recent call last):", *frames, error])


def test_the_first_rank_that_failed_speaks() -> None:
    log = "[xpo] step 1/9 | loss 2\n" + traceback(1, "RuntimeError: boom") + traceback(0, "RuntimeError: closed by peer") + SUMMARY
    head, *rest = explain(log)
    assert head == "rank 1: RuntimeError: boom"
    assert rest == traceback(1, "RuntimeError: boom").splitlines()


def test_the_first_error_of_a_chain_and_only_the_last_lines() -> None:
    log = traceback(0, "torch.OutOfMemoryError: CUDA out of memory") + traceback(0, "RuntimeError: while handling it", depth=40) + SUMMARY
    head, *rest = explain(log)
    assert head == "rank 0: torch.OutOfMemoryError: CUDA out of memory"
    assert len(rest) == 20 and rest[-1] == "[rank0]: RuntimeError: while handling it"


def test_a_warning_of_another_rank_is_no_failure() -> None:
    log = "[rank0]:[W1121 09:00:00.1 ProcessGroupNCCL.cpp:1] Warning: slow\n" + traceback(1, "ValueError: x") + SUMMARY
    assert explain(log)[0] == "rank 1: ValueError: x"


def test_killed_without_a_traceback() -> None:
    head, *rest = explain("".join(f"line {number}\n" for number in range(30)) + SUMMARY)
    assert head == "rank 1: killed by SIGSEGV"
    assert rest == [f"line {number}" for number in range(10, 30)]


def test_before_the_process_group_exists() -> None:
    plain = "Traceback (most recent call last):\n  File 'x'\nModuleNotFoundError: No module named 'megatron'\n"
    head, *rest = explain(plain + SUMMARY)
    assert head == "rank 1: ModuleNotFoundError: No module named 'megatron'" and rest == plain.splitlines()
    assert explain(plain)[0] == "ModuleNotFoundError: No module named 'megatron'"  # one process, no torchrun


def test_an_empty_log() -> None:
    assert explain("") == ["no error in the log"]


def test_a_rank_that_was_killed_is_the_first() -> None:
    """Others complain of a lost connection before torchrun has noticed."""
    summary = SUMMARY.replace("exitcode  : -11", "exitcode  : -9")
    head, *rest = explain("step 7\n" + traceback(0, "RuntimeError: Connection reset by peer") + summary)
    assert head == "rank 1: killed by SIGKILL (the machine's memory may have run out)" and rest == ["step 7"]


BOTH = """Failures:
[1]:
  time      : 2026-11-30_21:27:SECOND
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 30166)  (SIGKILL)
Root Cause (first observed failure):
[0]:
  time      : 2026-11-30_21:27:26
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 30165)
"""


def test_found_at_once_the_killed_one_is_the_first() -> None:
    """Not so one that torchrun itself killed half a minute later."""
    log = "step 7\n" + traceback(0, "RuntimeError: Connection reset by peer")
    assert explain(log + BOTH.replace("SECOND", "26"))[0].startswith("rank 1: killed by SIGKILL")
    assert explain(log + BOTH.replace("SECOND", "56"))[0] == "rank 0: RuntimeError: Connection reset by peer"


def test_nodes_that_did_not_meet() -> None:
    log = "Traceback (most recent call last):\ntorch.distributed.elastic.rendezvous.api.RendezvousTimeoutError\n"
    assert explain(log)[0].startswith("not all nodes of the job met in time: can they reach the first one")


def test_of_several_nodes_the_one_whose_rank_was_killed_speaks() -> None:
    """Every node's torchrun sums up, and the other nodes may be first."""
    lost = SUMMARY.replace("rank      : 1 ", "rank      : 0 ").replace("-11 (pid: 28027)  (SIGSEGV)", "1 (pid: 7)")
    victim = SUMMARY.replace("rank      : 1 ", "rank      : 3 ").replace("-11 (pid", "-9 (pid")
    log = traceback(0, "RuntimeError: Connection closed by peer") + lost + victim
    assert explain(log)[0].startswith("rank 3: killed by SIGKILL")


def test_a_node_that_cannot_be_reached() -> None:
    error = "torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: The connection to the C10d store has failed.\n"
    assert "cannot reach the first one" in explain(traceback(0, error.strip()))[0]
