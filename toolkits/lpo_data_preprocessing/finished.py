"""What a finished output was made of: asked for again it is kept, asked for with anything else it is not taken for the same.

A stage that is done writes ``<output>.plan.json``: its plan (inputs by sha256, options, fingerprints: everything that decides the bytes)
and the sha256 of what it made. It is the last file a stage writes, so an output without one, or with another plan, is none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.data.atomic_files import read_json, sha256_file, write_json

Plan = Mapping[str, Any]
OTHERWISE = "use another OUTPUT (--output) or --overwrite"


def compare_plans(plan: Plan, recorded: Plan, what: str) -> None:
    """ValueError that opens with `what` and names the first difference, if there is one."""
    differing = sorted(key for key in {**plan, **recorded} if plan.get(key) != recorded.get(key))
    if differing:
        was, now = recorded.get(differing[0]), plan.get(differing[0])
        raise ValueError(f"{what} made with another {', '.join(differing)} ({differing[0]} was {was!r}, is {now!r}); {OTHERWISE}")


@dataclass(frozen=True)
class Finished:
    """The files a stage makes; the plan lies beside the first."""

    outputs: Sequence[Path]

    @property
    def path(self) -> Path:
        """The plan's file."""
        return Path(f"{self.outputs[0]}.plan.json")

    def forget(self) -> None:
        """From here until `record` the output counts as unfinished."""
        self.path.unlink(missing_ok=True)

    def record(self, plan: Plan) -> None:
        """Say that the output is finished."""
        write_json(self.path, {"plan": dict(plan), "outputs": self._contents()})

    def holds(self, plan: Plan, *, update: bool = False) -> bool:
        """Whether the output is there, finished and made with this plan.

        ValueError for another plan or changed contents, unless `update`: then it is as good as not there.
        """
        if not self.path.exists() or not all(path.exists() for path in self.outputs):
            return False
        recorded = read_json(self.path, "the plan of the finished output")
        try:
            compare_plans(plan, recorded["plan"], f"{self.outputs[0]}: was")
            if recorded["outputs"] != self._contents():
                raise ValueError(f"{self.outputs[0]}: was changed since it was made; {OTHERWISE}")
        except ValueError:
            if not update:
                raise
            return False
        return True

    def _contents(self) -> dict[str, str]:
        return {path.name: sha256_file(path) for path in self.outputs}
