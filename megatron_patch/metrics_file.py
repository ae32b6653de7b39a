"""``metrics.jsonl``: one JSON object for every step and every evaluation of a run.

Lines are whole: what a full disk does not take leaves nothing behind, and the half of one that a killed process leaves is dropped when
the run goes on. Nothing here knows Megatron.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.data.atomic_files import append_line, atomic_path

FILE = "metrics.jsonl"


def append(save: Path, row: Mapping[str, Any]) -> None:
    """Add a row; JSON has no NaN and no infinity, so null. OSError: nothing was added."""
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}
    append_line(save / FILE, json.dumps(finite, allow_nan=False))


def rows(save: Path) -> list[dict[str, Any]]:
    """All of them, less a last one that is being written or was cut short.

    Raises:
        ValueError: a line is none of ours, with its number.
    """
    path, found = save / FILE, []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            found.append(json.loads(line))
            _ = found[-1]["iteration"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}:{number}: not a row of metrics: {line[:80]!r}; remove the line, nothing else depends on it") from None
    return found


def rewind(save: Path, iteration: int) -> None:
    """Drop the rows of steps after ``iteration``: a resumed run writes them again."""
    if (save / FILE).exists():
        kept = [row for row in rows(save) if row["iteration"] <= iteration]
        with atomic_path(save / FILE) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def has_evaluation(save: Path, iteration: int) -> bool:
    """Whether the evaluation after this step is there."""
    return any(row["iteration"] == iteration and any(name.startswith("eval_") for name in row) for row in rows(save))
