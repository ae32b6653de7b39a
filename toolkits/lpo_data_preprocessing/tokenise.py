"""Text to token ids, in one place: the chat template for prompts, the turn's end for responses, and fingerprints of both.

A prompt is what the chat template renders with the generation prompt. A response is its text followed by the end token (`<|im_end|>`),
without the newline the template writes after it and without `<|endoftext|>`: exactly what a model produces, so exactly what is scored.
Prompt and response are tokenised apart, because that is how generation sees them; `follows_template` says where the template, applied to
the whole conversation, would have merged tokens across the border.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from megatron_patch.data.tokenizer_identity import tokenizer_fingerprint
from toolkits.lpo_data_preprocessing.records import Message

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer in a local folder, whose code is never run; ValueError if there is none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder (a local Hugging Face tokenizer is needed)")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: not a loadable tokenizer ({error!s:.200})") from None


class ChatTokenizer:
    """A Hugging Face tokenizer with a chat template, plus the token that ends a response."""

    def __init__(self, folder: str | Path, *, response_end: str = "<|im_end|>") -> None:
        """`folder`: a local Hugging Face tokenizer; code in it is never run.

        ValueError if it is none, has no chat template or lacks the end token.
        """
        self.tokenizer = load_tokenizer(folder)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{folder}: the tokenizer has no chat template")
        self.end_id = self._token_id(response_end, folder)
        self.response_end = response_end

    def _token_id(self, token: str, folder: str | Path) -> int:
        known = self.tokenizer.get_vocab()
        if token not in known:
            raise ValueError(f"{folder}: the tokenizer has no token {token!r}")
        return known[token]

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
        return self._ids(self._render(messages, add_generation_prompt=True))

    def response_ids(self, text: str, *, ended: bool = True) -> list[int]:
        """The response's text, and the end token if the model (or the reference's author) `ended` it.

        A control token spelled out in the text stays text: a sample cannot end a turn or open another by writing so.
        """
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, self.end_id] if ended else ids

    def follows_template(self, messages: Sequence[Message], text: str) -> bool:
        """Whether prompt + response ids are how the template's own rendering of the whole conversation begins."""
        ours = self.prompt_ids(messages) + self.response_ids(text)
        whole = self._ids(self._render([*messages, {"role": "assistant", "content": text}], add_generation_prompt=False))
        return whole[: len(ours)] == ours

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, byte for byte (no clean-up of spaces)."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The template's text; ValueError where it refuses the conversation (some want roles to alternate)."""
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation ({error!s:.200})") from None

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
