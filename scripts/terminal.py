"""What a job shows on the terminal: reads its output, passes on the lines that start with "[", turns steps into one progress bar.

On a terminal the bar is redrawn in place; elsewhere (a pipe, a SLURM log) it is a line every 30 seconds. A repeated error line of
several ranks is shown once.

    python -m torch.distributed.run ... 2>&1 | tee job.log | python scripts/terminal.py
"""

import re
import sys
import time
from contextlib import suppress

from tqdm import tqdm

LINE = re.compile(r"^\[[a-z]+\] ")
STEP = re.compile(r"^\[(?P<mode>[a-z]+)\] step (?P<step>\d+)/(?P<last>\d+) \| (?P<metrics>.*)$")
SECONDS_BETWEEN_LINES = 30.0


class Bar:
    """Redraws one line in place."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def step(self, match: re.Match[str]) -> None:
        """Show a step."""
        step, last = int(match["step"]), int(match["last"])
        if self.bar is None:
            self.bar = tqdm(total=last, initial=step - 1, desc=f"[{match['mode']}]", unit="step", mininterval=0.2, dynamic_ncols=True)
        self.bar.set_postfix_str(match["metrics"], refresh=False)
        self.bar.update(step - self.bar.n)

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
            show(match[0])

    def close(self) -> None:
        """Nothing is pending."""


def show(line: str) -> None:
    """One line on standard output, at once; above a bar where there is one."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def main() -> None:
    """Filter standard input to standard output until it ends."""
    steps = Bar() if sys.stderr.isatty() else Lines()
    errors: set[str] = set()
    for line in map(str.rstrip, sys.stdin):
        match = STEP.match(line)
        if match is not None:
            steps.step(match)
        elif LINE.match(line) and line not in errors:
            show(line)
            if line.startswith("[error]"):
                errors.add(line)
    steps.close()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # meant for the job, which says itself what it makes of it
        main()
