"""Import and export of Hugging Face checkpoints: real files, real processes, transformers on both ends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_patch.checkpoint.hf_files import read_checkpoint, weights_fingerprint

WORKER = Path(__file__).with_name("layout_worker.py")
ROOT = Path(__file__).parents[3]
LAYOUTS = {  # source checkpoint, layout, number of weight files (a layer has 31 kB, so each half of tp2-pp2 needs three of 30 kB)
    "tp1": ("untied", {"tp": 1, "pp": 1}, 1),
    "tp1-tied": ("tied", {"tp": 1, "pp": 1}, 1),
    "tp2-pp2": ("untied", {"tp": 2, "pp": 2, "max_shard_bytes": 30_000, "full_disk": True}, 6),
    "tp2-pp2-tied": ("tied", {"tp": 2, "pp": 2}, 2),
    "pp2-vpp2-tied": ("tied", {"tp": 1, "pp": 2, "vpp": 2}, 2),
    "pp3-uneven": ("untied", {"tp": 1, "pp": 3, "first": 1, "last": 1}, 3),
    "tp4-more-than-groups": ("untied", {"tp": 4, "pp": 1}, 1),
    "tp2-dp2-bf16": ("bf16", {"tp": 2, "pp": 1, "world": 4, "dtype": "bfloat16", "wrapped": True}, 1),
}
REFUSED = {
    "too-few-layers": ("untied", {"model": {"num_hidden_layers": 2}, "error": "disagree about model.layers.2.input_layernorm.weight"}),
    "wrong-ffn": ("untied", {"model": {"intermediate_size": 24}, "error": "linear_fc1.weight has shape (48, 32)"}),
    "tied-but-different": ("tied-different", {"error": "lm_head.weight differs from model.embed_tokens.weight"}),
}


def make_checkpoint(folder, tied, dtype=torch.float32):
    """A tiny random Qwen2 by transformers; 131 tokens, so that TP 2 and 4 need padding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(7)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # norms and biases too, or an exchange of two would go unseen
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    base = tmp_path_factory.mktemp("sources")
    made = {
        "tied": make_checkpoint(base / "tied", tied=True),
        "untied": make_checkpoint(base / "untied", tied=False),
        "bf16": make_checkpoint(base / "bf16", tied=False, dtype=torch.bfloat16),
    }
    made["tied-different"] = with_tensors(made["tied"], base / "tied-different", lambda t: {**t, "lm_head.weight": t[EMBED] + 1})
    return made


EMBED = "model.embed_tokens.weight"


def with_tensors(source, target, change):
    shutil.copytree(source, target)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def exported(sources, tmp_path_factory):
    """Exit codes of every rank of every layout; each layout's export lies in a folder of its name."""
    base = tmp_path_factory.mktemp("exports")
    jobs = {}
    for name, (source, layout) in {**{k: v[:2] for k, v in LAYOUTS.items()}, **REFUSED}.items():
        layout = {"tp": 1, "pp": 1, "dtype": "float32", **layout}
        jobs[name] = {"world": layout["tp"] * layout["pp"], **layout, "source": str(sources[source])}
        jobs[name] |= {"out": str(base / name), "store": str(base / f"store-{name}")}
    file = base / "jobs.json"
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, WORKER, "roundtrip", file], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return base, json.loads(file.with_suffix(".out").read_text()), done.stderr


@pytest.mark.parametrize("name", [*LAYOUTS, *REFUSED])
def test_every_rank_is_content(name, exported):
    """The ranks compare what they loaded with a formula of their own, and see the errors that they should."""
    _, results, log = exported
    codes = results[name]["exit_codes"]
    assert codes == [0] * len(codes), log[-6000:]


