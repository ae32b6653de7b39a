"""Stage 2: n samples per prompt from the policy, at the paper's temperature 1 and top-p 1, in blocks that can be lost and made again.

The unit of work is a block of 64 consecutive input records, generated as one batch. A finished block is a file of its own under
`<output>.blocks/`; a restart makes only the missing ones and the output is put together at the end. The noise of a sample depends on
(seed, record id, sample number) alone, and a block's batch is fixed by the input's order, so a block made again is byte for byte the same.
`<output>.blocks/plan.json` says what the blocks were made with: blocks of another model, input or option are refused. A finished output
keeps its plan as `<output>.plan.json`: asked for once more with the same plan it stays as it is, so a requeued job goes on at any point.

A candidate is {"text", "finish_reason"}: "stop" if the model ended its turn, "length" if it was cut. Nothing is appended to a cut answer.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.data.atomic_files import read_json, sha256_file, write_json
from megatron_patch.evaluation.generate import PerRowSampler, generate
from toolkits.lpo_data_preprocessing.records import (
    Record,
    StageParser,
    Tally,
    check_messages,
    close_stage,
    get_field,
    jsonl_writer,
    progress,
    read_records,
    refuse_existing,
    run_stage,
)
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

BLOCK = 64
_PLAN_OPTIONS = ("engine", "n", "temperature", "top_p", "max_new_tokens", "max_prompt_length", "seed", "dtype", "response_end")


@dataclass(frozen=True)
class Request:
    """One sample to be made."""

    prompt: list[int]
    key: str
    """"<record id>/<sample number>": what its noise depends on, beside the seed."""


Engine = Callable[[list[Request]], list[dict[str, str]]]
"""One block's requests -> one {"text", "finish_reason"} each, in order."""


def transformers_engine(args: argparse.Namespace, tokenizer: ChatTokenizer) -> Engine:
    """Sample with a transformers model loaded from `args.model` on `args.device`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    model.to(device).eval()

    def sample(requests: list[Request]) -> list[dict[str, str]]:
        sampler = PerRowSampler([request.key for request in requests], args.seed, args.temperature, args.top_p)
        prompts = [request.prompt for request in requests]
        outputs = generate(model, prompts, max_new_tokens=args.max_new_tokens, stop_ids=tokenizer.stop_ids, sampler=sampler)
        return [{"text": tokenizer.decode(output.ids), "finish_reason": output.finish_reason} for output in outputs]

    return sample


ENGINES: dict[str, Callable[[argparse.Namespace, ChatTokenizer], Engine]] = {"transformers": transformers_engine}


@dataclass(frozen=True)
class Blocks:
    """The folder of finished blocks of one output."""

    folder: Path
    count: int

    def path(self, index: int) -> Path:
        """File of block `index`."""
        return self.folder / f"{index:06d}.jsonl"

    def missing(self) -> list[int]:
        """Blocks not made yet."""
        return [index for index in range(self.count) if not self.path(index).exists()]

    def open(self, plan: dict[str, Any]) -> None:
        """Create the folder, or check that what is in it was made with the same plan; ValueError naming the difference."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "plan.json"
        if not path.exists():
            write_json(path, plan)
        recorded = read_json(path, "the plan of the finished blocks")
        _compare(plan, recorded, f"{self.folder}: holds blocks")

    def merge(self, output: str | Path, tally: Tally, max_drop_fraction: float) -> int:
        """Put the finished blocks together in input order; returns the number of candidates that were cut at the length limit."""
        cut = 0
        with jsonl_writer(output) as write:
            for index in range(self.count):
                for _, record in read_records(self.path(index)):
                    tally.read += 1
                    if "candidates" in record:
                        tally.kept += 1
                        cut += sum(candidate["finish_reason"] == "length" for candidate in record["candidates"])
                        write(record)
                    else:
                        tally.drop("prompt_too_long")
            tally.check(max_drop_fraction)
        return cut


def _compare(plan: dict[str, Any], recorded: dict[str, Any], what: str) -> None:
    differing = sorted(key for key in plan | recorded if plan.get(key) != recorded.get(key))
    if differing:
        was, now = recorded.get(differing[0]), plan.get(differing[0])
        raise ValueError(
            f"{what} made with another {', '.join(differing)} ({differing[0]} was {was!r}, is {now!r}); "
            "use another OUTPUT (--output) or --overwrite"
        )


@dataclass(frozen=True)
class Finished:
    """The plan and the contents of a finished output, beside it; written after the output and before its blocks go."""

    output: Path

    @property
    def path(self) -> Path:
        """The file."""
        return Path(f"{self.output}.plan.json")

    def record(self, plan: dict[str, Any]) -> None:
        """Say that the output is finished."""
        write_json(self.path, {"plan": plan, "output": sha256_file(self.output)})

    def holds(self, plan: dict[str, Any]) -> bool:
        """Whether the output is there, finished, and made with this plan; ValueError for another plan or changed contents."""
        if not self.path.exists() or not self.output.exists():
            return False
        recorded = read_json(self.path, "the plan of the finished output")
        _compare(plan, recorded["plan"], f"{self.output}: was")
        if recorded["output"] != sha256_file(self.output):
            raise ValueError(f"{self.output}: was changed since it was made; use another OUTPUT (--output) or --overwrite")
        return True


