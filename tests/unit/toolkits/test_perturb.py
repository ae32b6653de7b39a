"""Noise: how much of it, what it does to words and to Chinese characters, and that it is the same every time."""

import random
import re
from collections import Counter

import pytest

from toolkits.lpo_data_preprocessing.perturb import add_noise, perturbed, units

ENGLISH = " ".join(f"w{i}" for i in range(5000))
CHINESE = "".join(chr(0x4E00 + i) for i in range(5000))


def fates(before: list[str], after: list[str]) -> Counter:
    """What became of each unit (all of them distinct), read from the output alone.

    A unit followed by itself was repeated; one that is missing at its turn was deleted; one out of turn was inserted. An insertion that
    draws the next unit or its own looks like another edit, which at 5,000 units happens to about one insertion.
    """
    counts, position = Counter(), 0
    for unit in before:
        if position < len(after) and after[position] == unit:
            position += 1
            if position < len(after) and after[position] == unit:
                counts["repeated"] += 1
                position += 1
            elif position < len(after) and abs(before.index(after[position]) - before.index(unit)) > 20:
                counts["inserted"] += 1
                position += 1
            else:
                counts["kept"] += 1
        else:
            counts["deleted"] += 1
    assert position == len(after)
    return counts


@pytest.mark.parametrize(("text", "split"), [(ENGLISH, str.split), (CHINESE, list)], ids=["words", "characters"])
def test_a_tenth_of_the_units_and_every_edit_as_often(text, split):
    counts = fates(split(text), split(add_noise(text, 0.1, random.Random(1))))
    assert sum(counts.values()) == 5000
    for edit in ("deleted", "repeated", "inserted"):  # binomial: 167 expected, standard deviation 13
        assert 127 < counts[edit] < 207, counts
    assert counts["kept"] == 5000 - sum(counts[edit] for edit in ("deleted", "repeated", "inserted"))


def test_units():
    assert units("他说 hello world，好") == ["他", "说", "hello", "world", "，", "好"]
    assert units("It's  7+8=15.\n#### 15") == ["It's", "7+8=15.", "####", "15"]
    assert units("カナ한국 어") == ["カ", "ナ", "한국", "어"]
    assert units(" \n") == []


def test_ratio_of_one_hits_every_unit():
    """Each line one word, so what became of it can be seen line by line."""
    noisy = add_noise("a\nb\nc\nd\ne\n", 1.0, random.Random(3))
    for line in noisy.split():
        assert line in "abcde"
    assert all(re.fullmatch(r"[a-e] [a-e]", line) for line in noisy.splitlines()), noisy


def test_spaces_stay_between_words_and_none_comes_between_characters():
    for seed in range(200):
        assert re.fullmatch(r"(one|two|three)?([ \n](one|two|three))*[ \n]?", add_noise("one two\nthree", 0.5, random.Random(seed)))
        assert " " not in add_noise("今天天气很好", 0.5, random.Random(seed))


@pytest.mark.parametrize("text", ["word", "好", "a a", "哈哈", "one two three", "  padded  "])
@pytest.mark.parametrize("ratio", [1e-9, 0.1, 1.0])
def test_never_the_text_and_never_nothing(text, ratio):
    for number in range(100):
        noisy = perturbed(text, ratio, 1, "id", number)
        assert noisy.strip() and noisy.strip() != text.strip()
        assert set(noisy.split()) <= set(text.split()) or not text.isascii()


def test_only_seed_id_and_number_matter():
    same = perturbed("one two three four", 0.3, 1, "r7", 0)
    assert same == perturbed("one two three four", 0.3, 1, "r7", 0)
    others = [perturbed(ENGLISH, 0.1, *key) for key in ((1, "r7", 0), (2, "r7", 0), (1, "r8", 0), (1, "r7", 1))]
    assert len(set(others)) == 4


def test_frozen():
    """What a seed gives is part of a data set's description: it must not change with the code."""
    assert [perturbed("Ana has 12 pens and 7 cups", 0.3, 1, "r0", number) for number in range(3)] == [
        "Ana pens has has 12 7 12 cups",
        "Ana has 12 pens and 7 and cups",
        "Ana 12 pens pens and 7 7 cups",
    ]


def test_nothing_to_perturb():
    with pytest.raises(ValueError, match="an empty text cannot be perturbed"):
        perturbed(" \n", 0.1, 1, "id", 0)
