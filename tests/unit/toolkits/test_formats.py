"""Every input format against records written by hand, and TRL's formats against TRL itself."""

import json

import pytest
from toolkit_helpers import ROOT, read_jsonl, write_jsonl

from toolkits.lpo_data_preprocessing.formats import BY_NAME, FORMATS, detect_format, shared_length
from toolkits.lpo_data_preprocessing.normalise import main

GOLDEN = ROOT / "tests" / "data" / "formats"
CONVERSATIONS = [format_.name for format_ in FORMATS if format_.converse]
TRL = ["standard", "conversational", "standard_implicit", "conversational_implicit", "infinity_preference", "ultrafeedback"]


def normalised(tmp_path, source, *more):
    output = tmp_path / "out.jsonl"
    assert main(["--input", str(source), "--output", str(output), "--overwrite", *more]) == 0
    return read_jsonl(output)


def test_every_row_has_golden_files_and_every_file_a_row():
    suffixes = {name: [".jsonl", ".records.jsonl"] + [".every_turn.jsonl"] * (name in CONVERSATIONS) for name in BY_NAME}
    wanted = {name + suffix for name in BY_NAME for suffix in suffixes[name]}
    assert {path.name for path in GOLDEN.iterdir()} == wanted and len(BY_NAME) == len(FORMATS)


