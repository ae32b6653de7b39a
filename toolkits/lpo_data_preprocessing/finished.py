"""What an output was made of: asked for again it is kept, asked for with anything else it is not taken for the same.

Beside its output a stage keeps ``<output>.plan.json``: the plan (inputs by sha256, options, fingerprints: everything that decides the
bytes), written before the output, and once that is there its sha256. So an output without that file is somebody else's, one without the
sha256 was interrupted and is made again, and one with it is finished.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_patch.data.atomic_files import read_json, remove_stale, sha256_file, write_json
from toolkits.lpo_data_preprocessing.records import tally_path

Plan = Mapping[str, Any]
OTHERWISE = "use another OUTPUT (--output) or --overwrite"
# Flags that say where things are or what to do about an output that is there; all others decide what is in it.
PLACES = ("input", "output", "valid_output", "tokenizer", "overwrite", "update", "workers")


@dataclass(frozen=True)
class Ingredients:
    """What a stage reads and writes, beside its flags."""

    inputs: Sequence[Path]
    outputs: Sequence[Path]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of what a flag only points to: a tokenizer, say."""

    def plan(self, args: argparse.Namespace) -> Plan:
        """Everything that decides the bytes of the outputs."""
        options = {name: value for name, value in vars(args).items() if name not in PLACES}
        return {**options, **self.fingerprints, "input": [sha256_file(path) for path in self.inputs]}


def make_once(args: argparse.Namespace, ingredients: Ingredients, make: Callable[[], str]) -> str:
    """The summary of `make`, or of an output that is there and need not be made.

    ValueError if the output is another's, or was made of something else and neither --update nor --overwrite was given.
    """
    finished, plan = Finished(args.output, ingredients.outputs), ingredients.plan(args)
    if not args.overwrite:
        if finished.holds(plan, update=args.update):
            return f"finished before with the same plan, kept -> {args.output}"
        finished.refuse_strangers()
    finished.begin(plan)
    try:
        summary = make()
    finally:
        finished.clear_if_nothing_was_made()
    finished.record(plan)
    return summary


def compare_plans(plan: Plan, recorded: Plan, what: str) -> None:
    """ValueError that opens with `what` and names the first difference, if there is one."""
    differing = sorted(key for key in {**plan, **recorded} if plan.get(key) != recorded.get(key))
    if differing:
        was, now = recorded.get(differing[0]), plan.get(differing[0])
        raise ValueError(f"{what} made with another {', '.join(differing)} ({differing[0]} was {was!r}, is {now!r}); {OTHERWISE}")


@dataclass(frozen=True)
class Finished:
    """What a stage makes."""

    output: str | Path
    """The stage's --output, which may be a prefix."""
    files: Sequence[Path]
    """Whose contents are looked at; of a store the manifest, which holds sizes and sha256 of the others."""

    @property
    def path(self) -> Path:
        """The plan's file."""
        return Path(f"{self.output}.plan.json")

    def begin(self, plan: Plan) -> None:
        """Say whose the output will be. What is there already keeps its plan: it stays finished until it is replaced."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.remove_stale()
        if not self.path.exists():
            write_json(self.path, {"plan": dict(plan), "outputs": None})

    def remove_stale(self) -> None:
        """Remove the temporary files of killed writers."""
        for path in (*self.files, self.path, tally_path(self.output)):
            remove_stale(path)

    def record(self, plan: Plan) -> None:
        """Say that the output is finished."""
        write_json(self.path, {"plan": dict(plan), "outputs": self._contents()})

    def clear_if_nothing_was_made(self) -> None:
        """A stage that fails leaves nothing behind."""
        if not any(path.exists() for path in self.files):
            self.path.unlink(missing_ok=True)

    def refuse_strangers(self) -> None:
        """ValueError if there is an output that no stage has left here."""
        found = [path for path in self.files if path.exists()]
        if found and not self.path.exists():
            raise ValueError(f"{found[0]}: exists already, give another --output or --overwrite")

    def holds(self, plan: Plan, *, update: bool = False) -> bool:
        """Whether the output is there, finished and made with this plan.

        ValueError for another plan or changed contents, unless `update`: then it is as good as not there.
        """
        if not self.path.exists() or not all(path.exists() for path in self.files):
            return False
        recorded = read_json(self.path, "the plan of the output")
        if recorded["outputs"] is None:
            return False
        try:
            compare_plans(plan, recorded["plan"], f"{self.output}: was")
            if recorded["outputs"] != self._contents():
                raise ValueError(f"{self.output}: was changed since it was made; {OTHERWISE}")
        except ValueError:
            if not update:
                raise
            return False
        return True

    def _contents(self) -> dict[str, str]:
        return {path.name: sha256_file(path) for path in self.files}
