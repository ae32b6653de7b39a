"""Stage 2: n samples per prompt from the policy, at the paper's temperature 1 and top-p 1, in blocks that can be lost and made again.

The unit of work is a block of 64 consecutive input records, generated as one batch. A finished block is a file of its own under
`<output>.blocks/`; a restart makes only the missing ones and the output is put together at the end. The noise of a sample depends on
(seed, record id, sample number) alone, and a block's batch is fixed by the input's order, so a block made again is byte for byte the same
(with the transformers engine in float32; the plan says what another engine promises).
`<output>.blocks/plan.json` says what the blocks were made with: blocks of another model, input or option are refused.

With --shard i/n a process makes every n-th block and stops there; all shards write to the one folder, so an interrupted job may go on
with another number of them. --merge puts the output together and refuses while a block is missing. Without either one process does both.

A candidate is {"text", "finish_reason"}: "stop" if the model ended its turn, "length" if it was cut; a server may say something else
(content_filter...), and then `select` leaves it out. Nothing is appended to a cut answer. Where the tokenizer is known, a candidate that
spells out a token which it calls special has that token as "control_token". A prompt without room for it is dropped and counted, whoever
notices: this stage by --max-prompt-length, or the server.
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_patch.data.atomic_files import read_json, sha256_file, write_json
from megatron_patch.evaluation.generate import PerRowSampler
from toolkits.lpo_data_preprocessing.engines import ENGINES, Answer, Engine, Request, check_engine
from toolkits.lpo_data_preprocessing.finished import Finished, compare_plans
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
    run_stage,
    tally_path,
)
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

BLOCK = 64
_SHOWN = 3
# A process's place among its fellows: of a SLURM step, of torchrun.
_PLACES = (("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE"))
_PLAN_OPTIONS = ("engine", "n", "temperature", "top_p", "max_new_tokens", "max_prompt_length", "seed", "dtype", "response_end")


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
        compare_plans(plan, recorded, f"{self.folder}: holds blocks")

    def merge(self, output: str | Path, tally: Tally, max_drop_fraction: float) -> "Merged":
        """Put the finished blocks together in input order."""
        merged = Merged()
        with jsonl_writer(output) as write:
            for index in range(self.count):
                for _, record in read_records(self.path(index)):
                    tally.read += 1
                    if "candidates" in record:
                        tally.kept += 1
                        merged.ends.update(candidate["finish_reason"] for candidate in record["candidates"])
                        write(record)
                    else:
                        tally.drop("prompt_too_long")
                        merged.drop(record)
            try:
                tally.check(max_drop_fraction)
            except ValueError as error:
                raise ValueError(f"{error}{merged.first_too_long()}") from None
        return merged


@dataclass
class Merged:
    """What is told about the output beside the counts of records."""

    ends: Counter[str] = field(default_factory=Counter)
    """Candidates by finish reason."""
    too_long: list[str] = field(default_factory=list)
    """The first few ids of the prompts dropped, with what is known of their length."""

    def drop(self, record: Record) -> None:
        """Remember a record whose prompt is too long."""
        if len(self.too_long) < _SHOWN:
            self.too_long.append(f"{record['id']} ({record['refused']})")

    def first_too_long(self) -> str:
        """A line with the prompts dropped, if there are any."""
        return f"\n  first     prompt_too_long: {', '.join(self.too_long)}" if self.too_long else ""

    def notes(self) -> str:
        """The lines under the table."""
        count = self.ends.total()
        lines = [f"\n  samples   {count}, {self.ends['length'] / max(1, count):.1%} cut at the limit"]
        odd = ((reason, n) for reason, n in self.ends.most_common() if reason not in ("stop", "length"))
        lines += [f"\n  note      finish reason {reason!r}: {n} (select leaves such samples out)" for reason, n in odd]
        return "".join(lines) + self.first_too_long()


def model_fingerprint(folder: str | Path) -> str:
    """Names and sha256 (16 digits each) of a Hugging Face folder's configuration and weights; ValueError if it holds none."""
    files = sorted(path for pattern in ("config.json", "*.safetensors") for path in Path(folder).glob(pattern))
    if len(files) < 2:
        raise ValueError(f"{folder}: no Hugging Face checkpoint (config.json and *.safetensors) here")
    return ",".join(f"{path.name}:{sha256_file(path)[:16]}" for path in files)


