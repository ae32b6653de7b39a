"""Weights into and out of a model built from Transformer Engine's spec, which names its norms differently.

The spec can be built on a CPU, not run. Needs the optional package transformer-engine (requirements-gpu.txt).
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="optional transformer-engine is not installed"),
]

WORKER = """
import sys, torch
from megatron_patch import cpu_backend
cpu_backend.install()
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig
from megatron_patch.checkpoint.hf_io import load_hf_weights, save_hf_weights
from megatron_patch.model.layer_specs import qwen2_block_spec

source, out = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{out}.store", rank=0, world_size=1)
parallel_state.initialize_model_parallel(1, 1)
config = TransformerConfig(
    num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96, add_bias_linear=False, add_qkv_bias=True,
    gated_linear_unit=True, normalization="RMSNorm", transformer_impl="transformer_engine", use_cpu_initialization=True,
)
spec = qwen2_block_spec(GPTModelConfig(transformer=config, vocab_size=301))
model = GPTModel(config=config, transformer_layer_spec=spec, vocab_size=301, max_sequence_length=128, position_embedding_type="rope",
                 share_embeddings_and_output_weights=False)
assert any(name.endswith("linear_qkv.layer_norm_weight") for name, _ in model.named_parameters())
load_hf_weights([model], source)
save_hf_weights([model], out, source, dtype=torch.float32)
"""


def test_round_trip_through_transformer_engine_names(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=301, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WORKER, str(tmp_path / "source"), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
