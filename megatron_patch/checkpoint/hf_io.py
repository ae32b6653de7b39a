"""Hugging Face safetensors straight into a sharded Megatron model, and back out of it.

There is no intermediate checkpoint. On import every rank reads just the slices that `hf_mapping` assigns to its parameters, and copies them
into those parameters in place (a replaced Parameter would lose its parallel attributes); on export the TP shards of one parameter at a
time are gathered and written. No rank holds more than its own shard and one parameter.

Import costs the file system one read of the model: only the first rank of each data-and-context-parallel group reads, the others
receive. Export writes into a folder beside the target and renames it at the end, so that a reader finds all of it or nothing.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_patch.checkpoint.hf_files import (
    DTYPES,
    INDEX_FILE,
    MARKER,
    SINGLE_FILE,
    SliceReader,
    StoredTensor,
    copy_companions,
    make_temporary_folder,
    publish,
    read_checkpoint,
    read_config,
    refuse_foreign_folder,
    set_aside,
    temporary_folder,
    write_json,
    write_safetensors,
)
from megatron_patch.checkpoint.hf_mapping import (
    EMBEDDING,
    OUTPUT,
    ModelShape,
    Piece,
    Row,
    Shard,
    check_layout,
    exported_tensors,
    fill_shard,
    find_row,
    hf_tensors,
    merge_shards,
    shard_pieces,
)
from megatron_patch.errors import AgreedError

DEFAULT_SHARD_BYTES = 5 * 10**9  # the size that the Hub's tools use

FilePlan = list[list[tuple[str, list[str]]]]  # for each pipeline stage its files: name, and the tensors in it


class OwnedParameter(NamedTuple):
    """A parameter of this rank and what the mapping knows of it."""

    name: str
    parameter: nn.Parameter
    row: Row
    layer: int | None  # counted from 0 over the whole model; None outside layers


class ImportCost(NamedTuple):
    """What filling the model took on this rank: seconds reading and copying, seconds of the broadcasts, bytes of its parameters."""

    read: float
    sent: float
    size: int


def load_hf_weights(model_chunks: Sequence[nn.Module], hf_path: str | Path) -> ImportCost:
    """Fill a Megatron model with a Hugging Face checkpoint, in place; a collective over all ranks.

    Works for any TP x PP x virtual PP x CP x DP, with either layer spec, wrapped or not. Both copies of a tied embedding are filled.
    Padded vocabulary rows become zero. Values are cast to the parameters' dtype.

    Args:
        model_chunks: this rank's GPTModel chunks (one, or one for each virtual stage).
        hf_path: folder with config.json and *.safetensors.

    Raises:
        ValueError: on every rank, before anything is written: the layout does not fit the model, or tensors are missing, unexpected or
            of another shape (all of them are listed).
    """
    shape, stored = read_checkpoint(hf_path)
    tp_rank, tp_size = _tp()
    check_layout(shape, tp_size)
    _names_of_stages(model_chunks, shape)
    _refuse_different_tied_output(shape, stored)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    plans = [(owned.parameter, _shard_of(owned, shape, tp_rank, tp_size)) for owned in _parameters(model_chunks)]
    started, reading = time.perf_counter(), 0.0
    with SliceReader(stored) as read:
        for parameter, plan in plans:
            if group.rank() == 0:
                before = time.perf_counter()
                fill_shard(parameter.data, plan, read)
                reading += time.perf_counter() - before
            if group.size() > 1:
                torch.distributed.broadcast(parameter.data, group=group, group_src=0)
    if any(parameter.is_cuda for parameter, _ in plans):
        torch.cuda.synchronize()
    size = sum(parameter.numel() * parameter.element_size() for parameter, _ in plans)
    return ImportCost(reading, time.perf_counter() - started - reading, size)


def save_hf_weights(
    model_chunks: Sequence[nn.Module],
    out_dir: str | Path,
    source_hf_path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    check: Callable[[Path], None] = lambda written: None,
) -> None:
    """Write a Megatron model as a Hugging Face checkpoint; a collective over all ranks.

    The parameters must be up to date on data-parallel rank 0 (with overlapped parameter gathering: after a forced synchronisation).

    Args:
        model_chunks: this rank's GPTModel chunks.
        out_dir: the folder to make; it must not exist, be empty, or hold an earlier export, which is replaced.
        source_hf_path: the checkpoint that the model came from: config.json, generation config and tokenizer files are taken from it.
        dtype: of the written tensors.
        max_shard_bytes: upper bound of one file's tensors in bytes; a larger tensor gets a file of its own.
        check: looks at what was written before it gets its name, on every rank; what it raises leaves that as ``<out_dir>.rejected``
            and an earlier export as it was.

    Raises:
        ValueError: on every rank: out_dir holds something else or is the source, the dtype cannot be stored, the model and config.json
            do not match.
    """
    out, source = Path(out_dir), Path(source_hf_path)
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is where the model came from: it is not overwritten")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} cannot be exported; one of {', '.join(map(str, DTYPES))}")
    config = read_config(source)
    shape = ModelShape.from_hf(config)
    temporary = temporary_folder(out)
    _on_rank_zero(lambda: refuse_foreign_folder(out))
    _on_rank_zero(lambda: make_temporary_folder(out))
    files = _plan_files(_names_of_stages(model_chunks, shape), shape, dtype, max_shard_bytes)
    _write_stage(model_chunks, shape, temporary, files, dtype)
    torch.distributed.barrier()  # every stage's files are on disk
    _on_rank_zero(lambda: _add_other_files(temporary, source, config, files, dtype))
    try:
        check(temporary)
    except AgreedError:
        _on_rank_zero(lambda: set_aside(out))
        raise
    _on_rank_zero(lambda: publish(out))


def _parameters(model_chunks: Sequence[nn.Module]) -> Iterator[OwnedParameter]:
    """Every parameter of this rank, in the model's order.

    The number in a parameter's name counts within the chunk; the layer's own number is global and starts at 1.
    """
    for chunk in unwrap_model(list(model_chunks)):
        for name, parameter in chunk.named_parameters():
            row, local = find_row(name)
            yield OwnedParameter(name, parameter, row, None if local is None else chunk.decoder.layers[local].layer_number - 1)


def _shard_of(owned: OwnedParameter, shape: ModelShape, tp_rank: int, tp_size: int) -> Shard:
    found = tuple(owned.parameter.shape)
    padded = found[0] * tp_size if owned.row.split == "vocab" else None
    plan = shard_pieces(owned.row, shape, owned.layer, tp_rank, tp_size, padded)
    if found != plan.shape:
        raise ValueError(f"parameter {owned.name} has shape {found}, but the checkpoint's config.json makes it {plan.shape}")
    return plan


def _tp() -> tuple[int, int]:
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def _on_rank_zero(action: Callable[[], None]) -> None:
    """Run an action on global rank 0; its failure is raised on every rank, so that nobody waits for a rank that left."""
    verdict: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except (ValueError, OSError) as error:
            verdict[0] = str(error)
    torch.distributed.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise ValueError(verdict[0])


def _refuse_different_tied_output(shape: ModelShape, stored: dict[str, StoredTensor]) -> None:
    """A tied checkpoint may carry lm_head.weight if it repeats the embedding; only global rank 0 reads the two."""
    if shape.tied and OUTPUT in stored:
        _on_rank_zero(lambda: _compare_tied(shape, stored))


def _compare_tied(shape: ModelShape, stored: dict[str, StoredTensor], rows_at_once: int = 4096) -> None:
    with SliceReader(stored) as read:
        for start in range(0, shape.vocab, rows_at_once):
            length = min(rows_at_once, shape.vocab - start)
            if not torch.equal(*(read(Piece(name, 0, start, length, 0)) for name in (EMBEDDING, OUTPUT))):
                raise ValueError(f"config.json ties the embeddings, but {OUTPUT} differs from {EMBEDDING} in {stored[OUTPUT].file}")


def _names_of_stages(model_chunks: Sequence[nn.Module], shape: ModelShape) -> list[list[str]]:
    """The Hugging Face tensors that each pipeline stage holds, in order, on every rank; a tied output layer does not count.

    Raises:
        ValueError: together the stages do not hold exactly the tensors that config.json asks for.
    """
    mine = [name for owned in _parameters(model_chunks) for name in exported_tensors(owned.row, shape, owned.layer)]
    stages: list[list[str]] = [[] for _ in range(parallel_state.get_pipeline_model_parallel_world_size())]
    torch.distributed.all_gather_object(stages, mine, group=parallel_state.get_pipeline_model_parallel_group())
    held = Counter(name for names in stages for name in names)
    expected = Counter(hf_tensors(shape).keys())
    if held != expected:
        raise ValueError(f"the model and config.json disagree about {', '.join(sorted((held - expected) + (expected - held)))}")
    return stages


def _plan_files(stages: list[list[str]], shape: ModelShape, dtype: torch.dtype, max_bytes: int) -> FilePlan:
    """Fill files in order, none above max_bytes unless it holds a single tensor, and number them over all stages."""
    sizes = {name: math.prod(full) * dtype.itemsize for name, full in hf_tensors(shape).items()}
    grouped: list[list[list[str]]] = []
    for names in stages:
        files: list[list[str]] = []
        room = 0
        for name in names:
            if not files or sizes[name] > room:
                files.append([])
                room = max_bytes
            files[-1].append(name)
            room -= sizes[name]
        grouped.append(files)
    count = sum(map(len, grouped))
    file_names = iter([SINGLE_FILE] if count == 1 else [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)])
    return [[(next(file_names), names) for names in files] for files in grouped]


def _write_stage(model_chunks: Sequence[nn.Module], shape: ModelShape, folder: Path, files: FilePlan, dtype: torch.dtype) -> None:
    """Gather and write this stage's tensors; only the first data-parallel replica takes part, and its TP rank 0 writes."""
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    full = hf_tensors(shape)
    tensors = _gathered_tensors(model_chunks, shape)
    if _tp()[0] == 0:
        for file, names in files[parallel_state.get_pipeline_model_parallel_rank()]:
            write_safetensors(folder / file, {name: full[name] for name in names}, tensors, dtype)
    left_over = sum(1 for _ in tensors)  # other TP ranks take part in the gathering and get nothing
    assert left_over == 0, f"{left_over} tensors were not in the plan"


