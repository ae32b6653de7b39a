"""Ids by the word against the tokenizers library, on text made to be awkward; and which tokenizers are left to the library."""

import random

import pytest
import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from toolkit_helpers import QUESTIONS
from transformers import PreTrainedTokenizerFast

from toolkits.lpo_data_preprocessing.byte_level import word_tokenizer
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECES = [
    *"aZé漢字ßİıſ1²٣½'’\"-—.,;:!?()[]{}<>|/\\ \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u200b\u0301\u0300\ufeff\U0001f600\ud7ff\u0378",
    " ", " ", "\n", "word", "it's", "IT'S", "don’t", "e\u0301", "\r\n", "  \n ", "12345", "<|im_end|>", "<|im_", "<|im_start|>user\n",
    "<tool_call>", "<tool_", "<tool_call>s", "call>",
]  # fmt: skip


def awkward(rng: random.Random, most: int = 25) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(1, most)))


def byte_level(pattern: str = QWEN2, folder=None, **changes):
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    rng = random.Random(1)
    backend.train_from_iterator([*QUESTIONS, "user\n assistant\n", *(awkward(rng) for _ in range(300))], trainer)
    backend.add_special_tokens([AddedToken(token, special=True, **changes) for token in ("<|im_start|>", "<|im_end|>")])
    # Qwen2.5 has ordinary added tokens as well: they are cut out of a response too.
    ordinary = {"normalized": False, **changes}
    backend.add_tokens([AddedToken(token, special=False, **ordinary) for token in ("<tool_call>", "<tool_call>s")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


PATTERNS = pytest.mark.parametrize("pattern", [QWEN2, LLAMA3, GPT2], ids=["qwen2", "llama3", "gpt2"])


@PATTERNS
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("nested", [False, True], ids=["", "tokens within tokens"])
def test_ids_are_the_librarys(pattern, split, nested):
    tokenizer, rng, answered = byte_level(pattern), random.Random(2), 0
    if nested:  # a special token holds ordinary ones, and begins with one
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("im_start", "<|", "_end|>")])
        tokenizer.add_tokens([AddedToken("<tool_call>!", special=True, normalized=False)], special_tokens=True)
    words = word_tokenizer(tokenizer)
    for _ in range(3000):
        text = awkward(rng)
        ids = words.ids(text, split_special_tokens=split)
        answered += ids is not None
        assert ids is None or ids == tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"], repr(text)
    assert answered > 500


@PATTERNS
def test_what_stays_apart_surely_does(pattern):
    """Prompts that end in white space and signs, answers that begin with them: where the answer is yes, the library agrees."""
    tokenizer, rng, yes = byte_level(pattern), random.Random(4), 0
    words = word_tokenizer(tokenizer)
    for _ in range(4000):
        prompt = "<|im_start|>assistant" + "".join(rng.choices(["\n", " ", "  ", ":", "a", "\t", "(", "5", "'"], k=rng.randint(0, 4)))
        text = "".join(rng.choices([" ", "\n", "(", "5", "z", "s", "'s", ".", "  "], k=rng.randint(1, 4))) + " word"
        whole = prompt + text + "<|im_end|>"
        if words.stay_apart(prompt, text, "<|im_end|>", whole):
            yes += 1
            parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text, "<|im_end|>")]
            assert tokenizer(whole, add_special_tokens=False)["input_ids"] == [*parts[0], *parts[1], *parts[2]], repr(whole)
    assert yes > 1000


def test_what_unicode_tables_or_normalisation_could_change_is_left_to_the_library():
    words = word_tokenizer(byte_level())
    for text in ("e\u0301", "a\u0378", "\u212b"):  # a decomposed letter, an unassigned code point, a singleton
        assert words.ids(text, split_special_tokens=True) is None
    assert words.ids("é 漢字 \U0001f600’", split_special_tokens=True) is not None


def test_follows_template_is_the_whole_comparison(tmp_path):
    byte_level(folder=tmp_path)
    chat, rng, seen = ChatTokenizer(tmp_path), random.Random(3), {True: 0, False: 0}
    for _ in range(1500):
        prompt, text = [{"role": "user", "content": awkward(rng, 5)}], awkward(rng, 8)
        ours = chat.prompt_ids(prompt) + chat.response_ids(text)
        rendered = chat.tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)
        whole = chat.tokenizer(rendered, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        follows = whole[: len(ours)] == ours
        assert chat.follows_template(prompt, text) == follows, repr(text)
        seen[follows] += 1
    assert min(seen.values()) > 100


def test_a_clean_border_needs_no_second_look(tmp_path, monkeypatch):
    byte_level(folder=tmp_path)
    chat = ChatTokenizer(tmp_path)
    prompt = [{"role": "user", "content": "2+2?"}]
    rendered = chat.render_prompts([prompt])[0]
    monkeypatch.setattr(chat, "_backend_ids", lambda texts, split: pytest.fail("asked the library") if texts else [])
    monkeypatch.setattr(chat, "ids", lambda texts, **_: pytest.fail("tokenised again") if texts else [])
    assert chat.follow_template([(rendered, prompt, "It is 4, of course.")]) == [True]


def test_other_tokenizers_are_left_to_the_library(tiny_qwen):
    assert word_tokenizer(ChatTokenizer(tiny_qwen).tokenizer) is not None
    for changes in ({"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}):
        assert word_tokenizer(byte_level(**changes)) is None, changes
    for pattern in (r"(?<=a)b|.", r"\bword|.", r"^a|."):
        assert word_tokenizer(byte_level(pattern)) is None, pattern
    metaspace = byte_level()
    metaspace.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert word_tokenizer(metaspace) is None
    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert word_tokenizer(lower) is None
    cut = byte_level()
    cut.backend_tokenizer.enable_truncation(3)
    assert word_tokenizer(cut) is None


def test_engines_that_differ_on_a_character_are_noticed(monkeypatch):
    words = word_tokenizer(byte_level())
    monkeypatch.setattr(words, "_find_words", regex.compile(QWEN2.replace(r"?\p{L}+", "?[a-zA-Z漢]+")).findall)
    assert words.ids("cafe 漢", split_special_tokens=True) is not None
    assert words.ids("café", split_special_tokens=True) is None


@pytest.mark.parametrize(
    ("opening", "text", "apart"),
    [
        ("assistant\n", "Yes.", True),
        ("assistant\n", "\nYes.", False),  # the expression takes both line ends at once
        ("assistant\n<|im_", "end|> and on", False),  # a control token across the border
        ("assistant: e.", "\u0301 was meant", False),  # NFC moves nothing here, but the mark belongs to the sign before it
        ("assistant: e", "\u0301 was meant", False),  # and here it composes
    ],
)
def test_borders(opening, text, apart):
    prompt = f"<|im_start|>user\nhm?<|im_end|>\n<|im_start|>{opening}"
    whole = f"{prompt}{text}<|im_end|>\n"
    assert word_tokenizer(byte_level()).stay_apart(prompt, text, "<|im_end|>", whole) == apart
