"""Ordinary added tokens for a Hugging Face tokenizer, by editing its files.

Ordinary, not special: in a response, tokens that the tokenizer calls special are spelled out letter by letter (a sample must not be able
to end a turn), and an audio token there has to stay one id. They are matched as they are written, before any normalisation, and spaces
around them belong to the text.

The files are edited rather than saved anew by transformers, so that all else in them stays: what a version of transformers does not know,
and a chat template inside tokenizer_config.json. What came of it is then looked at through transformers (`check_round_trip`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkits.lpo_data_preprocessing.tokenise import load_tokenizer

TOKENIZER, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_ORDINARY = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def pattern_tokens(pattern: str, count: int) -> list[tuple[str, str]]:
    """(token, where it comes from) of a pattern with {} for the number, counted from 0."""
    if pattern.count("{}") != 1:
        raise ValueError(f"--pattern must have {{}} once, for the token's number, got {pattern!r}")
    if count < 1:
        raise ValueError(f"--tokens must be at least 1, got {count}")
    return [(pattern.replace("{}", str(i)), f"--pattern {pattern}") for i in range(count)]


def file_tokens(path: str | Path) -> list[tuple[str, str]]:
    """(token, "file:line") of a text file with one token a line; empty lines are skipped."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    stripped = ((number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1))
    return [(line, f"{path}:{number}") for number, line in stripped if line]


class TokenizerFiles:
    """The JSON files of a tokenizer that hold added tokens.

    Raises:
        ValueError: naming the file, for one that is missing or of another form than the tokenizers library writes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / TOKENIZER).is_file():
            raise ValueError(f"{folder}: no {TOKENIZER} (load and save the tokenizer with transformers, which writes one)")
        self.contents = {name: _read(self.folder / name) for name in (TOKENIZER, CONFIG, ADDED) if (self.folder / name).exists()}
        vocabulary, added = self.contents[TOKENIZER].get("model", {}).get("vocab"), self.contents[TOKENIZER].get("added_tokens")
        if not isinstance(vocabulary, dict) or not vocabulary or not isinstance(added, list):
            raise ValueError(f"{self.folder / TOKENIZER}: no vocabulary of tokens and ids (a BPE tokenizer is needed)")
        self.ids: dict[str, int] = {**vocabulary, **{entry["content"]: entry["id"] for entry in added}}

    @property
    def next_id(self) -> int:
        """The first id that is free, as are all after it."""
        return max(self.ids.values()) + 1

    def check_new(self, tokens: Sequence[tuple[str, str]]) -> None:
        """ValueError for a (token, place) that is empty, has spaces at its ends, is known already or comes twice."""
        first: dict[str, str] = {}
        for token, where in tokens:
            if not token.strip() or token != token.strip():
                raise ValueError(f"{where}: a token must not be empty or have spaces at its ends, got {token!r}")
            if token in self.ids:
                raise ValueError(f"{where}: token {token!r} is known already (id {self.ids[token]} in {self.folder / TOKENIZER})")
            if token in first:
                raise ValueError(f"{where}: token {token!r} was given before ({first[token]})")
            first[token] = where

    def write(self, folder: Path, tokens: Sequence[str]) -> None:
        """Write the files with the tokens added, under the next free ids, into `folder`."""
        ids = {token: self.next_id + i for i, token in enumerate(tokens)}
        for name, content in self.contents.items():
            changed = dict(content)
            if name == TOKENIZER:
                changed["added_tokens"] = content["added_tokens"] + [{"id": id, "content": token, **_ORDINARY} for token, id in ids.items()]
            elif name == ADDED:
                changed |= ids
            elif "added_tokens_decoder" in content:
                decoder = {str(id): {"content": token, **_ORDINARY} for token, id in ids.items()}
                changed["added_tokens_decoder"] = content["added_tokens_decoder"] | decoder
            (folder / name).write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_round_trip(folder: str | Path, tokens: Sequence[str], first_id: int) -> None:
    """Whether transformers reads each token as its one id, in a response too, and writes the id as the token; else ValueError."""
    tokenizer = load_tokenizer(folder)
    found = tokenizer(list(tokens), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for id, (token, ids) in enumerate(zip(tokens, found, strict=True), start=first_id):
        text = tokenizer.decode([id], clean_up_tokenization_spaces=False)
        if ids != [id] or text != token:
            raise ValueError(f"token {token!r} does not survive: meant as id {id}, it becomes {ids}, and the id gives {text!r}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content
