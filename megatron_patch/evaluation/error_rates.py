"""Character and word error rates of texts against references: edits over reference length, both summed over the whole corpus.

Summed before dividing, as speech recognition counts (NIST sclite): the mean of per-text rates would give a short reference the weight of a
long one. Characters are Unicode code points; words are what white space separates. A rate can exceed 1: there is no limit to insertions.
"""

from collections.abc import Sequence


def edit_distance(source: Sequence[object], target: Sequence[object]) -> int:
    """Fewest insertions, deletions and substitutions that turn ``source`` into ``target`` (Levenshtein), in O(len x len) time.

    Works on strings (characters) and on lists (words); one row of the table is kept at a time.
    """
    row = list(range(len(target) + 1))
    for i, left in enumerate(source, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(target, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def is_closer_than(limit: int, source: Sequence[object], target: Sequence[object]) -> bool:
    """Whether the edit distance is below ``limit``, in O(limit x len) time: a path that strays ``limit`` off the diagonal costs as much."""
    if abs(len(source) - len(target)) >= limit:
        return False
    row = [min(j, limit) for j in range(len(target) + 1)]
    for i, left in enumerate(source, start=1):
        first, last = max(1, i - limit + 1), min(len(target), i + limit - 1)
        diagonal, row[first - 1] = row[first - 1], min(i, limit) if first == 1 else limit
        for j in range(first, last + 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != target[j - 1]), limit)
    return row[-1] < limit


def character_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Character edits per reference character. Raises ValueError for lists of different length or references without a character."""
    return _error_rate(hypotheses, references)


def word_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Word edits per reference word. Raises ValueError for lists of different length or references without a word."""
    return _error_rate([text.split() for text in hypotheses], [text.split() for text in references])


def _error_rate(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    length = sum(map(len, references))
    if not length:
        raise ValueError("an error rate needs a reference that is not empty")
    return sum(map(edit_distance, hypotheses, references)) / length
