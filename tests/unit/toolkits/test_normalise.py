"""Every input shape to the one shape; every bad line by its place."""

import pytest
from toolkit_helpers import files, read_jsonl, write_jsonl

from toolkits.lpo_data_preprocessing.normalise import FORMATS, main

USER = [{"role": "user", "content": "q"}]
SYSTEM = [{"role": "system", "content": "s"}, *USER]


def said(text):
    return [{"role": "assistant", "content": text}]


SHAPES = {
    "standard": ({"prompt": "q", "chosen": "a", "rejected": "b"}, (USER, "a", ["b"])),
    "conversational": ({"prompt": SYSTEM, "chosen": said("a"), "rejected": said("b")}, (SYSTEM, "a", ["b"])),
    "records": ({"prompt": USER, "chosen": "a", "rejected": ["b", "c"]}, (USER, "a", ["b", "c"])),
    "question_answer": ({"question": "q", "answer": "a"}, (USER, "a", [])),
    "messages": ({"messages": [*SYSTEM, *said("a1"), *USER, *said("a")]}, ([*SYSTEM, *said("a1"), *USER], "a", [])),
}


def stage(tmp_path, records, *more):
    path = write_jsonl(tmp_path / "in.jsonl", records)
    return main(["--input", str(path), "--output", str(tmp_path / "out.jsonl"), *more])


def test_every_format_is_covered():
    assert set(SHAPES) == {format_.name for format_ in FORMATS}


@pytest.mark.parametrize("name", SHAPES)
def test_formats(tmp_path, capsys, name):
    raw, (prompt, chosen, rejected) = SHAPES[name]
    assert stage(tmp_path, [raw | {"task": "t", "n": [1]}]) == 0
    (record,) = read_jsonl(tmp_path / "out.jsonl")
    assert (record["prompt"], record["chosen"], record["rejected"]) == (prompt, chosen, rejected)
    assert record["task"] == "t" and record["n"] == [1]
    assert set(record) == {"id", "prompt", "chosen", "rejected", "task", "n"}
    assert f"in.jsonl: {name}" in capsys.readouterr().out


def test_id_is_of_the_content_and_the_stage_is_idempotent(tmp_path):
    stage(tmp_path, [{"question": "q", "answer": "a", "id": "mine"}, {"question": "q2", "answer": "a"}])
    first, second = read_jsonl(tmp_path / "out.jsonl")
    assert first["source_id"] == "mine" and first["id"] != second["id"] and len(first["id"]) == 16
    (tmp_path / "again").mkdir()
    stage(tmp_path / "again", [{"answer": "a", "question": "q2"}])
    assert read_jsonl(tmp_path / "again" / "out.jsonl") == [second]
    (tmp_path / "twice").mkdir()
    stage(tmp_path / "twice", [first, second])
    assert read_jsonl(tmp_path / "twice" / "out.jsonl") == [first, second]


def test_duplicates_are_counted_across_files(tmp_path, capsys):
    more = write_jsonl(tmp_path / "more.jsonl", [{"messages": [*USER, *said("a")]}, {"messages": [*USER, *said("c")]}])
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "b"}, {"answer": "a", "question": "q"}]
    assert stage(tmp_path, rows, "--more-input", str(more)) == 0
    assert [record["chosen"] for record in read_jsonl(tmp_path / "out.jsonl")] == ["a", "b", "c"]
    out = capsys.readouterr().out
    assert "5 records read, 3 kept, 2 dropped" in out and "duplicate" in out and "more.jsonl: messages" in out


GOOD = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([GOOD, '{"question": '], (), "in.jsonl:2: not valid JSON"),
        ([{"a": 1}], (), "in.jsonl:1: format not recognised from fields a"),
        ([GOOD, {"question": "q"}], (), "in.jsonl:2: field 'answer' is missing"),
        ([GOOD, {"question": "q", "answer": 5}], (), "in.jsonl:2: field 'answer' must be a str, got int"),
        ([GOOD], ("--format", "messages"), "in.jsonl:1: field 'messages' is missing"),
        ([GOOD, {"question": "q", "answer": " \n"}], (), "in.jsonl:2: field 'chosen' is empty"),
        ([{"question": "", "answer": "a"}], (), "in.jsonl:1: field 'prompt' is empty"),
        ([{"prompt": "q", "chosen": "a", "rejected": ["b", ""]}], (), "in.jsonl:1: field 'rejected[1]' is empty"),
        ([{"prompt": "q", "chosen": "a", "rejected": [1]}], (), "in.jsonl:1: field 'rejected' must be text"),
        ([{"messages": USER}], (), "in.jsonl:1: messages must end with an assistant's turn"),
        ([{"messages": said("a")}], (), "in.jsonl:1: messages must end"),
        ([{"messages": [{"role": "user"}]}], (), "in.jsonl:1: a message needs"),
        (
            [{"prompt": USER, "chosen": said("a") * 2, "rejected": said("b")}],
            (),
            "in.jsonl:1: field 'chosen' must be one assistant message",
        ),
        ([{"prompt": [*USER, *said("x")], "chosen": "a"}], (), "in.jsonl:1: the prompt must not end with an assistant"),
        ([GOOD, GOOD, GOOD], (), "2 of 3 records dropped, more than --max-drop-fraction 0.5 (duplicate 2)"),
        ([], (), "no records left (empty input)"),
    ],
)
def test_bad_input(tmp_path, fails, records, more, message):
    path = write_jsonl(tmp_path / "in.jsonl", records)
    assert message in fails(main, "--input", path, "--output", tmp_path / "out.jsonl", *more)
    assert files(tmp_path) == ["in.jsonl"]


def test_drop_empty(tmp_path, capsys):
    assert stage(tmp_path, [GOOD, {"question": "q", "answer": ""}], "--drop-empty") == 0
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 1 and "empty_text" in capsys.readouterr().out


def test_existing_output(tmp_path, fails):
    stage(tmp_path, [GOOD])
    before = (tmp_path / "out.jsonl").read_bytes()
    argv = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert "out.jsonl: exists already" in fails(main, *argv)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert main([str(a) for a in argv] + ["--overwrite"]) == 0
