"""What an output was made of: asked for again it is kept, asked for with anything else it is not taken for the same.

Beside its output a stage keeps ``<output>.plan.json``: the plan (inputs by sha256, options, fingerprints: everything that decides the
bytes), written before the output with the names of the files to be made, and once they are there each file's size and sha256. So a file
that no plan names is somebody else's, an output without sizes was interrupted and is made again, and one with them is finished.

Whether a finished output is whole is looked at before it is kept: every file is there and has its size, and its contents are compared if
it is small or was touched (by its ctime, which nobody sets by hand) after the plan was written. Stores take hundreds of gigabytes, and
reading one to learn that nobody wrote to it takes minutes.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_patch.data.atomic_files import read_json, remove_stale, sha256_file, write_json
from toolkits.lpo_data_preprocessing.records import tally_path

Plan = Mapping[str, Any]
OTHERWISE = "use another OUTPUT (--output) or --overwrite"
# Flags that say where things are or what to do about an output that is there; all others decide what is in it.
PLACES = ("input", "output", "valid_output", "tokenizer", "overwrite", "update", "workers")
SMALL = 64 * 2**20
"""Bytes up to which a file's contents are compared in any case."""


@dataclass(frozen=True)
class Ingredients:
    """What a stage reads and writes, beside its flags."""

    inputs: Sequence[Path]
    outputs: Sequence[Path]
    """Everything that the stage makes but its counts; a folder stands for all that is in it."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of what a flag only points to: a tokenizer, say."""
    counts: bool = True
    """Whether the stage writes ``<output>.tally.json``."""

    def files(self, output: str | Path) -> list[Path]:
        """All that is made; ValueError for a file that would be written twice, or is read too."""
        files = [*self.outputs, *([tally_path(output)] if self.counts else [])]
        taken = {path.resolve(): "one of the inputs" for path in self.inputs}
        for path in files:
            if path.resolve() in taken:
                raise ValueError(f"{path}: is {taken[path.resolve()]} too; give another --output")
            taken[path.resolve()] = "another output"
        return files

    def plan(self, args: argparse.Namespace) -> Plan:
        """Everything that decides the bytes of the outputs."""
        options = {name: value for name, value in vars(args).items() if name not in PLACES}
        return {**options, **self.fingerprints, "input": [sha256_file(path) for path in self.inputs]}


def make_once(args: argparse.Namespace, ingredients: Ingredients, make: Callable[[], str]) -> str:
    """The summary of `make`, or of an output that is there and need not be made.

    ValueError if the output is another's, or was made of something else and neither --update nor --overwrite was given.
    """
    finished = Finished(args.output, ingredients.files(args.output))
    plan = {**ingredients.plan(args), "files": finished.names}
    if not args.overwrite:
        if finished.holds(plan, update=args.update):
            return f"finished before with the same plan, kept -> {args.output}"
        finished.refuse_strangers()
    with finished.made(plan, overwrite=args.overwrite):
        return make()


def plan_path(output: str | Path) -> Path:
    """Where the plan of a stage's --output is kept."""
    return Path(f"{Path(output)}.plan.json")


def compare_plans(plan: Plan, recorded: Plan, what: str) -> None:
    """ValueError that opens with `what` and names the first difference, if there is one."""
    differing = sorted(key for key in {**plan, **recorded} if plan.get(key) != recorded.get(key))
    if differing:
        was, now = recorded.get(differing[0]), plan.get(differing[0])
        raise ValueError(f"{what} made with another {', '.join(differing)} ({differing[0]} was {was!r}, is {now!r}); {OTHERWISE}")


@dataclass(frozen=True)
class Recorded:
    """What a plan's file says. Names are paths as seen from the plan's folder, so that an output may be moved as a whole."""

    plan: Plan
    outputs: Mapping[str, Mapping[str, Any]] | None
    """Name -> size and sha256; None: begun and not finished."""
    making: Sequence[str] = ()
    """What a run that began later was going to make; empty when it has ended."""
    written_ns: int = 0
    """When the file was written."""

    @classmethod
    def read(cls, path: Path) -> "Recorded | None":
        """None if there is no such file; ValueError if it is another's."""
        if not path.exists():
            return None
        content = read_json(path, "the plan of the output")
        plan, outputs, making = (content.get(name, default) for name, default in (("plan", None), ("outputs", 0), ("making", [])))
        named = outputs is None or (
            isinstance(outputs, dict) and all(isinstance(file, dict) and {"size", "sha256"} <= file.keys() for file in outputs.values())
        )
        if not (isinstance(plan, dict) and named and isinstance(making, list)):
            raise ValueError(f"{path}: is not the plan of an output of this version; remove it, or {OTHERWISE}")
        return cls(plan, outputs, making, path.stat().st_mtime_ns)

    def owns(self, name: str) -> bool:
        """Whether a stage made the file, or may have: one that was stopped does not say how far it came."""
        return name in (self.outputs or ()) or any(name == made or name.startswith(f"{made}/") for made in self.making)

    def describes(self, name: str, path: Path) -> bool:
        """Whether the file is the one that was recorded (see above for what is looked at)."""
        assert self.outputs is not None
        found, recorded = path.stat(), self.outputs[name]
        if found.st_size != recorded["size"]:
            return False
        untouched = found.st_size > SMALL and found.st_ctime_ns < self.written_ns and not self.making
        return untouched or sha256_file(path) == recorded["sha256"]


