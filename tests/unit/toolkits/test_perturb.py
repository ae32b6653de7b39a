"""Perturbed answers: always another text, the same ones for one seed, and each kind of edit what it says."""

import random
from collections import Counter

import pytest
from toolkit_helpers import files, read_jsonl, record, write_jsonl

from megatron_patch.evaluation.error_rates import edit_distance
from toolkits.lpo_data_preprocessing.perturb import EDITS, edit_character, edit_number, edit_word, main, perturb

TEXT = "7+8=15, 4+3+1=8\n#### 85"


def edited(edit, text=TEXT, times=300):
    return [edit(text, random.Random(seed)) for seed in range(times)]


def test_one_character():
    assert all(edit_distance(text, TEXT) <= 1 for text in edited(edit_character))
    assert {len(text) - len(TEXT) for text in edited(edit_character)} == {-1, 0, 1}


def test_one_digit():
    for text in edited(edit_number):
        changed = [(a, b) for a, b in zip(text, TEXT, strict=True) if a != b]
        assert len(changed) == 1 and "".join(changed[0]).isdigit()
    assert set(edited(edit_number, "no digits")) == {"no digits"}


def test_one_word():
    words = Counter(TEXT.split())
    lengths = set()
    for text in edited(edit_word):
        now = Counter(text.split())
        lengths.add(sum(now.values()) - sum(words.values()))
        assert sum(((now - words) + (words - now)).values()) <= 1
    assert lengths == {-1, 0, 1}  # deleted, exchanged, repeated
    assert set(edited(edit_word, "word")) == {"word"}
    assert set(edited(edit_word, "a\nb")) == {"b", "a a\nb", "b\na"}


@pytest.mark.parametrize("kinds", [("character",), ("number",), ("word",), tuple(EDITS)])
def test_never_the_text_itself(kinds):
    """Two edits may undo each other: then they are made again."""
    assert all(perturb("1 1 2", random.Random(seed), 2, kinds) != "1 1 2" for seed in range(500))


def test_nothing_to_edit():
    with pytest.raises(ValueError, match="no edit of kind number changes 'words'"):
        perturb("words", random.Random(0), 2, ("number",))


def test_stage(tmp_path):
    rows = write_jsonl(tmp_path / "in.jsonl", [record(i, task="t") for i in range(20)])
    command = ["--input", str(rows), "-n", "3", "--output"]
    assert main([*command, str(tmp_path / "a.jsonl")]) == 0 and main([*command, str(tmp_path / "b.jsonl"), "--seed", "2"]) == 0
    first, other = read_jsonl(tmp_path / "a.jsonl"), read_jsonl(tmp_path / "b.jsonl")
    assert all(len(row["candidates"]) == 3 and row["task"] == "t" and row["chosen"] for row in first)
    assert all(c["text"] != row["chosen"] and c["finish_reason"] == "stop" for row in first for c in row["candidates"])
    assert first != other and len({c["text"] for c in first[0]["candidates"]}) > 1
    assert main([*command, str(tmp_path / "a.jsonl"), "--overwrite"]) == 0 and read_jsonl(tmp_path / "a.jsonl") == first


def test_a_record_alone_is_perturbed_the_same(tmp_path):
    both = write_jsonl(tmp_path / "both.jsonl", [record(0), record(1)])
    one = write_jsonl(tmp_path / "one.jsonl", [record(1)])
    assert main(["--input", str(both), "--output", str(tmp_path / "x.jsonl")]) == 0
    assert main(["--input", str(one), "--output", str(tmp_path / "y.jsonl")]) == 0
    assert read_jsonl(tmp_path / "x.jsonl")[1:] == read_jsonl(tmp_path / "y.jsonl")


def test_mistakes(fails, tmp_path):
    rows = write_jsonl(tmp_path / "in.jsonl", [record(0), record(1) | {"chosen": " "}])
    assert "in.jsonl:2: an empty chosen answer" in fails(main, "--input", rows, "--output", tmp_path / "out.jsonl")
    assert "--n must be at least 1" in fails(main, "--input", rows, "--output", tmp_path / "out.jsonl", "-n", "0")
    assert files(tmp_path) == ["in.jsonl"]
