"""Stage 4: records -> a pair store (token ids on disk). One pair per rejected answer, or one fine-tuning sample per record.

Lengths are limited here and nowhere later: a pair whose prompt + response exceeds --max-length tokens is dropped under a reason, or its
prompt is cut from the left on request. A response is never cut: a cut response is another response, and its reference log-prob another.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.data.atomic_files import sha256_file
from megatron_patch.data.pair_store import PairStoreWriter
from toolkits.lpo_data_preprocessing.finished import Ingredients, make_once
from toolkits.lpo_data_preprocessing.records import (
    Message,
    Record,
    StageParser,
    Tally,
    check_messages,
    close_stage,
    content_hash,
    get_field,
    get_texts,
    progress,
    read_records,
    run_stage,
)
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer


@dataclass(frozen=True)
class Sample:
    """One document to be: texts and what travels beside them."""

    id: str
    prompt: list[Message]
    responses: list[tuple[str, str, bool]]
    """(name, text, ended) of the chosen and, for pairs, the rejected answer."""
    scores: tuple[float, float] | None = None


def samples_of(record: Record, kind: str, where: str) -> Iterator[Sample]:
    """The samples in one record; ValueError naming `where` for a missing or mistyped field."""
    prompt = check_messages(get_field(record, "prompt", list, where), where)
    id, chosen = get_field(record, "id", str, where), get_field(record, "chosen", str, where)
    if kind == "sft":
        yield Sample(id, prompt, [("chosen", chosen, True)])
        return
    rejected = get_texts(record, "rejected", where)
    ended = _aligned(record, "rejected_ended", bool, len(rejected), where) or [True] * len(rejected)
    scores = _aligned(record, "rejected_scores", (int, float), len(rejected), where)
    scores = scores and [_number(score, "rejected_scores", where) for score in scores]
    for i, (text, end) in enumerate(zip(rejected, ended, strict=True)):
        pair_scores = (_number(get_field(record, "chosen_score", object, where), "chosen_score", where), scores[i]) if scores else None
        yield Sample(f"{id}-{i}", prompt, [("chosen", chosen, True), ("rejected", text, end)], pair_scores)


def _number(value: Any, name: str, where: str) -> float:
    """A finite number; neither true nor "0.5" is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{where}: field {name!r} must hold finite numbers, got {value!r:.80}")
    return value


def _aligned(record: Record, name: str, kind: Any, length: int, where: str) -> list[Any] | None:
    """An optional list with one entry per rejected answer."""
    values = record.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != length or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{where}: field {name!r} needs one entry per rejected answer ({length}), got {values!r:.80}")
    return values


@dataclass
class Builder:
    """Tokenises samples into a store and counts what does not fit."""

    tokenizer: ChatTokenizer
    writer: PairStoreWriter
    tally: Tally
    args: argparse.Namespace
    template_exceptions: int = 0
    truncated_prompts: int = 0

    def add(self, sample: Sample, where: str, line: int) -> None:
        """Tokenise one sample and store it, or count why not."""
        self.tally.read += 1
        empty = [name for name, text, _ in sample.responses if not text.strip()]
        if empty and not self.args.drop_empty:
            raise ValueError(f"{where}: empty {empty[0]} answer of {sample.id} (--drop-empty leaves such pairs out)")
        if empty:
            return self._drop(f"empty_{empty[0]}")
        prompt = self.tokenizer.prompt_ids(sample.prompt)
        responses = [self.tokenizer.response_ids(text, ended=ended) for _, text, ended in sample.responses]
        room = self.args.max_length - max(len(ids) for ids in responses)
        if len(prompt) > room:
            if not self.args.truncate_prompt or room < 1:
                return self._drop(f"too_long_{self._too_long(sample, prompt, responses)}")
            prompt = prompt[-room:]
            self.truncated_prompts += 1
        self.template_exceptions += sum(not self.tokenizer.follows_template(sample.prompt, text) for _, text, _ in sample.responses)
        group = content_hash(sample.prompt)
        self.writer.add([prompt, *responses], id=sample.id, group=group, scores=sample.scores, source_line=line)
        self.tally.kept += 1

    def _drop(self, reason: str) -> None:
        self.tally.drop(reason)
        self.writer.drop(reason)

    def _too_long(self, sample: Sample, prompt: list[int], responses: list[list[int]]) -> str:
        """The first response that does not fit (with at least one prompt token beside it)."""
        needed = 1 if self.args.truncate_prompt else len(prompt)
        over = [name for (name, _, _), ids in zip(sample.responses, responses, strict=True) if needed + len(ids) > self.args.max_length]
        return over[0]


