"""Each method on hand-made candidates and, where it is there, verify-math on GSM8K's real ones."""

import json
import os
from pathlib import Path

import pytest
from toolkit_helpers import read_jsonl, record, sampled, write_jsonl

from toolkits.lpo_data_preprocessing.records import Tally
from toolkits.lpo_data_preprocessing.select import main
from toolkits.lpo_data_preprocessing.selection import METHODS, LeftOut, Options, Selection

GSM8K = Path(os.environ.get("GSM8K_DIR", "/nowhere"))


def select(method, given, **options):
    """(the record with pairs or the reason why there is none, what was left out)."""
    tally = Tally()
    try:
        result = METHODS[method].select(Selection(given, "f:1", Options(**options), tally))
    except LeftOut as reason:
        return str(reason), tally.left_out
    return result, tally.left_out


def test_lppc_keeps_every_other_answer():
    given = record(0, chosen="good", candidates=sampled("bad", " good\n", "worse", "bad ", "", "cut off", cut=(5,)), task="t")
    result, left_out = select("lppc", given)
    assert (result["rejected"], result["rejected_ended"]) == (["bad", "worse", "cut off"], [True, True, False])
    assert left_out == {"equal_to_chosen": 1, "duplicate_candidate": 1, "empty_candidate": 1}
    assert "candidates" not in result and result["task"] == "t" and result["chosen"] == "good"


def test_limit_and_answers_given_before():
    given = record(0, chosen="good", rejected=["given"], candidates=sampled("given", "a", "b", cut=(1,)))
    result, left_out = select("lppc", given, max_pairs=2)
    assert (result["rejected"], result["rejected_ended"]) == (["given", "a"], [True, False])
    assert left_out == {"duplicate_candidate": 1, "over_max_pairs_per_prompt": 1}


@pytest.mark.parametrize("method", ["lppc", "verify-math", "perturb"])
def test_an_answer_cut_before_stays_cut(method):
    """Selections one after the other: what the first one knew of an answer's end, the second keeps."""
    samples = sampled("#### 1 and", "#### 2", cut=(0,))
    first, _ = select("lppc", record(0, chosen="#### 3", candidates=samples))
    result, _ = select(method, first | {"candidates": sampled("#### 4")})
    assert (result["rejected"][:2], result["rejected_ended"]) == (["#### 1 and", "#### 2"], [False, True, True])
    with pytest.raises(ValueError, match=r"f:1: field 'rejected_ended' needs one entry per rejected answer \(2\)"):
        select(method, first | {"candidates": samples, "rejected_ended": [False]})


def test_other_finish_reasons_are_left_out():
    filtered = [{"text": "", "finish_reason": "content_filter"}, {"text": "half", "finish_reason": "tool calls"}]
    result, left_out = select("lppc", record(0, chosen="good", candidates=[*filtered, *sampled("bad")]))
    assert result["rejected"] == ["bad"] and left_out == {"finish_reason_content_filter": 1, "finish_reason_tool_calls": 1}
    assert select("lppc", record(0, chosen="good", candidates=filtered))[0] == "no_candidate_left"
    assert select("scores", record(0, candidates=[c | {"score": 9} for c in filtered]))[0] == "fewer_than_two_scores"


def test_equal_means_the_whole_text():
    result, _ = select("lppc", record(0, chosen="#### 15", candidates=sampled("#### 1", "5", "#### 15 ", "#### 155")))
    assert result["rejected"] == ["#### 1", "5", "#### 155"]


def test_nothing_left():
    assert select("lppc", record(0, chosen="good", candidates=sampled("good", "good ")))[0] == "no_candidate_left"


@pytest.mark.parametrize(
    ("distance", "kept"),
    [
        (0, ["abcdefghiX", "abcdefgh", "abcdefg", "zyx"]),
        (1, ["abcdefghiX", "abcdefgh", "abcdefg", "zyx"]),
        (2, ["abcdefgh", "abcdefg", "zyx"]),
        (3, ["abcdefg", "zyx"]),
        (0.2, ["abcdefgh", "abcdefg", "zyx"]),
        (0.21, ["abcdefg", "zyx"]),
        (0.3, ["abcdefg", "zyx"]),
        (10, ["zyx"]),
    ],
)
def test_min_edit_distance(distance, kept):
    """One, two, three and ten characters from a text of ten."""
    given = record(0, chosen="abcdefghij", candidates=sampled("abcdefghiX", "abcdefgh", " abcdefg", "zyx"))
    result, left_out = select("lppc", given, min_edit_distance=distance)
    assert [text.strip() for text in result["rejected"]] == kept and left_out["too_close_to_chosen"] == 4 - len(kept)


