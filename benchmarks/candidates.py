"""Sampling with the stage's transformers engine beside transformers' own `generate`, by hand in batches and one prompt at a time.

    python -m benchmarks.candidates --model outputs/quickstart/sft/hf --input outputs/quickstart/problems/train.jsonl

Same model, prompts, temperature 1, top-p 1 and limit; float32 on the CPU. The hand-made batches are what one would write: prompts sorted
by length, padded on the left, 64 at a time. A token counts if the model was asked for it: up to and including the end of its answer, on
each side as the ids that were generated. Medians of repetitions in turns; the first round warms up and is not counted.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from toolkits.lpo_data_preprocessing.candidates import BLOCK
from toolkits.lpo_data_preprocessing.engines import ENGINES, Request
from toolkits.lpo_data_preprocessing.records import read_records
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

Ids = list[int]
TARGETS = {"batches by hand": 0.9, "one at a time": 4.0}


class CountingTokenizer(ChatTokenizer):
    """Counts the ids that an engine turns into text. Tokenised again, the text has others: more of them, if the model is untrained."""

    decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        self.decoded += len(ids)
        return super().decode(ids)


def ours(args: argparse.Namespace) -> Callable[[Sequence[Ids]], int]:
    """The stage's engine, a block at a time, in the order of the input."""
    chat = CountingTokenizer(args.model)
    sample = ENGINES["transformers"].load(args, chat)

    def run(prompts: Sequence[Ids]) -> int:
        before, ends = chat.decoded, 0
        for start in range(0, len(prompts), BLOCK):
            block = [Request([], prompt, f"{start + i}/0") for i, prompt in enumerate(prompts[start : start + BLOCK])]
            ends += sum(answer["finish_reason"] == "stop" for answer in sample(block))  # the end itself is in no text
        return chat.decoded - before + ends

    return run


def upstream(model: Any, chat: ChatTokenizer, args: argparse.Namespace, size: int) -> Callable[[Sequence[Ids]], int]:
    """`model.generate`, `size` prompts of similar length at a time."""

    @torch.inference_mode()
    def run(prompts: Sequence[Ids]) -> int:
        tokens = 0
        ordered = sorted(prompts, key=len)
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            width = max(map(len, batch))
            ids = torch.tensor([[chat.end_id] * (width - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            made = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=args.max_new_tokens,
                eos_token_id=list(chat.stop_ids), pad_token_id=chat.end_id,
            )  # fmt: skip
            tokens += sum(_asked_for(row, chat) for row in made[:, width:].tolist())
        return tokens

    return run


def _asked_for(row: Ids, chat: ChatTokenizer) -> int:
    """Tokens up to the first stop, that one included."""
    return next((i + 1 for i, token in enumerate(row) if token in chat.stop_ids), len(row))


def main() -> int:
    """Print the table; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint")
    parser.add_argument("--input", required=True, metavar="JSONL", help="with a field question")
    parser.add_argument("--prompts", type=int, default=256, metavar="N", help="default %(default)s; a fifth of them one at a time")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="TOKENS", help="default %(default)s")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="default %(default)s")
    args = parser.parse_args()
    args.device, args.dtype, args.seed, args.temperature, args.top_p = "cpu", "float32", 1, 1.0, 1.0
    chat = ChatTokenizer(args.model)
    questions = [record["question"] for _, record in read_records(args.input)][: args.prompts]
    prompts = [chat.prompt_ids([{"role": "user", "content": question}]) for question in questions]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    ).eval()
    sides: dict[str, tuple[Callable[[Sequence[Ids]], int], Sequence[Ids]]] = {
        "candidates": (ours(args), prompts),
        "batches by hand": (upstream(model, chat, args, BLOCK), prompts),
        "one at a time": (upstream(model, chat, args, 1), prompts[::5]),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(args.repetitions + 1):
        for name, (run, asked) in sides.items():
            started = time.perf_counter()
            tokens = run(asked)
            if repetition:
                rates[name].append(tokens / (time.perf_counter() - started))
    print(f"{len(prompts)} prompts, {args.max_new_tokens} tokens at most, model of {model.num_parameters():,} parameters", end=", ")
    print(f"{torch.get_num_threads()} threads")
    return _report(rates)


def _report(rates: dict[str, list[float]]) -> int:
    middle = {name: statistics.median(values) for name, values in rates.items()}
    good = True
    for name, values in rates.items():
        line = f"{name:<16} {middle[name]:>9.0f} tokens/s  ({', '.join(f'{value:.0f}' for value in values)})"
        if name in TARGETS:
            ratio = middle["candidates"] / middle[name]
            good = good and ratio >= TARGETS[name]
            line += f"  candidates: {ratio:.2f}x, target {TARGETS[name]:g}x"
        print(line)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
