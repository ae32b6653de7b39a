"""Algorithm 1 on hand-made candidates, and the split."""

import pytest
from toolkit_helpers import files, read_jsonl, record, write_jsonl

from toolkits.lpo_data_preprocessing.records import Tally
from toolkits.lpo_data_preprocessing.select import is_validation, main, select_judged, select_lppc, select_verified


def sampled(*texts, cut=()):
    return [{"text": text, "finish_reason": "length" if i in cut else "stop"} for i, text in enumerate(texts)]


def stage(tmp_path, records, *more):
    write_jsonl(tmp_path / "in.jsonl", records)
    return main(["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), *more])


def test_lppc_keeps_every_other_answer():
    tally = Tally()
    given = record(0, chosen="good", candidates=sampled("bad", " good\n", "worse", "bad ", "", "cut off", cut=(5,)), task="t")
    result = select_lppc(given, "f:1", None, tally)
    assert result is not None and (result["rejected"], result["rejected_ended"]) == (["bad", "worse", "cut off"], [True, True, False])
    assert tally.left_out == {"equal_to_chosen": 1, "duplicate_candidate": 1, "empty_candidate": 1}
    assert "candidates" not in result and result["task"] == "t" and result["chosen"] == "good"


def test_limit_and_answers_given_before():
    tally = Tally()
    given = record(0, chosen="good", rejected=["given"], candidates=sampled("given", "a", "b", cut=(1,)))
    result = select_lppc(given, "f:1", 2, tally)
    assert result is not None and (result["rejected"], result["rejected_ended"]) == (["given", "a"], [True, False])
    assert tally.left_out == {"duplicate_candidate": 1, "over_max_pairs_per_prompt": 1}


def test_equal_means_the_whole_text():
    result = select_lppc(record(0, chosen="#### 15", candidates=sampled("#### 1", "5", "#### 15 ", "#### 155")), "f:1", None, Tally())
    assert result is not None and result["rejected"] == ["#### 1", "5", "#### 155"]


def test_nothing_left():
    assert select_lppc(record(0, chosen="good", candidates=sampled("good", "good ")), "f:1", None, Tally()) is None


def test_stage_counts(tmp_path, capsys):
    rows = [record(0, chosen="good", candidates=sampled("bad", "worse")), record(1, chosen="good", candidates=sampled("good", "good"))]
    assert stage(tmp_path, rows) == 0
    assert [(r["id"], r["rejected"]) for r in read_jsonl(tmp_path / "out.jsonl")] == [("r0", ["bad", "worse"])]
    out = capsys.readouterr().out
    assert "2 records read, 1 kept, 1 dropped, 2 left out" in out and "no_candidate_left" in out and "out.jsonl: 2" in out


def test_a_prompt_is_on_one_side_only(tmp_path):
    rows = [record(i, f"question {i % 200}", candidates=sampled(f"bad {i}")) for i in range(600)]
    assert stage(tmp_path, rows, "--valid-fraction", "0.25", "--valid-output", str(tmp_path / "valid.jsonl")) == 0
    train, valid = ({r["prompt"][0]["content"] for r in read_jsonl(tmp_path / name)} for name in ("out.jsonl", "valid.jsonl"))
    assert not train & valid and len(train | valid) == 200
    assert 0.15 < len(valid) / 200 < 0.35
    ids = [r["id"] for name in ("out.jsonl", "valid.jsonl") for r in read_jsonl(tmp_path / name)]
    assert sorted(ids) == sorted(r["id"] for r in rows)


def test_split_hangs_on_prompt_and_seed_alone():
    rows = [record(i, f"q{i}") for i in range(300)]
    side = [is_validation(row, 0.3, 1) for row in rows]
    assert side == [is_validation(row | {"id": "x", "chosen": "y"}, 0.3, 1) for row in rows] != [is_validation(row, 0.3, 2) for row in rows]
    assert all(not b or a for a, b in zip([is_validation(row, 0.5, 1) for row in rows], side, strict=True))  # growing F moves none back


GOOD = record(0, candidates=sampled("bad"))


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([GOOD, "{"], (), "in.jsonl:2: not valid JSON"),
        ([GOOD, record(1)], (), "in.jsonl:2: field 'candidates' is missing"),
        ([record(0, candidates=[{"finish_reason": "stop"}])], (), "in.jsonl:1: candidate 0 has no text"),
        ([record(0, candidates=[{"text": "x", "finish_reason": "eos"}])], (), "in.jsonl:1: candidate 0 has finish_reason 'eos'"),
        ([{"prompt": "q"}], (), "in.jsonl:1: field 'prompt' must be a list"),
        ([GOOD, GOOD | {"rejected": "abc"}], (), "in.jsonl:2: field 'rejected' must be a list, got str"),
        ([GOOD | {"rejected": ["a", 1]}], (), "in.jsonl:1: rejected[1] must be text, got int"),
        ([GOOD | {"rejected": None}], (), "in.jsonl:1: field 'rejected' must be a list, got NoneType"),
        ([GOOD | {"candidates": "abc"}], (), "in.jsonl:1: field 'candidates' must be a list, got str"),
        ([record(0, chosen="x", candidates=sampled("x"))], (), "1 of 1 records dropped"),
        ([GOOD], ("--valid-fraction", 0.5), "--valid-fraction and --valid-output go together"),
        ([GOOD], ("--valid-fraction", 1.5), "must lie in [0, 1), got 1.5"),
        ([GOOD], ("--valid-fraction", 0.0001, "--valid-output", "{tmp}/v"), "v: no pair on this side"),
        ([GOOD], ("--max-pairs-per-prompt", 0), "must be at least 1, got 0"),
    ],
)
def test_bad_input(tmp_path, fails, records, more, message):
    path = write_jsonl(tmp_path / "in.jsonl", records)
    more = [str(a).replace("{tmp}", str(tmp_path)) for a in more]
    assert message in fails(main, "--input", path, "--output", tmp_path / "out.jsonl", *more)
    assert files(tmp_path) == ["in.jsonl"]


