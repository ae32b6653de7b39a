"""New tokens for a Hugging Face checkpoint (audio tokens, say): its tokenizer and its safetensors, into a new folder.

    python -m toolkits.lpo_data_preprocessing.extend_vocab --input models/Qwen2.5-7B --output models/Qwen2.5-7B-audio \\
        --tokens 4096 --pattern '<|g0r0_{}|>' --more '<|beginofaudio|>' '<|endofaudio|>'

The tokens are ordinary added tokens under the tokenizer's next free ids (see `added_tokens`): first --more, then --tokens-file, then
--pattern. Qwen2.5 has more rows than its tokenizer has tokens (0.5B: 151936 and 151665): new tokens take these rows first, and the
vocabulary grows only when that is too little, to a multiple of --multiple-of. What a new row holds: `megatron_patch/checkpoint/hf_rows.py`.
Training pads to a multiple of its tensor-parallel size on its own, so any multiple will do; 64 suits the kernels of GPUs.

All other files of the folder go along, but for weights in other formats, which would keep the old vocabulary. The folder appears whole
or not at all, with `extend_vocab.json` in it: what was added, and the sign that the folder may be replaced.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_patch.checkpoint import hf_files
from megatron_patch.checkpoint.hf_rows import NewRows, RowWriter, plan_rows
from toolkits.lpo_data_preprocessing.added_tokens import TokenizerFiles, check_round_trip, file_tokens, pattern_tokens
from toolkits.lpo_data_preprocessing.finished import Ingredients, make_once, plan_path
from toolkits.lpo_data_preprocessing.records import CommandParser, progress, run_stage

MARKER = "extend_vocab.json"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_ROOM = 64 * 2**20  # bytes asked for beyond what is known: the tokenizer's growth, blocks of the file system
_MIB = 2**20


class Extension:
    """A checkpoint and the tokens that it is to get.

    Raises:
        ValueError: anything about them that stands in the way; nothing is written.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.source, self.output = Path(args.input), Path(args.output)
        if self.output.resolve() == self.source.resolve():
            raise ValueError(f"{args.output}: is the input too; give another --output")
        if self.output.exists() and not ((self.output / MARKER).exists() or plan_path(self.output).exists()):
            raise ValueError(f"{self.output}: exists and was not made by extend_vocab (no {MARKER} in it): it is not overwritten")
        given = _given_tokens(args)
        self.tokenizer, self.weights = TokenizerFiles(self.source), RowWriter(self.source)
        self.tokenizer.check_new(given)
        self.tokens, self.first_id = [token for token, _ in given], self.tokenizer.next_id
        options = {"multiple_of": args.multiple_of, "noise": args.noise, "seed": args.seed}
        self.rows = plan_rows(self.first_id, len(given), self.weights.shape, **options)

    def check_disk(self) -> None:
        """ValueError if the disk is too small."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        beside = sum(path.stat().st_size for path in self.copied_files())
        needed, free = self.weights.bytes_needed(self.rows) + beside + _ROOM, shutil.disk_usage(self.output.parent).free
        if free < needed:
            raise ValueError(f"{self.output.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")

    def write(self) -> str:
        """Write the folder; the stage's closing lines."""
        self.check_disk()
        hf_files.make_temporary_folder(self.output)
        folder = hf_files.temporary_folder(self.output)
        try:
            left_out = self._write_small_files(folder)
            check_round_trip(folder, self.tokens, self.first_id)
            self._write_weights(folder)
            hf_files.publish(self.output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return self._summary() + "".join(f"\n  left out  {name}: weights in another form" for name in left_out)

    def copied_files(self) -> list[Path]:
        """The files of the source beside its weights: copied, or written anew with the tokens."""
        return [path for top in self._others()[0] for path in (top, *sorted(top.rglob("*"))) if path.is_file()]

    def _others(self) -> tuple[list[Path], list[str]]:
        """What of the source is copied beside what is written anew (files and folders, hidden ones not), and the names left out."""
        own = {file.name for file in self.weights.files} | {hf_files.INDEX_FILE, hf_files.MARKER, MARKER}
        others = [path for path in sorted(self.source.iterdir()) if path.name not in own and not path.name.startswith(".")]
        left_out = [path.name for path in others if path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json")]
        return [path for path in others if path.name not in left_out], left_out

    def _write_small_files(self, folder: Path) -> list[str]:
        """Everything but the weights; returns the names that were left out."""
        copied, left_out = self._others()
        for path in copied:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
        self.tokenizer.write(folder, self.tokens)
        hf_files.write_json(folder / "config.json", {**hf_files.read_config(self.source), "vocab_size": self.rows.total})
        hf_files.write_json(folder / MARKER, self._record())
        return left_out

    def _write_weights(self, folder: Path) -> None:
        written = 0
        with progress((), what="extend_vocab", unit="MiB", total=self.weights.bytes_needed(self.rows) // _MIB) as bar:

            def tell(count: int) -> None:
                nonlocal written
                written += count
                bar.update(written // _MIB - bar.n)

            self.weights.write(folder, self.rows, tell)

    def _record(self) -> dict[str, object]:
        rows: NewRows = self.rows
        return {
            "source": str(self.source.resolve()), "tokens": len(self.tokens), "first_id": self.first_id,
            "first_token": self.tokens[0], "last_token": self.tokens[-1], "new_rows": [rows.first, rows.first + rows.new],
            "vocab_size": rows.total, "vocab_size_before": self.weights.shape.vocab, "noise": rows.noise, "seed": rows.seed,
        }  # fmt: skip

    def _summary(self) -> str:
        last, before, total = self.first_id + len(self.tokens) - 1, self.weights.shape.vocab, self.rows.total
        size = f"vocab_size {before} as before" if total == before else f"vocab_size {before} -> {total}"
        return f"{len(self.tokens)} tokens added, ids {self.first_id} to {last}, {size} -> {self.output}"


def _given_tokens(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(token, where it comes from), in the order of their ids."""
    if (args.tokens is None) != (args.pattern is None):
        raise ValueError("--tokens and --pattern belong together")
    given = [(token, "--more") for token in args.more]
    given += file_tokens(args.tokens_file) if args.tokens_file else []
    given += pattern_tokens(args.pattern, args.tokens) if args.pattern is not None else []
    if not given:
        raise ValueError("no tokens to add: give --tokens N --pattern P, --tokens-file or --more")
    return given


def _run(args: argparse.Namespace) -> str:
    extension = Extension(args)
    decisive = argparse.Namespace(
        **{name: getattr(args, name) for name in ("input", "output", "overwrite", "update", "noise", "seed", "multiple_of")}
    )
    tokens = hashlib.sha256(json.dumps(extension.tokens).encode()).hexdigest()
    fingerprints = {"tokens": tokens, "weights": hf_files.weights_fingerprint(extension.source)}
    ingredients = Ingredients(extension.copied_files(), [extension.output], fingerprints, counts=False)
    return make_once(decisive, ingredients, extension.write)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = CommandParser(
        "extend_vocab", "Add ordinary tokens to a Hugging Face checkpoint: tokenizer, embedding and output layer.",
        "--input models/Qwen2.5-7B --output models/Qwen2.5-7B-audio --tokens 4096 --pattern '<|g0r0_{}|>'",
        output="the new folder",
    )  # fmt: skip
    parser.add_argument("--input", required=True, metavar="DIR", help="Hugging Face checkpoint with tokenizer.json and safetensors")
    parser.add_argument("--tokens", type=int, metavar="N", help="how many tokens of --pattern")
    parser.add_argument("--pattern", metavar="TEXT", help="such a token; {} stands for its number, from 0 to N - 1")
    parser.add_argument("--tokens-file", metavar="FILE", help="one token a line; their ids come before those of --pattern")
    parser.add_argument("--more", nargs="+", default=[], metavar="TOKEN", help="single tokens; their ids come first")
    parser.add_argument("--noise", type=float, default=0.1, metavar="F", help="in new rows, in deviations of the known (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default %(default)s)")
    parser.add_argument("--multiple-of", type=int, default=64, metavar="N", help="what a vocabulary that must grow grows to (%(default)s)")
    return run_stage(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