def test_spelled_out_control_tokens_are_left_out():
    texts = ("so <|im_start|> 3", "<|g0r0_7|><|endofaudio|>", "a <| b |> c", "a <|b| c|>", "<|endoftext|>", "if a<|b|")
    result, left_out = select("lppc", record(0, chosen="good", candidates=sampled(*texts)))
    assert result["rejected"] == ["<|g0r0_7|><|endofaudio|>", "a <| b |> c", "a <|b| c|>", "if a<|b|"] and left_out == {"control_token": 2}
    marked = [{**candidate, "control_token": "<s>"} for candidate in sampled("a <s>", "b <s>")]
    result, left_out = select("lppc", record(0, chosen="good", candidates=[*marked, *sampled("c <s>")]))
    assert result["rejected"] == ["c <s>"] and left_out == {"control_token": 2}
    assert select("scores", record(0, candidates=[c | {"score": 1} for c in marked]))[1] == {"control_token": 2}
    answers = sampled("<|im_end|>\n#### 12", "#### 12", "#### 13<|im_end|>", "#### 14")
    result, left_out = select("verify-math", record(0, chosen="#### 12", candidates=answers), chosen="sampled")
    assert (result["chosen"], result["rejected"]) == ("#### 12", ["#### 14"]) and left_out["control_token"] == 2


def test_verify_math_leaves_out_what_is_right():
    samples = sampled("7+5=12\n#### 12", "other words\nA: $12.00.", "#### 13", "#### 12", cut=(3,))
    given = record(0, chosen="7+5=12\n#### 12", rejected=["A: 12", "A: 11"], candidates=samples)
    result, left_out = select("verify-math", given)
    assert (result["rejected"], result["rejected_ended"]) == (["A: 11", "#### 13", "#### 12"], [True, True, False])
    assert result["chosen"] == "7+5=12\n#### 12" and left_out == {"right_candidate": 3}


def test_verify_math_with_both_sides_from_samples():
    samples = sampled("#### 13", "so\n#### 12", "thus\n#### 12", "#### 14", "#### 15", cut=(4,))
    result, left_out = select("verify-math", record(0, chosen="#### 12", rejected=["given"], candidates=samples), chosen="sampled")
    assert (result["chosen"], result["rejected"]) == ("so\n#### 12", ["#### 13", "#### 14"])
    assert left_out == {"cut_candidate": 1, "right_candidate": 1, "given_rejected": 1}
    assert select("verify-math", record(0, chosen="#### 12", candidates=sampled("#### 13")), chosen="sampled")[0] == "no_right_candidate"


def test_perturb_keeps_given_answers_first():
    result, left_out = select("perturb", record(0, chosen="a b c d", rejected=["given"]), n=2, noise_ratio=0.5)
    assert result["rejected"][0] == "given" and len(result["rejected"]) + left_out["duplicate_candidate"] == 3
    assert set("".join(result["rejected"][1:]).split()) <= set("abcd")


def scored(*scores, texts="abcdef", cut=()):
    return [c | {"score": s} for c, s in zip(sampled(*texts[: len(scores)], cut=cut), scores, strict=True)]


def test_scores_take_best_and_worst():
    result, left_out = select("scores", record(0, rejected=["given"], candidates=scored(0.5, 3, -1, 3, -1)))
    assert (result["chosen"], result["rejected"]) == ("b", ["c"])  # the first of equals
    assert (result["chosen_score"], result["rejected_scores"]) == (3, [-1])
    assert left_out == {"given_rejected": 1, "not_below_best": 1, "over_max_pairs_per_prompt": 2}
    result, _ = select("scores", record(0, candidates=scored(0.5, 3, -1, 3, -1)), max_pairs=9)
    assert (result["rejected"], result["rejected_scores"]) == (["c", "e", "a"], [-1, -1, 0.5])


