"""Byte-level BPE by the word: the same ids as the tokenizers library, several times as fast, where that is certain; else no answer.

The tokenizers of GPT-2's family (Qwen, Llama 3...) cut a text at control tokens, then into words by a regular expression, and merge within
words only. Words repeat, so their ids are worth keeping; the library spends most of its time elsewhere (on the expression and on offsets).
We cut with the `regex` package and ask the tokenizer's own model for the ids of a word not seen before.

What makes it certain: only tokenizers of exactly this form are taken; the two regular expression engines are compared, on what they do with
each character, before a text with that character is cut (their Unicode tables are of different years); texts must be in NFC already. The
expression scans from left to right without looking back, so texts that share a cut go on alike from there: that also tells, from a few
characters, whether prompt and response stay apart when the chat template writes them as one text.
"""

import json
import re
import unicodedata
from functools import lru_cache
from itertools import chain
from typing import Any

import regex

KEPT_WORDS = 2**17
"""More are not remembered at a time: some 30 MB."""
BORDER = 64
"""Characters before and after a border that are looked at; where they are too few to tell, the answer is no."""


def is_plain_backend(tokenizer: Any) -> bool:
    """Whether a transformers tokenizer does nothing but call the tokenizers library: then that may be called directly, without offsets."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    untouched = all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in ("_encode_plus", "__call__"))
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not untouched:
        return False
    backend = tokenizer.backend_tokenizer
    return backend.truncation is None and backend.padding is None and hasattr(backend, "encode_batch_fast")


def word_tokenizer(tokenizer: Any) -> "WordTokenizer | None":
    """The word by word equal of a transformers tokenizer; None if it is of another form."""
    if not is_plain_backend(tokenizer):
        return None
    backend = tokenizer.backend_tokenizer
    pattern = _word_pattern(json.loads(backend.to_str()))
    added = list(backend.get_added_tokens_decoder().values())
    if pattern is None or not all(map(_splits_alone, added)):
        return None
    try:
        return WordTokenizer(backend, regex.compile(pattern), added)
    except regex.error:
        return None


def _word_pattern(state: dict[str, Any]) -> str | None:
    """The regular expression of a tokenizer that is it, the byte level and BPE, after NFC at most; `state`: its tokenizer.json."""
    steps = (state["pre_tokenizer"] or {}).get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"] or (state["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return None
    split, level = steps
    pattern = split["pattern"].get("Regex")
    plain = split["behavior"] == "Isolated" and not split["invert"] and not level["add_prefix_space"] and not level["use_regex"]
    merges = state["model"]["type"] == "BPE" and not state["model"].get("dropout")
    return pattern if plain and merges and pattern and not re.search(r"\(\?<|\\[bBAGKzZ]|[$^](?![\\\[])", pattern) else None


def _any_of(tokens: list[Any]) -> re.Pattern[str]:
    """What matches one of these added tokens, the longest where several begin."""
    longest_first = sorted((token.content for token in tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _splits_alone(token: Any) -> bool:
    """Whether an added token is cut out as it is, wherever it stands."""
    return not (token.lstrip or token.rstrip or token.single_word or token.normalized or re.search(r"\s", token.content))


class _Words(dict[str, tuple[int, ...]]):
    """Word -> ids; a word that is not there is asked for."""

    def __init__(self, backend: Any) -> None:
        from tokenizers import pre_tokenizers

        self._model, self._level = backend.model, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(self._level.pre_tokenize_str(word)[0][0]))
        if len(word) <= BORDER:
            if len(self) >= KEPT_WORDS:
                self.clear()
            self[word] = ids
        return ids


class WordTokenizer:
    """See the module; made by `word_tokenizer`."""

    def __init__(self, backend: Any, pattern: Any, added: list[Any]) -> None:
        self._pre_tokenizer, self._find_words, self._words = backend.pre_tokenizer, pattern.findall, _Words(backend)
        self._added = {token.content: backend.token_to_id(token.content) for token in added}
        self._control, self._special = _any_of(added), frozenset(token.content for token in added if token.special)
        self._agreed: set[str] = set()
        self._is_cut = lru_cache(maxsize=4096)(self._cuts_between)
        self._is_certain = lru_cache(maxsize=2048)(self._is_read_alike)  # a response is asked about twice in a chunk

    def ids(self, text: str, *, split_special_tokens: bool) -> list[int] | None:
        """The token ids of a text, None if it must be left to the tokenizers library."""
        if not self._is_certain(text):
            return None
        words = self._words.__getitem__
        ids: list[int] = []
        start = 0
        for match in self._control.finditer(text):
            if split_special_tokens and match.group() in self._special:
                continue  # text like any other, but what lies within it is no other token either
            ids.extend(chain.from_iterable(map(words, self._find_words(text[start : match.start()]))))
            ids.append(self._added[match.group()])
            start = match.end()
        ids.extend(chain.from_iterable(map(words, self._find_words(text[start:]))))
        return ids

    def stay_apart(self, prompt: str, text: str, end: str, whole: str) -> bool:
        """Whether `whole` surely has the tokens of `prompt`, then those of `text` (split), then `end`. False: it may or not."""
        if end not in self._added or not whole.startswith(end, len(prompt) + len(text)):
            return False
        control = self._control.search(whole, len(prompt))
        if control is None or control.start() != len(prompt) + len(text) or control.group() != end:
            return False
        if not (whole.startswith(prompt) and whole.startswith(text, len(prompt)) and self._is_certain(text)):
            return False
        # A cut depends on the next word, the spaces behind it and one more character at most.
        match = re.match(r"\s*\S+\s+\S", text[:BORDER])
        word = match.group() if match else text
        return 0 < len(word) <= BORDER and self._is_cut(prompt[-BORDER:], word)

    def _cuts_between(self, before: str, after: str) -> bool:
        """Whether two texts are cut where they meet, the first into its own words; what is before its last control token is no matter."""
        ends = [match.end() for match in self._control.finditer(before)]
        if not ends:
            return False
        before = before[ends[-1] :]
        if self._control.search(before + after) or not self._is_certain(before + after):
            return False
        alone, both = ([place for _, place in self._pre_tokenizer.pre_tokenize_str(text)] for text in (before, before + after))
        return both[: len(alone)] == alone  # cut there, and before it as if nothing followed

    def _is_read_alike(self, text: str) -> bool:
        """Whether both engines cut this text alike and no normalisation changes it."""
        new = set(text) - self._agreed
        if new and not all(map(self._agrees, new)):
            return False
        return text.isascii() or unicodedata.is_normalized("NFC", text)

    def _agrees(self, character: str) -> bool:
        """Whether both engines take a character alike, among letters, digits, signs and white space."""
        if unicodedata.category(character) in ("Cn", "Cs"):
            return False
        c = character
        probe = f"a{c}a{c}{c} {c}a '{c} 1{c}1{c}{c}1 {c}1 .{c}.{c}{c}. {c}.\n{c}\n{c}{c}\n {c}\n\t{c}\t {c}  {c}a'{c}  {c}"
        theirs = [place for _, place in self._pre_tokenizer.pre_tokenize_str(probe)]
        cuts, position = [], 0
        for word in self._find_words(probe):
            cuts.append((position, position + len(word)))
            position += len(word)
        if theirs != cuts or position != len(probe):
            return False
        self._agreed.add(c)
        return True
