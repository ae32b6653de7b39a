"""Rejected answers without a model: the chosen one with noise (the speech-recognition pairs of arXiv 2508.14947, Table 7).

A text is a row of units: each Chinese or Japanese character is one, anything else is split into words at white space. Every unit is hit
with the probability `ratio`, independently, and then one of three things happens to it, each as likely as the others:

    deletion     it goes, and the white space after it with it
    repetition   it stands there twice
    insertion    a unit drawn from all units of the same text follows it, so the noise brings in no foreign vocabulary

A draw that leaves the text as it was, or nothing of it, is made again. What comes out hangs on (seed, record id, number) alone.
"""

import hashlib
import random
import re

RATIO = 0.1
"""The paper's noise ratio."""
_ATTEMPTS = 100
# Ideographs with their extensions, kana, and the punctuation and full-width forms that stand among them.
_CJK = "\u3001-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff60\U00020000-\U0003134f"
_PIECE = re.compile(rf"(?P<space>\s+)|[{_CJK}]|[^\s{_CJK}]+")
_ONE_CJK = re.compile(f"[{_CJK}]")


def units(text: str) -> list[str]:
    """The characters (Chinese, Japanese) and words (all else) of a text, in order, without white space."""
    return [match[0] for match in _PIECE.finditer(text) if not match["space"]]


def perturbed(text: str, ratio: float, seed: int, id: str, number: int) -> str:
    """The `number`-th noisy version of `text`, different from it and not empty; `ratio` (above 0, at most 1) of the units are hit.

    Raises ValueError for a text without any unit.
    """
    if not text.strip():
        raise ValueError("an empty text cannot be perturbed")
    rng = random.Random(hashlib.sha256(f"{seed}/{id}/{number}".encode()).digest())
    for _ in range(_ATTEMPTS):
        noisy = add_noise(text, ratio, rng)
        if noisy.strip() not in ("", text.strip()):
            return noisy
    return _repeat_one(text, rng)  # short text, low ratio: the lightest noise that there is


def add_noise(text: str, ratio: float, rng: random.Random) -> str:
    """`text` with each unit hit with the probability `ratio`: at times nothing is, at times nothing is left."""
    vocabulary, out, dropping = units(text), list[str](), False
    for match in _PIECE.finditer(text):
        piece = match[0]
        if match["space"]:
            out += [] if dropping else [piece]
            continue
        hit = rng.random() < ratio
        edit = ("delete", "repeat", "insert")[_below(3, rng)] if hit else ""
        dropping = edit == "delete"
        if edit == "insert":
            piece = _joined(piece, vocabulary[_below(len(vocabulary), rng)])
        elif edit == "repeat":
            piece = _joined(piece, piece)
        out += [] if dropping else [piece]
    return "".join(out)


def _repeat_one(text: str, rng: random.Random) -> str:
    matches = [match for match in _PIECE.finditer(text) if not match["space"]]
    match = matches[_below(len(matches), rng)]
    return text[: match.start()] + _joined(match[0], match[0]) + text[match.end() :]


def _joined(first: str, second: str) -> str:
    """Two units side by side: a space between two words, none beside a Chinese character."""
    return f"{first}{'' if _ONE_CJK.match(first) or _ONE_CJK.match(second) else ' '}{second}"


def _below(limit: int, rng: random.Random) -> int:
    """A whole number in [0, limit); from random() alone, the one method whose sequence Python promises to keep."""
    return int(rng.random() * limit)
