"""The quickstart, with few steps, as a user starts it; and its numbers computed again from the exported folders with transformers alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """report.json of one small quickstart."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    environment = {**os.environ, "QUICKSTART_SMALL": "1", "QUICKSTART_OUT": str(out)}
    done = subprocess.run(["bash", "scripts/quickstart.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "curves.png").stat().st_size > 20_000
    assert "[xpo] step 0: loss 2.000000" in done.stdout
    return json.loads((out / "report.json").read_text())


def response_logps(folder: str, records: list[dict[str, Any]]) -> np.ndarray:
    """float64 [pairs, 2] nats per token of chosen and rejected, by transformers and nothing of ours."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for record in records:
        prompt = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        row = []
        for text, ended in ((record["chosen"], True), (record["rejected"][0], record.get("rejected_ended", [True])[0])):
            # A barely trained model writes "<|im_start|>" now and then: by the contract a control token spelled out in a text stays text.
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids += [tokenizer.convert_tokens_to_ids("<|im_end|>")] * ended
            with torch.no_grad():
                logps = model(torch.tensor([prompt_ids + ids])).logits[0].double().log_softmax(-1)
            start = len(prompt_ids) - 1
            row.append(np.mean([logps[start + i, token].item() for i, token in enumerate(ids)]))
        rows.append(row)
    return np.array(rows)


def greedy_answers(folder: str, questions: list[str]) -> list[str | None]:
    """What transformers' own generate says to each question alone; None where it did not end its turn in 64 tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    answers: list[str | None] = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        whole = model.generate(**ids, do_sample=False, max_new_tokens=64, eos_token_id=ends, pad_token_id=ends[1])
        made = whole[0, ids["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(made[:-1]) if made[-1].item() in ends else None)
    return answers


def last_number(text: str) -> str | None:
    """The digits after the last ####, as our problems end; else the last digits in the text."""
    numbers = re.findall(r"-?\d+", text.rpartition("####")[2])
    return None if not numbers else numbers[0] if "####" in text else numbers[-1]


def accuracy(answers: list[str | None], references: list[str]) -> float:
    """Fraction of answers that ended with the reference's number."""
    pairs = zip(answers, references, strict=True)
    right = [answer is not None and last_number(answer) == last_number(reference) for answer, reference in pairs]
    return sum(right) / len(right)


def test_report_has_what_was_promised(report: dict[str, Any]) -> None:
    accuracies = {"sft_accuracy", "lpo_accuracy", "dpo_accuracy"}
    assert accuracies | {"heldout", "step0", "pairs", "dropped", "parallel", "seconds", "models"} <= set(report)
    assert report["parallel"] == {"tp": 2, "pp": 1, "cp": 1, "dp": 1}
    assert report["pairs"] > 50 and set(report["models"]) == {"sft", "lpo", "dpo"}
    assert {"problems", "checkpoint", "finetune", "pairs", "lpo", "dpo"} <= set(report["seconds"])


def test_step_zero(report: dict[str, Any]) -> None:
    """LPO's loss at policy = reference is 2 for any options; the authors' own log starts at 3.4."""
    assert report["step0"]["loss"] == pytest.approx(2.0, abs=1e-4)
    assert report["step0"]["max_abs_chosen_logratio_per_token"] <= 1e-5
    assert report["step0"]["max_abs_rejected_logratio_per_token"] <= 1e-5


@pytest.mark.parametrize("run", ["lpo", "dpo"])
def test_heldout_numbers_again(report: dict[str, Any], run: str) -> None:
    records = [json.loads(line) for line in Path(report["heldout_pairs"]).read_text().splitlines()]
    ratios = response_logps(report["models"][run], records) - response_logps(report["models"]["sft"], records)
    margin = ratios[:, 0] - ratios[:, 1]
    expected = report["heldout"][run]
    assert len(records) == report["heldout_pair_count"]
    assert expected["chosen_logratio"] == pytest.approx(ratios[:, 0].mean(), abs=1e-5)
    assert expected["rejected_logratio"] == pytest.approx(ratios[:, 1].mean(), abs=1e-5)
    assert expected["margin"] == pytest.approx(margin.mean(), abs=1e-5)
    assert abs(expected["preference_accuracy"] - (margin > 0).mean()) <= 1.5 / len(records)  # a margin of 0 may round either way


def test_greedy_accuracy_again(report: dict[str, Any], tmp_path: Path) -> None:
    """So few steps solve hardly anything, so the count is also made on references that the model's own answers give: neither 0 nor 1."""
    out = Path(report["models"]["lpo"]).parents[1]
    problems = [json.loads(line) for line in (out / "problems/heldout.jsonl").read_text().splitlines()]
    answers = greedy_answers(report["models"]["lpo"], [problem["question"] for problem in problems])
    references = [problem["answer"] for problem in problems]
    assert len(problems) == report["heldout_problems"]
    assert report["lpo_accuracy"] == pytest.approx(accuracy(answers, references), abs=0.5 / len(problems))

    both = enumerate(zip(answers, references, strict=True))
    told = [answer if answer and last_number(answer) and i % 3 else reference for i, (answer, reference) in both]
    expected = accuracy(answers, told)
    rows = [{"question": problem["question"], "answer": answer} for problem, answer in zip(problems, told, strict=True)]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "scripts/greedy_accuracy.py", "--model", report["models"]["lpo"], "--problems", str(tmp_path / "told.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < expected < 1 and float(done.stdout) == pytest.approx(expected, abs=1e-4)