def test_scores_of_another_name_or_beside_the_candidates():
    named = [c | {"reward": i} for i, c in enumerate(sampled("a", "b"))]
    assert select("scores", record(0, candidates=named), score_field="reward")[0]["chosen"] == "b"
    assert select("scores", record(0, candidates=sampled("a", "b"), reward=[2, 1]), score_field="reward")[0]["chosen"] == "a"


def test_scores_that_decide_nothing():
    assert select("scores", record(0, candidates=scored(1, 1.0, 1)))[0] == "tied_scores"
    assert select("scores", record(0, candidates=scored(1, None, None))) == ("fewer_than_two_scores", {"no_score": 2})
    assert select("scores", record(0, candidates=sampled("a", "b"))) == ("fewer_than_two_scores", {"no_score": 2})
    assert select("scores", record(0, candidates=scored(1, 2, cut=(0, 1))))[0] == "every_candidate_cut"
    assert select("scores", record(0, candidates=scored(1, 0, texts=["same", "same "])))[0] == "no_candidate_left"


def test_a_cut_sample_is_never_chosen():
    result, left_out = select("scores", record(0, candidates=scored(1, 9, 0, cut=(1, 2))))
    assert (result["chosen"], result["rejected"], result["rejected_ended"]) == ("a", ["c"], [False])
    assert left_out == {"not_below_best": 1}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"candidates": scored(1, "2")}, "f:1: the score ('score') of candidate 1 must be a finite number, got '2'"),
        ({"candidates": scored(True, 1)}, "candidate 0 must be a finite number, got True"),
        ({"candidates": scored(1, float("nan"))}, "must be a finite number, got nan"),
        ({"candidates": scored(1, 10**400)}, "must be a finite number, got 1000"),
        ({"candidates": sampled("a", "b"), "score": [1]}, r"f:1: field 'score' needs one score per candidate \(2\), got \[1\]"),
        ({"candidates": sampled("a", "b"), "score": 0.5}, "needs one score per candidate"),
    ],
)
def test_bad_scores(more, message):
    with pytest.raises(ValueError, match=message.replace("('score')", r"\('score'\)")):
        select("scores", record(0, **more))


def test_old_scores_do_not_stand_beside_new_answers():
    given = record(0, chosen="good", rejected=["given"], rejected_scores=[0.1], chosen_score=1, candidates=sampled("bad"))
    assert not {"rejected_scores", "chosen_score"} & set(select("lppc", given)[0])


def gsm8k():
    """(1,319 records with four candidates each, whether each candidate is right by GSM8K's own mark)."""
    records, right = [], []
    for i, line in enumerate((GSM8K / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()):
        raw = json.loads(line)
        solved = [value for value in raw.values() if isinstance(value, dict)]
        texts = [solution["solution"] for solution in solved]
        records.append(record(i, raw["question"], chosen=raw["ground_truth"], candidates=sampled(*texts)))
        right.append([solution["is_correct"] for solution in solved])
    return records, right


@pytest.mark.skipif(not (GSM8K / "example_model_solutions.jsonl").is_file(), reason="GSM8K_DIR does not hold GSM8K")
def test_verify_math_on_real_solutions(tmp_path):
    """5,276 solutions of four models, each marked right or wrong in the data: no verdict of ours differs."""
    records, right = gsm8k()
    assert main(["--input", str(write_jsonl(tmp_path / "in.jsonl", records)), "--output", str(tmp_path / "out.jsonl"),
                 "--method", "verify-math"]) == 0  # fmt: skip
    rejected = {row["id"]: set(row["rejected"]) for row in read_jsonl(tmp_path / "out.jsonl")}
    exceptions, marked_right = set(), 0
    for i, (row, marks) in enumerate(zip(records, right, strict=True)):
        for model, (candidate, mark) in enumerate(zip(row["candidates"], marks, strict=True)):
            ours = candidate["text"] not in rejected.get(f"r{i}", set())
            marked_right += mark
            if ours != mark:
                exceptions.add((i, model))
    assert sum(map(len, right)) == 5276 and marked_right == 2001
    assert exceptions == set(), "(question, model) whose mark is not our verdict; none is known"
