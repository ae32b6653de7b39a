"""What a record asks to be stored: one sample per rejected answer, or one fine-tuning sample, or one plain text; every field
checked.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolkits.lpo_data_preprocessing.records import Message, Record, check_messages, get_field, get_texts


@dataclass(frozen=True)
class Sample:
    """One document to be: texts and what travels beside them."""

    id: str
    prompt: list[Message]
    responses: list[tuple[str, str, bool]]
    """(name, text, ended) of the chosen and, for pairs, the rejected answer."""
    scores: tuple[float, float] | None = None
    line: int = -1
    """1-based, of the input file."""


def samples_of(record: Record, kind: str, where: str, line: int = -1) -> Iterator[Sample]:
    """The samples in one record, which is `line` of its file; ValueError naming `where` for a missing or mistyped field."""
    if kind == "text":
        text = get_field(record, "text", str, where)
        yield Sample(get_field({"id": f"line-{line}"} | record, "id", str, where), [], [("text", text, True)], line=line)
        return
    prompt = check_messages(get_field(record, "prompt", list, where), where)
    id, chosen = get_field(record, "id", str, where), get_field(record, "chosen", str, where)
    if kind == "sft":
        yield Sample(id, prompt, [("chosen", chosen, True)], line=line)
        return
    rejected = get_texts(record, "rejected", where)
    ended = aligned(record, "rejected_ended", bool, len(rejected), where) or [True] * len(rejected)
    scores = aligned(record, "rejected_scores", (int, float), len(rejected), where)
    scores = scores and [_number(score, "rejected_scores", where) for score in scores]
    for i, (text, end) in enumerate(zip(rejected, ended, strict=True)):
        pair_scores = (_number(get_field(record, "chosen_score", object, where), "chosen_score", where), scores[i]) if scores else None
        yield Sample(f"{id}-{i}", prompt, [("chosen", chosen, True), ("rejected", text, end)], pair_scores, line)


def _number(value: Any, name: str, where: str) -> float:
    """A finite number; neither true nor "0.5" is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{where}: field {name!r} must hold finite numbers, got {value!r:.80}")
    return value


def aligned(record: Record, name: str, kind: Any, length: int, where: str) -> list[Any] | None:
    """An optional list with one entry per rejected answer."""
    values = record.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != length or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{where}: field {name!r} needs one entry per rejected answer ({length}), got {values!r:.80}")
    return values
