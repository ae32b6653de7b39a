"""How fast stage 4 tokenises, what a store takes on disk and what the stage takes in memory, beside TRL's own way, in one run.

Both sides get the same generated preference pairs and the same tokenizer (Qwen2's kind, trained here on text of the same generator), and
make token ids on disk with two processes: ours is `build_pairs`, TRL's is `DPOTrainer._prepare_dataset`, as its trainer calls it
(`datasets.map` over a function that applies the chat template and tokenises prompt, prompt + chosen and prompt + rejected), then
`save_to_disk`. Each repetition is a process of its own and the sides take turns. Timed is, with imports done, for TRL from a loaded
tokenizer and data set to files on disk, for us the whole stage: tokenizer, start of the workers, reading and checking the records, writing.
Memory is that of the process tree: what each process has for itself (USS) and the largest shared rest, sampled four times a second in runs
that are not timed (sampling costs time).

    python benchmarks/build_pairs.py --folder outputs/benchmark-pairs > benchmarks/build_pairs.txt
"""

import argparse
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
PAPER_BYTES = 2 * (4096 + 4) * 4
"""A pair in the paper's released code: two rows of 4096 + 4 float32."""


class Writer:
    """Text as alike to chat as random text can be: words by Zipf's law, sentences, paragraphs, numbers, some of it not ASCII."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        letters, weights = "etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1)
        lengths = random.Random(0)
        self.words = ["".join(lengths.choices(letters, weights, k=lengths.choice((2, 3, 4, 5, 6, 7, 9, 11)))) for _ in range(40_000)]
        self.words[50:60] = ["café", "naïve", "don’t", "it’s", "—", "°C", "été", "100%", "x=3", "漢字"]
        self.cumulative: list[float] = []
        for rank in range(1, len(self.words) + 1):
            self.cumulative.append((self.cumulative[-1] if self.cumulative else 0.0) + 1 / rank)

    def text(self, median_words: int) -> str:
        """Some paragraphs; log-normal length."""
        length = max(3, int(self.random.lognormvariate(0, 0.7) * median_words))
        words = self.random.choices(self.words, cum_weights=self.cumulative, k=length)
        for i in range(0, len(words), 12):
            words[i] = words[i].capitalize()
            words[i - 1] += self.random.choice((".", ".", ",", "?", ".\n", ":\n\n", f" {self.random.randint(1, 2000)}."))
        return " ".join(words).replace("\n ", "\n")

    def record(self, number: int) -> dict[str, Any]:
        """A pair as stage 4 reads it."""
        prompt = [{"role": "user", "content": self.text(50)}]
        return {"id": f"{self.random.getrandbits(64):016x}", "prompt": prompt, "chosen": self.text(150), "rejected": [self.text(150)]}


def write_records(path: Path, pairs: int) -> None:
    """`pairs` records as JSON Lines."""
    writer = Writer(1)
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(pairs):
            stream.write(json.dumps(writer.record(number), ensure_ascii=False) + "\n")


def train_tokenizer(folder: Path, vocabulary: int) -> None:
    """A Qwen2 tokenizer with the chat template of scripts/make_tiny_qwen.py."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_tiny_qwen", ROOT / "scripts/make_tiny_qwen.py")
    assert spec and spec.loader
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    writer = Writer(2)
    maker.make_tokenizer((writer.text(150) for _ in range(20_000)), vocabulary, "You are a helpful assistant.").save_pretrained(folder)


