"""What a failed job says on the terminal: the first error of the first rank that failed, the last lines of that rank, the log's path.

torchrun's own summary stands at the end of a log, says nothing about the cause, and is left out. Python puts "[rankN]: " before every
line of a traceback once the process group exists; the rank whose traceback came first is the one that failed first, the others lost
their connection to it. A rank that died without a traceback (a signal, out of memory) is known from torchrun's summary alone, and
the last lines before that summary, less what others said of it, are all there is.

    python scripts/failure.py job.log
"""

import re
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

LAST = 20
TRACEBACK = re.compile(r"^\[rank(\d+)\]: Traceback \(most recent call last\)")
ERROR = re.compile(r"^(?:\[rank\d+\]: )?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Failure|OutOfMemory)\b.*)")
# torchrun's agent: "W1121 09:35:15.718000 28021 .../torch/distributed/elastic/...", srun's "srun: error: ..."
AGENT = re.compile(r"^(?:\[rank\d+\]:)?[WEI]\d{4} \d\d:\d\d:\d\d\.\d+ \d+ .*torch/distributed/elastic|^srun: ")
ROOT_CAUSE = re.compile(r"Root Cause \(first observed failure\):.*?rank +: (\d+).*?exitcode +: ([^\n]*)", re.DOTALL)
END = re.compile(r"^  time +: (\S+)$.*?^  rank +: (\d+).*?^  exitcode +: ([^\n]*)", re.DOTALL | re.MULTILINE)
HINTS = (
    (
        "RendezvousTimeoutError",
        "not all nodes of the job met in time: can they reach the first one (its address and MASTER_PORT), and were all of them started? "
        "TORCHRUN_FLAGS=--rdzv-conf=join_timeout=1200 waits longer",
    ),
    (
        "RendezvousConnectionError",
        "this node cannot reach the first one of the job: its address is SLURM's (scontrol show node), its port MASTER_PORT; is one of "
        "them wrong, or is a firewall between them?",
    ),
)
"""What an error of torchrun's own means for whoever started the job."""


def before_summary(lines: Sequence[str]) -> list[str]:
    """The lines up to the agent's first word about a failure."""
    end = next((number for number, line in enumerate(lines) if AGENT.match(line)), len(lines))
    return list(lines[:end])


def how_it_ended(exit_code: str) -> str:
    """Words for torchrun's "-9 (pid: 123)": a negative exit code is a signal."""
    match = re.match(r"-(\d+)\b", exit_code)
    if match is None or int(match[1]) not in set(signal.Signals):
        return f"exit code {exit_code}"
    name = signal.Signals(int(match[1])).name
    return f"killed by {name}" + (" (the machine's memory may have run out)" if name == "SIGKILL" else "")


def killed(text: str) -> str | None:
    """The rank that was killed outright, if one was when the first failed: whoever complains then lost the connection to it.

    torchrun looks every tenth of a second, and names one of those that it finds; later it kills what does not end.
    """
    for summary in text.split("Failures:")[1:]:  # every node's torchrun has one
        ends = [(datetime.strptime(time, "%Y-%m-%d_%H:%M:%S"), rank, code) for time, rank, code in END.findall(summary)]
        first = min((time for time, *_ in ends), default=None)
        for time, rank, code in ends:
            if code.startswith(f"-{signal.SIGKILL.value} ") and (time - first).total_seconds() <= 1:
                return rank
    return None


def explain(text: str) -> list[str]:
    """The lines to show for a log's ``text``: who failed first and of what, then the last lines of that rank."""
    lines, victim = text.splitlines(), killed(text)
    if victim is not None:
        return [f"rank {victim}: {how_it_ended('-9')}", *[line for line in before_summary(lines) if not line.startswith("[rank")][-LAST:]]
    first = next((match[1] for match in map(TRACEBACK.match, lines) if match), None)
    if first is not None:
        own = [line for line in lines if line.startswith(f"[rank{first}]:")]
    else:
        own = before_summary(lines)
    error = next((match[1] for match in map(ERROR.match, own) if match), None)
    cause = ROOT_CAUSE.search(text)
    if error is None and cause is not None:
        error = how_it_ended(cause[2].strip())
    rank = first if first is not None else cause[1] if cause is not None else None
    who = f"rank {rank}: " if rank is not None else ""
    hint = next((meaning for word, meaning in HINTS if word in text), None)
    return [f"{who}{hint or error or 'no error in the log'}", *own[-LAST:]]


def main(log: Path) -> None:
    """Explain a log on standard error."""
    head, *rest = explain(log.read_text(encoding="utf-8", errors="replace"))
    sys.stderr.write("\n".join([f"[failed] {head}", *rest, f"[failed] the whole log: {log}"]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
