"""Stage 2 without a model: candidates made by editing the chosen answer at random, in place of samples of the policy.

Rejected answers made so are cheap, and damaged in ways that no model's are: many still end in the right number. What they are worth
against samples is a question this stage lets one ask. One edit changes a character, a word or a digit; which and where depends on
(seed, record id, candidate number) alone.
"""

import argparse
import hashlib
import random
import re
import string
import sys
from collections.abc import Callable, Sequence
from typing import Any

from toolkits.lpo_data_preprocessing.records import (
    Record,
    StageParser,
    Tally,
    close_stage,
    get_field,
    jsonl_writer,
    progress,
    read_records,
    refuse_existing,
    run_stage,
)

Edit = Callable[[str, random.Random], str]
_ATTEMPTS = 100  # an edit may undo the one before


def edit_character(text: str, rng: random.Random) -> str:
    """Delete, repeat or replace one character."""
    place = rng.randrange(len(text))
    instead = rng.choice(("", text[place] * 2, rng.choice(string.ascii_lowercase)))
    return text[:place] + instead + text[place + 1 :]


def edit_word(text: str, rng: random.Random) -> str:
    """Delete or repeat one word, or exchange it with the next; white space stays. A text of one word stays as it is."""
    pieces = re.split(r"(\s+)", text)
    words = [number for number in range(0, len(pieces), 2) if pieces[number]]
    if len(words) < 2:
        return text
    place = rng.randrange(len(words) - 1)
    this, following = words[place], words[place + 1]
    edit = rng.choice(("delete", "repeat", "exchange"))
    if edit == "exchange":
        pieces[this], pieces[following] = pieces[following], pieces[this]
    elif edit == "repeat":
        pieces[this] += f" {pieces[this]}"
    else:
        del pieces[this : this + 2]
    return "".join(pieces)


def edit_number(text: str, rng: random.Random) -> str:
    """Replace one digit by another; a text without digits stays as it is."""
    digits = [match.start() for match in re.finditer(r"[0-9]", text)]
    if not digits:
        return text
    place = rng.choice(digits)
    return text[:place] + rng.choice([digit for digit in string.digits if digit != text[place]]) + text[place + 1 :]


EDITS: dict[str, Edit] = {"character": edit_character, "word": edit_word, "number": edit_number}


def perturb(text: str, rng: random.Random, edits: int, kinds: Sequence[str]) -> str:
    """`text` after `edits` random edits of these `kinds`, neither equal to it nor empty.

    Raises ValueError where none of the kinds can change the text.
    """
    for _ in range(_ATTEMPTS):
        changed = text
        for _ in range(edits):
            changed = EDITS[rng.choice(kinds)](changed, rng) if changed else changed
        if changed.strip() not in ("", text.strip()):
            return changed
    raise ValueError(f"no edit of kind {', '.join(kinds)} changes {text!r:.80}")


def perturbed(record: Record, args: argparse.Namespace, where: str) -> Record:
    """The record with `args.n` candidates, all of which ended."""
    chosen, id = get_field(record, "chosen", str, where), get_field(record, "id", str, where)
    if not chosen.strip():
        raise ValueError(f"{where}: an empty chosen answer cannot be perturbed")
    candidates: list[dict[str, Any]] = []
    for number in range(args.n):
        rng = random.Random(hashlib.sha256(f"{args.seed}/{id}/{number}".encode()).digest())
        try:
            candidates.append({"text": perturb(chosen, rng, args.edits, args.kinds), "finish_reason": "stop"})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return record | {"candidates": candidates}


def _run(args: argparse.Namespace) -> str:
    for name in ("n", "edits"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    refuse_existing(args.output, args.overwrite)
    tally = Tally()
    with jsonl_writer(args.output) as write:
        for number, record in progress(read_records(args.input), what="perturb", unit="record"):
            write(perturbed(record, args, f"{args.input}:{number}"))
            tally.read, tally.kept = tally.read + 1, tally.kept + 1
        tally.check(args.max_drop_fraction)
    return close_stage(tally, args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = StageParser(
        "perturb", "Make candidates by random edits of the chosen answer.",
        "--input records.jsonl --output candidates.jsonl -n 1 --edits 2 --kinds number",
        output="records with candidates, one per line",
    )  # fmt: skip
    parser.add_argument("-n", "--n", type=int, default=1, metavar="N", help="candidates per record (default %(default)s)")
    parser.add_argument("--edits", type=int, default=2, metavar="N", help="edits per candidate (default %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=list(EDITS), default=list(EDITS), help="of edits (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the edits (default %(default)s)")
    return run_stage(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
