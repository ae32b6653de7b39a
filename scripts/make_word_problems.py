"""Short arithmetic word problems with worked answers, for trying the whole path without downloading anything.

Two-digit additions and subtractions in a dozen wordings; the answer works column by column, carries written out, and ends in "#### N" as
GSM8K's do. The splits share no sum: a problem's numbers (whatever the wording and their order) occur in one split only, so held-out
accuracy is arithmetic and not memory. Same seed, same bytes.

    python scripts/make_word_problems.py --output outputs/problems --train 3000 --valid 300 --heldout 500 --seed 1
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement
from pathlib import Path

from megatron_patch.data.atomic_files import atomic_path

NAMES = ("Ana", "Ben", "Mia", "Tom", "Eva", "Max", "Zoe", "Leo")
OBJECTS = ("pens", "figs", "cups", "eggs", "nuts", "hats", "keys", "jars")
ADDITIONS = (
    "{name} has {a} {things} and finds {b} more. How many {things} now?",
    "{name} has {a} {things}. {other} brings {b} {things}. How many in all?",
    "{a} {things} are in a box. {name} adds {b} {things}. How many are in the box?",
    "{name} sells {a} {things} and then {b} {things}. How many are sold?",
)
SUBTRACTIONS = (
    "{name} has {a} {things} and loses {b}. How many {things} are left?",
    "{name} has {a} {things} and gives {b} to {other}. How many are left?",
    "{a} {things} are in a box. {name} takes {b} of them. How many are in the box?",
    "{name} has {a} {things}, {other} has {b}. How many more has {name}?",
)
Sum = tuple[str, int, int]  # ("+" or "-", a, b); for "+" a <= b, for "-" a > b


def all_sums() -> list[Sum]:
    """Every sum the problems can ask: two-digit numbers, differences positive; addition without regard to order."""
    numbers = range(10, 100)
    additions = [("+", a, b) for a, b in combinations_with_replacement(numbers, 2)]
    return additions + [("-", b, a) for a, b in combinations(numbers, 2)]


def worked_answer(sign: str, a: int, b: int) -> str:
    """The solution column by column, ones first.

    >>> worked_answer("+", 47, 38)
    '7+8=15, 4+3+1=8\\n#### 85'
    >>> worked_answer("-", 53, 28)
    '13-8=5, 5-2-1=2\\n#### 25'
    """
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    if sign == "+":
        carry, result = (a_ones + b_ones) // 10, a + b
        ones, tens = f"{a_ones}+{b_ones}={a_ones + b_ones}", f"{a_tens}+{b_tens}{'+1' * carry}={a_tens + b_tens + carry}"
    else:
        borrow, result = int(a_ones < b_ones), a - b
        ones = f"{a_ones + 10 * borrow}-{b_ones}={a_ones + 10 * borrow - b_ones}"
        tens = f"{a_tens}-{b_tens}{'-1' * borrow}={a_tens - b_tens - borrow}"
    return f"{ones}, {tens}\n#### {result}"


def problem(rng: random.Random, sum_: Sum) -> dict[str, str]:
    """One record {"question", "answer"} for a sum, in a wording drawn from `rng`."""
    sign, a, b = sum_
    if sign == "+" and rng.random() < 0.5:
        a, b = b, a
    name, other = rng.sample(NAMES, 2)
    wording = rng.choice(ADDITIONS if sign == "+" else SUBTRACTIONS)
    question = wording.format(name=name, other=other, things=rng.choice(OBJECTS), a=a, b=b)
    return {"question": question, "answer": worked_answer(sign, a, b)}


def splits(sizes: Sequence[int], seed: int) -> Iterator[list[dict[str, str]]]:
    """One list of problems per size, no sum in two of them. ValueError if there are not that many sums."""
    rng, sums = random.Random(seed), all_sums()
    if min(sizes) < 1 or sum(sizes) > len(sums):
        raise ValueError(f"split sizes {list(sizes)} must be positive and sum to at most {len(sums)}")
    rng.shuffle(sums)
    start = 0
    for size in sizes:
        yield [problem(rng, sum_) for sum_ in sums[start : start + size]]
        start += size


def main(argv: Sequence[str] | None = None) -> int:
    """Write train.jsonl, valid.jsonl and heldout.jsonl; 0, or 2 after a one-line error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the three JSONL files")
    for name, size in (("train", 3000), ("valid", 300), ("heldout", 500)):
        parser.add_argument(f"--{name}", type=int, default=size, metavar="N", help="problems in this split (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    args = parser.parse_args(argv)
    try:
        parts = list(splits([args.train, args.valid, args.heldout], args.seed))
    except ValueError as error:
        print(f"[error] make_word_problems: {error}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "valid", "heldout"), parts, strict=True):
        with atomic_path(args.output / f"{name}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")
    print(f"make_word_problems: {', '.join(str(len(part)) for part in parts)} problems -> {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
