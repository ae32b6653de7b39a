"""Error rates against cases counted by hand, and the edit distance against its definition."""

import random

import pytest

from megatron_patch.evaluation.error_rates import character_error_rate, edit_distance, is_closer_than, word_error_rate


def by_definition(source: str, target: str) -> int:
    """Levenshtein's recursion, word for word: exponential and independent of any table."""
    if not source or not target:
        return len(source) + len(target)
    if source[0] == target[0]:
        return by_definition(source[1:], target[1:])
    rests = ((source[1:], target), (source, target[1:]), (source[1:], target[1:]))
    return 1 + min(by_definition(*rest) for rest in rests)


@pytest.mark.parametrize(
    ("source", "target", "edits"),
    [("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_known_distances(source: str, target: str, edits: int) -> None:
    assert edit_distance(source, target) == edits


def test_every_distance_is_the_recursion_s() -> None:
    rng = random.Random(0)
    for _ in range(300):
        source, target = ("".join(rng.choices("ab1", k=rng.randint(0, 6))) for _ in range(2))
        assert edit_distance(source, target) == by_definition(source, target) == edit_distance(target, source)


def test_closer_than_is_a_smaller_distance() -> None:
    rng = random.Random(1)
    for _ in range(300):
        source, target = ("".join(rng.choices("ab1", k=rng.randint(0, 9))) for _ in range(2))
        for limit in range(11):
            assert is_closer_than(limit, source, target) == (edit_distance(source, target) < limit), (limit, source, target)


def test_a_corpus_is_summed_before_dividing() -> None:
    """1 edit on 1 character and 0 edits on 9: 1/10, where the mean of the rates would be 1/2."""
    assert character_error_rate(["b", "123456789"], ["a", "123456789"]) == pytest.approx(0.1)


def test_characters_are_code_points() -> None:
    assert character_error_rate(["你好"], ["你们好"]) == pytest.approx(1 / 3)
    assert character_error_rate(["naive"], ["naïve"]) == pytest.approx(1 / 5)
    assert character_error_rate(["🙂"], ["🙃"]) == 1.0


def test_words_are_separated_by_any_white_space() -> None:
    assert word_error_rate(["7+8=15,\t4+3=7 #### 75"], ["7+8=15, 4+3+1=8\n#### 85"]) == pytest.approx(2 / 4)


def test_insertions_have_no_limit() -> None:
    assert character_error_rate(["aaaa"], ["a"]) == 3.0


@pytest.mark.parametrize("rate", [character_error_rate, word_error_rate])
def test_nothing_to_divide_by(rate) -> None:
    assert rate(["", "a"], ["", "a"]) == 0.0  # one empty reference is a reference like any other
    with pytest.raises(ValueError, match="not empty"):
        rate(["a"], [""])
    with pytest.raises(ValueError, match="2 hypotheses for 1 references"):
        rate(["a", "b"], ["a"])
