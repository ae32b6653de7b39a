"""Which tokenizer turned text into the ids of a store: a fingerprint of what it does, not of where it lies."""

import hashlib
import json
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of everything that turns text into ids: vocabulary, merges, added tokens, normaliser, pre-tokeniser.

    ``tokenizer``: a transformers tokenizer backed by the tokenizers library.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: state.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def folder_tokenizer_fingerprint(folder: str | Path) -> str | None:
    """The fingerprint of the tokenizer in a Hugging Face folder; None when it holds none. Code in the folder is never run."""
    if not any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return tokenizer_fingerprint(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True))