def _fill(builder: Builder, args: argparse.Namespace) -> int:
    """All records of the input into the store; returns how many records there were."""
    records = 0
    for number, record in progress(read_records(args.input), what="build_pairs", unit="record"):
        records += 1
        where = f"{args.input}:{number}"
        samples = list(samples_of(record, args.kind, where))
        if not samples:
            builder.tally.left_out["record_without_rejected"] += 1
        for sample in samples:
            try:
                builder.add(sample, where, number)
            except ValueError as error:
                raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    return records


def _run(args: argparse.Namespace) -> str:
    if args.max_length < 2:
        raise ValueError(f"--max-length must be at least 2 tokens, got {args.max_length}")
    if not Path(args.input).is_file():
        raise ValueError(f"{args.input}: no such file")
    tokenizer = ChatTokenizer(args.tokenizer, response_end=args.response_end)
    fingerprints = {"tokenizer": tokenizer.fingerprint, "template": tokenizer.template_fingerprint}
    ingredients = Ingredients([Path(args.input)], [Path(f"{args.output}.json")], fingerprints)
    return make_once(args, ingredients, lambda: _build(args, tokenizer))


def _build(args: argparse.Namespace, tokenizer: ChatTokenizer) -> str:
    tally = Tally(unit="pairs" if args.kind == "pairs" else "samples")
    with PairStoreWriter(args.output, args.kind, overwrite=True) as writer:
        builder = Builder(tokenizer, writer, tally, args)
        records = _fill(builder, args)
        tally.check(args.max_drop_fraction)
        source = {"path": str(Path(args.input).resolve()), "sha256": sha256_file(args.input), "records": records}
        writer.commit(
            tokenizer={"fingerprint": tokenizer.fingerprint, "path": str(Path(args.tokenizer).resolve())},
            template={
                "fingerprint": tokenizer.template_fingerprint,
                "response_end": args.response_end,
                "exceptions": builder.template_exceptions,
            },
            sources=[source],
            options={
                "truncate_prompt": args.truncate_prompt,
                "drop_empty": args.drop_empty,
                "truncated_prompts": builder.truncated_prompts,
            },
            limits={"max_length": args.max_length},
        )
    notes = {"prompts cut from the left": builder.truncated_prompts, "responses off the template": builder.template_exceptions}
    return close_stage(tally, args.output) + "".join(f"\n  note      {name}: {count}" for name, count in notes.items() if count)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = StageParser(
        "build_pairs", "Tokenise records into a pair store.",
        "--input train.jsonl --output data/train --tokenizer models/Qwen2.5-0.5B-Instruct --max-length 4096",
        output="prefix of the store: writes PATH.bin, .idx, .meta.npz and, last, PATH.json",
    )  # fmt: skip
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="local Hugging Face tokenizer with a chat template")
    parser.add_argument("--kind", choices=("pairs", "sft"), default="pairs", help="pairs: one per rejected answer; sft: prompt and chosen")
    parser.add_argument("--max-length", type=int, default=4096, metavar="TOKENS", help="of prompt + response (default %(default)s)")
    parser.add_argument("--truncate-prompt", action="store_true", help="cut long prompts from the left instead of dropping the pair")
    parser.add_argument("--drop-empty", action="store_true", help="drop and count pairs with an empty answer (else an error)")
    parser.add_argument("--response-end", default="<|im_end|>", metavar="TOKEN", help="token that ends a response (default %(default)s)")
    return run_stage(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
