"""Hugging Face ``config.json`` -> Megatron arguments. There are no size tables: the checkpoint says what it is.

Source of the field names: transformers' ``Qwen2Config`` (both the flat ``rope_theta`` and the nested ``rope_parameters`` form).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.hf_mapping import ModelShape

SUPPORTED_ARCHITECTURE = "Qwen2ForCausalLM"


@dataclass(frozen=True)
class Qwen2Config(ModelShape):
    """The numbers of one Qwen2-class model: its shape, and what no tensor's shape says. Positions in tokens."""

    rope_base: float
    norm_eps: float
    max_positions: int
    init_std: float

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding over all ``tp`` ranks: the vocabulary rounded up to a multiple of TP, never of 128."""
        return -(-self.vocab // tp) * tp


def read_qwen2_config(hf_path: str | Path) -> Qwen2Config:
    """Read ``<hf_path>/config.json``.

    Raises:
        ValueError: no config.json, another architecture, or a feature that is not supported (sliding window, RoPE scaling,
            an activation other than SiLU), naming the file and the field.
    """
    path = Path(hf_path) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--hf-path: {path} does not exist; it must be a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(raw).__name__}")
    _refuse_unsupported(path, raw)
    rope = raw.get("rope_parameters") or {}
    try:
        return Qwen2Config(
            **vars(ModelShape.from_hf(raw, path)),
            rope_base=float(raw["rope_theta"] if "rope_theta" in raw else rope["rope_theta"]),
            norm_eps=float(raw["rms_norm_eps"]),
            max_positions=raw.get("max_position_embeddings", 32768),
            init_std=raw.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ValueError(f"{path}: field {error} is missing") from None


def _refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    architectures = raw.get("architectures") or [raw.get("model_type")]
    if SUPPORTED_ARCHITECTURE not in architectures:
        raise ValueError(f"{path}: architecture {architectures} is not supported, only {SUPPORTED_ARCHITECTURE}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    if raw.get("use_sliding_window"):
        raise ValueError(f"{path}: use_sliding_window is not supported")
    for rope in (raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}):  # transformers lets the second overrule the first
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{path}: RoPE scaling {kind!r} is not supported")


def megatron_model_arguments(config: Qwen2Config, tp: int) -> dict[str, Any]:
    """Megatron's argument names (megatron/training/arguments.py) for this model, given the tensor-parallel size."""
    return {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "group_query_attention": True,
        "num_query_groups": config.kv_groups,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.ffn,
        "vocab_size": config.vocab,
        "padded_vocab_size": config.padded_vocab(tp),
        "untie_embeddings_and_output_weights": not config.tied,
        "position_embedding_type": "rope",
        "rotary_base": int(config.rope_base),
        "rotary_percent": 1.0,
        "max_position_embeddings": config.max_positions,
        "normalization": "RMSNorm",
        "norm_epsilon": config.norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": config.init_std,
    }