def _plan(args: argparse.Namespace, tokenizer: ChatTokenizer | None) -> dict[str, Any]:
    """Everything that changes the samples, and what the engine promises."""
    kind = ENGINES[args.engine]
    plan = {name: getattr(args, name) for name in _PLAN_OPTIONS} | {"block": BLOCK, "input": sha256_file(args.input)}
    plan |= {"promise": kind.promise, "model": model_fingerprint(args.model) if kind.is_local else args.model}
    if tokenizer is not None:
        plan |= {"tokenizer": tokenizer.fingerprint, "template": tokenizer.template_fingerprint}
    return plan


def shard_of(text: str | None) -> tuple[int, int] | None:
    """(i, n) of "i/n", or of this process's place among its fellows for "auto" (0/1 where it has none); None for None."""
    if text is None:
        return None
    if text == "auto":
        places = ((os.environ[own], os.environ[all_]) for own, all_ in _PLACES if own in os.environ and all_ in os.environ)
        text = "/".join(next(places, ("0", "1")))
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise ValueError(f"--shard must be i/n or auto, got {text!r}") from None
    if not 0 <= index < count:
        raise ValueError(f"--shard i/n needs 0 <= i < n, got {text}")
    return index, count


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


def make_block(
    records: Sequence[Record], tokenizer: ChatTokenizer | None, engine: Engine, n: int, max_prompt_length: int
) -> Iterator[Record]:
    """The records of one block with "candidates"; a record whose prompt is too long passes without them, and with "refused": why."""
    prompts = [tokenizer.prompt_ids(record["prompt"]) if tokenizer else [] for record in records]
    fits = [len(prompt) <= max_prompt_length for prompt in prompts]
    requests = [
        Request(record["prompt"], prompt, f"{record['id']}/{sample}")
        for record, prompt, fit in zip(records, prompts, fits, strict=True)
        if fit
        for sample in range(n)
    ]
    answers = iter(engine(requests))
    for record, prompt, fit in zip(records, prompts, fits, strict=True):
        bare = {name: value for name, value in record.items() if name != "candidates"}
        sampled = [next(answers) for _ in range(n)] if fit else [{"refused": f"{len(prompt)} tokens"}]
        refused = next((answer["refused"] for answer in sampled if "refused" in answer), None)
        yield bare | ({"refused": refused} if refused else {"candidates": [_marked(answer, tokenizer) for answer in sampled]})


def _marked(answer: Answer, tokenizer: ChatTokenizer | None) -> Answer:
    """The answer with the control token that it spells out, if it does."""
    token = tokenizer.control_token(answer["text"]) if tokenizer else None
    return answer | {"control_token": token} if token else answer


