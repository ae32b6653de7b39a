"""The mapping between Hugging Face and Megatron, for every rank of every published model size, without any memory."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from megatron_patch.checkpoint.hf_mapping import (
    TABLE,
    ModelShape,
    check_layout,
    exported_tensors,
    fill_shard,
    find_row,
    hf_tensors,
    merge_shards,
    shard_pieces,
)

CONFIGS = Path(__file__).parents[2] / "data" / "qwen2_5_configs"
WORKER = Path(__file__).with_name("layout_worker.py")
ROOT = Path(__file__).parents[3]
LAYOUTS = {
    "0.5B-tp1": {"tp": 1, "pp": 1},
    "0.5B-tp2": {"tp": 2, "pp": 1},
    "0.5B-tp2-pp2-vpp2": {"tp": 2, "pp": 2, "vpp": 2},
    "0.5B-tp1-pp5-uneven": {"tp": 1, "pp": 5, "first": 3, "last": 3},
    "1.5B-tp2": {"tp": 2, "pp": 1},
    "1.5B-tp4-more-than-groups": {"tp": 4, "pp": 1},
    "3B-tp2": {"tp": 2, "pp": 1},
    "3B-tp4-more-than-groups": {"tp": 4, "pp": 1},
    "3B-tp8-pp2-more-than-groups": {"tp": 8, "pp": 2},
    "7B-tp2-pp4": {"tp": 2, "pp": 4},
    "7B-tp4": {"tp": 4, "pp": 1},
    "7B-tp4-pp8-uneven": {"tp": 4, "pp": 8, "first": 2, "last": 2},
    "14B-tp8": {"tp": 8, "pp": 1},
    "14B-tp4-pp4-vpp3": {"tp": 4, "pp": 4, "vpp": 3},
    "32B-tp8-pp2": {"tp": 8, "pp": 2},
    "72B-tp8-pp4": {"tp": 8, "pp": 4},
    "72B-tp8-pp4-vpp5": {"tp": 8, "pp": 4, "vpp": 5},
}


def shape_of(size):
    return ModelShape.from_hf(json.loads((CONFIGS / f"{size}.json").read_text()))


@pytest.fixture(scope="module")
def covered(tmp_path_factory):
    """What every rank of every layout holds, from one process that builds all the models on the meta device."""
    jobs = {name: {**layout, "config": str(CONFIGS / f"{name.split('-')[0]}.json")} for name, layout in LAYOUTS.items()}
    file = tmp_path_factory.mktemp("coverage") / "jobs.json"
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, WORKER, "coverage", file], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.with_suffix(".out").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_together_holds_every_element_once(name, covered):
    """Names and shapes are transformers'; runs of the same tensor on different TP ranks must tile it, replicas must be whole."""
    result, tp = covered[name], LAYOUTS[name]["tp"]
    runs, tied = defaultdict(list), defaultdict(list)
    for hf_name, dim, start, stop, tp_rank, is_copy in result["runs"]:
        (tied if is_copy else runs)[hf_name].append((dim, start, stop, tp_rank))
    assert runs.keys() == result["expected"].keys()
    if LAYOUTS[name]["pp"] > 1 and "lm_head.weight" not in result["expected"]:
        assert sorted(tied["model.embed_tokens.weight"]) == sorted(runs["model.embed_tokens.weight"])
    else:
        assert not tied
    for hf_name, shape in result["expected"].items():
        (dim,) = {run[0] for run in runs[hf_name]}
        if "norm" in hf_name:
            assert sorted(runs[hf_name]) == [(0, 0, shape[0], rank) for rank in range(tp)]
            continue
        assert dim == (1 if "o_proj" in hf_name or "down_proj" in hf_name else 0)
        at = 0
        for _, start, stop, _ in sorted(runs[hf_name], key=lambda run: run[1]):
            assert start == at, (hf_name, start, at)
            at = stop
        assert at == shape[dim], hf_name


def test_layouts_are_what_their_names_say(covered):
    assert covered["0.5B-tp1-pp5-uneven"]["layers"] == [[3], [6], [6], [6], [3]]
    assert covered["7B-tp4-pp8-uneven"]["layers"] == [[2], *[[4]] * 6, [2]]
    assert covered["14B-tp4-pp4-vpp3"]["layers"] == [[4, 4, 4]] * 4


@pytest.mark.parametrize("size", [path.stem for path in CONFIGS.glob("*.json")])
def test_tensor_list_is_transformers_own(size, covered):
    expected = next(result["expected"] for name, result in covered.items() if name.split("-")[0] == size)
    assert {name: list(shape) for name, shape in hf_tensors(shape_of(size)).items()} == expected


