"""The speech-and-text dialogues of LPO's authors (arXiv 2508.14947) as messages of text.

What is known of them is what the authors' released code reads; the data is not released, and they are documented nowhere. A record has
"dialog" (or "dialoge"), a list of turns or its JSON text. A turn has a kind in "type" or else "role" ("user", "assistant", anything with
"system" in it), "content_list", and may say in "cal_loss" whether it is to be learnt (without: the assistant's turns are). A segment of
the list has a "type" and a "content":

    text         the content
    audio        audio_infos.audio_tokens, ids of one codebook, between <|beginofaudio|> and <|endofaudio|>; they stand where the content
                 says <|audio|>, or in place of it
    audio_text   the same between <|inter_audio_begin|> and <|inter_audio_end|>; the content, text and <|audio|>, must say where
    cot          the content between <|cot_begin|> and <|cot_end|>, and a line end
    tool...      the content between <tool_call> and </tool_call>, and a line end

An id i is the token <|g0r0_i|>. Spaces at the borders of a turn go. The record's response is the last turn that is to be learnt, the
prompt what comes before it; what follows is left out.

Different here: the authors write <|endoftext|> after every turn and head a turn with the speaker's "name"; here the chat template decides,
and it knows roles. They blow up "role_dialog" data into variants with text in place of speech; that is not done. For the tokens above
the tokenizer needs ordinary added tokens (`extend_vocab` adds them): in a response, tokens that it calls special are spelled out.
"""

from typing import Any

from toolkits.lpo_data_preprocessing.records import Message, Record, get_field, parse_json

_PLACE = "<|audio|>"
_AROUND = {"audio": ("<|beginofaudio|>", "<|endofaudio|>"), "audio_text": ("<|inter_audio_begin|>", "<|inter_audio_end|>")}


def lpo_conversation(record: Record, where: str) -> tuple[list[Message], list[int]]:
    """(messages, indices of the turns to be learnt) of a record; ValueError naming `where`."""
    name = "dialog" if "dialog" in record else "dialoge"
    turns = get_field(record, name, (list, str), where)
    if isinstance(turns, str):
        turns = _parsed(turns, name, where)
    messages, answers = [], []
    for i, turn in enumerate(turns):
        place = f"{where}: {name}[{i}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{place} must be an object, got {turn!r:.80}")
        role = _role(turn, place)
        messages.append({"role": role, "content": _content(get_field(turn, "content_list", list, place), place)})
        if _learnt(turn, role, place):
            answers.append(i)
    if not answers or not answers[-1]:
        raise ValueError(f"{where}: field {name!r} has no turn to be learnt after a prompt")
    return messages, [i for i in answers if i]


def _parsed(text: str, name: str, where: str) -> list[Any]:
    try:
        turns = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: field {name!r} is not valid JSON ({error})") from None
    if not isinstance(turns, list):
        raise ValueError(f"{where}: field {name!r} must hold a list, got {type(turns).__name__}")
    return turns


def _role(turn: Record, place: str) -> str:
    kind = get_field(turn, "type" if turn.get("type") is not None else "role", str, place)
    if kind not in ("user", "assistant") and "system" not in kind:
        raise ValueError(f"{place}: the role must be user, assistant or a system's, got {kind!r:.80}")
    return kind if kind in ("user", "assistant") else "system"


def _learnt(turn: Record, role: str, place: str) -> bool:
    learnt = turn.get("cal_loss")
    if learnt is None:
        return role == "assistant"
    if learnt not in (True, False):
        raise ValueError(f"{place}: field 'cal_loss' must be true or false, got {learnt!r:.80}")
    if learnt and role != "assistant":
        raise ValueError(f"{place}: a {role}'s turn cannot be learnt (field 'cal_loss')")
    return bool(learnt)


def _content(segments: list[Any], place: str) -> str:
    texts = []
    for i, segment in enumerate(segments):
        if not isinstance(segment, dict):
            raise ValueError(f"{place}.content_list[{i}] must be an object, got {segment!r:.80}")
        text = get_field(segment, "content", str, f"{place}.content_list[{i}]")
        texts.append(_segment(segment, text, f"{place}.content_list[{i}]"))
    return "".join(texts).strip()


def _segment(segment: Record, text: str, place: str) -> str:
    kind = get_field(segment, "type", str, place)
    if kind == "text":
        return text
    if kind == "cot":
        return f"<|cot_begin|>{text}<|cot_end|>\n"
    if "tool" in kind:
        return f"<tool_call>{text}</tool_call>\n"
    if kind not in _AROUND:
        raise ValueError(f"{place}: a segment's type must be text, audio, audio_text, cot or tool, got {kind!r:.80}")
    if kind == "audio_text" and _PLACE not in text:
        raise ValueError(f"{place}: an audio_text segment must say where its speech goes ({_PLACE})")
    before, after = _AROUND[kind]
    speech = before + "".join(f"<|g0r0_{i}|>" for i in _audio_tokens(segment, place)) + after
    return text.replace(_PLACE, speech) if _PLACE in text else speech


def _audio_tokens(segment: Record, place: str) -> list[int]:
    tokens = get_field(get_field(segment, "audio_infos", dict, place), "audio_tokens", list, f"{place}.audio_infos")
    if not tokens or any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in tokens):
        raise ValueError(f"{place}: audio_tokens must be a non-empty list of ids, got {tokens!r:.80}")
    return tokens
