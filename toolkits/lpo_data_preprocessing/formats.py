"""The shapes that data comes in, one row of `FORMATS` each, and how a record of each becomes prompt, chosen and rejected answers.

A row is the fields that give the format away and the function that converts. The order of the rows matters: the first that fits wins, so
those with more telling fields come first. A prompt is a list of messages {"role", "content"}; what a message has beside these goes on with
it. Where a format says nothing better, a text is taken as it is, spaces included: a prompt that TRL would train on is the same here.

What a row consumes is gone afterwards; every other field of a record passes through the stage, but for a prompt or an answer that no row
would use: that is an error (`check_nothing_lost`). A null is as good as a missing field, because a parquet file has every column in
every row.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkits.lpo_data_preprocessing.dialogues import lpo_conversation
from toolkits.lpo_data_preprocessing.records import Message, Record, check_messages, get_field, get_texts


@dataclass(frozen=True)
class Example:
    """One prompt with its answers."""

    prompt: list[Message]
    chosen: str
    rejected: list[str] = field(default_factory=list)
    more: Record = field(default_factory=dict)
    """Further fields of the record, under the names that later stages know."""


Conversation = tuple[list[Message], list[int]]
"""(messages, indices of those assistant turns that are answers to learn, at least one, ascending)"""


PROMPTS = frozenset(
    "prompt instruction instructions question query problem input inputs context system system_prompt history message messages "
    "conversation conversations dialog dialoge dialogue user human".split()
)
"""Fields that hold a prompt or a part of one, whatever their letters' case."""


@dataclass(frozen=True)
class Format:
    """One input shape: a pair of answers (`convert`) or one conversation (`converse`)."""

    name: str
    fields: dict[str, type | tuple[type, ...]]
    """Fields it consists of, with the JSON types that tell it from others; "a|b" is a field with two names."""
    convert: Callable[[Record, str], Example] | None = None
    """(record, "file:line") -> example; ValueError that opens with the place."""
    converse: Callable[[Record, str], Conversation] | None = None
    """(record, "file:line") -> conversation; ValueError that opens with the place."""
    consumes: tuple[str, ...] = ()
    """Optional fields that are part of the format too."""
    looks: Callable[[Record], bool] = lambda record: True
    """What else gives it away."""
    lone: bool = False
    """Whether a field that looks like a prompt, beside its own, speaks against it."""

    @property
    def names(self) -> set[str]:
        """Every field that the format consumes; a conversation may have rejected answers to its last turn."""
        optional = {*self.consumes, "rejected"} if self.converse else set(self.consumes)
        return {name for names in self.fields for name in names.split("|")} | optional

    def matches(self, record: Record) -> bool:
        """Whether a record has this format's fields."""
        present = all(any(isinstance(record.get(n), kind) for n in names.split("|")) for names, kind in self.fields.items())
        return present and self.looks(record) and not self.other_prompt(record)

    def other_prompt(self, record: Record) -> str | None:
        """A field that speaks against this format."""
        return next((name for name in record if self.lone and name.lower() in PROMPTS - self.names and record[name]), None)

    def examples(self, record: Record, where: str, every_turn: bool) -> list[Example]:
        """The record's example, or with `every_turn` one for each answer to a user's or a tool's turn."""
        if self.convert is not None:
            return [self.convert(record, where)]
        assert self.converse is not None
        messages, (*earlier, last) = self.converse(record, where)
        replies = [i for i in earlier if messages[i - 1]["role"] in ("user", "tool")] if every_turn else []
        before = [Example(messages[:i], messages[i]["content"]) for i in replies]
        return [*before, Example(messages[:last], messages[last]["content"], _given(record, where))]


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _messages(record: Record, name: str, where: str) -> list[Message]:
    """A field of messages, without the nulls that parquet gives every message for the fields that some have."""
    messages = get_field(record, name, list, where)
    bare = [{key: value for key, value in m.items() if value is not None} if isinstance(m, dict) else m for m in messages]
    return check_messages(bare, f"{where}: field {name!r}")


def _texts(record: Record, name: str, where: str) -> list[str]:
    """A field that is one text or several."""
    return [record[name]] if isinstance(record.get(name), str) else get_texts(record, name, where)


def _given(record: Record, where: str) -> list[str]:
    """The rejected answers of a format that need not have any."""
    return _texts(record, "rejected", where) if "rejected" in record else []