def model_fingerprint(folder: str | Path) -> str:
    """Names and sha256 (16 digits each) of a Hugging Face folder's configuration and weights; ValueError if it holds none."""
    files = sorted(path for pattern in ("config.json", "*.safetensors") for path in Path(folder).glob(pattern))
    if len(files) < 2:
        raise ValueError(f"{folder}: no Hugging Face checkpoint (config.json and *.safetensors) here")
    return ",".join(f"{path.name}:{sha256_file(path)[:16]}" for path in files)


def _plan(args: argparse.Namespace, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Everything that changes the samples."""
    plan = {name: getattr(args, name) for name in _PLAN_OPTIONS} | {"block": BLOCK, "input": sha256_file(args.input)}
    fingerprints = {"tokenizer": tokenizer.fingerprint, "template": tokenizer.template_fingerprint}
    return plan | {"model": model_fingerprint(args.model)} | fingerprints


def _read_input(path: str) -> list[Record]:
    """All records, checked before anything is generated; ids must be there and unique, since noise hangs on them."""
    records, seen = [], dict[str, int]()
    for number, record in read_records(path):
        where = f"{path}:{number}"
        check_messages(get_field(record, "prompt", list, where), where)
        id = get_field(record, "id", str, where)
        if id in seen:
            raise ValueError(f"{where}: id {id!r} was given on line {seen[id]} already")
        seen[id] = number
        records.append(record)
    if not records:
        raise ValueError(f"{path}: no records")
    return records


def make_block(records: Sequence[Record], tokenizer: ChatTokenizer, engine: Engine, n: int, max_prompt_length: int) -> Iterator[Record]:
    """The records of one block with "candidates"; a record whose prompt is too long passes without them."""
    prompts = [tokenizer.prompt_ids(record["prompt"]) for record in records]
    fits = [len(prompt) <= max_prompt_length for prompt in prompts]
    requests = [
        Request(prompt, f"{record['id']}/{sample}")
        for record, prompt, fit in zip(records, prompts, fits, strict=True)
        if fit
        for sample in range(n)
    ]
    answers = iter(engine(requests))
    for record, fit in zip(records, fits, strict=True):
        bare = {name: value for name, value in record.items() if name != "candidates"}
        yield bare | {"candidates": [next(answers) for _ in range(n)]} if fit else bare


def _check(args: argparse.Namespace) -> None:
    for name in ("n", "max_new_tokens", "max_prompt_length"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    PerRowSampler([], args.seed, args.temperature, args.top_p)  # refuses a bad temperature or top-p before a model is loaded
    ours = any(Path(f"{args.output}{suffix}").exists() for suffix in (".plan.json", ".blocks/plan.json"))
    refuse_existing(args.output, args.overwrite or ours)


def _run(args: argparse.Namespace) -> str:
    _check(args)
    records = _read_input(args.input)
    tokenizer = ChatTokenizer(args.model, response_end=args.response_end)
    blocks = Blocks(Path(f"{args.output}.blocks"), -(-len(records) // BLOCK))
    plan, finished = _plan(args, tokenizer), Finished(Path(args.output))
    if args.overwrite:
        finished.path.unlink(missing_ok=True)
        shutil.rmtree(blocks.folder, ignore_errors=True)
    elif finished.holds(plan):
        shutil.rmtree(blocks.folder, ignore_errors=True)  # an interruption may have left it
        return f"finished before with the same plan, kept -> {args.output}"
    blocks.open(plan)
    missing = blocks.missing()
    engine = ENGINES[args.engine](args, tokenizer) if missing else None
    found = blocks.count - len(missing)
    for index in progress(missing, what="candidates", unit="block", total=blocks.count, initial=found):
        assert engine is not None
        with jsonl_writer(blocks.path(index)) as write:
            part = records[index * BLOCK : (index + 1) * BLOCK]
            for record in make_block(part, tokenizer, engine, args.n, args.max_prompt_length):
                write(record)
    tally = Tally()
    cut = blocks.merge(args.output, tally, args.max_drop_fraction)
    summary = close_stage(tally, args.output)
    finished.record(plan)
    shutil.rmtree(blocks.folder)
    share = cut / max(1, tally.kept * args.n)
    samples = f"  samples   {tally.kept * args.n}, {share:.1%} cut at the limit"
    return f"{summary}\n{samples}\n  blocks    {found} found, {len(missing)} made"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = StageParser(
        "candidates", "Sample candidate answers from the policy; interrupted, it goes on where it was.",
        "--input records.jsonl --output candidates.jsonl --model outputs/sft-hf -n 4 --max-new-tokens 512",
        output="records with candidates, one per line; finished blocks wait in PATH.blocks/ meanwhile",
    )  # fmt: skip
    parser.add_argument("--model", required=True, metavar="DIR", help="local Hugging Face checkpoint with tokenizer: the policy to sample")
    parser.add_argument("--engine", choices=list(ENGINES), default="transformers", help="what generates (default %(default)s)")
    parser.add_argument("-n", "--n", type=int, default=1, metavar="N", help="samples per prompt (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default %(default)s, as in the paper")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus, 0 to 1 (default %(default)s: all tokens, as in the paper)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="TOKENS", help="end token included (default %(default)s)")
    parser.add_argument(
        "--max-prompt-length", type=int, default=4096, metavar="TOKENS", help="longer prompts are dropped (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the noise (default %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the model computes in (default %(default)s)")
    parser.add_argument("--response-end", default="<|im_end|>", metavar="TOKEN", help="token that ends a response (default %(default)s)")
    return run_stage(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
