"""What the benchmarks train: random Qwen2 models, pairs of GSM8K or with a long tail of lengths, and one run of ours over them."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.report import ROOT, Line, torchrun

BETA, RATE, SEED = 0.1, 1e-4, 1
SHAPES = {"small": (4, 512, 1408, 8, 2), "base": (12, 896, 4864, 14, 2)}
"""layers, hidden, intermediate, heads, key/value heads: a toy, and half the depth of Qwen2.5 0.5B."""
SHAPES_FOR_GPUS = {"0.5b": (24, 896, 4864, 14, 2), "1.5b": (28, 1536, 8960, 12, 2), "3b": (36, 2048, 11008, 16, 2)}
"""Qwen2.5's; with its vocabulary."""
VOCABULARIES = {"8k": 8_192, "152k": 151_936}
PAIRS = {"gsm8k": 8, "tail": 4}
"""Pairs of a step."""

Pair = tuple[list[int], list[int], list[int]]
"""Ids of a prompt, a chosen and a rejected response."""
Ints, FloatArray = npt.NDArray[np.int64], npt.NDArray[np.float64]


class Case(NamedTuple):
    """What is trained on what."""

    shape: str
    vocabulary: str
    pairs: str
    batch: int

    @property
    def name(self) -> str:
        """As the command line has it."""
        return f"{self.shape}-{self.vocabulary}-{self.pairs}"


ON_CPUS = {case.name: case for case in (Case(s, v, p, PAIRS[p]) for s in SHAPES for v in VOCABULARIES for p in PAIRS)}
CASES = ON_CPUS | {case.name: case for case in (Case(s, "152k", p, 64) for s in SHAPES_FOR_GPUS for p in PAIRS)}

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""A GPU where there is one: then everything is bfloat16 with float32 master weights, else float32."""


def gsm8k_pairs(count: int) -> list[Pair]:
    """Real text: a question, a right and a wrong solution of GSM8K's models, in ids of an 8k byte-level BPE trained on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if "GSM8K_DIR" not in os.environ:
        raise SystemExit("GSM8K_DIR is not set: the folder with GSM8K's example_model_solutions.jsonl")
    lines = (Path(os.environ["GSM8K_DIR"]) / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = []
    for row in map(json.loads, lines):
        solutions = [value for value in row.values() if isinstance(value, dict)]
        right, wrong = ([s["solution"] for s in solutions if s["is_correct"] is mark] for mark in (True, False))
        if right and wrong:
            texts.append((row["question"], right[0], wrong[0]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8_000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((text for row in texts for text in row), trainer)
    return [tuple(tokenizer.encode(text).ids for text in row) for row in texts[:count]]  # type: ignore[misc]


def tail_pairs(count: int) -> list[Pair]:
    """Random tokens; lengths of prompt + response log-normal with median 300 and 99th percentile 3,000, a third of them prompt."""
    rng = np.random.default_rng(SEED)
    pairs = []
    for _ in range(count):
        totals = np.clip(np.exp(rng.normal(np.log(300), np.log(10) / 2.326, 2)), 16, 4000).astype(int)
        prompt = max(4, int(totals.min()) // 3)
        pairs.append(tuple(rng.integers(0, 8_000, n).tolist() for n in (prompt, *(totals - prompt))))
    return pairs  # type: ignore[return-value]


def make_model(folder: Path, shape: str, vocabulary: str) -> None:
    """Random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    layers, hidden, ffn, heads, groups = (SHAPES | SHAPES_FOR_GPUS)[shape]
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=VOCABULARIES[vocabulary], hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def make_store(prefix: Path, pairs: Sequence[Pair]) -> None:
    """A pair store without a tokenizer."""
    from megatron_patch.data.pair_store import PairStoreWriter

    with PairStoreWriter(prefix, "pairs") as writer:
        for i, pair in enumerate(pairs):
            writer.add([np.array(ids) for ids in pair], id=f"p{i}", group=str(i))
        writer.commit(tokenizer={"fingerprint": "none"}, template={"fingerprint": "none"}, sources=[])


def make_materials(folder: Path, case: Case, steps: int, pairs: Sequence[Pair] | None = None) -> None:
    """``model``, the store ``pairs`` with reference log-probs by that model, and ``trl.json``: the pairs in the order of our steps."""
    folder.mkdir(parents=True)
    make_model(folder / "model", case.shape, case.vocabulary)
    pairs = pairs or {"gsm8k": gsm8k_pairs, "tail": tail_pairs}[case.pairs](steps * case.batch)
    make_store(folder / "pairs", pairs)
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pairs[i], strict=True)) for i in order_of(len(pairs))]
    (folder / "trl.json").write_text(json.dumps(rows), encoding="utf-8")
    run_reference_pass(folder)


def order_of(count: int) -> Ints:
    """The pairs in the order of our steps."""
    from megatron_patch.data.batch_plan import PairOrder

    return PairOrder([count], seed=SEED).positions(0, count)


def flops_of_pairs(folder: Path, *, share_prompts: bool = False) -> FloatArray:
    """Floating-point operations of a training step for each pair of ``folder/pairs``, in the store's order."""
    from megatron_patch.data.pair_dataset import SampleSet
    from megatron_patch.model.qwen2 import read_qwen2_config
    from megatron_patch.throughput import useful_flops

    samples = SampleSet([str(folder / "pairs")], "pairs")
    return useful_flops(read_qwen2_config(str(folder / "model")), samples.work(share_prompts))


def where_and_how() -> tuple[str, ...]:
    """Flags of our entries for this machine."""
    return ("--device", DEVICE, "--bf16") if DEVICE == "cuda" else ("--device", DEVICE)


def run_reference_pass(folder: Path, *flags: object) -> list[Line]:
    """Reference log-probs of ``folder/pairs`` by ``folder/model``; what the pass printed."""
    command = ("-m", "toolkits.lpo_data_preprocessing.reference_logps", *where_and_how(), "--seq-length", 4096)
    return torchrun(*command, "--hf-path", folder / "model", "--pair-data", folder / "pairs", *flags)


def run_ours(folder: Path, case: Case, steps: int, tokens: int, *flags: object, processes: int = 1) -> dict[str, Any]:
    """Seconds and losses of every step, and the most resident memory of a process."""
    save = folder / f"run-{time.time_ns()}"
    argv = [*where_and_how(), "--hf-path", folder / "model", "--pair-data", folder / "pairs", "--seq-length", 4096, "--seed", SEED]
    argv += ["--loss-type", "sigmoid", "--beta", BETA, "--global-batch-size", case.batch, "--train-iters", steps, "--lr", RATE]
    argv += ["--min-lr", RATE, "--lr-decay-style", "constant", "--weight-decay", 0, "--adam-beta1", 0.9, "--adam-beta2", 0.999]
    argv += ["--adam-eps", 1e-8, "--clip-grad", 1.0, "--no-parity-check", "--max-tokens-per-micro-batch", tokens]
    argv += ["--save", save, "--save-interval", 10**6, "--no-save-optim", *flags]
    torchrun(ROOT / "examples/qwen2_5/train_qwen.py", *argv, processes=processes)
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seconds": [row["seconds"] for row in rows], "losses": [row["loss"] for row in rows], "rows": rows,
        "bytes": max(row["peak_memory_bytes"] for row in rows),
    }  # fmt: skip
