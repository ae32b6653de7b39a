"""RMSNorm against transformers' Qwen2RMSNorm, to the last bit."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from megatron_patch.model.rms_norm import RMSNorm


def config(dtype=torch.float32, **options):
    options = {"use_cpu_initialization": True, **options}
    return TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, params_dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-2])
def test_values_and_gradients_are_transformers(dtype, eps):
    torch.manual_seed(0)
    mine, theirs = RMSNorm(config(dtype), 48, eps=eps), Qwen2RMSNorm(48, eps=eps).to(dtype)
    assert mine.weight.dtype == dtype and mine.weight.tolist() == [1.0] * 48
    with torch.no_grad():
        mine.weight.copy_(torch.randn(48) + 1)
        theirs.weight.copy_(mine.weight)
    x = (torch.randn(7, 2, 48) * torch.logspace(-3, 2, 7).view(7, 1, 1)).to(dtype)
    inputs, outputs = [], []
    for module in (mine, theirs):
        inputs.append(x.clone().requires_grad_())
        outputs.append(module(inputs[-1]))
        outputs[-1].float().square().sum().backward()
    assert outputs[0].dtype == dtype
    assert torch.equal(*outputs) and torch.equal(inputs[0].grad, inputs[1].grad) and torch.equal(mine.weight.grad, theirs.weight.grad)


def test_weight_is_made_on_the_accelerator(monkeypatch):
    """Weights are imported before upstream moves the model, and NCCL cannot broadcast a CPU tensor; "meta" plays the accelerator."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    assert RMSNorm(config(use_cpu_initialization=False), 32).weight.device.type == "meta"
    assert RMSNorm(config(), 32).weight.device.type == "cpu"


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_weight_carries_the_tag_that_sums_its_gradient(sequence_parallel):
    options = {"sequence_parallel": True, "tensor_model_parallel_size": 2} if sequence_parallel else {}
    norm = RMSNorm(config(**options), 32)
    assert norm.weight.sequence_parallel is sequence_parallel
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
