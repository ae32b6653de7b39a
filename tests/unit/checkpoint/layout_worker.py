"""Builds Megatron models in a process of its own: `python layout_worker.py coverage|roundtrip JOBS.json`.

It is started by the tests beside it, because building any layout needs process groups and patched CUDA calls that pytest's process
must not keep. `coverage` builds every rank's model on the meta device under the fake process group; `roundtrip` forks one gloo process
a rank after the slow imports, loads a checkpoint, compares every parameter with a formula of its own, and exports.
"""

import functools
import json
import math
import os
import sys
import traceback
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_patch.checkpoint import hf_files
from megatron_patch.checkpoint.hf_io import load_hf_weights, save_hf_weights
from megatron_patch.checkpoint.hf_mapping import ModelShape, check_layout, find_row, shard_pieces
from megatron_patch.model.layer_specs import qwen2_block_spec


def build_chunks(config, job, device, dtype):
    """This rank's GPTModel chunks for a Hugging Face config under an initialised process group."""
    parallel_state.initialize_model_parallel(job["tp"], job["pp"], job.get("vpp"), create_gloo_process_groups=False)
    transformer = TransformerConfig(
        num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"], ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"], num_query_groups=config["num_key_value_heads"],
        tensor_model_parallel_size=job["tp"], pipeline_model_parallel_size=job["pp"], virtual_pipeline_model_parallel_size=job.get("vpp"),
        num_layers_in_first_pipeline_stage=job.get("first"), num_layers_in_last_pipeline_stage=job.get("last"),
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False, add_qkv_bias=True, normalization="RMSNorm",
        transformer_impl="local", attention_dropout=0.0, hidden_dropout=0.0,
        use_cpu_initialization=True, perform_initialization=False, init_model_with_meta_device=device == "meta",
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype is torch.bfloat16,
    )  # fmt: skip
    stages = [None] if job.get("vpp") is None else range(job["vpp"])
    padded = math.ceil(config["vocab_size"] / job["tp"]) * job["tp"]
    with torch.device(device):
        return [
            GPTModel(
                transformer, qwen2_block_spec(SimpleNamespace(transformer=transformer), stage), padded, 4096,
                position_embedding_type="rope", vp_stage=stage,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                share_embeddings_and_output_weights=config["tie_word_embeddings"],
            )
            for stage in stages
        ]  # fmt: skip


def parameters(chunks):
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            row, local = find_row(name)
            yield name, parameter, row, None if local is None else chunk.decoder.layers[local].layer_number - 1


def coverage(job):
    """Every run of every Hugging Face tensor that any rank holds: [name, dim, start, stop, tp_rank, copy of a tied embedding]."""
    config = json.loads(Path(job["config"]).read_text())
    shape = ModelShape.from_hf(config)
    check_layout(shape, job["tp"])
    runs, layers = [], defaultdict(list)
    for rank in range(job["tp"] * job["pp"]):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=job["tp"] * job["pp"])
        chunks = build_chunks(config, job, "meta", torch.bfloat16)
        tp_rank, pp_rank = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
        layers[pp_rank] = [len(chunk.decoder.layers) for chunk in chunks]
        for name, parameter, row, layer in parameters(chunks):
            shard = shard_pieces(row, shape, layer, tp_rank, job["tp"])
            assert shard.shape == tuple(parameter.shape), (name, shard.shape, parameter.shape)
            check_tiles(shard, padded=row.split == "vocab")
            tied_copy = config["tie_word_embeddings"] and name.startswith("output_layer")
            runs += [[p.hf_name, p.dim, p.start, p.start + p.length, tp_rank, tied_copy] for p in shard.pieces]
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return {"runs": runs, "layers": [layers[stage] for stage in sorted(layers)], "expected": transformers_shapes(job["config"])}


def check_tiles(shard, padded):
    """The pieces lie one after another in the local shard, and fill it unless the vocabulary is padded."""
    at = 0
    for piece in shard.pieces:
        assert piece.offset == at and piece.length > 0, shard
        at += piece.length
    assert padded or at == shard.shape[shard.pieces[0].dim], shard


