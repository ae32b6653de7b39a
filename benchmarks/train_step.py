"""A training step of preference optimisation, ours against TRL's `DPOTrainer`: pairs per second and peak memory, on one machine.

Both sides get the same random Qwen2 weights, the same pairs in the same order (as many a step), sigmoid loss with precomputed reference
log-probs, AdamW with the same constants, float32 (on a GPU bfloat16 with float32 master weights; never run there). A step's time is from
the end of the step before it: loading, collating, forward, backward, optimizer and logging are in both clocks, tokenising and the
reference pass in neither. The first step of each process warms up and is not counted. The losses of every step must agree to 1e-4. Sides
take turns, each time a new process; of each step the median over the turns, and of these the mean. Cases that PREFIX.json has are kept.

The faster settings are looked for first, one run of two steps each: TRL's pairs on the device at a time (its padding-free mode is off in
this version, it says so), our tokens of a micro-batch. Other settings were not tried. "loop by hand" is the same step in forty lines of
torch: what any framework costs shows beside it. R is TRL's floating-point operations over ours: what the ratio of times should be if both
were equally fast at it. Counted are 6 per parameter and token and attention by squares; TRL's with its padding, and off a GPU the output
layer at every position (trl/trainer/utils.py: only its Triton kernels leave unscored positions out); ours at scored tokens. Recomputation
counts for nobody.

    python -m benchmarks.train_step --output benchmarks/train_step --cases small-8k-gsm8k small-8k-tail ...
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.materials import BETA, CASES, DEVICE, ON_CPUS, RATE, Case, flops_of_pairs, make_materials, order_of, run_ours

SIDES = ("trl", "loop by hand", "ours", "ours, shared prompts")


def run_trl(folder: Path, case: Case, steps: int, at_once: int) -> dict[str, Any]:
    """The same of TRL, in this process."""
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
        max_length=None, use_cpu=DEVICE == "cpu", bf16=DEVICE == "cuda",
        report_to=[], logging_steps=1, save_strategy="no", gradient_checkpointing=False,
        disable_tqdm=True, dataloader_num_workers=0, disable_dropout=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    rows = Dataset.from_list(json.loads((folder / "trl.json").read_text(encoding="utf-8")))
    clock = Clock()
    trainer = Ordered(model, args=config, train_dataset=rows, processing_class=_tokenizer(), callbacks=[clock])
    trainer.train()
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    return {"seconds": seconds, "losses": clock.losses, "bytes": peak_bytes()}


def run_loop(folder: Path, case: Case, steps: int, _: int) -> dict[str, Any]:
    """The same written by hand, with nothing that a framework adds: a response at a time, logits of response tokens, torch's AdamW."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa").to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rows = json.loads((folder / "trl.json").read_text(encoding="utf-8"))[: steps * case.batch]

    def logp(prompt: list[int], response: list[int]) -> torch.Tensor:
        tokens = torch.tensor([prompt + response], device=DEVICE)
        hidden = model.model(tokens).last_hidden_state[0, len(prompt) - 1 : -1]
        return torch.log_softmax(model.lm_head(hidden).float(), dim=-1).gather(1, tokens[0, len(prompt) :].unsqueeze(1)).sum()

    @torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")
    def margin(row: dict[str, list[int]]) -> torch.Tensor:
        return logp(row["prompt_ids"], row["chosen_ids"]) - logp(row["prompt_ids"], row["rejected_ids"])

    with torch.no_grad():
        reference = [margin(row) for row in rows]
    seconds, losses = [], []
    for step in range(steps):
        started, total = time.perf_counter(), 0.0
        for i in range(step * case.batch, (step + 1) * case.batch):
            loss = -torch.nn.functional.logsigmoid(BETA * (margin(rows[i]) - reference[i])) / case.batch
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(total)
    return {"seconds": seconds, "losses": losses, "bytes": peak_bytes()}