@pytest.mark.parametrize(
    "size,tp,message",
    [
        ("7B", 8, "size 8 does not divide the model's 28 attention heads"),
        ("0.5B", 4, "14 attention heads"),
        ("14B", 16, "40 attention heads"),
    ],
)
def test_layouts_that_cannot_be_cut_are_refused(size, tp, message):
    with pytest.raises(ValueError, match=message):
        check_layout(shape_of(size), tp)


def test_other_indivisible_sizes_are_refused():
    base = {"layers": 1, "hidden": 12, "heads": 12, "kv_groups": 4, "head_dim": 1, "ffn": 12, "vocab": 5, "tied": False}
    for change, tp, message in (
        ({"ffn": 9}, 2, "feed-forward size 9"),
        ({}, 6, "neither divides nor is a multiple of the model's 4 KV groups"),
        ({"kv_groups": 3}, 12, "18 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            check_layout(ModelShape(**{**base, **change}), tp)


def tiny(tied, groups=2):
    return ModelShape(layers=2, hidden=8, heads=4, kv_groups=groups, head_dim=6, ffn=20, vocab=13, tied=tied)


def local_shards(row, shape, layer, tp, tensors):
    padded = -(-shape.vocab // tp) * tp + 2 * tp if row.split == "vocab" else None
    for rank in range(tp):
        plan = shard_pieces(row, shape, layer, rank, tp, padded)
        local = torch.full(plan.shape, float("nan"))
        fill_shard(local, plan, lambda piece: tensors[piece.hf_name].narrow(piece.dim, piece.start, piece.length))
        yield local


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_split_then_merge_gives_every_tensor_back(tp, tied, groups):
    shape = tiny(tied, groups)
    check_layout(shape, tp)
    tensors = {name: torch.randn(size) for name, size in hf_tensors(shape).items()}
    back = {}
    for row in TABLE:
        for layer in range(shape.layers) if "{i}" in row.megatron else [None]:
            shards = list(local_shards(row, shape, layer, tp, tensors))
            assert not any(shard.isnan().any() for shard in shards)
            merged = dict(merge_shards(row, shape, layer, shards))
            assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == exported_tensors(row, shape, layer)
            back |= merged
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_padded_vocabulary_rows_are_zero_and_may_fill_whole_ranks():
    shape, row = tiny(True), find_row("embedding.word_embeddings.weight")[0]
    shards = [shard_pieces(row, shape, None, rank, 4, padded_vocab=20) for rank in range(4)]
    assert [sum(piece.length for piece in shard.pieces) for shard in shards] == [5, 5, 3, 0]
    for shard in shards:
        local = torch.full(shard.shape, float("nan"))
        fill_shard(local, shard, lambda piece: torch.ones(piece.length, 8))
        assert local.sum() == 8 * sum(piece.length for piece in shard.pieces)
    for padded in (12, 22):
        with pytest.raises(ValueError, match=f"padded vocabulary {padded}"):
            shard_pieces(row, shape, None, 0, 4, padded_vocab=padded)


def test_fused_query_key_value_order():
    """One group's query heads, its key head, its value head, then the next group; rows are numbered by tensor and index."""
    shape = ModelShape(layers=1, hidden=3, heads=4, kv_groups=2, head_dim=1, ffn=4, vocab=4, tied=True)
    row, layer = find_row("decoder.layers.0.self_attention.linear_qkv.weight")
    first_number = {"q": (0, 4), "k": (100, 2), "v": (200, 2)}  # and how many rows
    tensors = {f"model.layers.0.self_attn.{x}_proj.weight": torch.arange(a, a + n)[:, None] for x, (a, n) in first_number.items()}
    expected = {
        1: [[0, 1, 100, 200, 2, 3, 101, 201]],
        2: [[0, 1, 100, 200], [2, 3, 101, 201]],
        4: [[0, 1], [100, 200], [2, 3], [101, 201]],
    }
    for tp, ranks in expected.items():
        for rank, rows in enumerate(ranks):
            plan = shard_pieces(row, shape, layer, rank, tp)
            assert [tensors[p.hf_name][p.start + k, 0].item() for p in plan.pieces for k in range(p.length)] == rows


def test_both_spec_namings_mean_the_same_row():
    te = {
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight": "decoder.layers.3.pre_mlp_layernorm.weight",
    }
    for te_name, local_name in te.items():
        assert find_row(te_name) == find_row(local_name)
        assert find_row(te_name)[1] == 3
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.mlp\.router\.weight has no counterpart"):
        find_row("decoder.layers.0.mlp.router.weight")


def test_shape_from_config():
    assert shape_of("7B") == ModelShape(28, 3584, 28, 4, 128, 18944, 152064, False)
    assert shape_of("0.5B").head_dim == 64 and shape_of("0.5B").tied
    with pytest.raises(ValueError, match="intermediate_size"):
        ModelShape.from_hf({"num_attention_heads": 1, "num_hidden_layers": 1, "hidden_size": 8})
