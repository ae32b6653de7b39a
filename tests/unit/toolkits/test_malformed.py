"""Input that is broken in every way we could think of: one line that names the place and exit code 2, or a drop under its own reason.

Whatever happens, no output is left half-written and nothing takes long.
"""

import gzip
import json
import shutil
import time

import pyarrow
import pyarrow.parquet
import pytest
from toolkit_helpers import files, read_jsonl, record, write_jsonl

from toolkits.lpo_data_preprocessing import build_pairs, candidates, normalise, select
from toolkits.lpo_data_preprocessing import records as shared

GOOD = b'{"question": "q", "answer": "a"}\n'
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
USER = [{"role": "user", "content": "q"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def line(**fields):
    return json.dumps(fields).encode() + b"\n"


def chat(*roles):
    return line(messages=[{"role": role, "content": "x"} for role in roles])


def dialogue(*turns):
    return line(dialog=[{"role": role, "content_list": segments} for role, segments in turns])


def text(content):
    return [{"type": "text", "content": content}]


@pytest.fixture
def refuses(tmp_path, fails):
    """Call normalise on bytes; the error line, after a check that nothing else was made."""

    def call(name, data, *more):
        path = tmp_path / name
        path.write_bytes(data)
        started = time.monotonic()
        message = fails(normalise.main, "--input", path, "--output", tmp_path / "out.jsonl", *more)
        assert files(tmp_path) == [name] and time.monotonic() - started < 10
        return message.removeprefix(f"[error] normalise: {tmp_path}/")

    return call


LINES = {
    "broken JSON": (GOOD + b'{"question": "q", "answer": }\n' + GOOD, "in.jsonl:2: not valid JSON (Expecting value, character 29)"),
    "truncated last line": (GOOD * 2 + GOOD[:20], "in.jsonl:3: not valid JSON"),
    "two objects on a line": (GOOD.strip() + GOOD, "in.jsonl:1: not valid JSON (Extra data"),
    "old Mac line ends": (GOOD.replace(b"\n", b"\r") * 2, "in.jsonl:1: not valid JSON (Extra data"),
    "latin-1": (GOOD + '{"question": "é", "answer": "a"}\n'.encode("latin-1"), "in.jsonl:2: not UTF-8 (byte 0xe9 at 14)"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "in.jsonl:1: not UTF-8 (byte 0xff at 0)"),
    "UTF-16 without a mark": (GOOD.decode().encode("utf-16-le"), "in.jsonl:1: not valid JSON"),
    "byte order mark in the middle": (GOOD + b"\xef\xbb\xbf" + GOOD, "in.jsonl:2: not valid JSON"),
    "NUL bytes": (GOOD + b"\0" * 20 + b"\n", "in.jsonl:2: not valid JSON"),
    "NUL in a text": (b'{"question": "q\0", "answer": "a"}\n', "in.jsonl:1: not valid JSON (Invalid control character"),
    "array in JSON Lines": (b"[" + GOOD.strip() + b"]\n", "in.jsonl:1: a record must be a JSON object, got list (a JSON array belongs"),
    "pretty array in JSON Lines": (json.dumps([PAIR], indent=1).encode(), "in.jsonl:1: not valid JSON"),
    "number": (GOOD + b"5\n", "in.jsonl:2: a record must be a JSON object, got int"),
    "null": (GOOD + b"null\n", "in.jsonl:2: a record must be a JSON object, got NoneType"),
    "NaN": (GOOD + b'{"question": "q", "answer": "a", "score": NaN}\n', "in.jsonl:2: not valid JSON (NaN is not"),
    "Infinity": (GOOD + b'{"question": "q", "answer": "a", "score": -Infinity}\n', "in.jsonl:2: not valid JSON (-Infinity is not"),
    "too large a float": (GOOD + b'{"question": "q", "answer": "a", "score": 1e999}\n', "in.jsonl:2: not valid JSON (1e999 is too large"),
    "huge integer": (b'{"question": "q", "answer": "a", "n": ' + b"7" * 5000 + b"}\n", "in.jsonl:1: not valid JSON (Exceeds the limit"),
    "lone surrogate": (GOOD + b'{"question": "q \\ud800", "answer": "a"}\n', "in.jsonl:2: not valid text (half of a surrogate pair"),
    "lone surrogate in a name": (GOOD + b'{"question": "q", "answer": "a", "\\uDFFF": 1}\n', "in.jsonl:2: not valid text (half"),
    "surrogates as bytes": (GOOD + b'{"question": "\xed\xa0\x80", "answer": "a"}\n', "in.jsonl:2: not UTF-8"),
    "deep nesting": (b'{"question": ' + b"[" * 100_000 + b"\n", "in.jsonl:1: nested too deeply"),
    "deep nesting, closed": (b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n", "in.jsonl:1: nested too deeply"),
    "field given twice": (GOOD + b'{"question": "q", "answer": "a", "answer": "b"}\n', "in.jsonl:2: not valid JSON (field 'answer'"),
    "empty object": (b"{}\n", "in.jsonl:1: format not recognised from fields (none)"),
    "unknown format": (b'{"a": 1}\n', "in.jsonl:1: format not recognised from fields a (known formats: "),
    "two formats in a file": (GOOD + line(**PAIR), "in.jsonl:2: field 'question' is missing (fields: prompt, chosen, rejected)"),
    "missing field": (GOOD + b'{"question": "q"}\n', "in.jsonl:2: field 'answer' is missing"),
    "null field": (GOOD + b'{"question": "q", "answer": null}\n', "in.jsonl:2: field 'answer' is missing"),
    "number for a text": (GOOD + b'{"question": "q", "answer": 5}\n', "in.jsonl:2: field 'answer' must be a str, got int"),
    "numbers for texts": (line(prompt="q", chosen="a", rejected=[1]), "in.jsonl:1: rejected[0] must be text, got int"),
    "empty prompt": (line(question="", answer="a"), "in.jsonl:1: field 'prompt' is empty"),
    "answer of spaces": (GOOD + line(question="q", answer=" \n\t\u3000"), "in.jsonl:2: field 'chosen' is empty"),
    "empty rejected": (line(prompt="q", chosen="a", rejected=["b", ""]), "in.jsonl:1: field 'rejected[1]' is empty"),
    "no messages": (line(messages=[]), "in.jsonl:1: field 'messages': messages must be a non-empty list"),
    "message without content": (line(messages=[{"role": "user"}]), "in.jsonl:1: field 'messages': a message needs 'content'"),
    "message with parts": (line(messages=[{"role": "user", "content": text("x")}]), "in.jsonl:1: field 'messages': a message needs"),
    "a text among messages": (line(messages=["x"]), "in.jsonl:1: field 'messages': a message needs"),
    "unknown role": (chat("user", "narrator", "assistant"), "in.jsonl:1: field 'messages': a message needs 'content'"),
    "conversation without an answer": (chat("user", "assistant", "user"), "in.jsonl:1: messages must end with an assistant's turn"),
    "answer without a question": (chat("assistant"), "in.jsonl:1: messages must end with an assistant's turn after a prompt"),
    "answer to the system": (chat("system", "assistant"), "in.jsonl:1: the prompt must end with a user's or a tool's turn, got system"),
    "two answers in a row": (chat("user", "assistant", "assistant"), "in.jsonl:1: the prompt must end with a user's or a tool's turn, got"),
    "prompt ends with an answer": (line(prompt=[*USER, *said("x")], chosen="a"), "in.jsonl:1: the prompt must end with a user's or a tool"),
    "two chosen messages": (
        line(prompt=USER, chosen=said("a") * 2, rejected=said("b")),
        "in.jsonl:1: field 'chosen' must be one assistant message (after the prompt that both sides share), got assistant, assistant",
    ),
    "conversations differ early": (
        line(chosen=[*USER, *said("a"), *USER, *said("b")], rejected=[*USER, *said("c"), *USER, *said("b")]),
        "in.jsonl:1: field 'chosen' must be one assistant message",
    ),
    "nothing in common": (line(chosen="x", rejected="y"), "in.jsonl:1: field 'prompt' is empty"),
    "nothing in common, messages": (line(chosen=said("a"), rejected=said("b")), "in.jsonl:1: the prompt must end with a user's"),
    "score of text": (
        line(prompt="q", chosen=[*USER, *said("a")], rejected=[*USER, *said("b")], score_chosen=1, score_rejected=2)
        + line(prompt="q", chosen=[*USER, *said("a")], rejected=[*USER, *said("b")], score_chosen="1", score_rejected=2),
        "in.jsonl:2: field 'score_chosen' must be a int or float, got str",
    ),
    "transcript out of order": (
        line(chosen="\n\nHuman: a\n\nAssistant: b", rejected="\n\nHuman: a\n\nAssistant: c")
        + line(chosen="\n\nHuman: a\n\nAssistant: b", rejected="So.\n\nHuman: a\n\nAssistant: c"),
        "in.jsonl:2: field 'rejected' must open with 'Human:' or 'Assistant:', got 'So.'",
    ),
    "unknown ShareGPT role": (line(conversations=[{"from": "alien", "value": "x"}]), "in.jsonl:1: a turn needs 'value' and 'from'"),
    "ShareGPT turn without value": (line(conversations=[{"from": "human"}, {"from": "gpt", "value": "x"}]), "in.jsonl:1: a message needs"),
    "history of triples": (line(instruction="i", output="o", history=[["a", "b", "c"]]), "in.jsonl:1: field 'history' must hold"),
    "dialogue of broken JSON": (line(dialog="[{"), "in.jsonl:1: field 'dialog' is not valid JSON"),
    "dialogue of a number": (line(dialog="5"), "in.jsonl:1: field 'dialog' must hold a list, got int"),
    "dialogue with an unknown role": (dialogue(("robot", text("x"))), "in.jsonl:1: dialog[0]: the role must be user, assistant or"),
    "dialogue with an unknown segment": (
        dialogue(("user", [{"type": "video", "content": "x"}])),
        "in.jsonl:1: dialog[0].content_list[0]: a segment's type must be",
    ),
    "dialogue without audio": (
        dialogue(("user", [{"type": "audio", "content": ""}])),
        "in.jsonl:1: dialog[0].content_list[0]: field 'audio_infos' is missing",
    ),
    "dialogue with bad audio": (
        dialogue(("user", [{"type": "audio", "content": "", "audio_infos": {"audio_tokens": [1.5]}}])),
        "in.jsonl:1: dialog[0].content_list[0]: audio_tokens must be",
    ),
    "dialogue with nothing to learn": (dialogue(("user", text("x"))), "in.jsonl:1: field 'dialog' has no turn to be learnt"),
    "rejected answers of numbers": (GOOD + line(question="q", answer="a", rejected=[5]), "in.jsonl:2: rejected[0] must be text, got int"),
    "empty file": (b"", "no records left (empty input)"),
    "blank lines only": (b"\n  \n\r\n", "no records left (empty input)"),
    "all of it duplicates": (GOOD * 3, "2 of 3 records dropped, more than --max-drop-fraction 0.5 (duplicate 2)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_lines(refuses, name):
    data, message = LINES[name]
    refusal = refuses("in.jsonl", data)
    assert refusal.removeprefix("[error] normalise: ").startswith(message), refusal


@pytest.mark.parametrize("name", [name for name, (data, _) in LINES.items() if data.startswith(GOOD) and data != GOOD * 3])
def test_lines_can_be_left_out(tmp_path, name, capsys):
    """The good records go through, the bad one is counted and shown."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"question": "other", "answer": "a"}\n'.join([b"", LINES[name][0]]))
    out = tmp_path / "out.jsonl"
    assert normalise.main(["--input", str(path), "--output", str(out), "--drop-invalid", "--max-drop-fraction", "0.8"]) == 0
    assert {row["chosen"] for row in read_jsonl(out)} == {"a"} and len(read_jsonl(out)) == 2
    dropped = json.loads((tmp_path / "out.jsonl.tally.json").read_text())["dropped"]
    assert sum(dropped[reason] for reason in ("not_a_record", "unfit_fields", "empty_text") if reason in dropped) == 1
    assert "  first     " in capsys.readouterr().out


ARRAYS = {
    "JSON Lines in .json": (GOOD * 2, "in.json: not a valid JSON array (Extra data"),
    "JSON Lines in .json, hint": (GOOD * 2, "one object a line belongs into a .jsonl file"),
    "an object": (GOOD, "in.json: must be an array of objects, got dict"),
    "cut": (b"[" + GOOD, "in.json: not a valid JSON array (Expecting"),
    "a number inside": (b"[" + GOOD + b", 5]", "in.json[1]: a record must be a JSON object, got int"),
    "a list inside": (b"[" + GOOD + b", []]", "in.json[1]: a record must be a JSON object, got list"),
    "NaN": (b'[{"a": NaN}]', "in.json: not a valid JSON array (NaN"),
    "lone surrogate": (b"[" + GOOD + b', {"question": "\\udc00", "answer": "a"}]', "in.json[1]: not valid text"),
    "UTF-16": ("[]".encode("utf-16"), "in.json: not a valid JSON array ('utf-8' codec can't decode"),
    "deep nesting": (b"[" * 100_000, "in.json: not a valid JSON array (maximum recursion"),
    "empty array": (b"[]", "no records left (empty input)"),
    "empty file": (b" \n", "no records left (empty input)"),
    "missing field": (b"[" + GOOD + b', {"question": "q"}]', "in.json[1]: field 'answer' is missing"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(refuses, name):
    data, message = ARRAYS[name]
    assert message in refuses("in.json", data)


PACKED = gzip.compress(GOOD * 50_000)
FRAME = pyarrow.compress(GOOD * 50_000, codec="zstd", asbytes=True)
COMPRESSED = {
    "truncated gzip": ("in.jsonl.gz", PACKED[:-20], "in.jsonl.gz: not readable after line "),
    "gzip without its end": ("in.jsonl.gz", PACKED[:-3], "in.jsonl.gz: not readable after line "),
    "gzip with a bad checksum": ("in.jsonl.gz", PACKED[:-8] + b"\0" * 4 + PACKED[-4:], "in.jsonl.gz: not readable after line "),
    "not gzip": ("in.jsonl.gz", GOOD, "in.jsonl.gz: not readable after line 0"),
    "truncated zstd": ("in.jsonl.zst", FRAME[:-2], "in.jsonl.zst: not readable after line "),
    "not zstd": ("in.json.zst", GOOD, "in.json.zst: not readable ("),
    "broken line in gzip": ("in.jsonl.gz", gzip.compress(GOOD + b"{\n"), "in.jsonl.gz:2: not valid JSON"),
    "not parquet": ("in.parquet", GOOD, "in.parquet: not readable as parquet after row 0"),
    "empty parquet file": ("in.parquet", b"", "in.parquet: not readable as parquet after row 0"),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_files(refuses, name):
    file, data, message = COMPRESSED[name]
    assert refuses(file, data, "--max-drop-fraction", "1").startswith(message)


def table(tmp_path, rows, **columns):
    built = pyarrow.Table.from_pylist(rows)
    for name, values in columns.items():
        built = built.append_column(name, values)
    pyarrow.parquet.write_table(built, tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


def test_parquet(tmp_path, refuses, fails):
    rows = [{"question": "q", "answer": "a"}, {"question": "q2", "answer": None}]
    cases = [
        (table(tmp_path, rows), "in.parquet:row 2: field 'answer' is missing"),
        (table(tmp_path, rows[:1], when=pyarrow.array([0], pyarrow.timestamp("s"))), "in.parquet:row 1: has no JSON form"),
        (table(tmp_path, rows[:1], image=pyarrow.array([b"\xff"])), "in.parquet:row 1: has no JSON form"),
        (table(tmp_path, rows[:1], score=pyarrow.array([float("nan")])), "in.parquet:row 1: has no JSON form"),
        (table(tmp_path, rows)[:-30], "in.parquet: not readable as parquet after row 0"),
        (table(tmp_path, [{"messages": [{"role": "user", "content": None}]}]), "in.parquet:row 1: field 'messages': a message needs"),
    ]
    (tmp_path / "made.parquet").unlink()
    for data, message in cases:
        assert refuses("in.parquet", data).startswith(message)


ACCEPTED = {
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "a"),
    "CRLF": (GOOD.replace(b"\n", b"\r\n") + b"\r\n", "a"),
    "no line end": (GOOD.strip(), "a"),
    "a pair of surrogates": (b'{"question": "q", "answer": "\\ud83c\\udf75"}\n', "🍵"),
    "escaped NUL": (b'{"question": "q", "answer": "a\\u0000"}\n', "a\0"),
    "assistant first": (chat("assistant", "user", "assistant"), "x"),
    "two users in a row": (chat("user", "user", "assistant"), "x"),
    "system in the middle": (chat("user", "system", "user", "assistant"), "x"),
    "a line of 50 MB": (b'{"question": "q", "answer": "' + b"a" * 50_000_000 + b'"}\n', "a" * 50_000_000),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(tmp_path, tiny_qwen, name):
    """What the Qwen template renders, and what is only unusual, goes all the way to the store."""
    data, chosen = ACCEPTED[name]
    (tmp_path / "in.jsonl").write_bytes(data)
    assert normalise.main(["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]) == 0
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert row["chosen"] == chosen
    if len(chosen) < 100:
        argv = ["--input", str(tmp_path / "out.jsonl"), "--output", str(tmp_path / "s"), "--tokenizer", str(tiny_qwen), "--kind", "sft"]
        assert build_pairs.main(argv) == 0


def test_a_huge_line(refuses, monkeypatch):
    monkeypatch.setattr(shared, "MAX_LINE_BYTES", 1000)
    message = "in.jsonl:2: longer than 1000 bytes"
    assert refuses("in.jsonl", GOOD + b'{"question": "' + b"q" * 1000).startswith(message)
    assert refuses("in.jsonl", GOOD + b'{"question": "' + b"q" * 1000, "--drop-invalid").startswith(message)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
        ("empty", "empty: no file of a known kind in this folder"),
        ("foreign", "foreign: no file of a known kind in this folder (known: .jsonl, .json"),
        ("foreign/notes.txt", "notes.txt: files of this kind are not known"),
        ("*.parquet", "*.parquet: matches no file of a known kind"),
        ("foreign/*", "foreign/*: matches no file of a known kind"),
        ("bad\0name", "no such file or folder"),
    ],
)
def test_words(tmp_path, fails, word, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("x")
    assert message in fails(normalise.main, "--input", f"{tmp_path}/{word}", "--output", tmp_path / "out.jsonl")
    assert files(tmp_path) == ["empty", "foreign"]


def test_format_of_another_name(tmp_path, fails, refuses):
    assert "invalid choice: 'csv'" in refuses("in.jsonl", GOOD, "--format", "csv")
    assert refuses("in.jsonl", GOOD, "--format", "messages").startswith("in.jsonl:1: field 'messages' is missing")


def test_equal_answers_are_counted(tmp_path):
    rows = [PAIR, PAIR | {"prompt": "p2", "rejected": "a"}, {"chosen": [*USER, *said("a")], "rejected": [*USER, *said("a")]}]
    write_jsonl(tmp_path / "a.jsonl", rows[:2])
    write_jsonl(tmp_path / "b.jsonl", rows[2:])
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert normalise.main(["--input", *inputs, "--output", str(tmp_path / "out"), "--max-drop-fraction", "0.7"]) == 0
    assert json.loads((tmp_path / "out.tally.json").read_text())["dropped"] == {"rejected_equals_chosen": 2}


SAMPLES = [{"text": "x", "finish_reason": "stop"}]
SELECT = {
    "no candidates": (record(0), "field 'candidates' is missing"),
    "candidates of text": (record(0, candidates="x"), "field 'candidates' must be a list"),
    "candidate of text": (record(0, candidates=["x"]), "candidate 0 has no text"),
    "candidate of numbers": (record(0, candidates=[{"text": 5, "finish_reason": "stop"}]), "candidate 0 has no text"),
    "no finish": (record(0, candidates=[{"text": "x"}]), "candidate 0 has finish_reason None"),
    "finish of numbers": (record(0, candidates=[{"text": "x", "finish_reason": 1}]), "candidate 0 has finish_reason 1"),
    "prompt of text": ({**record(0, candidates=SAMPLES), "prompt": "q"}, "field 'prompt' must be a list"),
    "rejected of text": (record(0, candidates=SAMPLES) | {"rejected": "abc"}, "field 'rejected' must be a list"),
    "chosen missing": ({"id": "a", "prompt": USER, "candidates": SAMPLES}, "field 'chosen' is missing"),
    "broken JSON": ('{"id": ', "not valid JSON"),
    "NaN": ('{"id": "a", "chosen_score": NaN}', "NaN is not a JSON number"),
    "array": ("[]", "a record must be a JSON object, got list"),
}


@pytest.mark.parametrize("name", SELECT)
def test_select(tmp_path, fails, name):
    row, message = SELECT[name]
    path = write_jsonl(tmp_path / "in.jsonl", [record(1, candidates=SAMPLES), row])
    said = fails(select.main, "--input", path, "--output", tmp_path / "out.jsonl")
    assert f"in.jsonl:2: {message}" in said or ("NaN" in name and "in.jsonl:2: not valid JSON (NaN" in said)
    assert files(tmp_path) == ["in.jsonl"]


BUILD = {
    "id of a number": (record(0, rejected=["b"]) | {"id": 5}, "field 'id' must be a str"),
    "no rejected": ({k: v for k, v in record(0).items() if k != "rejected"}, "field 'rejected' is missing"),
    "rejected of numbers": (record(0, rejected=[5]), "rejected[0] must be text"),
    "empty rejected": (record(0, rejected=[" "]), "empty rejected answer"),
    "scores too few": (record(0, rejected=["b"], chosen_score=1, rejected_scores=[]), "field 'rejected_scores' needs one entry"),
    "score missing": (record(0, rejected=["b"], rejected_scores=[1]), "field 'chosen_score' is missing"),
    "score of text": (record(0, rejected=["b"], chosen_score="1", rejected_scores=[1]), "field 'chosen_score' must hold finite numbers"),
    "huge score": (record(0, rejected=["b"], chosen_score=10**400, rejected_scores=[1]), "field 'chosen_score' must hold finite numbers"),
    "ended of numbers": (record(0, rejected=["b"], rejected_ended=[1]), "field 'rejected_ended' needs one entry"),
    "empty prompt": (record(0, rejected=["b"]) | {"prompt": []}, "messages must be a non-empty list"),
    "lone surrogate": (json.dumps(record(0, rejected=["\ud800"])), "not valid text"),
    "latin-1": ("\udce9", "not UTF-8"),
}


@pytest.mark.parametrize("name", BUILD)
def test_build_pairs(tmp_path, tiny_qwen, fails, name):
    row, message = BUILD[name]
    lines = [json.dumps(record(1, rejected=["b"])), row if isinstance(row, str) else json.dumps(row)]
    (tmp_path / "in.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    said = fails(build_pairs.main, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "s", "--tokenizer", tiny_qwen)
    assert f"in.jsonl:2: {message}" in said and files(tmp_path) == ["in.jsonl"]


def test_prompt_longer_than_the_limit(tmp_path, tiny_qwen):
    rows = [record(0, rejected=["b"]), record(1, question="word " * 500, rejected=["b"])]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    argv = ["--input", str(path), "--output", str(tmp_path / "s"), "--tokenizer", str(tiny_qwen), "--max-length", "200"]
    assert build_pairs.main(argv) == 0
    assert json.loads((tmp_path / "s.tally.json").read_text())["dropped"] == {"too_long_chosen": 1}


def test_a_template_that_refuses(tmp_path, tiny_qwen, fails):
    """Some templates want roles to alternate; theirs is no reason for a traceback."""
    shutil.copytree(tiny_qwen, tmp_path / "strict")
    for file in (tmp_path / "strict").glob("chat_template*"):
        file.unlink()
    config = json.loads((tmp_path / "strict" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "strict" / "tokenizer_config.json").write_text(json.dumps(config))
    path = write_jsonl(tmp_path / "in.jsonl", [record(0, rejected=["b"])])
    said = fails(build_pairs.main, "--input", path, "--output", tmp_path / "s", "--tokenizer", tmp_path / "strict")
    assert "in.jsonl:1: the chat template refuses the conversation (roles must alternate)" in said


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([record(0), record(0)], "in.jsonl:2: id 'r0' was given on line 1 already"),
        ([record(0), {"id": "a"}], "in.jsonl:2: field 'prompt' is missing"),
        ([record(0), {"prompt": USER}], "in.jsonl:2: field 'id' is missing"),
        ([record(0), {"id": "a", "prompt": [{"role": "boss", "content": "x"}]}], "in.jsonl:2: a message needs"),
        ([record(0), "{"], "in.jsonl:2: not valid JSON"),
        ([], "in.jsonl: no records"),
    ],
)
def test_candidates(tmp_path, tiny_qwen, fails, rows, message):
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    assert message in fails(candidates.main, "--input", path, "--output", tmp_path / "out", "--model", tiny_qwen)
    assert files(tmp_path) == ["in.jsonl"]
