"""Stage 1: data in one of several shapes -> records of one shape, with stable ids and without exact duplicates.

What is read is a matter of `sources`, what it means one of `formats`; here the two meet. The format is detected from a file's first record
and holds for the file: a mixed file is a mistake, not a convenience. The id is a hash of the content, so the same pair has the same id
whatever file, line or order it came in; a user's own "id" is kept as "source_id". For duplicates 36 bytes or so a record stay in memory.

A record that is no good is an error that names its place. Ten million rows are never all good: --drop-invalid counts such records under
a reason instead, shows the first of each, and --max-drop-fraction still bounds them.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkits.lpo_data_preprocessing.finished import Ingredients, make_once
from toolkits.lpo_data_preprocessing.formats import BY_NAME, Example, Format, check_alone, check_nothing_lost, demanded, detect_format
from toolkits.lpo_data_preprocessing.records import (
    Record,
    StageParser,
    Tally,
    close_stage,
    content_hash,
    jsonl_writer,
    progress,
    run_stage,
)
from toolkits.lpo_data_preprocessing.sources import MAX_ARRAY_BYTES, as_record, find_inputs, read_items


def normalise_record(raw: Record, format_: Format, where: str, every_turn: bool = False) -> list[Record]:
    """One record of any format in the common shape, several with `every_turn`; ValueError naming `where`."""
    record = {name: value for name, value in raw.items() if value is not None}
    check_alone(format_, record, where)
    examples = format_.examples(record, where, every_turn)
    check_nothing_lost(format_, record, examples[-1], where)
    return [_finished(record, example, format_, where) for example in examples]


def _finished(record: Record, example: Example, format_: Format, where: str) -> Record:
    if not example.prompt or example.prompt[-1]["role"] not in ("user", "tool"):
        got = example.prompt[-1]["role"] if example.prompt else "nothing"
        raise ValueError(f"{where}: the prompt must end with a user's or a tool's turn, got {got}")
    content = [example.prompt, example.chosen, example.rejected]
    result: Record = {"id": content_hash(content), "prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}
    taken = format_.names | {"id", "prompt", "chosen", "rejected"}
    passed_on = {name: value for name, value in record.items() if name not in taken}
    if record.get("id") not in (None, result["id"]):
        passed_on.setdefault("source_id", record["id"])
    return result | example.more | passed_on


def check_not_empty(record: Record, where: str) -> Record:
    """The record itself; ValueError naming the field whose text is empty or only spaces."""
    texts = {"prompt": record["prompt"][-1]["content"], "chosen": record["chosen"]}
    texts |= {f"rejected[{i}]": text for i, text in enumerate(record["rejected"])}
    for name, text in texts.items():
        if not text.strip():
            raise ValueError(f"{where}: field {name!r} is empty")
    return record


@dataclass
class Normaliser:
    """What is known across files."""

    args: argparse.Namespace
    tally: Tally = field(default_factory=Tally)
    seen: set[int] = field(default_factory=set)
    formats: list[tuple[Path, str]] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)
    """Why the first invalid record of each reason is one."""

    def records(self, path: Path) -> Iterator[Record]:
        """The records of a file that are kept."""
        format_ = self._checked(demanded(self.args.format)) if self.args.format else None
        for where, item in progress(read_items(path), what=f"normalise {path.name}", unit="record"):
            raw = self._try("not_a_record", as_record, item, where)
            if raw is None:
                continue
            format_ = format_ or self._checked(detect_format(raw, where))
            for record in self._try("unfit_fields", normalise_record, raw, format_, where, self.args.every_turn) or []:
                if self._try("empty_text", check_not_empty, record, where) and self._is_new(record):
                    yield record
        self.formats.append((path, format_.name if format_ else "no record"))

    def _checked(self, format_: Format) -> Format:
        if self.args.every_turn and format_.converse is None:
            able = ", ".join(name for name, row in BY_NAME.items() if row.converse)
            raise ValueError(f"--every-turn is for formats of one conversation ({able}), not for {format_.name}")
        return format_

    def _is_new(self, record: Record) -> bool:
        """Whether a record has something to learn that no other had; counted either way."""
        self.tally.read += 1
        number, chosen = int(record["id"], 16), record["chosen"].strip()
        if any(text.strip() == chosen for text in record["rejected"]):
            self.tally.drop("rejected_equals_chosen")
        elif number in self.seen:
            self.tally.drop("duplicate")
        else:
            self.seen.add(number)
            self.tally.kept += 1
            return True
        return False

    def _try[T](self, reason: str, function: Callable[..., T], *args: Any) -> T | None:
        """The function's result; None, and one more under `reason`, where it raises ValueError and --drop-invalid was given."""
        try:
            return function(*args)
        except ValueError as error:
            if not self.args.drop_invalid:
                raise ValueError(f"{error} (--drop-invalid leaves such records out)") from None
            self.tally.read += 1
            self.tally.drop(reason)
            self.first.setdefault(reason, " ".join(str(error).split()))
            return None

    def notes(self) -> str:
        """The files' formats (of many files how many have each) and the first invalid record of each reason, a line each."""
        lines = [f"{path}: {name}" for path, name in self.formats]
        if len(lines) > 10:
            lines = [f"{count} files: {name}" for name, count in Counter(name for _, name in self.formats).most_common()]
        return "".join([f"\n  format    {line}" for line in lines] + [f"\n  first     {why}" for why in self.first.values()])


def _run(args: argparse.Namespace) -> str:
    paths, output = find_inputs(args.input), Path(args.output).resolve()
    if any(path.resolve() == output for path in paths):
        raise ValueError(f"{args.output}: is one of the inputs too; give another --output")
    return make_once(args, Ingredients(paths, [Path(args.output)]), lambda: _normalise(args, paths))


def _normalise(args: argparse.Namespace, paths: list[Path]) -> str:
    normaliser = Normaliser(args)
    with jsonl_writer(args.output) as write:
        for path in paths:
            for record in normaliser.records(path):
                write(record)
        normaliser.tally.check(args.max_drop_fraction)
    return close_stage(normaliser.tally, args.output) + normaliser.notes()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = StageParser(
        "normalise",
        "Bring data of any known format into records with stable ids. Files: .jsonl, .json (an array of objects: read whole, at most "
        f"{MAX_ARRAY_BYTES >> 30} GiB), both also .gz or .zst, and .parquet.",
        "--input train.jsonl more/ 'shards/*.parquet' --output records.jsonl",
        output="records, one per line", many_inputs=True,
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=list(BY_NAME), metavar="NAME", help=f"do not detect each file's format, demand this one: {', '.join(BY_NAME)}"
    )
    parser.add_argument("--every-turn", action="store_true", help="a record for each answer of a conversation (default: for the last one)")
    parser.add_argument("--drop-invalid", action="store_true", help="drop and count bad lines, unfit or empty records (else an error)")
    return run_stage(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