@functools.cache
def transformers_shapes(config_file):
    """Names and shapes by transformers, which knows nothing of this project."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config.from_json_file(config_file)
    with torch.device("meta"):
        names = {name: list(tensor.shape) for name, tensor in Qwen2ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del names["lm_head.weight"]
    return names


def expected_parameter(name, layer, hf, config, tp_rank, tp_size):
    """The local shard by Megatron's own rules, written with reshapes of whole tensors instead of slices."""
    kind = name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
    suffix = name.rsplit(".", 1)[-1]
    prefix = f"model.layers.{layer}."
    if kind in ("word_embeddings", "output_layer"):
        tied_or_first = kind == "word_embeddings" or config["tie_word_embeddings"]
        whole = hf["model.embed_tokens.weight" if tied_or_first else "lm_head.weight"]
        rows = math.ceil(len(whole) / tp_size) * tp_size
        return torch.cat([whole, whole.new_zeros(rows - len(whole), whole.shape[1])]).chunk(tp_size)[tp_rank]
    if kind == "linear_qkv":
        groups = config["num_key_value_heads"]
        q, k, v = (hf[f"{prefix}self_attn.{x}_proj.{suffix}"] for x in "qkv")
        fused = torch.cat([x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)], dim=1)
        return fused.reshape(-1, *q.shape[1:]).chunk(tp_size)[tp_rank]
    if kind == "linear_fc1":
        return torch.cat([hf[f"{prefix}mlp.{x}_proj.weight"].chunk(tp_size)[tp_rank] for x in ("gate", "up")])
    if kind in ("linear_proj", "linear_fc2"):
        source = "self_attn.o_proj" if kind == "linear_proj" else "mlp.down_proj"
        return hf[f"{prefix}{source}.weight"].chunk(tp_size, dim=1)[tp_rank]
    norms = {"input_layernorm": f"{prefix}input_layernorm", "pre_mlp_layernorm": f"{prefix}post_attention_layernorm"}
    return hf[norms.get(kind, "model.norm") + ".weight"]


def roundtrip_rank(job, rank):
    """One rank: load, compare, export. Runs in a forked process, so what it patches goes with it."""
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # the tied embedding's first all-reduce asks for a GPU
    dist.init_process_group("gloo", init_method=f"file://{job['store']}", rank=rank, world_size=job["world"])
    source = Path(job["source"])
    config = json.loads((source / "config.json").read_text())
    dtype = getattr(torch, job["dtype"])
    chunks = build_chunks({**config, **job.get("model", {})}, job, "cpu", dtype)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    if "error" in job:
        must_refuse(lambda: load_hf_weights(chunks, source), job["error"])
        assert all(parameter.isnan().all() for chunk in chunks for parameter in chunk.parameters()), "something was written"
        return
    identities = [(id(p), vars(p).copy()) for chunk in chunks for p in chunk.parameters()]
    load_hf_weights(chunks, source)
    assert identities == [(id(p), vars(p)) for chunk in chunks for p in chunk.parameters()], "a Parameter was replaced"
    hf = load_file(source / "model.safetensors")
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter, _, layer in parameters(chunks):
        expected = expected_parameter(name, layer, hf, config, tp_rank, job["tp"])
        assert torch.equal(parameter.data, expected.to(dtype)), (rank, name, layer)
    if "wrapped" in job:
        chunks = [Float16Module(chunk.config, chunk) for chunk in chunks]
    if "full_disk" in job:
        with mock.patch.object(hf_files, "sync_folder", side_effect=OSError("disk full")):
            must_refuse(lambda: save_hf_weights(chunks, job["out"], source, dtype), "disk full")
        assert not Path(job["out"]).exists(), "half an export"
    save_hf_weights(chunks, job["out"], source, dtype)
    save_hf_weights(chunks, job["out"], source, dtype, job.get("max_shard_bytes", 5 * 10**9))  # replaces its own earlier export
    must_refuse(lambda: save_hf_weights(chunks, source, source, dtype), "not overwritten")


def must_refuse(action, message):
    try:
        action()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def roundtrip(job):
    children = []
    for rank in range(job["world"]):
        child = os.fork()
        if child == 0:
            try:
                roundtrip_rank(job, rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    return {"exit_codes": [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, file = sys.argv[1], Path(sys.argv[2])
    action = {"coverage": coverage, "roundtrip": roundtrip}[mode]
    file.with_suffix(".out").write_text(json.dumps({name: action(job) for name, job in json.loads(file.read_text()).items()}))
