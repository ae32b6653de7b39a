"""config.json -> Megatron arguments: transformers reads the same files, and everything we cannot do is refused by name."""

import json
from pathlib import Path

import pytest
from transformers import Qwen2Config as HfConfig

from megatron_patch.model.qwen2 import megatron_model_arguments, read_qwen2_config

PUBLISHED = sorted((Path(__file__).parents[2] / "data" / "qwen2_5_configs").glob("*.json"))
TINY = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 501, "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0, "max_position_embeddings": 256, "tie_word_embeddings": True, "initializer_range": 0.05,
}  # fmt: skip


def folder(tmp_path, fields):
    (tmp_path / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return tmp_path


def without(*names):
    return {name: value for name, value in TINY.items() if name not in names}


def test_all_seven_published_sizes_are_here():
    assert [path.stem for path in PUBLISHED] == ["0.5B", "1.5B", "14B", "32B", "3B", "72B", "7B"]


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda path: path.stem)
def test_published_sizes_are_what_transformers_reads(tmp_path, published):
    ours = read_qwen2_config(folder(tmp_path, published.read_text()))
    theirs = HfConfig.from_json_file(published)
    assert ours.layers == theirs.num_hidden_layers and ours.hidden == theirs.hidden_size and ours.ffn == theirs.intermediate_size
    assert ours.heads == theirs.num_attention_heads and ours.kv_groups == theirs.num_key_value_heads
    assert ours.head_dim * ours.heads == theirs.hidden_size
    assert ours.vocab == theirs.vocab_size and ours.tied == theirs.tie_word_embeddings
    assert ours.rope_base == theirs.rope_parameters["rope_theta"] == 1e6
    assert ours.norm_eps == theirs.rms_norm_eps and ours.max_positions == theirs.max_position_embeddings
    assert ours.init_std == theirs.initializer_range


def test_arguments_by_hand(tmp_path):
    config = read_qwen2_config(folder(tmp_path, TINY))
    assert megatron_model_arguments(config, 4) == {
        "num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2,
        "kv_channels": 16, "ffn_hidden_size": 96, "vocab_size": 501, "padded_vocab_size": 504,
        "untie_embeddings_and_output_weights": False, "position_embedding_type": "rope", "rotary_base": 1_000_000, "rotary_percent": 1.0,
        "max_position_embeddings": 256, "normalization": "RMSNorm", "norm_epsilon": 1e-6, "swiglu": True, "add_bias_linear": False,
        "add_qkv_bias": True, "attention_dropout": 0.0, "hidden_dropout": 0.0, "init_method_std": 0.05,
    }  # fmt: skip


def test_vocabulary_is_padded_to_the_ranks_and_no_further(tmp_path):
    config = read_qwen2_config(folder(tmp_path, TINY))
    assert [config.padded_vocab(tp) for tp in (1, 2, 3, 4, 8)] == [501, 502, 501, 504, 504]
    big = read_qwen2_config(folder(tmp_path, next(path for path in PUBLISHED if path.stem == "72B").read_text()))
    assert [big.padded_vocab(tp) for tp in (1, 8, 128)] == [152_064] * 3


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1234.0},
        {"rope_theta": 1234, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 1234.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1234.0}},
    ],
)
def test_both_spellings_of_the_rope_base(tmp_path, rope):
    fields = without("rope_theta") | rope
    assert read_qwen2_config(folder(tmp_path, fields)).rope_base == 1234.0 == HfConfig(**fields).rope_parameters["rope_theta"]


def test_a_config_that_transformers_saved(tmp_path):
    HfConfig(**TINY).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"architectures": ["Qwen2ForCausalLM"]}))
    mine = read_qwen2_config(tmp_path)
    (tmp_path / "plain").mkdir()
    assert mine == read_qwen2_config(folder(tmp_path / "plain", TINY))


def test_what_may_be_absent(tmp_path):
    config = read_qwen2_config(folder(tmp_path, without("num_key_value_heads", "tie_word_embeddings", "hidden_act")))
    assert config.kv_groups == 4 and config.tied is False
    assert read_qwen2_config(folder(tmp_path, TINY | {"num_key_value_heads": None})).kv_groups == 4


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (TINY | {"architectures": ["LlamaForCausalLM"]}, r"architecture \['LlamaForCausalLM'\] is not supported, only Qwen2ForCausalLM"),
        (without("architectures"), r"architecture \['qwen2'\]"),
        (TINY | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (TINY | {"use_sliding_window": True}, "use_sliding_window"),
        (TINY | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn'"),
        (TINY | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "RoPE scaling 'linear'"),
        (TINY | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "RoPE scaling 'yarn'"),
        (TINY | {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn'"),
        ('{"architectures": [\n"Qwen2ForCausalLM"', r"config\.json:2: not JSON"),
        ("[]", "a JSON object is expected, not list"),
        *((without(name), f"field '{name}' is missing") for name in (
            "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "rms_norm_eps", "rope_theta")),
    ],
)  # fmt: skip
def test_what_we_cannot_do_is_refused_by_file_and_field(tmp_path, fields, complaint):
    with pytest.raises(ValueError, match=complaint) as refusal:
        read_qwen2_config(folder(tmp_path, fields))
    assert str(tmp_path / "config.json") in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"--hf-path: .*nowhere/config\.json does not exist"):
        read_qwen2_config(tmp_path / "nowhere")
