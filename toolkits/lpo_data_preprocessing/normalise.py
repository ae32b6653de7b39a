"""Stage 1: JSONL in one of several shapes -> records of one shape, with stable ids and without exact duplicates.

A shape is one row of `FORMATS`: the fields that give it away and the function that turns it into (prompt messages, chosen, rejected). The
format is detected from the file's first record and holds for the file: a mixed file is a mistake, not a convenience. The id is a hash of
the content, so the same pair has the same id whatever file, line or order it came in; a user's own "id" is kept as "source_id".
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkits.lpo_data_preprocessing.records import (
    Message,
    Record,
    StageParser,
    Tally,
    check_messages,
    close_stage,
    content_hash,
    get_field,
    jsonl_writer,
    progress,
    read_records,
    refuse_existing,
    run_stage,
)

Parts = tuple[list[Message], str, list[str]]
"""(prompt messages, chosen text, rejected texts)"""


@dataclass(frozen=True)
class Format:
    """One input shape."""

    name: str
    fields: dict[str, type | tuple[type, ...]]
    """Fields it consists of, with the JSON types that tell it from others; all other fields pass through."""
    convert: Callable[[Record, str], Parts]
    """(record, "file:line") -> parts; ValueError that opens with the place."""

    def matches(self, record: Record) -> bool:
        """Whether a record has this format's fields."""
        return all(isinstance(record.get(name), kind) for name, kind in self.fields.items())


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _texts(value: Any, where: str, name: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: field {name!r} must be text or a list of texts")
    return texts


def _reply(messages: Any, where: str, name: str) -> str:
    checked = check_messages(messages, f"{where}: field {name!r}")
    if len(checked) != 1 or checked[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in checked)
        raise ValueError(f"{where}: field {name!r} must be one assistant message, got {roles}")
    return checked[0]["content"]


def _from_standard(record: Record, where: str) -> Parts:
    prompt, chosen = get_field(record, "prompt", str, where), get_field(record, "chosen", str, where)
    return _user(prompt), chosen, _texts(get_field(record, "rejected", object, where), where, "rejected")


def _from_conversational(record: Record, where: str) -> Parts:
    prompt = check_messages(get_field(record, "prompt", list, where), where)
    chosen, rejected = (_reply(get_field(record, name, list, where), where, name) for name in ("chosen", "rejected"))
    return prompt, chosen, [rejected]


def _from_records(record: Record, where: str) -> Parts:
    prompt = check_messages(get_field(record, "prompt", list, where), where)
    return prompt, get_field(record, "chosen", str, where), _texts(record.get("rejected", []), where, "rejected")


def _from_question(record: Record, where: str) -> Parts:
    return _user(get_field(record, "question", str, where)), get_field(record, "answer", str, where), []


def _from_messages(record: Record, where: str) -> Parts:
    messages = check_messages(get_field(record, "messages", list, where), where)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError(f"{where}: messages must end with an assistant's turn after a prompt")
    return messages[:-1], messages[-1]["content"], []


FORMATS = (
    Format("standard", {"prompt": str, "chosen": str, "rejected": (str, list)}, _from_standard),
    Format("conversational", {"prompt": list, "chosen": list, "rejected": list}, _from_conversational),
    Format("records", {"prompt": list, "chosen": str}, _from_records),
    Format("question_answer", {"question": str, "answer": str}, _from_question),
    Format("messages", {"messages": list}, _from_messages),
)
_BY_NAME = {format_.name: format_ for format_ in FORMATS}


def detect_format(record: Record, where: str) -> Format:
    """The first row of `FORMATS` that a record fits; ValueError listing the rows if none does."""
    for format_ in FORMATS:
        if format_.matches(record):
            return format_
    known = "; ".join(f"{format_.name}: {', '.join(format_.fields)}" for format_ in FORMATS)
    raise ValueError(f"{where}: format not recognised from fields {', '.join(record) or '(none)'} (known formats: {known})")


def normalise_record(record: Record, format_: Format, where: str) -> Record:
    """One record in the common shape; ValueError naming `where`."""
    prompt, chosen, rejected = format_.convert(record, where)
    if prompt[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the prompt must not end with an assistant's turn")
    result: Record = {"id": content_hash([prompt, chosen, rejected]), "prompt": prompt, "chosen": chosen, "rejected": rejected}
    passed_on = {name: value for name, value in record.items() if name not in format_.fields and name not in result}
    if record.get("id") not in (None, result["id"]):
        passed_on.setdefault("source_id", record["id"])
    return result | passed_on


def is_empty(record: Record) -> str | None:
    """The field whose text is empty (or only spaces), if any."""
    texts = {"prompt": record["prompt"][-1]["content"], "chosen": record["chosen"]}
    texts |= {f"rejected[{i}]": text for i, text in enumerate(record["rejected"])}
    return next((name for name, text in texts.items() if not text.strip()), None)


def _run(args: argparse.Namespace) -> str:
    refuse_existing(args.output, args.overwrite)
    tally, seen, shapes = Tally(), set[str](), []
    with jsonl_writer(args.output) as write:
        for path in [args.input, *args.more_input]:
            format_ = _BY_NAME.get(args.format)
            for number, raw in progress(read_records(path), what=f"normalise {Path(path).name}", unit="record"):
                where = f"{path}:{number}"
                format_ = format_ or detect_format(raw, where)
                record = normalise_record(raw, format_, where)
                tally.read += 1
                if empty := is_empty(record):
                    if not args.drop_empty:
                        raise ValueError(f"{where}: field {empty!r} is empty (--drop-empty leaves such records out)")
                    tally.drop("empty_text")
                elif record["id"] in seen:
                    tally.drop("duplicate")
                else:
                    seen.add(record["id"])
                    tally.kept += 1
                    write(record)
            shapes.append(f"{path}: {format_.name if format_ else 'empty file'}")
        tally.check(args.max_drop_fraction)
    return close_stage(tally, args.output) + "".join(f"\n  format    {shape}" for shape in shapes)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = StageParser(
        "normalise", "Bring JSONL files of any known format into records with stable ids.",
        "--input train.jsonl --output records.jsonl", output="records, one per line",
    )  # fmt: skip
    parser.add_argument("--more-input", nargs="*", default=[], metavar="JSONL", help="further files, each with a format of its own")
    parser.add_argument("--format", choices=list(_BY_NAME), help="do not detect the format, demand this one")
    parser.add_argument("--drop-empty", action="store_true", help="drop and count records with an empty prompt or answer (else an error)")
    return run_stage(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
