"""Which tokenizer turned text into the ids of a store: a fingerprint of what it does, not of where it lies."""

import hashlib
import json
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of everything that turns text into ids: vocabulary, merges, added tokens, normaliser, pre-tokeniser.

    ``tokenizer``: any transformers tokenizer. Of one that is not backed by the tokenizers library: its class, vocabulary, added tokens and,
    where it has one, SentencePiece model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        parts = {name: state.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    else:
        parts = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "added_tokens": {str(id): repr(token) for id, token in tokenizer.added_tokens_decoder.items()},
            "pieces": _sentence_pieces(tokenizer),
        }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sentence_pieces(tokenizer: Any) -> str | None:
    """Hex sha256 of a slow tokenizer's SentencePiece model."""
    model = getattr(tokenizer, "sp_model", None)
    return None if model is None else hashlib.sha256(model.serialized_model_proto()).hexdigest()


def folder_tokenizer_fingerprint(folder: str | Path) -> str | None:
    """The fingerprint of the tokenizer in a Hugging Face folder; None when it holds none. Code in the folder is never run."""
    if not any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return tokenizer_fingerprint(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True))
