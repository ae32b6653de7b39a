"""What a job shows on the terminal: reads its output, passes on the lines that start with "[", turns steps into one progress bar.

On a terminal the bar is redrawn in place; elsewhere (a pipe, a SLURM log) it is a line every 30 seconds. A repeated error line of
several ranks is shown once.

    python -m torch.distributed.run ... 2>&1 | tee job.log | python scripts/terminal.py
"""

import re
import sys

from tqdm import tqdm

LINE = re.compile(r"^\[[a-z]+\] ")
STEP = re.compile(r"^\[(?P<mode>[a-z]+)\] step (?P<step>\d+)/(?P<last>\d+) \| (?P<metrics>.*)$")
SECONDS_BETWEEN_LINES = 30.0


def main() -> None:
    """Filter standard input to standard output until it ends."""
    bar: tqdm | None = None
    errors: set[str] = set()
    interval = 0.2 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    for line in sys.stdin:
        if not LINE.match(line) or line in errors:
            continue
        if line.startswith("[error]"):
            errors.add(line)
        match = STEP.match(line)
        if match is None:
            tqdm.write(line.rstrip("\n"), file=sys.stdout)
            sys.stdout.flush()
            continue
        step, last = int(match["step"]), int(match["last"])
        if bar is None:
            bar = tqdm(total=last, initial=step - 1, desc=f"[{match['mode']}]", unit="step", mininterval=interval, maxinterval=interval)
        bar.set_postfix_str(match["metrics"], refresh=False)
        bar.update(step - bar.n)
    if bar is not None:
        bar.close()


if __name__ == "__main__":
    main()