def _reply(messages: list[Message], name: str, where: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages) or "nothing"
        raise ValueError(f"{where}: field {name!r} must be one assistant message (after the prompt that both sides share), got {roles}")
    return messages[0]["content"]


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long a prompt two whole texts or conversations share: up to the first difference, and never all of the shorter one.

    Among texts, a space before the difference belongs to the answers. This is the rule of TRL's `extract_prompt`.
    """
    shorter = min(len(one), len(other))
    different = (i for i in range(shorter) if one[i] != other[i])
    length = next(different, max(0, shorter - 1))
    return length - (length > 0 and one[length] != other[length] and one[length - 1] == " ")


def _pair(chosen: list[Message], rejected: list[Message], names: tuple[str, str], where: str) -> Example:
    """Two whole conversations that differ in their last answer."""
    length = shared_length(chosen, rejected)
    return Example(chosen[:length], _reply(chosen[length:], names[0], where), [_reply(rejected[length:], names[1], where)])


def _from_standard(record: Record, where: str) -> Example:
    prompt, chosen = get_field(record, "prompt", str, where), get_field(record, "chosen", str, where)
    return Example(_user(prompt), chosen, _texts(record, "rejected", where))


def _from_conversational(record: Record, where: str) -> Example:
    prompt, *sides = (_messages(record, name, where) for name in ("prompt", "chosen", "rejected"))
    return Example(prompt, _reply(sides[0], "chosen", where), [_reply(sides[1], "rejected", where)])


def _from_records(record: Record, where: str) -> Example:
    return Example(_messages(record, "prompt", where), get_field(record, "chosen", str, where), _given(record, where))


def _from_implicit_texts(record: Record, where: str) -> Example:
    chosen, rejected = get_field(record, "chosen", str, where), get_field(record, "rejected", str, where)
    length = shared_length(chosen, rejected)
    return Example(_user(chosen[:length]), chosen[length:], [rejected[length:]])


def _from_implicit_messages(record: Record, where: str) -> Example:
    """As TRL does, a prompt that is a text beside conversations is not looked at: they hold it, with its role and what went before."""
    return _pair(_messages(record, "chosen", where), _messages(record, "rejected", where), ("chosen", "rejected"), where)


def _from_ultrafeedback(record: Record, where: str) -> Example:
    example = _from_implicit_messages(record, where)
    chosen, rejected = (get_field(record, name, (int, float), where) for name in ("score_chosen", "score_rejected"))
    return Example(example.prompt, example.chosen, example.rejected, {"chosen_score": chosen, "rejected_scores": [rejected]})


def _from_step_dpo(record: Record, where: str) -> Example:
    """Whole solutions to the question: the steps that both sides share, then the rest of either.

    In Math-Step-DPO-10K (arXiv 2406.18629) "prompt" is the question and "initial_reason_steps" the assistant's solution up to and with
    the number of the step that goes wrong ("... Step 3:"). "chosen" and "rejected" are that one step, "full_chosen" and "full_rejected"
    the solution from there to its end: Step-DPO's own code puts prompt, initial steps and step together with nothing between. Single
    steps would be answers that end in mid-solution after half an assistant's turn; a response here is a whole turn that ends, so
    the steps are not used. The shared steps stay in both answers and, to find the border again, as a field. A full answer that holds
    the shared steps already is taken as it is.
    """
    names = ("prompt", "initial_reason_steps", "full_chosen", "full_rejected")
    prompt, steps, *rest = (get_field(record, name, str, where) for name in names)
    chosen, rejected = (text if text.startswith(steps) else steps + text for text in rest)
    return Example(_user(prompt), chosen, [rejected], {"initial_reason_steps": steps})


_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def _transcript(record: Record, name: str, where: str) -> list[Message]:
    before, *parts = _SPEAKER.split(get_field(record, name, str, where).lstrip("\n"))
    if before.strip() or not parts:
        raise ValueError(f"{where}: field {name!r} must open with 'Human:' or 'Assistant:', got {before!r:.80}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _from_hh(record: Record, where: str) -> Example:
    """Transcripts of Anthropic's HH-RLHF: turns open with a blank line and "Human:" or "Assistant:"; spaces around a turn are not kept."""
    return _pair(_transcript(record, "chosen", where), _transcript(record, "rejected", where), ("chosen", "rejected"), where)


def _is_transcript(record: Record) -> bool:
    return record["chosen"].lstrip("\n").startswith(("Human:", "Assistant:")) and "\n\nAssistant:" in record["chosen"]


