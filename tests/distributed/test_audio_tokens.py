"""Speech dialogues in the authors' form, from their JSON to an exported checkpoint with 512 audio tokens, stage by stage."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_patch.data.pair_store import PairStore
from tests.distributed import harness
from toolkits.lpo_data_preprocessing import build_pairs, candidates, extend_vocab, normalise, select

pytestmark = pytest.mark.ci
ROOT = Path(__file__).parents[2]
CODES = 512
MARKERS = ["<|beginofaudio|>", "<|endofaudio|>", "<|cot_begin|>", "<|cot_end|>"]
TP2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")


def audio(codes: list[int]) -> dict:
    """A segment of speech."""
    return {"type": "audio", "content": "<|audio|>", "audio_infos": {"audio_tokens": codes}}


def dialogue(rng: random.Random, number: int) -> dict:
    """A spoken question and its spoken answer: the question's codes plus one."""
    codes = [rng.randrange(CODES - 1) for _ in range(rng.randint(2, 6))] if number else [0, CODES - 2]
    answer = [{"type": "cot", "content": f"{len(codes)} codes"}, audio([code + 1 for code in codes])]
    question = [{"type": "text", "content": f"Say it one higher, {number}: "}, audio(codes)]
    return {"dialog": [{"type": "user", "content_list": question}, {"type": "assistant", "content_list": answer}]}


def stage(main: Callable[[list[str]], int], *argv: object) -> None:
    """A stage that must succeed."""
    assert main([str(a) for a in argv]) == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only checkpoint with its own tokenizer, by the repository's maker."""
    folder = tmp_path_factory.mktemp("speech")
    texts = "".join(json.dumps({"text": f"Say it one higher, {i}: {i} codes"}) + "\n" for i in range(40))
    (folder / "text.jsonl").write_text(texts)
    sizes = ["--layers", "2", "--hidden", "32", "--ffn", "48", "--heads", "2", "--kv-groups", "2", "--untied"]
    made = [sys.executable, "scripts/make_tiny_qwen.py", "--input", folder / "text.jsonl", "--output", folder / "text-only", *sizes]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    return folder


def train(ranks: int, save: Path, *argv: object) -> list[dict]:
    """The rows of four steps, all finite; exports to `<save>/hf`."""
    run = harness.train(ranks, save, [*argv, "--export-hf", save / "hf", "--seq-length", 128, "--global-batch-size", 8, "--train-iters", 4])
    assert run.ok, run.output[-4000:]
    rows = harness.metrics(save)
    assert len(rows) == 4 and all(math.isfinite(row[name]) for row in rows for name in ("loss", "grad_norm"))
    return rows


def test_from_dialogues_to_an_aligned_checkpoint(base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rng = random.Random(0)
    (base / "dialogues.jsonl").write_text("".join(json.dumps(dialogue(rng, i)) + "\n" for i in range(24)))
    stage(normalise.main, "--input", base / "dialogues.jsonl", "--format", "lpo_dialogue", "--output", base / "records.jsonl")
    speech = base / "speech"
    more = ("--more", *MARKERS, "--tokens", CODES, "--pattern", "<|g0r0_{}|>")
    stage(extend_vocab.main, "--input", base / "text-only", "--output", speech, *more)
    first = json.loads((speech / "extend_vocab.json").read_text())["first_id"] + len(MARKERS)  # of the audio tokens
    rows = json.loads((speech / "config.json").read_text())["vocab_size"]

    stage(build_pairs.main, "--kind", "sft", "--input", base / "records.jsonl", "--output", base / "sft", "--tokenizer", speech)
    store = PairStore(base / "sft")
    spoken = [int(i) - first for i in np.concatenate(store[0]) if i >= first]
    assert spoken == [0, CODES - 2, 1, CODES - 1] and rows % 64 == 0 and first + CODES <= rows
    sft = train(2, base / "tuned", "--train-mode", "finetune", "--hf-path", speech, "--pair-data", base / "sft", "--lr", 1e-3, *TP2)
    assert sft[-1]["loss"] < sft[0]["loss"]

    tuned = base / "tuned/hf"
    sampling = ("--model", tuned, "-n", 2, "--max-new-tokens", 12, "--device", "cpu")
    stage(candidates.main, "--input", base / "records.jsonl", "--output", base / "candidates.jsonl", *sampling)
    stage(select.main, "--input", base / "candidates.jsonl", "--output", base / "pairs.jsonl")
    stage(build_pairs.main, "--input", base / "pairs.jsonl", "--output", base / "pairs", "--tokenizer", tuned)
    pairs = PairStore(base / "pairs")
    assert sum(bool((rejected >= first).any()) for _, _, rejected in pairs) > len(pairs) / 2  # what was sampled is mostly speech
    flags = ["--hf-path", tuned, "--pair-data", base / "pairs"]
    reference = harness.launch(1, harness.REFERENCE, [*flags, "--seq-length", 128], base / "reference.log")
    assert reference.ok, reference.output[-4000:]
    train(2, base / "aligned", *flags, "--loss-type", "lpo-ste", "--lr", 1e-4, *TP2)
    gate = json.loads((base / "aligned/step_zero.json").read_text())
    assert gate["max_abs_chosen_logratio_per_token"] < 1e-5 and gate["loss"] == pytest.approx(2.0, abs=1e-4)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base / "aligned/hf"), AutoTokenizer.from_pretrained(base / "aligned/hf")
    assert model.config.vocab_size == rows and model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == rows
    assert tokenizer.convert_tokens_to_ids(f"<|g0r0_{CODES - 1}|>") == first + CODES - 1
    with torch.no_grad():
        assert model(torch.tensor([np.concatenate(store[0]).tolist()])).logits.isfinite().all()
