"""The quickstart's data and model: right answers, disjoint splits, same bytes for a seed, loadable by transformers alone."""

import json
import re

import pytest
import torch
from toolkit_helpers import ROOT, files, load_script, read_jsonl, write_jsonl

from megatron_patch.evaluation.answers import final_number

problems = load_script("make_word_problems")
tiny = load_script("make_tiny_qwen")
SPLITS = ("train", "valid", "heldout")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    assert problems.main(["--output", str(folder), "--train", "400", "--valid", "50", "--heldout", "60", "--seed", "3"]) == 0
    return folder


def sum_of(question: str, answer: str) -> tuple:
    """The numbers asked for and the operation, from the text alone."""
    a, b = map(int, re.findall(r"\d+", question))
    return ("+", min(a, b), max(a, b)) if "+" in answer.split(",")[0] else ("-", a, b)


def test_worked_answers_are_right():
    for sign, a, b in problems.all_sums():
        answer = problems.worked_answer(sign, a, b)
        assert final_number(answer) == (a + b if sign == "+" else a - b), answer
        steps = re.findall(r"([\d+-]+)=(\d+)", answer)
        assert len(steps) == 2, answer
        assert all(sum(int(n) for n in re.findall(r"[+-]?\d+", left)) == int(right) for left, right in steps), answer


def test_all_sums():
    sums = problems.all_sums()
    assert len(sums) == len(set(sums)) == 8100
    assert all(10 <= b <= 99 and 10 <= a <= 99 and (a <= b if sign == "+" else a > b) for sign, a, b in sums)


def test_questions_ask_what_is_answered(data):
    words = {"+": "finds|brings|adds|sells", "-": "loses|gives|takes|How many more"}
    for record in read_jsonl(data / "train.jsonl"):
        sign, a, b = sum_of(record["question"], record["answer"])
        assert re.search(words[sign], record["question"]), record
        assert final_number(record["answer"]) == (a + b if sign == "+" else a - b), record


def test_splits_share_no_sum(data):
    parts = [read_jsonl(data / f"{name}.jsonl") for name in SPLITS]
    assert [len(part) for part in parts] == [400, 50, 60] and files(data) == sorted(f"{name}.jsonl" for name in SPLITS)
    sums = [{sum_of(r["question"], r["answer"]) for r in part} for part in parts]
    assert len(set.union(*sums)) == 510
    assert {sign for sign, _, _ in sums[0]} == {"+", "-"}


def test_seed_decides_the_bytes(data, tmp_path):
    sizes = ["--train", "400", "--valid", "50", "--heldout", "60"]
    for seed, same in (("3", True), ("4", False)):
        assert problems.main(["--output", str(tmp_path), *sizes, "--seed", seed]) == 0
        assert all(((tmp_path / f"{n}.jsonl").read_bytes() == (data / f"{n}.jsonl").read_bytes()) == same for n in SPLITS)


@pytest.mark.parametrize("train", ["9000", "0"])
def test_impossible_sizes(tmp_path, fails, train):
    assert "at most 8100" in fails(problems.main, "--output", tmp_path / "x", "--train", train)
    assert not (tmp_path / "x").exists()


def test_checkpoint_is_qwen2_and_speaks(tiny_qwen):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_qwen)
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    assert type(model).__name__ == "Qwen2ForCausalLM" and type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert config.vocab_size == len(tokenizer) <= 512 and config.vocab_size % 128
    assert config.rope_parameters["rope_theta"] == 1e6 and config.tie_word_embeddings and config.num_key_value_heads == 1
    assert tokenizer.convert_tokens_to_ids(list(tiny.SPECIAL_TOKENS)) == [len(tokenizer) - 3 + i for i in range(3)]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    biases = [p for name, p in model.named_parameters() if name.endswith("_proj.bias")]
    assert len(biases) == 3 and all(p.abs().min() > 0 for p in biases)
    assert torch.isfinite(model(torch.tensor([tokenizer("Ana has 12 pens.")["input_ids"]])).logits).all()


def test_same_seed_same_weights(tiny_qwen, tmp_path):
    from safetensors.torch import load_file

    texts = tiny_qwen.parent / "text.jsonl"
    sizes = ["--layers", "1", "--hidden", "16", "--ffn", "24", "--heads", "2", "--kv-groups", "1"]
    here = load_file(tiny_qwen / "model.safetensors")
    for seed, same in (("1", True), ("2", False)):
        assert tiny.main(["--input", str(texts), "--output", str(tmp_path / seed), "--seed", seed, *sizes]) == 0
        there = load_file(tmp_path / seed / "model.safetensors")
        assert all(torch.equal(here[name], there[name]) for name in here) == same
        assert (tmp_path / seed / "tokenizer.json").read_bytes() == (tiny_qwen / "tokenizer.json").read_bytes()
    assert files(tmp_path) == ["1", "2"]


def test_untied(tiny_qwen, tmp_path):
    argv = ["--input", str(tiny_qwen.parent / "text.jsonl"), "--output", str(tmp_path / "m"), "--untied", "--hidden", "16", "--layers", "1"]
    assert tiny.main(argv) == 0
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--vocab-size", 384), "got 384"),
        (("--vocab-size", 600), "got 600"),
        (("--heads", 3), "heads 3"),
        (("--input", "/nowhere"), "/nowhere: no such file"),
    ],
)
def test_bad_sizes(tiny_qwen, tmp_path, fails, more, message):
    assert message in fails(tiny.main, "--input", tiny_qwen.parent / "text.jsonl", "--output", tmp_path / "m", *more)
    assert files(tmp_path) == []


def test_bad_text_and_existing_output(tiny_qwen, tmp_path, fails):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"a": "x"}, "{"])
    assert "bad.jsonl:2" in fails(tiny.main, "--input", bad, "--output", tmp_path / "m")
    assert "exists already" in fails(tiny.main, "--input", tiny_qwen.parent / "text.jsonl", "--output", tiny_qwen)


def test_commands_in_docstrings_name_real_files():
    for name in ("make_word_problems", "make_tiny_qwen"):
        text = (ROOT / "scripts" / f"{name}.py").read_text()
        assert f"python scripts/{name}.py --" in text