@dataclass(frozen=True)
class Finished:
    """What a stage makes."""

    output: str | Path
    """The stage's --output, which may be a prefix."""
    files: Sequence[Path]
    """All of it; a folder stands for what is in it."""
    beside: Sequence[Path] = ()
    """Written too, but not missed: the output is finished without."""

    @property
    def path(self) -> Path:
        """The plan's file."""
        return plan_path(self.output)

    @property
    def names(self) -> list[str]:
        """Of `files`, as seen from the plan's folder."""
        return [self._name(path) for path in self.files]

    def holds(self, plan: Plan, *, update: bool = False) -> bool:
        """Whether the output is there, finished, whole and made with this plan.

        ValueError for another plan or changed contents, unless `update`: then it is as good as not there. A file that is missing is
        made again in any case, and so is what an interrupted run may have changed.
        """
        recorded = Recorded.read(self.path)
        if recorded is None or recorded.outputs is None:
            return False
        there = {name: path for name in recorded.outputs if (path := self.path.parent / name).is_file()}
        try:
            compare_plans(plan, recorded.plan, f"{self.output}: was")
            changed = [path for name, path in there.items() if not recorded.describes(name, path)]
            if changed and not recorded.making:
                raise ValueError(f"{changed[0]}: was changed since it was made; --update makes it again, else {OTHERWISE}")
        except ValueError:
            if not update:
                raise
            return False
        return not changed and there.keys() == recorded.outputs.keys()

    def refuse_strangers(self) -> None:
        """ValueError if a file that would be replaced is there and no stage has made it."""
        recorded = Recorded.read(self.path)
        for path in self._found():
            if recorded is None or not (recorded.owns(self._name(path)) or path in self.beside):
                raise ValueError(f"{path}: exists already and was not made with this --output; give another one or --overwrite")

    @contextmanager
    def made(self, plan: Plan, *, overwrite: bool = False) -> Iterator[None]:
        """The output is made inside the block. What is there keeps its plan until it is replaced; what an earlier plan made and this one
        does not is removed, unless somebody changed it. A block that fails before it has replaced anything leaves nothing behind.
        """
        was, before = self._begin(plan, overwrite), self._states()
        try:
            yield
        except BaseException:
            if self._states() == before:
                self._forget(was)
            raise
        self._remove_what_is_made_no_more(was)
        self.record(plan)

    def record(self, plan: Plan) -> None:
        """Say that the output is finished."""
        files = [path for path in self._found() if path not in self.beside]
        outputs = {self._name(path): {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in files}
        write_json(self.path, {"plan": dict(plan), "outputs": outputs})

    def _begin(self, plan: Plan, overwrite: bool) -> Recorded | None:
        """Say whose the output will be; returns what was said before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (*self.files, *self.beside, self.path):
            remove_stale(path)
        try:
            was = Recorded.read(self.path)
        except ValueError:
            if not overwrite:
                raise
            was = None
        stays = was if was is not None and was.outputs is not None else Recorded(plan, None)
        making = {*self.names, *(was.making if was is not None else ())}
        self._write(Recorded(stays.plan, stays.outputs, sorted(making)))
        return was

    def _forget(self, was: Recorded | None) -> None:
        """Take `_begin` back."""
        if was is None or (was.outputs is None and not self._found()):
            self.path.unlink(missing_ok=True)
        else:
            self._write(was)

    def _write(self, recorded: Recorded) -> None:
        making = {"making": list(recorded.making)} if recorded.making else {}
        write_json(self.path, {"plan": dict(recorded.plan), "outputs": recorded.outputs, **making})

    def _remove_what_is_made_no_more(self, was: Recorded | None) -> None:
        if was is None:
            return
        made = {self._name(path) for path in self._found()}
        for name in {*(was.outputs or ()), *was.making} - made:
            path = self.path.parent / name
            if path.is_file() and (name in was.making or was.describes(name, path)):
                path.unlink()

    def _found(self) -> list[Path]:
        """The files that are there."""
        every = [path for top in (*self.files, *self.beside) for path in (sorted(top.rglob("*")) if top.is_dir() else [top])]
        return [path for path in every if path.is_file()]

    def _states(self) -> list[tuple[Path, int, int, int]]:
        """What tells whether a file was replaced or written to."""
        return [(path, found.st_ino, found.st_size, found.st_mtime_ns) for path in self._found() for found in [path.stat()]]

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.path.parent)
