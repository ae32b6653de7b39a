"""What a job shows on the terminal: reads its output, passes on the lines that start with "[", turns steps into one progress bar.

On a terminal the bar is redrawn in place; elsewhere (a pipe, a SLURM log) it is a line every 30 seconds. A repeated error line of
several ranks is shown once. Every line goes into a log, if one is named. A full disk under either ends nothing: what it does not take is
lost, whole lines of it.

    python -m torch.distributed.run ... 2>&1 | python scripts/terminal.py job.log
"""

import importlib.util
import re
import sys
import time
from contextlib import suppress
from typing import Any

LINE = re.compile(r"^\[[a-z]+\] ")
STEP = re.compile(r"^\[(?P<mode>[a-z]+)\] step (?P<step>\d+)/(?P<last>\d+) \| (?P<metrics>.*)$")
SECONDS_BETWEEN_LINES = 30.0


class Bar:
    """Redraws one line in place."""

    def __init__(self) -> None:
        self.bar: Any = None

    def step(self, match: re.Match[str]) -> None:
        """Show a step."""
        from tqdm import tqdm

        step, last = int(match["step"]), int(match["last"])
        if self.bar is None:
            self.bar = tqdm(total=last, initial=step - 1, desc=f"[{match['mode']}]", unit="step", mininterval=0.2, dynamic_ncols=True)
        self.bar.set_postfix_str(match["metrics"], refresh=False)
        self.bar.update(step - self.bar.n)

    def show(self, line: str) -> None:
        """Another line, above the bar."""
        from tqdm import tqdm

        with suppress(OSError):
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.close()


class Lines:
    """Prints a step now and then; the first and the last one always."""

    def __init__(self) -> None:
        self.next_at = 0.0

    def step(self, match: re.Match[str]) -> None:
        """Show a step, if it is time."""
        if time.monotonic() >= self.next_at or match["step"] == match["last"]:
            self.next_at = time.monotonic() + SECONDS_BETWEEN_LINES
            self.show(match[0])

    def show(self, line: str) -> None:
        """Another line, at once."""
        with suppress(OSError):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def close(self) -> None:
        """Nothing is pending."""


class Log:
    """A file of all lines, written anew."""

    def __init__(self, path: str) -> None:
        self.stream = open(path, "wb", buffering=0)

    def keep(self, line: bytes) -> None:
        """The whole line or nothing of it."""
        end = self.stream.tell()
        try:
            while line:
                line = line[self.stream.write(line) :]
        except OSError:
            with suppress(OSError):
                self.stream.seek(end)
                self.stream.truncate()


def main(log: str | None = None) -> None:
    """Filter standard input to standard output until it ends."""
    steps = Bar() if sys.stderr.isatty() and importlib.util.find_spec("tqdm") else Lines()
    kept: Log | None = None
    with suppress(OSError):
        kept = Log(log) if log else None
    errors: set[str] = set()
    for read in sys.stdin.buffer:
        if kept is not None:
            kept.keep(read)
        line = read.decode(errors="replace").rstrip()
        match = STEP.match(line)
        if match is not None:
            steps.step(match)
        elif LINE.match(line) and line not in errors:
            steps.show(line)
            if line.startswith("[error]"):
                errors.add(line)
    steps.close()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # meant for the job, which says itself what it makes of it
        main(*sys.argv[1:])