def _check(args: argparse.Namespace) -> None:
    """ValueError for a bad choice, before anything is written."""
    for name in ("n", "max_new_tokens", "max_prompt_length", "concurrency", "engine_tensor_parallel"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    PerRowSampler([], args.seed, args.temperature, args.top_p)  # refuses a bad temperature or top-p before a model is loaded
    if not args.merge:
        check_engine(args)
    elif args.shard:
        raise ValueError("--merge: one process puts the shards together; give one of --shard and --merge")
    if args.overwrite and args.shard:
        raise ValueError("--overwrite: shards would remove each other's blocks; remove the output and its .blocks folder first")
    if not args.overwrite:
        _finished(args).refuse_strangers()


def _finished(args: argparse.Namespace) -> Finished:
    return Finished(args.output, [Path(args.output)], [tally_path(args.output)])


def _load_tokenizer(args: argparse.Namespace) -> ChatTokenizer | None:
    """A local model's own, or --tokenizer; none is needed for a server, which has its own template and limit."""
    folder = args.tokenizer or (args.model if ENGINES[args.engine].is_local else None)
    return ChatTokenizer(folder, response_end=args.response_end) if folder else None


def _make_blocks(args: argparse.Namespace, blocks: Blocks, records: Sequence[Record], tokenizer: ChatTokenizer | None) -> tuple[int, int]:
    """Make what is missing of this process's blocks; returns how many were found and made."""
    index, count = shard_of(args.shard) or (0, 1)
    own = range(index, blocks.count, count)
    missing = [number for number in blocks.missing() if number in own]
    engine = ENGINES[args.engine].load(args, tokenizer) if missing else None
    found = len(own) - len(missing)
    for number in progress(missing, what="candidates", unit="block", total=len(own), initial=found):
        assert engine is not None
        with jsonl_writer(blocks.path(number)) as write:
            part = records[number * BLOCK : (number + 1) * BLOCK]
            for record in make_block(part, tokenizer, engine, args.n, args.max_prompt_length):
                write(record)
    return found, len(missing)


def _merge(args: argparse.Namespace, blocks: Blocks, finished: Finished, plan: dict[str, Any]) -> str:
    """Put the output together; ValueError if a block is missing."""
    if missing := blocks.missing():
        named = ", ".join(blocks.path(number).name for number in missing[:5])
        raise ValueError(f"{blocks.folder}: {len(missing)} of {blocks.count} blocks are missing ({named}): a shard has not finished")
    tally = Tally()
    with finished.made(plan):
        merged = blocks.merge(args.output, tally, args.max_drop_fraction)
        summary = close_stage(tally, args.output)
    shutil.rmtree(blocks.folder)
    return summary + merged.notes()


def _run(args: argparse.Namespace) -> str:
    _check(args)
    shard_of(args.shard)
    records = _read_input(args.input)
    tokenizer = _load_tokenizer(args)
    blocks = Blocks(Path(f"{args.output}.blocks"), -(-len(records) // BLOCK))
    plan, finished = _plan(args, tokenizer), _finished(args)
    if args.overwrite:
        finished.path.unlink(missing_ok=True)
        shutil.rmtree(blocks.folder, ignore_errors=True)
    elif finished.holds(plan, update=args.update):
        if not args.shard:
            shutil.rmtree(blocks.folder, ignore_errors=True)  # an interruption may have left it
        return f"finished before with the same plan, kept -> {args.output}"
    blocks.open(plan)
    found, made = (0, 0) if args.merge else _make_blocks(args, blocks, records, tokenizer)
    if args.shard:
        return f"shard {args.shard}: {found} blocks found, {made} made -> {blocks.folder} (--merge puts the output together)"
    summary = _merge(args, blocks, finished, plan)
    return summary if args.merge else f"{summary}\n  blocks    {found} found, {made} made"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = StageParser(
        "candidates", "Sample candidate answers from the policy; interrupted, it goes on where it was.",
        "--input records.jsonl --output candidates.jsonl --model outputs/sft-hf -n 4 --max-new-tokens 512",
        output="records with candidates, one per line; finished blocks wait in PATH.blocks/ meanwhile",
    )  # fmt: skip
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="local Hugging Face checkpoint with tokenizer; openai: the model's name on the server"
    )
    parser.add_argument("--engine", choices=list(ENGINES), default="transformers", help="what generates (default %(default)s)")
    parser.add_argument("-n", "--n", type=int, default=1, metavar="N", help="samples per prompt (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="above 0 (default %(default)s, as in the paper)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus, 0 to 1 (default %(default)s: all, as in the paper)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="TOKENS", help="end token included (default %(default)s)")
    parser.add_argument(
        "--max-prompt-length", type=int, default=4096, metavar="TOKENS", help="longer prompts are dropped (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the noise (default %(default)s)")
    parser.add_argument("--response-end", default="<|im_end|>", metavar="TOKEN", help="token that ends a response (default %(default)s)")
    parser.add_argument("--shard", metavar="i/n", help="make every n-th block, from i (0 to n-1); auto: as SLURM or torchrun number us")
    parser.add_argument("--merge", action="store_true", help="only put finished shards together")
    local = parser.add_argument_group("engines transformers and vllm")
    local.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default %(default)s")
    local.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the model computes in (default %(default)s)")
    local.add_argument("--engine-tensor-parallel", type=int, default=1, metavar="N", help="vllm: GPUs of one model (default %(default)s)")
    server = parser.add_argument_group("engine openai: any server of chat completions; its key, if it wants one, in $OPENAI_API_KEY")
    server.add_argument("--base-url", nargs="+", metavar="URL", help="of equal servers, for example http://localhost:8000/v1")
    server.add_argument("--tokenizer", metavar="DIR", help="the model's, for --max-prompt-length and to know its control tokens")
    server.add_argument("--concurrency", type=int, default=64, metavar="N", help="requests at a time (default %(default)s)")
    server.add_argument("--retries", type=int, default=8, metavar="N", help="of one request, with growing waits (default %(default)s)")
    server.add_argument("--request-timeout", type=float, default=600.0, metavar="S", help="seconds for one answer (default %(default)s)")
    return run_stage(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