def run_ours(folder: Path, records: str, output: str, workers: int) -> float:
    """Seconds of the stage."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401  imports are outside the measurement on both sides

    from toolkits.lpo_data_preprocessing import build_pairs

    argv = ["--input", folder / records, "--output", folder / output, "--tokenizer", folder / "tokenizer", "--workers", workers]
    started = time.perf_counter()
    assert build_pairs.main([*map(str, argv), "--overwrite"]) == 0
    return time.perf_counter() - started


def run_trl(folder: Path, records: str, output: str, workers: int) -> float:
    """Seconds of TRL's preparation of the same pairs, and of saving them."""
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    rows = [json.loads(line) for line in open(folder / records, encoding="utf-8")]
    data = datasets.Dataset.from_list([
        {"prompt": row["prompt"]} | {
            key: [{"role": "assistant", "content": text}] for key, text in (("chosen", row["chosen"]), ("rejected", row["rejected"][0]))
        }
        for row in rows
    ])  # fmt: skip
    config = DPOConfig(output_dir=str(folder / "unused"), max_length=4096, dataset_num_proc=workers, use_cpu=True, bf16=False, report_to=[])
    trainer = object.__new__(DPOTrainer)  # preparing needs no model
    trainer._tokenizer = tokenizer
    started = time.perf_counter()
    trainer._prepare_dataset(data, tokenizer, config, "train").select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).save_to_disk(
        folder / output
    )
    return time.perf_counter() - started


