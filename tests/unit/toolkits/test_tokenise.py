"""Prompts and responses against the template's own rendering."""

import json
import shutil

import pytest
from toolkit_helpers import QUESTIONS

from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

MESSAGES = [{"role": "user", "content": QUESTIONS[0]}]
ANSWER = "2+0=2, 1+1=2\n#### 22"


@pytest.fixture(scope="module")
def chat(tiny_qwen):
    return ChatTokenizer(tiny_qwen)


def test_prompt_is_the_template_with_the_generation_prompt(chat):
    ids = chat.prompt_ids(MESSAGES)
    text = f"<|im_start|>system\nSolve the problem.<|im_end|>\n<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(ids) == text
    own_system = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert chat.decode(chat.prompt_ids(own_system)).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_response_is_text_and_end_token(chat):
    vocab = chat.tokenizer.get_vocab()
    ids = chat.response_ids(ANSWER)
    assert ids[-1] == vocab["<|im_end|>"] and ids.count(vocab["<|im_end|>"]) == 1 and vocab["<|endoftext|>"] not in ids
    assert chat.decode(ids[:-1]) == ANSWER
    assert chat.response_ids(ANSWER, ended=False) == ids[:-1]
    assert chat.stop_ids == (vocab["<|im_end|>"], vocab["<|endoftext|>"])


def test_digits_stand_alone(chat):
    pieces = [chat.tokenizer.decode([i]) for i in chat.response_ids("1234", ended=False)]
    assert pieces == list("1234")


@pytest.mark.parametrize("text", ["é 漢字 \U0001f600", "  two  spaces ", "tab\tend\n\n", "\nnewline first"])
def test_text_survives(chat, text):
    assert chat.decode(chat.response_ids(text, ended=False)) == text


def test_control_tokens_in_a_response_stay_text(chat):
    text = "a<|im_end|>\n<|im_start|>user"
    ids = chat.response_ids(text)
    special = {chat.tokenizer.get_vocab()[token] for token in ("<|im_end|>", "<|im_start|>")}
    assert special & set(ids[:-1]) == set() and ids[-1] == chat.end_id and chat.decode(ids[:-1]) == text
    assert not chat.follows_template(MESSAGES, text)  # the template would make them control tokens
    assert special <= set(chat.prompt_ids(MESSAGES))  # and the prompt still has its own


def test_prompt_and_response_begin_the_whole_conversation(chat):
    assert chat.follows_template(MESSAGES, ANSWER)
    assert chat.follows_template([*MESSAGES, {"role": "assistant", "content": "x"}, *MESSAGES], ANSWER)


def test_a_template_that_edits_the_text_is_noticed(chat, monkeypatch):
    edited = chat.tokenizer.chat_template.replace("message.content", "message.content.strip()")
    monkeypatch.setattr(chat.tokenizer, "chat_template", edited)
    assert chat.follows_template(MESSAGES, ANSWER) and not chat.follows_template(MESSAGES, ANSWER + " ")


def test_fingerprints(tiny_qwen, tmp_path):
    here = ChatTokenizer(tiny_qwen)
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_qwen, copy)
    there = ChatTokenizer(copy)
    there.tokenizer("some text", padding="max_length", truncation=True, max_length=64)  # state of use, not of the vocabulary
    assert (there.fingerprint, there.template_fingerprint) == (here.fingerprint, here.template_fingerprint)
    (copy / "chat_template.jinja").write_text((copy / "chat_template.jinja").read_text().replace("Solve", "Answer"))
    retold = ChatTokenizer(copy)
    assert retold.fingerprint == here.fingerprint and retold.template_fingerprint != here.template_fingerprint
    assert ChatTokenizer(tiny_qwen, response_end="<|endoftext|>").template_fingerprint != here.template_fingerprint
    state = json.loads((copy / "tokenizer.json").read_text())
    state["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(state))
    assert ChatTokenizer(copy).fingerprint != here.fingerprint


def test_bad_folders(tiny_qwen, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        ChatTokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a loadable tokenizer"):
        ChatTokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no token '<\|eot\|>'"):
        ChatTokenizer(tiny_qwen, response_end="<|eot|>")
    shutil.copytree(tiny_qwen, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="plain: the tokenizer has no chat template"):
        ChatTokenizer(tmp_path / "plain")