def peak_bytes() -> int:
    """The most resident memory of this process so far (its own: getrusage's also counts the process that started it)."""

    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _tokenizer() -> Any:
    """TRL asks for one; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])), pad_token="a", eos_token="b")


def flops_of_trl(folder: Path, case: Case, at_once: int) -> float:
    """Operations of all counted steps, both responses of all pairs that are on the device at a time as long as the longest of them."""
    from megatron_patch.data.pair_dataset import Work
    from megatron_patch.model.qwen2 import read_qwen2_config
    from megatron_patch.throughput import useful_flops

    model = read_qwen2_config(str(folder / "model"))
    rows = json.loads((folder / "trl.json").read_text(encoding="utf-8"))[case.batch :]
    longest = np.array([
        max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows[i : i + at_once])
        for i in range(0, len(rows), at_once)
    ])  # fmt: skip
    rows_at_once = 2 * at_once
    scored = rows_at_once * (longest - 1)
    if DEVICE == "cuda":
        responses = np.array([len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows])
        scored = np.add.reduceat(responses, np.arange(0, len(rows), at_once))
    return float(useful_flops(model, Work(rows_at_once * longest, rows_at_once * longest**2, scored)).sum())


def flops(folder: Path, case: Case, at_once: int) -> dict[str, float]:
    """Operations of all counted steps of each side."""
    separate, shared = (flops_of_pairs(folder, share_prompts=share) for share in (False, True))
    counted = order_of(len(separate))[case.batch :]
    ours = float(separate[counted].sum())
    trl, together = flops_of_trl(folder, case, at_once), float(shared[counted].sum())
    return {"trl": trl, "loop by hand": ours, "ours": ours, "ours, shared prompts": together}


def in_a_process(folder: Path, case: Case, steps: int, side: str, setting: int) -> dict[str, Any]:
    """One side's run, with both cores."""
    words = ("--side", side, "--folder", folder, "--cases", case.name, "--setting", setting, "--steps", steps, "--output", "-")
    found = json.loads(report.python("-m", "benchmarks.train_step", *words)[-1].text)
    return {name: value for name, value in found.items() if name != "rows"}


def fastest(measure: Callable[[int], dict[str, Any]], settings: Sequence[int]) -> tuple[int, dict[int, dict[str, float]]]:
    """The setting whose second step is shortest, and seconds and bytes of all."""
    runs = {setting: measure(setting) for setting in settings}
    tried = {setting: {"seconds": run["seconds"][1], "bytes": run["bytes"]} for setting, run in runs.items()}
    return min(tried, key=lambda setting: tried[setting]["seconds"]), tried


def compare(case: Case, folder: Path, steps: int, repetitions: int) -> dict[str, Any]:
    """All of one case."""
    make_materials(folder, case, steps)
    settings = {
        "trl": tuple(n for n in (1, 2, 4, 8) if n <= (case.batch if case.shape == "small" else 2)),
        "ours": tuple(n for n in (1024, 4096, 16384) if n >= longest_pair(folder)),
    }
    best, tried = {}, {}
    for side, choices in settings.items():
        best[side], tried[side] = fastest(lambda setting, side=side: in_a_process(folder, case, 2, side, setting), choices)  # type: ignore[misc]
    best = {"trl": best["trl"], "loop by hand": 1, "ours": best["ours"], "ours, shared prompts": best["ours"]}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(repetitions):
        for side in SIDES:
            runs[side].append(in_a_process(folder, case, steps, side, best[side]))
    losses = {side: runs[side][0]["losses"] for side in runs}
    near, every = 2e-2 if DEVICE == "cuda" else 1e-4, [run["losses"] for each in runs.values() for run in each]
    assert all(abs(a - b) < near for each in every for a, b in zip(each, losses["trl"], strict=True)), f"losses differ: {every}"
    assert abs(losses["trl"][-1] - np.log(2)) > 1e-3, f"the loss stands still: {losses}"
    seconds = {side: seconds_a_step([run["seconds"][1:] for run in each]) for side, each in runs.items()}
    return {
        "case": case.name, "batch": case.batch, "steps": steps, "tried": tried, "best": best, "seconds": seconds, "losses": losses,
        "flops": flops(folder, case, best["trl"]), "bytes": {side: max(run["bytes"] for run in each) for side, each in runs.items()},
        "runs": runs,
    }  # fmt: skip


def seconds_a_step(runs: Sequence[Sequence[float]]) -> float:
    """Of each step the median over runs; the mean of these, as steps differ in what they have to do."""
    return statistics.mean(statistics.median(times) for times in zip(*runs, strict=True))


def longest_pair(folder: Path) -> int:
    """Tokens of the longest pair, its prompt counted twice."""
    from megatron_patch.data.pair_dataset import SampleSet

    return int(SampleSet([str(folder / "pairs")], "pairs").tokens.max())


