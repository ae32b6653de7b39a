"""Tokenizers of other kinds than Qwen's: every pair is what the template says, or counted as one that is not."""

import json
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


CLEAN = ["the answer is no number", "12 pens", "Ana has 10 + 25 = 35", "number", "47 and 58"]


def build(folder, tmp_path, texts, *more):
    """The store of pairs from `texts`, each rejected beside the next."""
    rows = [record(i, chosen=text, rejected=[texts[i - 1]], text=text) for i, text in enumerate(texts)]
    argv = ["--input", write_jsonl(tmp_path / "in.jsonl", rows), "--output", tmp_path / "s", "--tokenizer", folder, *more]
    assert main([str(word) for word in argv]) == 0
    return PairStore(tmp_path / "s")


def test_no_space_before_a_response_that_the_template_does_not_write(folder, tmp_path, capsys):
    store = build(folder, tmp_path, CLEAN)
    assert store.manifest["template"]["exceptions"] == 0 and "off the template" not in capsys.readouterr().out
    tokenizer = ChatTokenizer(folder).tokenizer
    conversation = [*record(0)["prompt"], {"role": "assistant", "content": CLEAN[0]}]
    whole = tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False), add_special_tokens=False)["input_ids"]
    prompt, chosen, _ = (part.tolist() for part in store[0])
    assert whole[: len(prompt) + len(chosen)] == prompt + chosen


def test_responses_that_are_all_off_the_template_are_said_to_be(tmp_path, capsys):
    """A control token right before the answer, and a tokenizer that sets a space before the first text alone."""
    tokenizer = unigram("first")
    tokenizer.chat_template = TEMPLATE.replace("assistant\n", "").replace("m.role }}\n{{", "'' if m.role == 'assistant' else m.role }}{{")
    tokenizer.save_pretrained(tmp_path / "first")
    store = build(tmp_path / "first", tmp_path, CLEAN)
    out = capsys.readouterr().out
    assert store.manifest["template"]["exceptions"] == 10 and "responses off the template: 10 (first: r0-0 chosen, r0-0 rejected" in out
    assert "most of them: in the template's own text answers have other tokens than here" in out


@pytest.mark.parametrize(("kind", "name"), [("unigram", "T5Tokenizer"), ("bpe", "LlamaTokenizer"), ("bpe", "GemmaTokenizer")])
def test_a_sentencepiece_model_alone(tmp_path, kind, name):
    """A folder with tokenizer.model and no tokenizer.json. The judge of texts is SentencePiece itself, of the template transformers."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "text").write_text("\n".join([*QUESTIONS, *CLEAN] * 9))
    sentencepiece.SentencePieceTrainer.train(
        input=tmp_path / "text", model_prefix=folder / "tokenizer", model_type=kind, vocab_size=90, user_defined_symbols=CONTROL, pad_id=3,
        hard_vocab_limit=False, add_dummy_prefix=name != "GemmaTokenizer", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": name, "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    store = build(folder, tmp_path, CLEAN)
    assert store.manifest["template"]["exceptions"] == 0
    texts = build(folder, tmp_path, CLEAN, "--kind", "text", "--response-end", "<|im_end|>", "--overwrite")
    end = processor.piece_to_id("<|im_end|>")
    for i, text in enumerate(CLEAN):
        assert texts[i][0].tolist() == [*processor.encode(text), end]


def test_fingerprint_of_a_slow_tokenizer(tmp_path):
    prints = set()
    for name, extra in (("a", 0), ("b", 0), ("c", 1)):
        tokenizer = ByT5Tokenizer(eos_token="<|im_end|>", additional_special_tokens=[*CONTROL, "<|more|>"][: 2 + extra], extra_ids=0)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(tmp_path / name)
        assert getattr(ChatTokenizer(tmp_path / name).tokenizer, "backend_tokenizer", None) is None
        prints.add(ChatTokenizer(tmp_path / name).fingerprint)
    assert len(prints) == 2
