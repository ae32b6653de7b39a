"""Greedy accuracy of a Hugging Face checkpoint on problems with a known final number; transformers only.

    python scripts/greedy_accuracy.py --model outputs/quickstart/sft/hf --problems outputs/quickstart/problems/valid.jsonl

A problem counts as solved when the model ends its answer and the final number is exactly the reference's. Prints the fraction.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from megatron_patch.evaluation.answers import same_answer
from megatron_patch.evaluation.generate import generate
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer


def load(folder: str | Path) -> tuple[Any, ChatTokenizer]:
    """The model (float32) and the chat tokenizer of a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return model.eval(), ChatTokenizer(folder)


def greedy_accuracy(model: Any, tokenizer: ChatTokenizer, problems: Sequence[dict[str, str]], max_new_tokens: int = 64) -> float:
    """Fraction of ``problems`` ({"question", "answer"}) whose greedy answer ends and has the reference's final number."""
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": problem["question"]}]) for problem in problems]
    solved = 0
    for start in range(0, len(prompts), 256):
        answers = generate(model, prompts[start : start + 256], max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids)
        for problem, answer in zip(problems[start : start + 256], answers, strict=True):
            ended = answer.finish_reason == "stop"
            solved += ended and same_answer(tokenizer.decode(answer.ids), problem["answer"])
    return solved / len(problems)


def read_problems(path: str | Path) -> list[dict[str, str]]:
    """The lines of a JSONL file of problems."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str]) -> None:
    """Print the accuracy of ``--model`` on ``--problems``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--problems", required=True, help='JSONL of {"question", "answer"}')
    parser.add_argument("--limit", type=int, default=None, help="only the first N problems")
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    print(f"{greedy_accuracy(*load(args.model), read_problems(args.problems)[: args.limit]):.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
