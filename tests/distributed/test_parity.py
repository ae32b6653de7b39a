"""The Megatron model is the transformers model: log-probs of every response, and every tensor there and back.

The judge is transformers' Qwen2ForCausalLM, one unpacked response at a time, which shares no code with the training path.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.distributed.materials import PAIRS, Bench, reference, response_lengths, tensors, transformers_logps

TOLERANCE = 1e-5  # nats per token, float32

CASES = [
    ("tied", "one", False), ("tied", "tp2-sp", False), ("tied", "pp2", False), ("untied", "tp2", False), ("untied", "tp2-pp2-sp", False),
    ("tied", "tp2", True), ("tied", "tp2-pp2-sp", True), ("tied", "tp2-pp2", True), ("tied", "vpp2", True), ("tied", "dp2", True),
    ("untied", "one", True), ("untied", "tp2-sp", True), ("untied", "pp2", True), ("untied", "vpp2", True),
    ("tied", "cp2", False), ("untied", "tp2-cp2-sp", True), ("untied", "cp2-pp2", True),
    ("tied", "share-prompt", False), ("untied", "share-prompt tp2-sp", True),
]  # fmt: skip
QUICK = [pytest.param(model, layout, marks=[pytest.mark.ci] if ci else []) for model, layout, ci in CASES]


@pytest.fixture(scope="session")
def judged(bench: Bench) -> dict[str, np.ndarray]:
    """transformers' log-probs of every response, by model."""
    return {model: np.array(list(transformers_logps(bench.models[model], bench.pairs))) for model in ("tied", "untied")}


@pytest.mark.parametrize(("model", "layout"), QUICK)
def test_response_log_probs_equal_transformers(
    bench: Bench, judged: dict[str, np.ndarray], model: str, layout: str, record_property: Callable[[str, object], None]
) -> None:
    """Every response of 48 pairs, the one-token ones included; measured: 8.3e-7 nats per token at worst (untied, TP1)."""
    difference = np.abs(reference(bench.reference(model, layout)) - judged[model]) / response_lengths(bench.pairs)
    record_property("worst", difference.max())
    assert difference.max() <= TOLERANCE, f"{difference.max():.2g} nats per token at pair {difference.max(1).argmax()}"


def test_the_pass_ends_with_what_it_found(bench: Bench) -> None:
    prefix = bench.reference()
    chosen, rejected = reference(prefix).sum(axis=0) / response_lengths(prefix).sum(axis=0)
    last = [line for line in prefix.with_suffix(".log.0").read_text().splitlines() if line.startswith("[reference]")][-1]
    assert f"{PAIRS} pairs scored, on average {chosen:.4f} nats a chosen token, {rejected:.4f} a rejected one" in last


def test_reference_in_blocks_with_an_idle_rank(bench: Bench) -> None:
    """A last block of one pair at DP2 leaves one rank without pairs; blocks change nothing."""
    in_blocks = reference(bench.reference("tied", "dp2", "--block-pairs", PAIRS - 1))
    difference = np.abs(in_blocks - reference(bench.reference())) / response_lengths(bench.pairs)
    assert difference.max() <= TOLERANCE


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("tied", "tp2-sp"),
        ("untied", "tp2-pp2-sp"),
        pytest.param("tied", "tp2-pp2", marks=pytest.mark.ci),
        pytest.param("tied", "vpp2", marks=pytest.mark.ci),
        pytest.param("untied", "dp2-do", marks=pytest.mark.ci),
    ],
)
def test_import_and_export_give_back_every_bit(bench: Bench, model: str, layout: str) -> None:
    """One step at learning rate 0 between import and export, float32."""
    exported = tensors(bench.unmoved(model, layout) / "hf")
    original = tensors(bench.models[model])
    assert exported.keys() == original.keys()
    different = [name for name, tensor in original.items() if not torch.equal(tensor, exported[name])]
    assert not different
