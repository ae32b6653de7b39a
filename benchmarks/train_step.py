"""A training step of preference optimisation, ours against TRL's `DPOTrainer`: pairs per second and peak memory, on one machine.

Both sides get the same random Qwen2 weights, the same pairs in the same order (as many a step), sigmoid loss with precomputed reference
log-probs, AdamW with the same constants, float32. A step's time is from the end of the step before it: loading, collating, forward,
backward, optimizer and logging are in both clocks, tokenising and the reference pass in neither. The first step of each process warms up
and is not counted; then both losses of the second must agree to 1e-4. Sides take turns, each time a new process; medians over all steps.

TRL's fastest setting is looked for first (pairs on the device at a time; its padding-free mode is off in this version, it says so), and
ours too (tokens of a micro-batch). R is TRL's floating-point operations over ours, both counted as what a step needs (6 per parameter and
token, attention by squares, the output layer for scored tokens), TRL's with its padding: what the ratio of times should be if both were
equally fast at it.

    python benchmarks/train_step.py --output benchmarks/train_step --cases small-8k-gsm8k small-8k-tail ...
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BETA, RATE, SEED = 0.1, 1e-4, 1
SHAPES = {"small": (4, 512, 1408, 8, 2), "base": (12, 896, 4864, 14, 2)}
"""layers, hidden, intermediate, heads, key/value heads: a toy, and half the depth of Qwen2.5 0.5B."""
VOCABULARIES = {"8k": 8_192, "152k": 151_936}
PAIRS = ("gsm8k", "tail")


class Case(NamedTuple):
    """What is trained on what."""

    shape: str
    vocabulary: str
    pairs: str
    batch: int

    @property
    def name(self) -> str:
        """As the command line has it."""
        return f"{self.shape}-{self.vocabulary}-{self.pairs}"


CASES = {case.name: case for case in (Case(s, v, p, 8) for s in SHAPES for v in VOCABULARIES for p in PAIRS)}


def gsm8k_pairs(count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Real text: a question, a right and a wrong solution of GSM8K's models, in ids of an 8k byte-level BPE trained on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    lines = (Path(os.environ["GSM8K_DIR"]) / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = []
    for row in map(json.loads, lines):
        solutions = [value for value in row.values() if isinstance(value, dict)]
        right, wrong = ([s["solution"] for s in solutions if s["is_correct"] is mark] for mark in (True, False))
        if right and wrong:
            texts.append((row["question"], right[0], wrong[0]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8_000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((text for row in texts for text in row), trainer)
    return [tuple(tokenizer.encode(text).ids for text in row) for row in texts[:count]]  # type: ignore[misc]


def tail_pairs(count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Random tokens; lengths of prompt + response log-normal with median 300 and 99th percentile 3,000, a third of them prompt."""
    rng = np.random.default_rng(SEED)
    pairs = []
    for _ in range(count):
        totals = np.clip(np.exp(rng.normal(np.log(300), np.log(10) / 2.326, 2)), 16, 4000).astype(int)
        prompt = max(4, int(totals.min()) // 3)
        pairs.append(tuple(rng.integers(0, 8_000, n).tolist() for n in (prompt, *(totals - prompt))))
    return pairs  # type: ignore[return-value]


def make_model(folder: Path, case: Case) -> None:
    """Random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    layers, hidden, ffn, heads, groups = SHAPES[case.shape]
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=VOCABULARIES[case.vocabulary], hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def make_materials(folder: Path, case: Case, steps: int) -> None:
    """Model, store with reference log-probs, and the same pairs for TRL in the order in which ours visits them."""
    from megatron_patch.data.batch_plan import PairOrder
    from megatron_patch.data.pair_store import PairStoreWriter

    make_model(folder / "model", case)
    count = steps * case.batch
    pairs = (gsm8k_pairs if case.pairs == "gsm8k" else tail_pairs)(count)
    with PairStoreWriter(folder / "pairs", "pairs") as writer:
        for i, pair in enumerate(pairs):
            writer.add([np.array(ids) for ids in pair], id=f"p{i}", group=str(i))
        writer.commit(tokenizer={"fingerprint": "none"}, template={"fingerprint": "none"}, sources=[])
    order = PairOrder([count], seed=SEED).positions(0, count)
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pairs[i], strict=True)) for i in order]
    (folder / "trl.json").write_text(json.dumps(rows), encoding="utf-8")
    reference_pass(folder)


def reference_pass(folder: Path) -> None:
    """Reference log-probs of ``folder/pairs`` by ``folder/model``."""
    torchrun("-m", "toolkits.lpo_data_preprocessing.reference_logps", "--device", "cpu", "--seq-length", 4096,
             "--hf-path", folder / "model", "--pair-data", folder / "pairs")  # fmt: skip


def torchrun(*words: object, processes: int = 1) -> None:
    """Processes that share two cores."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *words]
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, 2 // processes)), PYTHONWARNINGS="ignore")
    subprocess.run([*map(str, command)], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def run_ours(folder: Path, case: Case, steps: int, tokens: int, *flags: object, processes: int = 1) -> dict[str, Any]:
    """Seconds and losses of every step, and the most resident memory of a process."""
    save = folder / f"run-{time.time_ns()}"
    argv = ["--device", "cpu", "--hf-path", folder / "model", "--pair-data", folder / "pairs", "--seq-length", 4096, "--seed", SEED]
    argv += ["--loss-type", "sigmoid", "--beta", BETA, "--global-batch-size", case.batch, "--train-iters", steps, "--lr", RATE]
    argv += ["--min-lr", RATE, "--lr-decay-style", "constant", "--weight-decay", 0, "--adam-beta1", 0.9, "--adam-beta2", 0.999]
    argv += ["--adam-eps", 1e-8, "--clip-grad", 1.0, "--no-parity-check", "--max-tokens-per-micro-batch", tokens]
    argv += ["--save", save, "--save-interval", 10**6, "--no-save-optim", *flags]
    torchrun(ROOT / "examples/qwen2_5/train_qwen.py", *argv, processes=processes)
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seconds": [row["seconds"] for row in rows], "losses": [row["loss"] for row in rows], "rows": rows,
        "bytes": max(row["peak_memory_bytes"] for row in rows),
    }  # fmt: skip


def run_trl(folder: Path, case: Case, steps: int, at_once: int) -> dict[str, Any]:
    """The same of TRL, in this process."""
    import torch
    from datasets import Dataset
    from transformers import Qwen2ForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        """Notes when steps end, and their losses."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])
                self.ends.append(time.perf_counter())

    class Ordered(DPOTrainer):
        """Takes the pairs as they lie."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # ids already

    config = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=at_once, gradient_accumulation_steps=case.batch // at_once,
        max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999,
        adam_epsilon=1e-8, max_grad_norm=1.0, beta=BETA, loss_type=["sigmoid"], precompute_ref_log_probs=True, precompute_ref_batch_size=2,
        max_length=None, use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no", gradient_checkpointing=False,
        disable_tqdm=True, dataloader_num_workers=0, disable_dropout=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    rows = Dataset.from_list(json.loads((folder / "trl.json").read_text(encoding="utf-8")))
    clock = Clock()
    trainer = Ordered(model, args=config, train_dataset=rows, processing_class=_tokenizer(), callbacks=[clock])
    trainer.train()
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    return {"seconds": seconds, "losses": clock.losses, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _tokenizer() -> Any:
    """TRL asks for one; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])), pad_token="a", eos_token="b")


def flops(folder: Path, case: Case, at_once: int) -> dict[str, float]:
    """Operations of all counted steps: ours, ours with shared prompts, TRL's with its padding."""
    from megatron_patch.data.batch_plan import PairOrder
    from megatron_patch.data.pair_dataset import SampleSet, Work
    from megatron_patch.model.qwen2 import read_qwen2_config
    from megatron_patch.throughput import useful_flops

    model, samples = read_qwen2_config(str(folder / "model")), SampleSet([str(folder / "pairs")], "pairs")
    rows = json.loads((folder / "trl.json").read_text(encoding="utf-8"))[case.batch :]
    longest = [
        max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows[i : i + at_once])
        for i in range(0, len(rows), at_once)
    ]
    scored = np.array([len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows])
    padded = np.array([2 * at_once * n for n in longest]), np.array([2 * at_once * n * n for n in longest])
    counted = PairOrder([len(samples)], seed=SEED).positions(case.batch, len(samples))
    sums = {}
    for name, share in (("ours", False), ("ours, shared prompts", True)):
        sums[name] = float(useful_flops(model, Work(*(column[counted] for column in samples.work(share)))).sum())
    body = useful_flops(model, Work(*padded, np.zeros(len(longest), dtype=np.int64))).sum()
    nothing = np.zeros(len(scored), dtype=np.int64)
    return sums | {"trl": float(body + useful_flops(model, Work(nothing, nothing, scored)).sum())}


def in_a_process(folder: Path, case: Case, steps: int, side: str, setting: int) -> dict[str, Any]:
    """One side's run, with both cores."""
    words = ["--side", side, "--folder", folder, "--cases", case.name, "--setting", setting, "--steps", steps]
    environment = dict(os.environ, OMP_NUM_THREADS="2", PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *map(str, words)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, f"{side} failed: {words}"
    return json.loads(done.stdout.splitlines()[-1])


def fastest(measure: Callable[[int], dict[str, Any]], settings: Sequence[int]) -> tuple[int, dict[int, float]]:
    """The setting whose second step is shortest, and the seconds of all."""
    tried = {setting: measure(setting)["seconds"][1] for setting in settings}
    return min(tried, key=lambda setting: tried[setting]), tried


def compare(case: Case, folder: Path, steps: int, repetitions: int) -> dict[str, Any]:
    """All of one case."""
    folder.mkdir(parents=True)
    make_materials(folder, case, steps)
    settings = {"trl": (1, 2, case.batch), "ours": (1024, 4096, 16384)}
    settings["ours"] = tuple(tokens for tokens in settings["ours"] if tokens >= longest_pair(folder))
    best, tried = {}, {}
    for side, choices in settings.items():
        best[side], tried[side] = fastest(lambda setting, side=side: in_a_process(folder, case, 2, side, setting), choices)  # type: ignore[misc]
    best["ours, shared prompts"] = best["ours"]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in best}
    for _ in range(repetitions):
        for side, setting in best.items():
            runs[side].append(in_a_process(folder, case, steps, side, setting))
    losses = {side: runs[side][0]["losses"] for side in runs}
    assert all(abs(losses[side][i] - losses["trl"][i]) < 1e-4 for side in losses for i in (0, 1)), f"the losses differ: {losses}"
    seconds = {side: statistics.median(s for run in each for s in run["seconds"][1:]) for side, each in runs.items()}
    return {
        "case": case.name, "batch": case.batch, "steps": steps, "settings": {k: list(v) for k, v in settings.items()}, "tried": tried,
        "best": best, "seconds": seconds, "flops": flops(folder, case, best["trl"]), "losses": losses,
        "bytes": {side: max(run["bytes"] for run in each) for side, each in runs.items()}, "runs": runs,
    }  # fmt: skip


def longest_pair(folder: Path) -> int:
    """Tokens of the longest pair, its prompt counted twice."""
    from megatron_patch.data.pair_dataset import SampleSet

    return int(SampleSet([str(folder / "pairs")], "pairs").tokens.max())


def report(results: list[dict[str, Any]], title: str) -> str:
    """A Markdown page."""
    lines = [title, "", "| case | side | setting | s/step | pairs/s | x TRL | R | of R | peak GiB | x TRL's |", "|---" * 10 + "|"]
    for result in results:
        trl_seconds, trl_bytes = result["seconds"]["trl"], result["bytes"]["trl"]
        for side, seconds in result["seconds"].items():
            ratio, wanted = trl_seconds / seconds, result["flops"]["trl"] / result["flops"][side]
            lines.append(
                f"| {result['case']} | {side} | {result['best'][side]} | {seconds:.2f} | {result['batch'] / seconds:.3f} | {ratio:.2f} "
                f"| {wanted:.2f} | {ratio / wanted:.2f} | {result['bytes'][side] / 2**30:.2f} | {result['bytes'][side] / trl_bytes:.2f} |"
            )
    lines += ["", "Settings: TRL's is pairs on the device at a time, ours tokens of a micro-batch. Seconds of a step with each one tried:"]
    for result in results:
        for side, tried in result["tried"].items():
            lines.append(f"- {result['case']}, {side}: " + ", ".join(f"{setting}: {s:.2f}" for setting, s in tried.items()))
    lines += ["", "Operations of the counted steps (TFLOP): " + "; ".join(
        f"{r['case']} " + ", ".join(f"{side} {count / 1e12:.2f}" for side, count in r["flops"].items()) for r in results
    )]  # fmt: skip
    return "\n".join([*lines, "", "![ratios](train_step.png)", ""])


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Ratios to TRL beside R."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.75 * len(results)), constrained_layout=True)
    for i, result in enumerate(results):
        for offset, side, color in ((0.18, "ours", "tab:blue"), (-0.18, "ours, shared prompts", "tab:green")):
            ratio = result["seconds"]["trl"] / result["seconds"][side]
            axes.barh(i + offset, ratio, 0.32, color=color, label=side if i == 0 else None)
            axes.plot([result["flops"]["trl"] / result["flops"][side]] * 2, [i + offset - 0.17, i + offset + 0.17], color="k", lw=2)
    axes.axvline(1, color="gray", lw=0.8)
    axes.set_yticks(range(len(results)), [result["case"] for result in results])
    axes.set_xlabel("pairs per second over TRL's (black: R, the ratio of operations)")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="writes PREFIX.json, PREFIX.md and PREFIX.png")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="SHAPE-VOCABULARY-PAIRS (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark-train-step"), help="for models, stores and runs")
    parser.add_argument("--steps", type=int, default=3, help="of each process; the first is not counted")
    parser.add_argument("--repetitions", type=int, default=2, help="processes of each side")
    parser.add_argument("--side", choices=("ours", "ours, shared prompts", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report, or, inside that, one side."""
    args = parse(argv)
    if args.side:
        case = CASES[args.cases[0]]
        if args.side == "trl":
            print(json.dumps(run_trl(args.folder, case, args.steps, args.setting)))
        else:
            flags = [] if args.side == "ours" else ["--share-prompt"]
            print(json.dumps(run_ours(args.folder, case, args.steps, args.setting, *flags)))
        return 0
    import torch
    import transformers
    import trl

    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
    machine += f"transformers {transformers.__version__}, TRL {trl.__version__}"
    results = []
    for name in args.cases:
        results.append(compare(CASES[name], args.folder.resolve() / name, args.steps, args.repetitions))
        command = f"python benchmarks/train_step.py --output {args.output} --cases {' '.join(args.cases)}"
        title = f"# A training step beside TRL's\n\n`{command}`; {machine}"
        Path(f"{args.output}.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")
        Path(f"{args.output}.md").write_text(report(results, title), encoding="utf-8")
        draw(results, Path(f"{args.output}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