def page(results: list[dict[str, Any]]) -> list[str]:
    """Tables in Markdown."""
    rows = []
    for result in results:
        for side, seconds in result["seconds"].items():
            ratio, wanted = (result[what]["trl"] / result[what][side] for what in ("seconds", "flops"))
            numbers = (seconds, result["batch"] / seconds, ratio, wanted, ratio / wanted)
            memory = (result["bytes"][side] / 2**30, result["bytes"][side] / result["bytes"]["trl"])
            rows.append([result["case"], side, str(result["best"][side]), *(f"{number:.2f}" for number in (*numbers, *memory))])
    head = ("case", "side", "setting", "s/step", "pairs/s", "x TRL", "R", "of R", "peak GiB", "x TRL's")
    lines = [
        *report.table(head, rows),
        "",
        "R is the ratio of operations, 0.9 of it the target.",
        "Setting: TRL's is pairs on the device at a time, ours tokens of a micro-batch.",
    ]
    lines += ["Each one tried, once, its second step:", ""]
    for result in results:
        for side, tried in result["tried"].items():
            found = (f"{setting}: {of['seconds']:.2f} s, {of['bytes'] / 2**30:.2f} GiB" for setting, of in tried.items())
            lines.append(f"- {result['case']}, {side}: {'; '.join(found)}")
    lines += ["", "Peak memory of the largest settings, ours over TRL's (target 0.5 at small-152k):", ""]
    for result in results:
        ours, trl = (result["tried"][side][max(result["tried"][side], key=int)]["bytes"] for side in ("ours", "trl"))
        lines.append(f"- {result['case']}: {ours / 2**30:.2f} of {trl / 2**30:.2f} GiB, {ours / trl:.2f}")
    lines += ["", "Ours over the loop by hand (below 1: ours is faster; what Megatron, its wrapper and the CPU backend cost, net):", ""]
    for result in results:
        lines.append(f"- {result['case']}: {result['seconds']['ours'] / result['seconds']['loop by hand']:.2f}")
    counts = "; ".join(f"{r['case']} " + ", ".join(f"{side} {n / 1e12:.2f}" for side, n in r["flops"].items()) for r in results)
    return [*lines, "", f"Operations of the counted steps (TFLOP): {counts}"]


def draw(results: list[dict[str, Any]]) -> Any:
    """Ratios to TRL beside R."""
    figure, plot = report.axes(8, 1.2 + 0.75 * len(results))
    for i, result in enumerate(results):
        for offset, side, color in ((-0.18, "ours", "tab:blue"), (0.18, "ours, shared prompts", "tab:green")):
            ratio = result["seconds"]["trl"] / result["seconds"][side]
            plot.barh(i + offset, ratio, 0.32, color=color, label=side if i == 0 else None)
            plot.plot([result["flops"]["trl"] / result["flops"][side]] * 2, [i + offset - 0.17, i + offset + 0.17], color="k", lw=2)
    plot.axvline(1, color="gray", lw=0.8)
    plot.set_yticks(range(len(results)), [result["case"] for result in results])
    plot.set_xlabel("pairs per second over TRL's (black: R, the ratio of operations)")
    plot.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report, or, inside that, one side."""
    parser = report.parser(__doc__, repetitions=2, folder="benchmark-train-step", steps=3)
    parser.add_argument("--cases", nargs="+", default=list(ON_CPUS), choices=CASES, help="SHAPE-VOCABULARY-PAIRS (default: those for CPUs)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        run: Callable[..., dict[str, Any]] = {"trl": run_trl, "loop by hand": run_loop}.get(args.side, run_ours)
        flags = ["--share-prompt"] if args.side == SIDES[-1] else []
        print(json.dumps(run(args.folder, CASES[args.cases[0]], args.steps, args.setting, *flags)))
        return 0
    where, results = report.machine("transformers", "trl"), report.results(args.output)
    for name in args.cases:
        if name not in {result["case"] for result in results}:
            results.append({"machine": where, **compare(CASES[name], args.folder.resolve() / name, args.steps, args.repetitions)})
        machines = "; ".join(dict.fromkeys(result["machine"] for result in results))
        report.write(args.output, "A training step beside TRL's", results, page(results), machines, draw(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