class Memory(threading.Thread):
    """The peak of a process tree."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.done = psutil.Process(pid), 0, threading.Event()

    def run(self) -> None:
        """Sample until told to stop."""
        while not self.done.wait(0.25):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        own, shared = 0, 0
        try:
            for process in (self.root, *self.root.children(recursive=True)):
                info = process.memory_full_info()
                own, shared = own + info.uss, max(shared, info.rss - info.uss)
        except psutil.Error:
            return 0
        return own + shared


def measure(side: str, folder: Path, records: str, workers: int = 2, *, memory: bool = False) -> float:
    """Seconds of one side in a process of its own, or the peak of its memory in bytes."""
    argv = [sys.executable, __file__, "--folder", str(folder), "--side", side, "--records", records, "--workers", str(workers)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        watch = Memory(process.pid)
        if memory:
            watch.start()
        out, _ = process.communicate()
        watch.done.set()
    assert process.returncode == 0, f"{side} failed: run {' '.join(argv)}"
    return watch.peak if memory else float(out.split()[-1])


def sizes(folder: Path, pairs: int) -> list[str]:
    """What the store takes, its reference log-probs included."""
    import numpy as np

    from megatron_patch.data.pair_store import PairStore, write_reference_logps
    from megatron_patch.data.store_columns import ColumnBuilder

    store = PairStore(folder / "ours")
    write_reference_logps(
        store.prefix, np.random.default_rng(0).uniform(-900, -1, (pairs, 2)), store_fingerprint=store.fingerprint, weights_fingerprint="w",
        dtype="float32",
    )  # fmt: skip
    files = {path.name.removeprefix("ours"): path.stat().st_size for path in folder.glob("ours.*") if "plan" not in path.name}
    counted = sum(size for name, size in files.items() if "tally" not in name)
    tokens = store.manifest["tokens"]
    theirs = sum(path.stat().st_size for path in (folder / "trl").iterdir())
    beside = (counted - 4 * tokens) / pairs
    with zipfile.ZipFile(folder / "ours.meta.npz") as columns:
        ids = columns.getinfo("id_utf8.npy").compress_size / pairs
    numbered = ColumnBuilder()
    for i in range(pairs):
        numbered.add(f"train-{i}-0", f"prompt {i}", None, i + 1)
    numbered.save(folder / "numbered.npz")
    with_numbers = beside - (files[".meta.npz"] - (folder / "numbered.npz").stat().st_size) / pairs
    return [
        f"tokens a pair: {tokens / pairs:.1f} (prompt once)",
        "bytes a pair: " + ", ".join(f"{name} {size / pairs:.2f}" for name, size in sorted(files.items())),
        f"all of it, reference log-probs included: {counted / pairs:.1f} bytes a pair, {counted / tokens:.3f} a token",
        f"beyond 4 bytes a token: {beside:.2f} bytes a pair; budget 64: {'met' if beside <= 64 else f'missed by {beside - 64:.2f}'}",
        "of .idx, in Megatron's format: three lengths (12), where three sequences start (24), where the pair starts (8)",
        f"the same with ids that are numbers (train-17-0): {with_numbers:.2f}; {'met' if with_numbers <= 64 else 'missed'}",
        f"of .meta.npz the text of the ids: {ids:.2f} bytes a pair (64 random bits as 16 hex digits, what normalise makes, and a number)",
        f"save_to_disk: {theirs / pairs:.1f} bytes a pair, without reference log-probs",
        f"the paper's released code: {PAPER_BYTES} bytes a pair (2 x (4096 + 4) float32), {PAPER_BYTES * pairs / counted:.1f} times ours",
    ]


def compare(args: argparse.Namespace) -> list[str]:
    """The whole run, as lines of text."""
    folder = args.folder
    folder.mkdir(parents=True)
    train_tokenizer(folder / "tokenizer", args.vocabulary)
    write_records(folder / "pairs.jsonl", args.pairs)
    times: dict[str, list[float]] = {"ours": [], "trl": []}
    for _ in range(args.repetitions):
        for side in times:
            times[side].append(measure(side, folder, "pairs.jsonl"))
    speed = {side: args.pairs / statistics.median(values) for side, values in times.items()}
    ratio = speed["ours"] / speed["trl"]
    lines = [
        *(f"{side}: {speed[side]:.0f} pairs/s, median of {', '.join(f'{v:.1f}' for v in times[side])} s" for side in times),
        f"ratio of the medians: {ratio:.2f}; target 3: {'met' if ratio >= 3 else f'missed by {3 - ratio:.2f}'}",
        f"ratios of neighbouring runs: {', '.join(f'{b / a:.2f}' for a, b in zip(times['ours'], times['trl'], strict=True))}",
        *sizes(folder, args.pairs),
    ]
    return [*lines, *memory(args)]


def memory(args: argparse.Namespace) -> list[str]:
    """Memory of both sides, and of ours with ten times the pairs."""
    write_records(args.folder / "many.jsonl", args.many)
    peaks = {side: measure(side, args.folder, "pairs.jsonl", memory=True) for side in ("ours", "trl")}
    peak = measure("ours", args.folder, "many.jsonl", memory=True)
    grown = (peak - peaks["ours"]) / (args.many - args.pairs)
    (args.folder / "many.jsonl").unlink()
    return [
        *(f"peak memory, {args.pairs} pairs, {side}: {peaks[side] / 2**20:.0f} MiB" for side in peaks),
        f"peak memory, {args.many} pairs, ours: {peak / 2**20:.0f} MiB, {grown:.0f} bytes for each pair more",
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for inputs and outputs; must not exist")
    parser.add_argument("--pairs", type=int, default=20_000, help="of both sides")
    parser.add_argument("--many", type=int, default=200_000, help="of the second measurement of memory")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="entries of the tokenizer")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--records", default="pairs.jsonl", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison, or, inside it, the seconds of one side."""
    args = parse(argv)
    if args.side:
        output = "ours" if args.records == "pairs.jsonl" else "many"
        run = {"ours": run_ours, "trl": run_trl}[args.side]
        if args.side == "trl":
            shutil.rmtree(args.folder / "trl", ignore_errors=True)
        print(run(args.folder, args.records, output if args.side == "ours" else "trl", args.workers))
        return 0
    if args.folder.exists():
        print(f"[error] build_pairs: {args.folder}: exists already", file=sys.stderr)
        return 2
    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "transformers", "datasets", "trl", "regex"))
    print(f"# {len(psutil.Process().cpu_affinity())} cores, Python {platform.python_version()}, {versions}")
    print(f"$ python benchmarks/build_pairs.py --folder {args.folder} --pairs {args.pairs} --repetitions {args.repetitions}")
    print(f"{args.pairs} generated pairs, tokenizer of {args.vocabulary} entries trained on the same generator's text, 2 processes a side")
    print("\n".join(compare(args)))
    shutil.rmtree(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
