"""Ids, duplicates across files, and what --drop-invalid changes; formats, files and bad input have tests of their own."""

import json

from toolkit_helpers import files, read_jsonl, write_jsonl

from toolkits.lpo_data_preprocessing.normalise import main

USER = [{"role": "user", "content": "q"}]
SYSTEM = [{"role": "system", "content": "s"}, *USER]


def said(text):
    return [{"role": "assistant", "content": text}]


def stage(tmp_path, records, *more):
    path = write_jsonl(tmp_path / "in.jsonl", records)
    return main(["--input", str(path), "--output", str(tmp_path / "out.jsonl"), *more])


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
    assert stage(tmp_path, rows, "--input", str(tmp_path / "in.jsonl"), str(more)) == 0
    assert [record["chosen"] for record in read_jsonl(tmp_path / "out.jsonl")] == ["a", "b", "c"]
    out = capsys.readouterr().out
    assert "5 records read, 3 kept, 2 dropped" in out and "duplicate" in out and "more.jsonl: messages" in out


GOOD = {"question": "q", "answer": "a"}


def test_drop_invalid(tmp_path, capsys):
    unfit = {"question": "q", "answer": 5}
    equal = {"prompt": "p", "chosen": "a", "rejected": "a "}
    rows = [GOOD, '{"question": ', unfit, {"answer": "x"}, {"question": "q", "answer": ""}, {"question": "q2", "answer": "a"}, GOOD]
    more = write_jsonl(tmp_path / "more.jsonl", [{**equal, "rejected": "b"}, equal])
    argv = ("--drop-invalid", "--max-drop-fraction", "0.7")
    assert stage(tmp_path, rows, *argv, "--input", str(tmp_path / "in.jsonl"), str(more)) == 0
    assert [record["chosen"] for record in read_jsonl(tmp_path / "out.jsonl")] == ["a", "a", "a"]
    out = capsys.readouterr().out
    assert "9 records read, 3 kept, 6 dropped" in out
    tally = json.loads((tmp_path / "out.jsonl.tally.json").read_text())
    assert tally["dropped"] == {"not_a_record": 1, "unfit_fields": 2, "empty_text": 1, "duplicate": 1, "rejected_equals_chosen": 1}
    assert "in.jsonl:3: field 'answer' must be a str" in out and "in.jsonl:4" not in out  # the first of each reason


def test_drop_invalid_is_bounded(tmp_path, fails):
    path = write_jsonl(tmp_path / "in.jsonl", [GOOD, "x", "y"])
    message = fails(main, "--input", path, "--output", tmp_path / "out.jsonl", "--drop-invalid")
    assert "2 of 3 records dropped, more than --max-drop-fraction 0.5 (not_a_record 2)" in message
    assert files(tmp_path) == ["in.jsonl"]


def test_existing_output(tmp_path, fails, capsys):
    stage(tmp_path, [GOOD])
    before = (tmp_path / "out.jsonl").read_bytes()
    argv = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert main([str(a) for a in argv]) == 0 and "kept" in capsys.readouterr().out
    assert "made with another drop_invalid" in fails(main, *argv, "--drop-invalid")
    assert (tmp_path / "out.jsonl").read_bytes() == before
    write_jsonl(tmp_path / "in.jsonl", [GOOD, GOOD])
    assert "made with another input" in fails(main, *argv)
    assert main([str(a) for a in argv] + ["--update"]) == 0 and "1 dropped" in capsys.readouterr().out
    (tmp_path / "out.jsonl.plan.json").unlink()
    assert "out.jsonl: exists already" in fails(main, *argv, "--update")
    assert main([str(a) for a in argv] + ["--overwrite"]) == 0