def _whole(messages: list[Message], where: str) -> Conversation:
    """A conversation whose assistant turns are all answers; it must end with one."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]
    if not answers or answers[-1] != len(messages) - 1:
        raise ValueError(f"{where}: messages must end with an assistant's turn after a prompt")
    return messages, answers


def _converse_messages(record: Record, where: str) -> Conversation:
    return _whole(_messages(record, "messages", where), where)


def _from_ms_swift(record: Record, where: str) -> Example:
    messages, answers = _converse_messages(record, where)
    return Example(messages[: answers[-1]], messages[-1]["content"], _texts(record, "rejected_response", where))


def _from_ms_swift_messages(record: Record, where: str) -> Example:
    sides = ("messages", "rejected_messages")
    return _pair(_messages(record, sides[0], where), _messages(record, sides[1], where), sides, where)


_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool", "observation": "tool",
}  # fmt: skip


def _system(record: Record, where: str) -> list[Message]:
    text = get_field(record, "system", str, where) if "system" in record else ""
    return [{"role": "system", "content": text}] if text else []


def _turn(turn: Any, where: str) -> Message:
    """A {"from", "value"} turn (or {"role", "content"}) as a message, whose content is not checked yet."""
    role = _SHAREGPT_ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, dict) else None
    if role is None:
        raise ValueError(f"{where}: a turn needs 'value' and 'from' (one of {', '.join(_SHAREGPT_ROLES)}), got {turn!r:.80}")
    return {"role": role, "content": turn.get("value", turn.get("content"))}


def _turns(record: Record, name: str, where: str) -> list[Message]:
    """The turns of a conversation; a "system" field opens it."""
    turns = [_turn(turn, where) for turn in get_field(record, name, list, where)]
    return check_messages(_system(record, where) + turns, where)


def _converse_sharegpt(record: Record, where: str) -> Conversation:
    """{"from", "value"} turns, as in Infinity-Instruct."""
    return _whole(_turns(record, "conversations", where), where)


def _from_conversation_preference(record: Record, where: str) -> Example:
    """A conversation up to a user's turn, and answers to it: texts or turns."""

    def said(answer: Any, name: str) -> str:
        return answer if isinstance(answer, str) else _reply(check_messages([_turn(answer, where)], where), name, where)

    prompt = _turns(record, "conversations" if "conversations" in record else "messages", where)
    given = record.get("rejected")
    rejected = [said(answer, "rejected") for answer in (given if isinstance(given, list) else [given])]
    return Example(prompt, said(record.get("chosen"), "chosen"), rejected)


def _alpaca_prompt(record: Record, where: str) -> list[Message]:
    """Instruction and input make the question, a line each; "history" holds earlier [question, answer] pairs."""
    messages = _system(record, where)
    for turn in get_field(record, "history", list, where) if "history" in record else []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"{where}: field 'history' must hold [question, answer] pairs of texts, got {turn!r:.80}")
        messages += [*_user(turn[0]), {"role": "assistant", "content": turn[1]}]
    question = get_field(record, "instruction", str, where)
    given = get_field(record, "input", str, where) if "input" in record else ""
    return messages + _user(f"{question}\n{given}" if question and given else question + given)


def _converse_alpaca(record: Record, where: str) -> Conversation:
    return _whole([*_alpaca_prompt(record, where), {"role": "assistant", "content": get_field(record, "output", str, where)}], where)


def _from_alpaca_preference(record: Record, where: str) -> Example:
    return Example(_alpaca_prompt(record, where), get_field(record, "chosen", str, where), _texts(record, "rejected", where))


def _from_question(record: Record, where: str) -> Example:
    return Example(_user(get_field(record, "question", str, where)), get_field(record, "answer", str, where), _given(record, where))


_QUESTIONS = ("question", "query", "problem", "input")


def _from_question_preference(record: Record, where: str) -> Example:
    """A question under one of several names, and a system's turn before it, as in Orca's pairs."""
    names = [name for name in _QUESTIONS if name in record]
    if len(names) != 1:
        raise ValueError(f"{where}: one field must hold the question ({', '.join(_QUESTIONS)}), got {', '.join(names) or 'none'}")
    prompt = _system(record, where) + _user(get_field(record, names[0], str, where))
    return Example(prompt, get_field(record, "chosen", str, where), _texts(record, "rejected", where))


