"""Final numbers against hand-written cases and, where it is there, GSM8K's own verdicts on 5,276 model answers."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_patch.evaluation.answers import final_number, numbers_in, same_answer

GSM8K = Path(os.environ.get("GSM8K_DIR", "/nowhere"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 7.\n#### 42", 42),
        ("#### 41\n#### 42 pens, not 43", 42),
        ("1 then 2 then 3.", 3),
        ("it costs $1,234,567.", 1234567),
        ("12,34", 34),
        ("1000.0", 1000),
        ("1/2", Fraction(1, 2)),
        ("x = -7.5%", Fraction(-15, 2)),
        ("10-3=7", 7),
        ("between 3-2", 2),
        ("= \N{MINUS SIGN}4", -4),
        (".5", Fraction(1, 2)),
        ("A: 18", 18),
        ("$1,234.50", Fraction(2469, 2)),
        ("18.00", 18),
        ("a loss of -$5", -5),
        ("$-5", -5),
        ("the answer is **18**.", 18),
        ("_18_", 18),
        (r"\boxed{18}", 18),
        ("答案是18元", 18),
        ("only x_2", None),
        ("0.1", Fraction(1, 10)),
        ("no number", None),
        ("5 apples\n#### none", None),
        ("only x2", None),
        ("1/0", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_a_model_in_a_loop_writes_a_number_like_any_other():
    assert final_number("9" * 5000) == 10**5000 - 1


def test_all_numbers_in_order():
    assert numbers_in("3, 4.5 and 1,000 of 2/3") == [3, Fraction(9, 2), 1000, Fraction(2, 3)]


@pytest.mark.parametrize("same", ["1,000", "1000", "1000.0", "#### 1000", "about $1,000.00."])
def test_equal_however_written(same):
    assert same_answer(same, "#### 1,000")


@pytest.mark.parametrize("other", ["15", "55", "5.01", "-5", "five", "", "#### 5 0 is not #### 50"])
def test_never_by_substring(other):
    assert not same_answer(other, "#### 5")


def test_reference_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="no number here"):
        same_answer("1", "no number here")


@pytest.mark.skipif(not (GSM8K / "example_model_solutions.jsonl").is_file(), reason="GSM8K_DIR does not hold GSM8K")
def test_agrees_with_gsm8k():
    verdicts = 0
    for line in (GSM8K / "example_model_solutions.jsonl").read_text().splitlines():
        record = json.loads(line)
        for solved in (value for value in record.values() if isinstance(value, dict)):
            assert same_answer(solved["solution"], record["ground_truth"]) == solved["is_correct"], record
            verdicts += 1
    assert verdicts == 5276
