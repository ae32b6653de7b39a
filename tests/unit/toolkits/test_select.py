"""The stage: counts, limits, the split, exchanged labels, scores and mistakes. The methods themselves are in test_selection.py."""

import pytest
from toolkit_helpers import files, read_jsonl, record, sampled, write_jsonl

from toolkits.lpo_data_preprocessing.select import is_validation, main


def stage(tmp_path, records, *more):
    write_jsonl(tmp_path / "in.jsonl", records)
    return main(["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), *more])


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


def test_a_prompt_s_pairs_are_limited_over_all_its_records(tmp_path, capsys):
    rows = [record(i, f"question {i % 2}", candidates=sampled("bad", "worse", f"worst {i}")) for i in range(6)]
    assert stage(tmp_path, rows, "--max-pairs-per-prompt", "4") == 0
    kept = {row["id"]: row["rejected"] for row in read_jsonl(tmp_path / "out.jsonl")}
    assert kept == {"r0": ["bad", "worse", "worst 0"], "r1": ["bad", "worse", "worst 1"], "r2": ["bad"], "r3": ["bad"]}
    out = capsys.readouterr().out
    assert "dropped   prompt_has_its_pairs                 2" in out and "left out  over_max_pairs_per_prompt            4" in out


def test_perturb_needs_no_candidates(tmp_path):
    """One record alone gives what it gives among others; the split's seed is the noise's unless another is named."""
    rows = [record(i, f"q{i}", chosen="one two three four five", task="t") for i in range(20)]
    command = ["--method", "perturb", "-n", "3", "--noise-ratio", "0.4", "--overwrite"]
    results = []
    for more in ([], ["--seed", "2"], ["--seed", "2", "--noise-seed", "1"]):
        assert stage(tmp_path, rows, *command, *more) == 0
        results.append(read_jsonl(tmp_path / "out.jsonl"))
    assert results[0] == results[2] != results[1]
    for row in results[0]:
        assert row["task"] == "t" and row["chosen"] == rows[0]["chosen"] and "candidates" not in row
        assert 1 <= len(row["rejected"]) <= 3 and row["chosen"] not in row["rejected"] and all(row["rejected_ended"])
    assert stage(tmp_path, rows[7:8], *command) == 0
    assert read_jsonl(tmp_path / "out.jsonl") == results[0][7:8]


def test_split_hangs_on_prompt_and_seed_alone():
    rows = [record(i, f"q{i}") for i in range(300)]
    side = [is_validation(row, 0.3, 1) for row in rows]
    assert side == [is_validation(row | {"id": "x", "chosen": "y"}, 0.3, 1) for row in rows] != [is_validation(row, 0.3, 2) for row in rows]
    assert all(not b or a for a, b in zip([is_validation(row, 0.5, 1) for row in rows], side, strict=True))  # growing F moves none back


SAMPLED = ("--method", "verify-math", "--chosen", "sampled")
GOOD = record(0, candidates=sampled("bad"))


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([GOOD, "{"], (), "in.jsonl:2: not valid JSON"),
        ([GOOD, record(1)], (), "in.jsonl:2: field 'candidates' is missing"),
        ([record(0, candidates=[{"finish_reason": "stop"}])], (), "in.jsonl:1: candidate 0 has no text"),
        ([record(0, candidates=[{"text": "x", "finish_reason": None}])], (), "in.jsonl:1: candidate 0 has finish_reason None"),
        ([{"prompt": "q"}], (), "in.jsonl:1: field 'prompt' must be a list"),
        ([GOOD, GOOD | {"rejected": "abc"}], (), "in.jsonl:2: field 'rejected' must be a list, got str"),
        ([GOOD | {"rejected": ["a", 1]}], (), "in.jsonl:1: rejected[1] must be text, got int"),
        ([GOOD | {"rejected": None}], (), "in.jsonl:1: field 'rejected' must be a list, got NoneType"),
        ([GOOD | {"candidates": "abc"}], (), "in.jsonl:1: field 'candidates' must be a list, got str"),
        ([record(0, chosen="x", candidates=sampled("x"))], (), "1 of 1 records dropped"),
        ([GOOD], ("--valid-fraction", 0.5), "--valid-fraction and --valid-output go together"),
        ([GOOD], ("--valid-fraction", 1.5), "must lie in [0, 1), got 1.5"),
        ([GOOD], ("--valid-fraction", 0.0001, "--valid-output", "{tmp}/v"), "v: no pair on this side"),
        ([GOOD], ("--max-pairs-per-prompt", 0), "--max-pairs-per-prompt must be at least 1, got 0"),
        ([GOOD], ("--min-edit-distance", 1.5), "must be a whole number of characters or a fraction below 1, got 1.5"),
        ([GOOD], ("--min-edit-distance", "nan"), "must be a whole number of characters"),
        ([GOOD], ("--method", "perturb", "--noise-ratio", 0), "--noise-ratio must lie in (0, 1], got 0"),
        ([GOOD], ("--method", "perturb", "-n", 0), "--n must be at least 1, got 0"),
        ([GOOD], ("--noise-ratio", 0.2), "--noise-ratio: --method lppc does not use it (perturb)"),
        ([GOOD], ("--chosen", "sampled"), "--chosen: --method lppc does not use it (verify-math)"),
        ([GOOD], ("--method", "perturb", "--score-field", "x"), "--score-field: --method perturb does not use it (scores)"),
        ([GOOD, record(1) | {"chosen": " "}], ("--method", "perturb"), "in.jsonl:2: an empty chosen answer cannot be perturbed"),
        ([GOOD], ("--method", "judged"), "invalid choice: 'judged'"),
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


def test_an_answer_without_a_number_cannot_judge(fails, tmp_path):
    rows = write_jsonl(tmp_path / "in.jsonl", [record(0, chosen="none", candidates=sampled("#### 1"))])
    line = fails(main, "--input", rows, "--output", tmp_path / "out.jsonl", "--method", "verify-math")
    assert "in.jsonl:1: the reference answer has no final number" in line


def test_swapped_labels(tmp_path, capsys):
    """About the fraction asked for, the same ones every time, and those whole pairs turned round."""
    rows = [record(i, f"question {i}", chosen=f"#### {i}", candidates=sampled(f"so #### {i}", f"#### {i + 1}")) for i in range(500)]
    assert stage(tmp_path, rows, *SAMPLED, "--max-pairs-per-prompt", "1", "--swap-fraction", "0.2") == 0
    first = read_jsonl(tmp_path / "out.jsonl")
    swapped = [row for row in first if row.get("swapped")]
    assert 70 < len(swapped) < 130 and len(first) == 500
    assert f"altered   labels_exchanged {len(swapped):>21}" in capsys.readouterr().out
    for row in first:
        number = int(row["id"].removeprefix("r"))
        sides = [f"so #### {number}", f"#### {number + 1}"]
        assert [row["chosen"], *row["rejected"]] == (sides[::-1] if row.get("swapped") else sides) and row["rejected_ended"] == [True]
    assert stage(tmp_path, rows, *SAMPLED, "--max-pairs-per-prompt", "1", "--swap-fraction", "0.2", "--overwrite") == 0
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
        (["--swap-fraction", "0.2"], "--swap-fraction needs --chosen sampled"),
        ([*SAMPLED, "--swap-fraction", "0.2"], "--swap-fraction needs"),
        ([*SAMPLED, "--swap-fraction", "0.2", "--max-pairs-per-prompt", "1", "--scores"], "--scores: a swapped pair"),
        (["--method", "scores", "--scores"], "give one of the two"),
    ],
)
def test_swaps_that_make_no_sense(fails, tmp_path, flags, complaint):
    rows = write_jsonl(tmp_path / "in.jsonl", [record(0, candidates=sampled("#### 3"))])
    assert complaint in fails(main, "--input", rows, "--output", tmp_path / "out.jsonl", *flags)