def _gathered_tensors(model_chunks: Sequence[nn.Module], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors of this stage, one parameter gathered over TP at a time; TP ranks above 0 yield nothing."""
    tp_rank, tp_size = _tp()
    for _, parameter, row, layer in _parameters(model_chunks):
        if not exported_tensors(row, shape, layer):
            continue
        shards = [parameter.data] * tp_size  # right as it is for a replicated parameter
        if tp_size > 1 and row.split != "replicated":
            shards = [torch.empty_like(parameter.data) for _ in range(tp_size)]
            torch.distributed.all_gather(shards, parameter.data, group=parallel_state.get_tensor_model_parallel_group())
        if tp_rank == 0:
            yield from merge_shards(row, shape, layer, shards)


def _add_other_files(folder: Path, source: Path, config: dict[str, Any], files: FilePlan, dtype: torch.dtype) -> None:
    """Index (when there are several files), config, generation config and tokenizer."""
    weight_map = {name: file for stage in files for file, names in stage for name in names}
    if len(set(weight_map.values())) > 1:
        shapes = hf_tensors(ModelShape.from_hf(config))
        total = sum(math.prod(full) * dtype.itemsize for full in shapes.values())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / MARKER, {"source": str(source), "dtype": str(dtype).removeprefix("torch.")})
    fields = [field for field in ("torch_dtype", "dtype") if field in config] or ["torch_dtype"]
    write_json(folder / "config.json", {**config, **dict.fromkeys(fields, str(dtype).removeprefix("torch."))})
    copy_companions(source, folder)
