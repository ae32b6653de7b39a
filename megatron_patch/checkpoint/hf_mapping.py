"""Which elements of which Hugging Face tensors make a Megatron parameter, as one table and pure functions of integers.

Import and export are the same sentence read in two directions, so it is written once: `shard_pieces` says which slice of which
Hugging Face tensor lies where in the local shard of a Megatron parameter on one tensor-parallel rank. Import copies the slices in,
export copies them out. Nothing here knows about processes, files or devices, so that every layout of every model can be checked
on one CPU without memory.

How Megatron lays parameters out (megatron-core 0.19.2):

    vocab       rows cut over TP, after zero rows are appended until they divide (core/tensor_parallel/layers.py)
    row         input dimension (dim 1) cut over TP
    replicated  the same on every rank
    qkv         one fused matrix: for each KV group its query heads, then its key head, then its value head; its rows are cut over TP
                in equal runs. With more TP ranks than KV groups a run ends inside a group, and attention.py gathers the activations.
    gate_up     each rank holds its share of the gate's rows, then its share of the up-projection's rows (core/transformer/mlp.py)

Qwen2's names and shapes are those of transformers' `Qwen2ForCausalLM`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide every tensor's shape; counts, not bytes."""

    layers: int
    hidden: int
    heads: int  # query heads
    kv_groups: int  # key/value heads
    head_dim: int
    ffn: int  # rows of the gate projection
    vocab: int  # rows of the embedding, without padding
    tied: bool  # the output layer is the embedding

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: object = "config.json") -> "ModelShape":
        """From the fields of a Hugging Face config.json, called ``where`` in errors. Raises ValueError naming a missing field."""
        try:
            heads = config["num_attention_heads"]
            return cls(
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                heads=heads,
                kv_groups=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                ffn=config["intermediate_size"],
                vocab=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise ValueError(f"{where}: field {error} is missing") from None


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the Hugging Face tensors it is made of; `{i}` stands for the layer, counted from 0."""

    megatron: str
    hf: tuple[str, ...]
    split: str  # vocab, row, replicated, qkv or gate_up: see the module's docstring
    te: str | None = None  # its name under Transformer Engine's spec, where the norm lives inside the next linear layer


_LAYER, _HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."
_ATTENTION, _HF_ATTENTION, _HF_MLP = _LAYER + "self_attention.", _HF_LAYER + "self_attn.", _HF_LAYER + "mlp."
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

# In the order of the forward pass, which is also the order of export and of the fingerprint.
TABLE: tuple[Row, ...] = (
    Row("embedding.word_embeddings.weight", (EMBEDDING,), "vocab"),
    Row(_LAYER + "input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",), "replicated",
        te=_ATTENTION + "linear_qkv.layer_norm_weight"),
    Row(_ATTENTION + "linear_qkv.weight", tuple(f"{_HF_ATTENTION}{x}_proj.weight" for x in "qkv"), "qkv"),
    Row(_ATTENTION + "linear_qkv.bias", tuple(f"{_HF_ATTENTION}{x}_proj.bias" for x in "qkv"), "qkv"),
    Row(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), "row"),
    Row(_LAYER + "pre_mlp_layernorm.weight", (_HF_LAYER + "post_attention_layernorm.weight",), "replicated",
        te=_LAYER + "mlp.linear_fc1.layer_norm_weight"),
    Row(_LAYER + "mlp.linear_fc1.weight", (_HF_MLP + "gate_proj.weight", _HF_MLP + "up_proj.weight"), "gate_up"),
    Row(_LAYER + "mlp.linear_fc2.weight", (_HF_MLP + "down_proj.weight",), "row"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Row("output_layer.weight", (OUTPUT,), "vocab"),
)  # fmt: skip

_ROWS = {name: row for row in TABLE for name in (row.megatron, row.te) if name is not None}
_LAYER_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class Piece:
    """A run of a Hugging Face tensor along `dim`, and where it starts in the local Megatron shard along the same dimension."""

    hf_name: str
    dim: int
    start: int  # first index in the Hugging Face tensor
    length: int
    offset: int  # first index in the local shard


@dataclass(frozen=True)
class Shard:
    """The local part of a Megatron parameter on one TP rank; what `pieces` leave uncovered is zero (padded vocabulary rows)."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def misfit(shape: ModelShape, tp_size: int) -> str | None:
    """What a model cannot be cut by at this tensor-parallel size, if anything."""
    if shape.heads % tp_size:
        return f"does not divide the model's {shape.heads} attention heads"
    if shape.ffn % tp_size:
        return f"does not divide the model's feed-forward size {shape.ffn}"
    if shape.kv_groups % tp_size and tp_size % shape.kv_groups:
        return f"neither divides nor is a multiple of the model's {shape.kv_groups} KV groups"
    rows = (shape.heads + 2 * shape.kv_groups) * shape.head_dim
    return f"does not divide the model's {rows} rows of fused query, key and value" if rows % tp_size else None


def check_layout(shape: ModelShape, tp_size: int) -> None:
    """Refuse a tensor-parallel size that the model cannot be cut into.

    Raises:
        ValueError: naming the size, what it does not divide, and the sizes that do.
    """
    why = misfit(shape, tp_size)
    if why is not None:
        fit = ", ".join(str(size) for size in range(1, shape.heads + 1) if misfit(shape, size) is None)
        raise ValueError(f"tensor-parallel size {tp_size} {why}; sizes that fit: {fit}")


def find_row(megatron_name: str) -> tuple[Row, int | None]:
    """The table's row for a parameter's name, with the layer index in that name (None outside layers).

    Raises:
        ValueError: the mapping knows no such parameter.
    """
    number = _LAYER_NUMBER.search(megatron_name)
    row = _ROWS.get(_LAYER_NUMBER.sub("{i}", megatron_name, count=1))
    if row is None:
        raise ValueError(f"parameter {megatron_name} has no counterpart in a Hugging Face Qwen2 checkpoint")
    return row, int(number.group()) if number else None


def hf_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the checkpoint, in the table's order; a tied model has no lm_head.weight."""
    inside = [row for row in TABLE if "{i}" in row.megatron]
    at = TABLE.index(inside[0])
    ordered = [(row, 0) for row in TABLE[:at]]
    ordered += [(row, layer) for layer in range(shape.layers) for row in inside]
    ordered += [(row, 0) for row in TABLE[at + len(inside) :] if not (shape.tied and OUTPUT in row.hf)]
    return {name.format(i=layer): _hf_shape(name, shape) for row, layer in ordered for name in row.hf}


def shard_pieces(row: Row, shape: ModelShape, layer: int | None, tp_rank: int, tp_size: int, padded_vocab: int | None = None) -> Shard:
    """What the local shard of a Megatron parameter is made of.

    Args:
        row: the parameter, from `find_row`.
        shape: the model's sizes; `check_layout(shape, tp_size)` must hold.
        layer: global layer index from 0, for parameters inside layers.
        padded_vocab: rows of the vocabulary over all ranks, padding included; default: the next multiple of tp_size.

    Raises:
        ValueError: padded_vocab is smaller than the vocabulary, or tp_size does not divide it.
    """
    names = [name.format(i=layer) for name in row.hf]
    if shape.tied and OUTPUT in names:
        names = [EMBEDDING]
    full = [_hf_shape(name, shape) for name in row.hf]
    if row.split == "vocab":
        return _vocab_shard(names[0], full[0], tp_rank, tp_size, padded_vocab)
    if row.split == "qkv":
        return _qkv_shard(names, full, shape, tp_rank, tp_size)
    if row.split == "gate_up":
        each = full[0][0] // tp_size
        pieces = tuple(Piece(name, 0, tp_rank * each, each, k * each) for k, name in enumerate(names))
        return Shard((2 * each, *full[0][1:]), pieces)
    if row.split == "row":
        each = full[0][1] // tp_size
        return Shard((full[0][0], each), (Piece(names[0], 1, tp_rank * each, each, 0),))
    assert row.split == "replicated", row
    return Shard(full[0], (Piece(names[0], 0, 0, full[0][0], 0),))


def merge_shards(row: Row, shape: ModelShape, layer: int | None, shards: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of a parameter, whole and one at a time, from its local shards on all TP ranks in order.

    Padding is dropped, and a tied output layer yields nothing: it is a copy of the embedding.
    """
    padded = shards[0].shape[0] * len(shards) if row.split == "vocab" else None
    plans = [shard_pieces(row, shape, layer, rank, len(shards), padded) for rank in range(len(shards))]
    for name, full in exported_tensors(row, shape, layer).items():
        whole = shards[0].new_empty(full)
        for shard, plan in zip(shards, plans, strict=True):
            for piece in (piece for piece in plan.pieces if piece.hf_name == name):
                part = shard.narrow(piece.dim, piece.offset, piece.length)
                whole.narrow(piece.dim, piece.start, piece.length).copy_(part)
        yield name, whole


def fill_shard(local: Tensor, plan: Shard, read: Callable[[Piece], Tensor]) -> None:
    """Write a local shard in place, piece by piece, so that no more than one piece is held beside it.

    Args:
        local: the shard, of shape `plan.shape`, on any device.
        read: returns a piece's elements; they are cast to the shard's dtype.
    """
    assert tuple(local.shape) == plan.shape, (tuple(local.shape), plan)
    if sum(piece.length for piece in plan.pieces) < local.shape[plan.pieces[0].dim if plan.pieces else 0]:
        local.zero_()
    for piece in plan.pieces:
        local.narrow(piece.dim, piece.offset, piece.length).copy_(read(piece))


def is_hf_name_ignored(name: str) -> bool:
    """Tensors that old checkpoints carry and nobody needs: the RoPE frequencies follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def exported_tensors(row: Row, shape: ModelShape, layer: int | None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what `merge_shards` yields for a parameter: nothing for the tied output layer, a copy of the embedding."""
    if shape.tied and OUTPUT in row.hf:
        return {}
    return {name.format(i=layer): _hf_shape(name, shape) for name in row.hf}


def _hf_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    """Shape of a Hugging Face tensor; the layer's number in its name does not matter."""
    kind = name.rsplit(".", 2)[-2]
    query, key = shape.heads * shape.head_dim, shape.kv_groups * shape.head_dim
    out = {"q_proj": query, "k_proj": key, "v_proj": key}.get(kind)
    if name.endswith(".bias"):
        assert out is not None, name
        return (out,)
    matrices = {
        "embed_tokens": (shape.vocab, shape.hidden),
        "lm_head": (shape.vocab, shape.hidden),
        "o_proj": (shape.hidden, query),
        "gate_proj": (shape.ffn, shape.hidden),
        "up_proj": (shape.ffn, shape.hidden),
        "down_proj": (shape.hidden, shape.ffn),
    }
    return (out, shape.hidden) if out is not None else matrices.get(kind, (shape.hidden,))


def _vocab_shard(name: str, full: tuple[int, ...], tp_rank: int, tp_size: int, padded_vocab: int | None) -> Shard:
    vocab = full[0]
    padded = -(-vocab // tp_size) * tp_size if padded_vocab is None else padded_vocab
    if padded < vocab or padded % tp_size:
        raise ValueError(f"padded vocabulary {padded} must be at least {vocab} and a multiple of the tensor-parallel size {tp_size}")
    each = padded // tp_size
    length = max(0, min(each, vocab - tp_rank * each))
    pieces = (Piece(name, 0, tp_rank * each, length, 0),) if length else ()
    return Shard((each, *full[1:]), pieces)


def _qkv_shard(names: list[str], full: list[tuple[int, ...]], shape: ModelShape, tp_rank: int, tp_size: int) -> Shard:
    """The run [first, last) of the fused matrix's rows that this rank holds, as pieces of query, key and value."""
    each = sum(rows for rows, *_ in full) // tp_size
    first, last = tp_rank * each, (tp_rank + 1) * each
    heads = (shape.heads // shape.kv_groups * shape.head_dim, shape.head_dim, shape.head_dim)  # rows per group of q, k, v
    pieces, at = [], 0  # at: row of the fused matrix
    for group in range(shape.kv_groups):
        for name, rows in zip(names, heads, strict=True):
            low, high = max(at, first), min(at + rows, last)
            if low < high:
                pieces.append(Piece(name, 0, group * rows + low - at, high - low, low - first))
            at += rows
    return Shard((each, *full[0][1:]), tuple(pieces))