_NUMBER = (int, float)
FORMATS = (
    Format(
        "step_dpo", {"prompt": str, "initial_reason_steps": str, "full_chosen": str, "full_rejected": str}, _from_step_dpo,
        consumes=("chosen", "rejected"),  # the single steps
    ),
    Format(
        "ultrafeedback", {"prompt": str, "chosen": list, "rejected": list, "score_chosen": _NUMBER, "score_rejected": _NUMBER},
        _from_ultrafeedback, consumes=("messages",),  # the chosen conversation once more
    ),
    Format("infinity_preference", {"prompt": str, "chosen": list, "rejected": list}, _from_implicit_messages),
    Format("standard", {"prompt": str, "chosen": str, "rejected": (str, list)}, _from_standard),
    Format("conversational", {"prompt": list, "chosen": list, "rejected": list}, _from_conversational),
    Format("records", {"prompt": list, "chosen": str}, _from_records, consumes=("rejected",)),
    Format("hh_rlhf", {"chosen": str, "rejected": str}, _from_hh, looks=_is_transcript),
    Format(
        "alpaca_preference", {"instruction": str, "chosen": str, "rejected": (str, list)},
        _from_alpaca_preference, consumes=("input", "history", "system"), lone=True,
    ),
    Format(
        "question_preference", {"|".join(_QUESTIONS): str, "chosen": str, "rejected": (str, list)},
        _from_question_preference, consumes=("system",), lone=True,
    ),
    Format(
        "conversation_preference", {"conversations|messages": list, "chosen": (str, dict), "rejected": (str, dict, list)},
        _from_conversation_preference, consumes=("system",),
    ),
    Format("standard_implicit", {"chosen": str, "rejected": str}, _from_implicit_texts, lone=True),
    Format("conversational_implicit", {"chosen": list, "rejected": list}, _from_implicit_messages),
    Format("ms_swift", {"messages": list, "rejected_response": (str, list)}, _from_ms_swift),
    Format("ms_swift_messages", {"messages": list, "rejected_messages": list}, _from_ms_swift_messages),
    Format("lpo_dialogue", {"dialog|dialoge": (list, str)}, converse=lpo_conversation),
    Format("sharegpt", {"conversations": list}, converse=_converse_sharegpt, consumes=("system",)),
    Format("messages", {"messages": list}, converse=_converse_messages),
    Format("alpaca", {"instruction": str, "output": str}, converse=_converse_alpaca, consumes=("input", "history", "system")),
    Format("question_answer", {"question": str, "answer": str}, _from_question, consumes=("rejected",)),
)  # fmt: skip
BY_NAME = {format_.name: format_ for format_ in FORMATS}


def detect_format(record: Record, where: str) -> Format:
    """The first row of `FORMATS` that a record fits; ValueError listing the rows if none does."""
    for format_ in FORMATS:
        if format_.matches(record):
            return format_
    for format_ in FORMATS:
        if demanded(format_.name).matches(record):
            check_alone(format_, record, where)
    known = "; ".join(f"{format_.name}: {', '.join(format_.fields)}" for format_ in FORMATS)
    raise ValueError(f"{where}: format not recognised from fields {', '.join(record) or '(none)'} (known formats: {known})")


def demanded(name: str) -> Format:
    """The row of a format that the user names: what else a record looks like does not count."""
    return replace(BY_NAME[name], lone=False)


def check_alone(format_: Format, record: Record, where: str) -> None:
    """ValueError for a field that looks like a prompt where the format has its prompt from elsewhere."""
    if name := format_.other_prompt(record):
        raise ValueError(
            f"{where}: field {name!r} looks like a prompt, but format {format_.name} does not use it (call it 'prompt' if it is the whole "
            f"prompt; --format {format_.name} passes it on as it is)"
        )


def check_nothing_lost(format_: Format, record: Record, example: Example, where: str) -> None:
    """ValueError for a prompt or an answer that the format does not use: unlike other fields, these cannot pass through.

    A text that the example has anyway is no loss: in UltraChat the "prompt" is the first of the messages.
    """
    said = {"prompt": [message["content"].strip() for message in example.prompt], "chosen": [example.chosen.strip()], "rejected": []}
    for name, texts in said.items():
        value = None if name in format_.names else record.get(name)
        if value and not (isinstance(value, str) and value.strip() in texts):
            raise ValueError(f"{where}: field {name!r} is not part of format {format_.name} and would be lost; rename or remove it")