def test_existing_output(tmp_path, fails):
    (tmp_path / "out.jsonl").write_text("mine")
    write_jsonl(tmp_path / "in.jsonl", [GOOD])
    assert "exists already" in fails(main, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_verified_leaves_out_what_is_right():
    tally = Tally()
    samples = sampled("7+5=12\n#### 12", "other words\n#### 12", "#### 13", "#### 12", cut=(3,))
    result = select_verified(record(0, chosen="7+5=12\n#### 12", candidates=samples), "f:1", None, tally)
    assert result is not None and (result["rejected"], result["rejected_ended"]) == (["#### 13", "#### 12"], [True, False])
    assert tally.left_out["right_candidate"] == 2


def test_judged_takes_both_sides_from_samples():
    tally = Tally()
    samples = sampled("#### 13", "so\n#### 12", "thus\n#### 12", "#### 14", "#### 15", cut=(4,))
    result = select_judged(record(0, chosen="7+5=12\n#### 12", rejected=["given"], candidates=samples), "f:1", None, tally)
    assert result is not None and (result["chosen"], result["rejected"]) == ("so\n#### 12", ["#### 13", "#### 14"])
    assert tally.left_out["cut_candidate"] == 1
    assert select_judged(record(0, chosen="#### 12", candidates=sampled("#### 13")), "f:1", None, tally) is None
    assert tally.left_out["no_right_candidate"] == 1


def test_an_answer_without_a_number_cannot_judge(fails, tmp_path):
    rows = write_jsonl(tmp_path / "in.jsonl", [record(0, chosen="none", candidates=sampled("#### 1"))])
    line = fails(main, "--input", rows, "--output", tmp_path / "out.jsonl", "--method", "verified")
    assert "in.jsonl:1: the reference answer has no final number" in line


def test_swapped_labels(tmp_path, capsys):
    """About the fraction asked for, the same ones every time, and those whole pairs turned round."""
    rows = [record(i, f"question {i}", chosen=f"#### {i}", candidates=sampled(f"so #### {i}", f"#### {i + 1}")) for i in range(500)]
    assert stage(tmp_path, rows, "--method", "judged", "--max-pairs-per-prompt", "1", "--swap-fraction", "0.2") == 0
    first = read_jsonl(tmp_path / "out.jsonl")
    swapped = [row for row in first if row.get("swapped")]
    assert 70 < len(swapped) < 130 and len(first) == 500
    assert f"altered   labels_exchanged {len(swapped):>21}" in capsys.readouterr().out
    for row in first:
        number = int(row["id"].removeprefix("r"))
        sides = [f"so #### {number}", f"#### {number + 1}"]
        assert [row["chosen"], *row["rejected"]] == (sides[::-1] if row.get("swapped") else sides) and row["rejected_ended"] == [True]
    assert stage(tmp_path, rows, "--method", "judged", "--max-pairs-per-prompt", "1", "--swap-fraction", "0.2", "--overwrite") == 0
    assert read_jsonl(tmp_path / "out.jsonl") == first


def test_scores_are_error_rates_against_the_answer(tmp_path):
    rows = [record(0, chosen="#### 12", candidates=sampled("#### 13", "12"))]
    assert stage(tmp_path, rows, "--scores") == 0
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert row["chosen_score"] == 1.0 and row["rejected_scores"] == pytest.approx([1 - 1 / 7, 1 - 5 / 7])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--swap-fraction", "1"], "--swap-fraction must lie in [0, 1)"),
        (["--swap-fraction", "0.2"], "--swap-fraction needs --method judged"),
        (["--swap-fraction", "0.2", "--method", "judged"], "--swap-fraction needs"),
        (["--swap-fraction", "0.2", "--method", "judged", "--max-pairs-per-prompt", "1", "--scores"], "--scores: a swapped pair"),
    ],
)
def test_swaps_that_make_no_sense(fails, tmp_path, flags, complaint):
    rows = write_jsonl(tmp_path / "in.jsonl", [record(0, candidates=sampled("#### 3"))])
    assert complaint in fails(main, "--input", rows, "--output", tmp_path / "out.jsonl", *flags)
