"""Numbers of a model, with transformers from its Hugging Face folder, so that anybody can compute them again.

Log-ratios are policy minus fine-tuned model, in nats per token of the response, end token included.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_patch.data.pair_store import PairStore, read_reference_logps
from megatron_patch.evaluation.answers import same_answer
from megatron_patch.evaluation.error_rates import character_error_rate
from megatron_patch.evaluation.generate import generate
from megatron_patch.evaluation.parity import transformers_logps
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

Problem = dict[str, str]
"""{"question", "answer"}: the answer is worked and ends in a number."""
_BATCH = 256  # problems answered at once


@dataclass(frozen=True)
class Answer:
    """What a model says to a problem."""

    text: str
    ended: bool
    """False: cut at the limit of tokens."""


def read_problems(path: str | Path) -> list[Problem]:
    """The lines of a JSONL file of problems."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def load(folder: str | Path) -> tuple[Any, ChatTokenizer]:
    """The model (float32) and the chat tokenizer of a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return model.eval(), ChatTokenizer(folder)


def greedy_answers(model: Any, tokenizer: ChatTokenizer, problems: Sequence[Problem], max_new_tokens: int = 64) -> list[Answer]:
    """One greedy answer a problem, in order."""
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": problem["question"]}]) for problem in problems]
    answers: list[Answer] = []
    for start in range(0, len(prompts), _BATCH):
        made = generate(model, prompts[start : start + _BATCH], max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids)
        answers += [Answer(tokenizer.decode(answer.ids), answer.finish_reason == "stop") for answer in made]
    return answers


def fraction_solved(answers: Sequence[Answer], problems: Sequence[Problem]) -> float:
    """Fraction of problems whose answer ended and has the reference's final number."""
    both = zip(answers, problems, strict=True)
    return sum(answer.ended and same_answer(answer.text, problem["answer"]) for answer, problem in both) / len(problems)


def log_ratios(store: PairStore, policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """float64 [pairs, 2]: chosen and rejected log-ratio, nats per token."""
    return (policy - reference) / store.lengths[:, 1:]


def pair_numbers(ratios: np.ndarray) -> dict[str, float]:
    """Means over pairs of what `log_ratios` gives; ``preference_accuracy`` is the fraction with a positive margin."""
    margin = ratios[:, 0] - ratios[:, 1]
    return {
        "preference_accuracy": float((margin > 0).mean()),
        "chosen_logratio": float(ratios[:, 0].mean()),
        "rejected_logratio": float(ratios[:, 1].mean()),
        "margin": float(margin.mean()),
        "margin_stderr": float(margin.std(ddof=1) / np.sqrt(len(margin))),
    }


def measure(model: Path, problems: Path, prefix: str, weights: str) -> dict[str, float]:
    """Everything a comparison says about the model in a Hugging Face folder.

    Args:
        prefix: pairs with reference log-probs. weights: fingerprint of the reference.
    """
    asked, store = read_problems(problems), PairStore(prefix, kind="pairs")
    answers = greedy_answers(*load(model), asked)
    policy = transformers_logps(model, [store[i] for i in range(len(store))])
    ratios = log_ratios(store, policy, read_reference_logps(store, weights_fingerprint=weights))
    return {
        "greedy_accuracy": fraction_solved(answers, asked),
        "character_error_rate": character_error_rate([answer.text for answer in answers], [problem["answer"] for problem in asked]),
        **pair_numbers(ratios),
    }
