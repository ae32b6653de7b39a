"""Accelerated Preference Optimization (arXiv 2410.06293, Algorithm 1): the step beyond a round of training, between two checkpoints.

    python scripts/extrapolate.py --trained outputs/round1/hf --previous outputs/sft/hf --output outputs/round2/start --alpha 0.3

makes theta = trained + alpha (trained - previous), element by element. It is meant for training in rounds: `previous` is what the
round before ended with (in the first round: the fine-tuned model that it started from), and the output is the next round's start
and its reference. The paper's alpha is 0.3, over three rounds; what the last round ends with is the result and is not extrapolated.
The paper shortens its name to APO; here the names that begin with apo are the anchored losses (arXiv 2408.06266).

Files, tensors, dtype, config and tokenizer of the output are those of `trained`; the arithmetic is in float32 or wider, and elements
that did not move keep their bits. Memory: one tensor and a block of rows, whatever the size of the model.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_patch.checkpoint.hf_files import (
    DTYPES,
    INDEX_FILE,
    MARKER,
    SliceReader,
    StoredTensor,
    copy_companions,
    make_temporary_folder,
    publish,
    read_checkpoint,
    refuse_foreign_folder,
    temporary_folder,
    write_json,
    write_safetensors,
)
from megatron_patch.checkpoint.hf_mapping import Piece

BLOCK_ELEMENTS = 2**24  # held in float32 at a time, for each of the two checkpoints
Stored = dict[str, StoredTensor]


def extrapolate(trained: Path, previous: Path, output: Path, alpha: float) -> tuple[int, int]:
    """Write ``trained + alpha (trained - previous)`` as a Hugging Face folder; how many files and tensors it has.

    Raises:
        ValueError: the two are not checkpoints of one model, alpha is no number >= 0, the result is not finite, or ``output`` is there
            and was not made by this script. Nothing is left of it then.
    """
    new, old, dtype = _checked(trained, previous, output, alpha)
    files: dict[str, list[str]] = {}
    for name, tensor in new.items():
        files.setdefault(tensor.file.name, []).append(name)
    temporary = temporary_folder(output)
    make_temporary_folder(output)
    try:
        with SliceReader(new) as read_new, SliceReader(old) as read_old:
            for file, names in files.items():
                layout = {name: new[name].shape for name in names}
                moved = ((name, _moved(name, layout[name], read_new, read_old, alpha, dtype)) for name in names)
                write_safetensors(temporary / file, layout, moved, dtype)
        _add_other_files(trained, temporary, {"trained": str(trained), "previous": str(previous), "alpha": alpha})
        publish(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only if something went wrong
    return len(files), len(new)


def _checked(trained: Path, previous: Path, output: Path, alpha: float) -> tuple[Stored, Stored, torch.dtype]:
    """Both checkpoints' tensors and the dtype to write, after every check that needs no tensor."""
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha = {alpha!r} is out of range: it must be a number >= 0")
    if len({trained.resolve(), previous.resolve(), output.resolve()}) < 3:
        raise ValueError(f"{trained}, {previous} and {output} must be three different folders")
    _refuse_other_folder(output)
    (shape, new), (old_shape, old) = read_checkpoint(trained), read_checkpoint(previous)
    if shape != old_shape:
        unequal = [f"{name} {size} and {vars(old_shape)[name]}" for name, size in vars(shape).items() if size != vars(old_shape)[name]]
        raise ValueError(f"{trained} and {previous} are different models: {', '.join(unequal)}")
    if new.keys() != old.keys():
        raise ValueError(f"{trained} and {previous} differ in {', '.join(sorted(new.keys() ^ old.keys()))}")
    _dtype_of(previous, old)
    return new, old, _dtype_of(trained, new)


def _dtype_of(folder: Path, stored: Stored) -> torch.dtype:
    """The one floating-point type of a checkpoint's tensors."""
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    found = sorted({tensor.dtype for tensor in stored.values()})
    if len(found) != 1 or found[0] not in dtypes:
        raise ValueError(f"{folder} holds tensors of type {', '.join(found)}: all must have the same, one of {', '.join(dtypes)}")
    return dtypes[found[0]]


def _refuse_other_folder(output: Path) -> None:
    """Only what this script made may be replaced: a training's export carries the same marker, but no alpha in it."""
    refuse_foreign_folder(output)
    if (output / MARKER).exists() and "alpha" not in json.loads((output / MARKER).read_text(encoding="utf-8")):
        raise ValueError(f"{output} holds a trained model: it is not overwritten")


def _moved(name: str, shape: tuple[int, ...], new: SliceReader, old: SliceReader, alpha: float, dtype: torch.dtype) -> Tensor:
    """One extrapolated tensor, made from blocks of rows."""
    wide = torch.promote_types(dtype, torch.float32)
    result = torch.empty(shape, dtype=dtype)
    rows = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        piece = Piece(name, 0, start, min(rows, shape[0] - start), 0)
        now, before = new(piece).to(wide), old(piece).to(wide)
        step = alpha * (now - before)
        result[start : start + piece.length] = torch.where(step == 0, now, now + step)  # not now + 0: that turns -0 into 0
    if not result.isfinite().all():
        raise ValueError(f"{name} is not finite after the step: alpha = {alpha} is too large, or a checkpoint is broken")
    return result


def _add_other_files(trained: Path, folder: Path, record: dict[str, str | float]) -> None:
    """Config, index (the files hold the same tensors), tokenizer, and a record of where this comes from."""
    for name in ("config.json", INDEX_FILE):
        if (trained / name).exists():
            shutil.copyfile(trained / name, folder / name)
    copy_companions(trained, folder)
    write_json(folder / MARKER, record)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (
        ("trained", "what this round's training ended with"),
        ("previous", "what the round before ended with, not the extrapolation of it"),
        ("output", "the next round's start; replaced if this script made it"),
    ):
        parser.add_argument(f"--{name}", required=True, type=Path, metavar="DIR", help=f"{what} (Hugging Face folder)")
    parser.add_argument("--alpha", type=float, default=0.3, help="the step beyond as a part of the round's own (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder; 0, or 2 after a one-line error."""
    args = parse(argv)
    try:
        files, tensors = extrapolate(args.trained, args.previous, args.output, args.alpha)
    except (ValueError, OSError) as error:
        print(f"[error] extrapolate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"[extrapolate] {args.output}: {tensors} tensors in {files} files, trained + {args.alpha:g} x (trained - previous)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
