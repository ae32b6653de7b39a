"""Text to token ids, in one place: the chat template for prompts, the turn's end for responses, and fingerprints of both.

A prompt is what the chat template renders with the generation prompt. A response is its text followed by the end token (`<|im_end|>`),
without the newline the template writes after it and without `<|endoftext|>`: exactly what a model produces, so exactly what is scored.
Prompt and response are tokenised apart, because that is how generation sees them; `follows_template` says where the template, applied to
the whole conversation, would have merged tokens across the border. A tokenizer that begins every text with a space (SentencePiece does)
would write one before each response, which the template does not: there a response is tokenised behind what the template writes before it.

Everything is asked for many texts at once: a call of the tokenizer costs more than its work on a chat turn. The comparison with the whole
conversation would double that work, so where the tokenizer's own rules leave no doubt (`byte_level`) only the border is looked at.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from megatron_patch.data.tokenizer_identity import tokenizer_fingerprint
from toolkits.lpo_data_preprocessing.byte_level import is_plain_backend, word_tokenizer
from toolkits.lpo_data_preprocessing.records import Message

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer in a local folder, whose code is never run; ValueError if there is none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder (a local Hugging Face tokenizer is needed)")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{folder}: not a loadable tokenizer ({error!s:.200})") from None


class ChatTokenizer:
    """A Hugging Face tokenizer with a chat template, plus the token that ends a response."""

    def __init__(self, folder: str | Path, *, response_end: str = "<|im_end|>", chat: bool = True) -> None:
        """`folder`: a local Hugging Face tokenizer; code in it is never run. `chat`: it needs a chat template (plain text does not).

        ValueError if it is none, has no chat template or lacks the end token.
        """
        self.tokenizer = load_tokenizer(folder)
        if chat and not self.tokenizer.chat_template:
            raise ValueError(f"{folder}: the tokenizer has no chat template")
        self.end_id = self._token_id(response_end, folder)
        self.response_end = response_end
        self._plain = is_plain_backend(self.tokenizer)
        self._words = word_tokenizer(self.tokenizer)
        self._lead = self._find_lead() if chat else ""

    def _token_id(self, token: str, folder: str | Path) -> int:
        known = self.tokenizer.get_vocab()
        if token not in known:
            raise ValueError(f"{folder}: the tokenizer has no token {token!r}")
        return known[token]

    def _find_lead(self) -> str:
        """What the template writes between its last control token and a response, if a response behind it has other ids than alone."""
        try:
            rendered = self._render([[{"role": "user", "content": "a"}]], prompt=True)[0]
        except ValueError:
            return ""  # it refuses even that
        ends = [found.end() for found in self._control.finditer(rendered)]
        lead = rendered[max(ends, default=0) :]
        before, behind, alone = self.ids([lead, lead + "a", "a"], split_special_tokens=True)
        return lead if behind != before + alone else ""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Generation stops at any of these: the response end and, where the vocabulary has it, `<|endoftext|>`."""
        known = self.tokenizer.get_vocab()
        return tuple(dict.fromkeys([self.end_id, *([known[END_OF_TEXT]] if END_OF_TEXT in known else [])]))

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of everything that turns text into ids: vocabulary, merges, added tokens, normaliser, pre-tokeniser. Not the path."""
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def template_fingerprint(self) -> str:
        """Hex sha256 of the chat template's text (with the default system prompt in it) and the response end."""
        return hashlib.sha256(json.dumps([self.tokenizer.chat_template, self.response_end]).encode()).hexdigest()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The rendered prompt up to and including the generation prompt."""
        return self.ids([self.render_prompts([messages])[0]])[0]

    def response_ids(self, text: str, *, ended: bool = True) -> list[int]:
        """The response's text, and the end token if the model (or the reference's author) `ended` it.

        A control token spelled out in the text stays text: a sample cannot end a turn or open another by writing so.
        """
        return self.responses_ids([(text, ended)])[0]

    def responses_ids(self, responses: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """`response_ids` of many (text, ended)."""
        found = self._behind_lead([text for text, _ in responses])
        return [[*ids, self.end_id] if ended else ids for ids, (_, ended) in zip(found, responses, strict=True)]

    def _behind_lead(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of responses: alone, or behind the lead where these do not merge with it."""
        alone = self.ids(texts, split_special_tokens=True)
        if not self._lead:
            return alone
        before, *behind = self.ids([self._lead, *(self._lead + text for text in texts)], split_special_tokens=True)
        return [b[len(before) :] if b[: len(before)] == before else a for a, b in zip(alone, behind, strict=True)]

    def follows_template(self, messages: Sequence[Message], text: str) -> bool:
        """Whether prompt + response ids are how the template's own rendering of the whole conversation begins."""
        return self.follow_template([(self.render_prompts([messages])[0], messages, text)])[0]

    def follow_template(self, turns: Sequence[tuple[str, Sequence[Message], str]]) -> list[bool]:
        """`follows_template` of many (rendered prompt, its messages, response text)."""
        wholes = self._render([[*messages, {"role": "assistant", "content": text}] for _, messages, text in turns], prompt=False)
        found = [
            self._words is not None and self._words.stay_apart(prompt, text, self.response_end, whole)
            for (prompt, _, text), whole in zip(turns, wholes, strict=True)
        ]
        doubtful = [i for i, clean in enumerate(found) if not clean]
        rendered = self.ids([wholes[i] for i in doubtful])
        prompts = self.ids([turns[i][0] for i in doubtful])
        responses = self.responses_ids([(turns[i][2], True) for i in doubtful])
        for i, whole, prompt, response in zip(doubtful, rendered, prompts, responses, strict=True):
            found[i] = whole[: len(prompt) + len(response)] == prompt + response
        return found

    def earlier_turns(self, messages: Sequence[Message], rendered: str) -> list[list[int]]:
        """A rendered prompt cut at its assistant turns: ids of what is before a turn, of the turn, and so on; last, of what is behind them.

        ValueError if the template does not write the earlier turns as they were (some leave out thoughts): nothing would be trained on then
        that is ever generated.
        """
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        begun = self.render_prompts([messages[:i] for i in places]) if places and places[0] else []
        if len(begun) < len(places):
            raise ValueError("the conversation opens with an assistant's turn, which answers nothing")
        pieces, end = [], 0
        for start, i in zip(begun, places, strict=True):
            turn = messages[i]["content"] + self.response_end
            if not rendered.startswith(start) or not rendered.startswith(turn, len(start)) or len(start) < end:
                raise ValueError(f"the chat template writes message {i} differently once another follows; leave out --every-assistant-turn")
            pieces.append(rendered[end : len(start)])
            end = len(start) + len(turn)
        between = self.ids([*pieces, rendered[end:]])
        turns = self.responses_ids([(messages[i]["content"], True) for i in places])
        return [ids for pair in zip(between, turns, strict=False) for ids in pair] + between[-1:]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, byte for byte (no clean-up of spaces)."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def control_token(self, text: str) -> str | None:
        """The first token in a text that the tokenizer calls special, None if there is none. Ordinary added tokens are no such tokens."""
        found = self._control.search(text)
        return found and found.group()

    @cached_property
    def _control(self) -> re.Pattern[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        special = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return re.compile("|".join(re.escape(token) for token in sorted(special)) or r"(?!)")

    def render_prompts(self, prompts: Sequence[Sequence[Message]]) -> list[str]:
        """The template's text of each prompt, the generation prompt included."""
        return self._render(prompts, prompt=True)

    def _render(self, conversations: Sequence[Sequence[Message]], *, prompt: bool) -> list[str]:
        """The template's texts; ValueError where it refuses one of the conversations (some want roles to alternate)."""
        if not conversations:
            return []
        try:
            listed = [list(messages) for messages in conversations]
            return self.tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation ({error!s:.200})") from None

    def ids(self, texts: Sequence[str], *, split_special_tokens: bool = False) -> list[list[int]]:
        """Token ids of each text; control tokens spelled out in it are tokens, or text if they are to be split."""
        words = self._words
        known = [words.ids(text, split_special_tokens=split_special_tokens) if words else None for text in texts]
        others = iter(self._backend_ids([text for text, ids in zip(texts, known, strict=True) if ids is None], split_special_tokens))
        return [next(others) if ids is None else ids for ids in known]

    def _backend_ids(self, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        if not self._plain:
            return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=split_special_tokens)["input_ids"]
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
