"""Tokenizers of other kinds than Qwen's: every pair is what the template says, or counted as one that is not."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from toolkit_helpers import QUESTIONS, record, write_jsonl
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from megatron_patch.data.pair_store import PairStore
from toolkits.lpo_data_preprocessing.build_pairs import main
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGING = TEMPLATE.replace("assistant\n", "assistant: ")  # no control token or line's end before the answer
CONTROL = ["<|im_start|>", "<|im_end|>"]


def unigram(prepend: str):
    """SentencePiece's unigram model, spaces as ▁, as the tokenizers library has it."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(prepend_scheme=prepend), decoders.Metaspace(prepend_scheme=prepend)
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([*QUESTIONS, "0123456789 + = user assistant \n ", "the answer is no number"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", additional_special_tokens=CONTROL)


def slow_bytes():
    """A tokenizer without the tokenizers library: bytes."""
    return ByT5Tokenizer(eos_token="<|im_end|>", additional_special_tokens=CONTROL, extra_ids=0)


MAKERS = {
    "always": lambda: unigram("always"), "first": lambda: unigram("first"), "never": lambda: unigram("never"), "slow": slow_bytes,
}  # fmt: skip


@pytest.fixture(params=MAKERS)
def folder(request, tmp_path):
    tokenizer = MAKERS[request.param]()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("template", [TEMPLATE, MERGING], ids=["line", "colon"])
def test_on_the_template_or_counted(folder, tmp_path, template):
    rng, rows = random.Random(4), []
    chat = ChatTokenizer(folder)
    chat.tokenizer.chat_template = template
    chat.tokenizer.save_pretrained(tmp_path / "chat")
    for i in range(40):
        texts = ["".join(rng.choices(["Ana", " ", "12", "\n", "the", "no", "<|im_end|>", "x"], k=6)) + "." for _ in range(2)]
        rows.append(record(i, chosen=texts[0], rejected=[texts[1]]))
    write_jsonl(tmp_path / "in.jsonl", rows)
    argv = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "s", "--tokenizer", tmp_path / "chat"]
    assert main([str(word) for word in argv]) == 0
    store, tokenizer, off = PairStore(tmp_path / "s"), chat.tokenizer, 0
    for i, row in enumerate(rows):
        prompt, *responses = (part.tolist() for part in store[i])
        for text, response in zip((row["chosen"], row["rejected"][0]), responses, strict=True):
            rendered = tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": text}], tokenize=False)
            whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            off += whole[: len(prompt) + len(response)] != prompt + response
            assert response[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") and response.count(response[-1]) == 1
    assert store.manifest["template"]["exceptions"] == off > 0


def test_fingerprint_of_a_slow_tokenizer(tmp_path):
    prints = set()
    for name, extra in (("a", 0), ("b", 0), ("c", 1)):
        tokenizer = ByT5Tokenizer(eos_token="<|im_end|>", additional_special_tokens=[*CONTROL, "<|more|>"][: 2 + extra], extra_ids=0)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(tmp_path / name)
        assert getattr(ChatTokenizer(tmp_path / name).tokenizer, "backend_tokenizer", None) is None
        prints.add(ChatTokenizer(tmp_path / name).fingerprint)
    assert len(prints) == 2
