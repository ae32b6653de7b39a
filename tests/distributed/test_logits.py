"""The logits of the Megatron model are transformers' Qwen2ForCausalLM's, position by position."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from tests.distributed import harness
from tests.distributed.materials import PAIRS, VOCABULARY, Bench

ENTRY = harness.ROOT / "tests/distributed/logits_entry.py"
CASES = [("tied", "one"), ("untied", "tp2"), ("tied", "tp2-sp"), ("untied", "pp2"), ("tied", "tp2-pp2-sp")]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_equal_transformers(bench: Bench, model: str, layout: str) -> None:
    """float32, to 1e-5 of the largest logit; the padded rows of the vocabulary do not exist."""
    out = bench.folder(f"logits-{model}-{layout}")
    run = bench.launch(layout, ENTRY, [out, *bench.reference_flags(model, bench.pairs)], Path(f"{out}.log"))
    assert run.ok, run.output[-4000:]
    (written,) = [path for path in out.parent.glob(f"{out.name}.*") if path.suffix.lstrip(".").isdigit() and ".log" not in path.name]
    sequences = torch.load(written, weights_only=True)
    assert len(sequences) == 2 * PAIRS
    theirs = Qwen2ForCausalLM.from_pretrained(bench.models[model], dtype=torch.float32).eval()
    worst = 0.0
    with torch.no_grad():
        for tokens, logits in sequences:
            expected = theirs(tokens[None]).logits[0]
            assert logits.shape == expected.shape == (len(tokens), VOCABULARY)
            worst = max(worst, float((logits - expected).abs().max() / expected.abs().max()))
    assert worst <= 1e-5, worst