@pytest.mark.parametrize("name", LAYOUTS)
def test_import_then_export_gives_every_tensor_back(name, exported, sources):
    base, _, _ = exported
    source, layout, files = LAYOUTS[name]
    before = load_file(sources[source] / "model.safetensors")
    after, weight_files = {}, sorted((base / name).glob("*.safetensors"))
    for file in weight_files:
        after |= load_file(file)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)
    assert len(weight_files) == files
    assert [path.name for path in base.glob(f".{name}*")] == []
    if files > 1:
        index = json.loads((base / name / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == after.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
        for key, file in index["weight_map"].items():
            with safe_open(base / name / file, framework="pt") as stored:
                assert key in stored.keys()
    if "max_shard_bytes" in layout:
        for file in weight_files:
            tensors = load_file(file)
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= layout["max_shard_bytes"]


@pytest.mark.parametrize("name", ["tp2-pp2", "tp1-tied", "tp2-dp2-bf16"])
def test_transformers_loads_the_export(name, exported, sources):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(exported[0] / name, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == (torch.bfloat16 if "bf16" in name else torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(sources[LAYOUTS[name][0]], dtype="auto")
    tokens = torch.tensor([[1, 5, 130, 7]])
    assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert (exported[0] / name / "tokenizer.json").read_text() == "{}"
    assert (exported[0] / name / "generation_config.json").exists()


def test_fingerprint_sees_weights_and_not_files(sources, exported, tmp_path):
    original = weights_fingerprint(sources["untied"])
    assert original == weights_fingerprint(exported[0] / "tp2-pp2"), "four files instead of one"
    repeated = with_tensors(sources["tied"], tmp_path / "repeated", lambda t: {**t, "lm_head.weight": t[EMBED].clone()})
    assert weights_fingerprint(repeated) == weights_fingerprint(sources["tied"])
    seen = {original, weights_fingerprint(sources["bf16"]), weights_fingerprint(sources["tied"])}
    assert len(seen) == 3

    def last_element_changed(tensors):
        tensors["model.layers.3.mlp.down_proj.weight"][-1, -1] += 1
        return tensors

    assert weights_fingerprint(with_tensors(sources["untied"], tmp_path / "changed", last_element_changed)) not in seen


def test_fingerprint_samples_both_ends_and_the_middle_of_large_tensors(sources, tmp_path):
    """131 x 32 float32 fits whole into the samples, so a larger vocabulary is written: 4096 x 32 x 4 B = 512 KiB."""

    def fingerprint(name, row):
        def enlarge(tensors):
            tensors[EMBED] = torch.zeros(4096, 32)
            if row is not None:
                tensors[EMBED][row] = 1
            return tensors

        folder = with_tensors(sources["tied"], tmp_path / name, enlarge)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 4096}))
        return weights_fingerprint(folder)

    plain = fingerprint("plain", None)
    assert fingerprint("first", 0) != plain and fingerprint("middle", 2048) != plain and fingerprint("last", 4095) != plain
    assert fingerprint("between", 1000) == plain


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: without(t, "model.norm.weight"), "missing: model.norm.weight$"),
        (lambda t: without(without(t, EMBED), "model.layers.1.self_attn.q_proj.bias"), f"missing: {EMBED}, .*1.self_attn.q_proj.bias$"),
        (lambda t: {**t, "model.extra.weight": torch.zeros(1)}, "unexpected: model.extra.weight$"),
        (lambda t: {**t, "model.norm.weight": torch.zeros(5)}, r"of another shape: model.norm.weight \(5,\) instead of \(32,\)"),
    ],
)
def test_wrong_tensors_are_listed(change, message, sources, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(with_tensors(sources["untied"], tmp_path / "bad", change))


def test_old_rotary_frequencies_are_ignored(sources, tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    folder = with_tensors(sources["untied"], tmp_path / "old", lambda t: {**t, **extra})
    assert extra.keys().isdisjoint(read_checkpoint(folder)[1])
    assert weights_fingerprint(folder) == weights_fingerprint(sources["untied"])


def test_damaged_folders_are_refused(sources, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_checkpoint(tmp_path)
    folder = tmp_path / "bad"
    shutil.copytree(sources["untied"], folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"has {len(whole) - 1} bytes instead of {len(whole)}"):
        read_checkpoint(folder)
    weights.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_checkpoint(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"files missing: model\.safetensors"):
        read_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBED: "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"files missing: model-00001-of-00002\.safetensors"):
        read_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json:1: not JSON"):
        read_checkpoint(folder)