def test_every_row_is_documented():
    table = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("## Formats")[1].split("## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    assert sorted(row[1].strip(" `") for row in rows) == sorted(BY_NAME)
    for _, name, fields, *_ in rows:
        assert all(names.split("|")[0] in fields for names in BY_NAME[name.strip(" `")].fields), name


@pytest.mark.parametrize("name", BY_NAME)
def test_golden(tmp_path, capsys, name):
    source, wanted = GOLDEN / f"{name}.jsonl", read_jsonl(GOLDEN / f"{name}.records.jsonl")
    assert normalised(tmp_path, source) == wanted
    assert f"{name}.jsonl: {name}" in capsys.readouterr().out
    assert normalised(tmp_path, source, "--format", name) == wanted
    twice = tmp_path / "twice.jsonl"
    (tmp_path / "out.jsonl").rename(twice)
    assert normalised(tmp_path, twice) == wanted


@pytest.mark.parametrize("name", BY_NAME)
def test_golden_files_have_turns_and_letters(name):
    records = read_jsonl(GOLDEN / f"{name}.records.jsonl")
    assert any(ord(letter) > 127 for letter in json.dumps(records, ensure_ascii=False))
    one_turn_only = {"standard", "standard_implicit", "step_dpo", "question_answer", "question_preference"}
    assert name in one_turn_only or any(len(record["prompt"]) > 2 for record in records)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_turn(tmp_path, name):
    assert normalised(tmp_path, GOLDEN / f"{name}.jsonl", "--every-turn") == read_jsonl(GOLDEN / f"{name}.every_turn.jsonl")


def test_every_turn_needs_a_conversation(tmp_path, fails):
    message = fails(main, "--input", GOLDEN / "standard.jsonl", "--output", tmp_path / "o", "--every-turn")
    assert "not for standard" in message and "messages" in message


@pytest.mark.parametrize("name", BY_NAME)
def test_each_record_is_of_one_format_only(name):
    """The first row that fits wins, so no record of a golden file may fit an earlier row."""
    for i, record in enumerate(read_jsonl(GOLDEN / f"{name}.jsonl")):
        assert detect_format(record, str(i)).name == name


@pytest.mark.parametrize("name", TRL)
def test_agrees_with_trl(name, tmp_path):
    """TRL's own extraction gives the same prompt, chosen and rejected, as texts or as messages."""
    trl = pytest.importorskip("trl")
    for raw, ours in zip(read_jsonl(GOLDEN / f"{name}.jsonl"), normalised(tmp_path, GOLDEN / f"{name}.jsonl"), strict=True):
        theirs = trl.maybe_extract_prompt(dict(raw))
        if isinstance(theirs["chosen"], str):
            assert ours["prompt"] == [{"role": "user", "content": theirs["prompt"]}]
            rejected = theirs["rejected"] if isinstance(theirs["rejected"], list) else [theirs["rejected"]]
            assert (ours["chosen"], ours["rejected"]) == (theirs["chosen"], rejected)
        else:
            said = [[{"role": "assistant", "content": text}] for text in (ours["chosen"], *ours["rejected"])]
            assert [ours["prompt"], *said] == [theirs["prompt"], theirs["chosen"], theirs["rejected"]]


def test_renders_as_trl_does(tiny_qwen, tmp_path):
    """Through a chat template: TRL's prompt text is ours, and its completion opens with our response and the turn's end."""
    trl = pytest.importorskip("trl")
    from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

    chat = ChatTokenizer(tiny_qwen)
    raw = read_jsonl(GOLDEN / "conversational.jsonl")
    for theirs, ours in zip(raw, normalised(tmp_path, GOLDEN / "conversational.jsonl"), strict=True):
        rendered = trl.apply_chat_template({key: theirs[key] for key in ("prompt", "chosen", "rejected")}, chat.tokenizer)
        assert chat.decode(chat.prompt_ids(ours["prompt"])) == rendered["prompt"]
        for text, key in ((ours["chosen"], "chosen"), (ours["rejected"][0], "rejected")):
            assert rendered[key].startswith(chat.decode(chat.response_ids(text)))


@pytest.mark.parametrize(
    ("one", "other"),
    [("ab c", "ab d"), ("a  c", "a  d"), ("ab", "abc"), ("abc", "abc"), ("a b", "a"), ("x y", "x yz"), ([1, 2, 3], [1, 2, 4]), ([1], [1])],
)
def test_shared_length_is_trls(one, other):
    trl = pytest.importorskip("trl")
    length = shared_length(one, other)
    theirs = trl.extract_prompt({"chosen": one, "rejected": other})
    assert {"prompt": one[:length], "chosen": one[length:], "rejected": other[length:]} == theirs


def test_nothing_is_shared():
    assert shared_length("a", "b") == shared_length("", "b") == shared_length(" a", "b ") == 0


PAIR = {"chosen": "The capital is Paris.", "rejected": "The capital is Rome."}


@pytest.mark.parametrize("field", ["system", "context", "Question", "Prompt", "inputs", "conversation", "user"])
def test_no_prompt_is_made_up_beside_one(tmp_path, fails, field):
    """Two texts that begin alike have a prompt in common only where there is none elsewhere; who knows better says so."""
    path = write_jsonl(tmp_path / "in.jsonl", [PAIR | {field: "What is the capital of France?"}])
    message = fails(main, "--input", path, "--output", tmp_path / "out.jsonl")
    assert f"in.jsonl:1: field '{field}' looks like a prompt" in message and "--format standard_implicit" in message
    (row,) = normalised(tmp_path, path, "--format", "standard_implicit")
    assert row["prompt"][0]["content"] == "The capital is" and row[field] == "What is the capital of France?"


ASKED = {"messages": [{"role": "user", "content": "q"}]}
ANSWERED = {"messages": [*ASKED["messages"], {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ANSWERED | {"chosen": "b"}, "field 'chosen' is not part of format messages and would be lost"),
        (ANSWERED | {"chosen": "b", "rejected": "c"}, "the prompt must end with a user's or a tool's turn, got assistant"),
        (ANSWERED | {"rejected_response": "b", "rejected": ["c"]}, "field 'rejected' is not part of format ms_swift and would be lost"),
        (ANSWERED | {"rejected": ANSWERED["messages"]}, "rejected[0] must be text, got dict"),
        (ASKED | {"chosen": ASKED["messages"][0], "rejected": "c"}, "field 'chosen' must be one assistant message"),
        ({"question": "q", "answer": "a", "prompt": "p"}, "field 'prompt' is not part of format question_answer and would be lost"),
        ({"instruction": "i", "output": "o", "rejected": {"a": 1}}, "field 'rejected' must be a list, got dict"),
        (PAIR | {"question": "q", "input": "i"}, "one field must hold the question"),
        (PAIR | {"question": "q", "context": "c"}, "field 'context' looks like a prompt, but format question_preference does not use it"),
    ],
)
def test_no_answer_is_lost(tmp_path, fails, record, message):
    """A prompt or an answer without a place is an error, or a counted drop."""
    path = write_jsonl(tmp_path / "in.jsonl", [record])
    assert f"in.jsonl:1: {message}" in fails(main, "--input", path, "--output", tmp_path / "out.jsonl")


def test_lost_answers_are_counted(tmp_path):
    good = {"question": "q", "answer": "a"}
    path = write_jsonl(tmp_path / "in.jsonl", [good, {"question": "q2", "answer": "a", "chosen": "b"}])
    assert [row["prompt"][0]["content"] for row in normalised(tmp_path, path, "--drop-invalid")] == ["q"]
    assert json.loads((tmp_path / "out.jsonl.tally.json").read_text())["dropped"] == {"unfit_fields": 1}


def test_a_later_record_with_a_prompt(tmp_path, fails):
    path = write_jsonl(tmp_path / "in.jsonl", [PAIR, PAIR | {"question": None}, PAIR | {"question": "What?"}])
    assert "in.jsonl:3: field 'question' looks like a prompt" in fails(main, "--input", path, "--output", tmp_path / "out.jsonl")


def test_nulls_are_missing_fields(tmp_path):
    raw = read_jsonl(GOLDEN / "messages.jsonl")
    padded = [{**row, "task": None, "tools": None, "messages": [{"name": None, **m} for m in row["messages"]]} for row in raw]
    source = write_jsonl(tmp_path / "padded.jsonl", padded)
    assert normalised(tmp_path, source) == read_jsonl(GOLDEN / "messages.records.jsonl")


def test_full_solutions_are_not_given_their_first_steps_twice(tmp_path):
    raw = [{**row, "full_chosen": row["initial_reason_steps"] + row["full_chosen"]} for row in read_jsonl(GOLDEN / "step_dpo.jsonl")]
    assert normalised(tmp_path, write_jsonl(tmp_path / "a.jsonl", raw)) == read_jsonl(GOLDEN / "step_dpo.records.jsonl")
