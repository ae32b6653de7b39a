"""Stage 4: records -> a pair store (token ids on disk). One pair per rejected answer, one fine-tuning sample or one text a record.

Lengths are limited here and nowhere later: a pair whose prompt + response exceeds --max-length tokens is dropped under a reason, or its
prompt is cut from the left on request. A response is never cut: a cut response is another response, and its reference log-prob another.

The input is streamed in chunks to worker processes (`documents`, `worker_pool`); this process reads, writes and keeps the order, so the
store does not depend on their number.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from megatron_patch.data.atomic_files import sha256_file
from megatron_patch.data.pair_store import PairStoreWriter, store_files
from toolkits.lpo_data_preprocessing.documents import Chunk, Outcome, Settings, document_maker
from toolkits.lpo_data_preprocessing.finished import Ingredients, make_once
from toolkits.lpo_data_preprocessing.records import StageParser, Tally, close_stage, progress, read_lines, run_stage
from toolkits.lpo_data_preprocessing.tokenise import END_OF_TEXT, ChatTokenizer
from toolkits.lpo_data_preprocessing.worker_pool import ordered_map, start_server, usable_cpus

KINDS = "pairs: one per rejected answer; sft: prompt and chosen; text: plain text in a field of that name, all of it trained on"
CHUNK_BYTES = 2**18
"""Input that a worker gets at a time, or one line if that is longer: some hundred pairs."""
WORTH_A_WORKER = 2**22
"""Bytes of input for each worker that is started unasked: the start of one takes as long as a megabyte or two."""


def _fill(writer: PairStoreWriter, tally: Tally, args: argparse.Namespace) -> Outcome:
    """All records of the input into the store; returns the counts that the tally has no place for."""
    settings = Settings(
        args.input, args.tokenizer, args.response_end, args.kind, args.max_length, args.truncate_prompt,
        args.every_assistant_turn, args.drop_empty,
    )  # fmt: skip
    total, workers = Outcome(), _workers(args)
    bar = progress(None, what="build_pairs", unit="record")
    with bar, closing(ordered_map(document_maker, (settings,), _chunks(args.input), workers)) as outcomes:
        for outcome in outcomes:
            _store(outcome, writer, args.input)
            total.add(outcome)
            bar.update(outcome.records)
    tally.read, tally.kept = total.read, len(writer)
    for reason, count in total.dropped.items():
        tally.drop(reason, count)
        writer.drop(reason, count)
    if total.without_rejected:
        tally.left_out["record_without_rejected"] += total.without_rejected
    return total


def _store(outcome: Outcome, writer: PairStoreWriter, input: str) -> None:
    for document in outcome.documents:
        try:
            writer.write(document)
        except ValueError as error:
            raise ValueError(f"{input}:{document.source_line}: {error}") from None
    if outcome.error:
        raise ValueError(outcome.error)


def _chunks(path: str) -> Iterator[Chunk]:
    """The lines of the input by the chunk; one that cannot be read is the last chunk's mistake, behind the lines before it."""
    lines: list[tuple[int, bytes]] = []
    size = 0
    error = None
    with open(path, "rb") as stream:
        try:
            for number, line in read_lines(stream, path):
                lines.append((number, line))
                size += len(line)
                if size >= CHUNK_BYTES:
                    yield Chunk(lines)
                    lines, size = [], 0
        except ValueError as mistake:
            error = str(mistake)
    yield Chunk(lines, error)


def _workers(args: argparse.Namespace) -> int:
    """Processes to tokenise with: as asked for, else one for each CPU if there is enough for it to do."""
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    return args.workers or max(1, min(usable_cpus(), Path(args.input).stat().st_size // WORTH_A_WORKER))


def _run(args: argparse.Namespace) -> str:
    if args.max_length < 2:
        raise ValueError(f"--max-length must be at least 2 tokens, got {args.max_length}")
    if args.every_assistant_turn and (args.kind != "sft" or args.truncate_prompt):
        raise ValueError("--every-assistant-turn is for --kind sft, and a conversation of which every turn counts cannot be truncated")
    if not Path(args.input).is_file():
        raise ValueError(f"{args.input}: no such file")
    if _workers(args) > 1:
        start_server(["toolkits.lpo_data_preprocessing.documents", "transformers.models.auto.tokenization_auto"])
    args.response_end = args.response_end or (END_OF_TEXT if args.kind == "text" else "<|im_end|>")
    tokenizer = ChatTokenizer(args.tokenizer, response_end=args.response_end, chat=args.kind != "text")
    fingerprints = {"tokenizer": tokenizer.fingerprint, "template": tokenizer.template_fingerprint}
    ingredients = Ingredients([Path(args.input)], store_files(args.output), fingerprints)
    return make_once(args, ingredients, lambda: _build(args, tokenizer))


def _build(args: argparse.Namespace, tokenizer: ChatTokenizer) -> str:
    tally = Tally(unit="pairs" if args.kind == "pairs" else "samples")
    with PairStoreWriter(args.output, args.kind, overwrite=True) as writer:
        total = _fill(writer, tally, args)
        tally.check(args.max_drop_fraction)
        source = {"path": str(Path(args.input).resolve()), "sha256": sha256_file(args.input), "records": total.records}
        writer.commit(
            tokenizer={"fingerprint": tokenizer.fingerprint, "path": str(Path(args.tokenizer).resolve())},
            template={
                "fingerprint": tokenizer.template_fingerprint,
                "response_end": args.response_end,
                "exceptions": total.template_exceptions,
                "first_exceptions": total.first_exceptions,
            },
            sources=[source],
            options={
                "truncate_prompt": args.truncate_prompt,
                "drop_empty": args.drop_empty,
                "every_assistant_turn": args.every_assistant_turn,
                "truncated_prompts": total.truncated_prompts,
            },
            limits={"max_length": args.max_length},
        )
    return close_stage(tally, args.output) + "".join(f"\n  note      {line}" for line in _notes(total, tally))


def _notes(total: Outcome, tally: Tally) -> Iterator[str]:
    if total.truncated_prompts:
        yield f"prompts cut from the left: {total.truncated_prompts}"
    if total.template_exceptions:
        yield f"responses off the template: {total.template_exceptions} (first: {', '.join(total.first_exceptions)})"
    if total.template_exceptions > tally.kept * (0.5 if tally.unit == "samples" else 1):
        yield "that is most of them: in the template's own text answers have other tokens than here (a tokenizer that sets a space before a"
        yield "text? a template that edits answers?); a model that other code fine-tuned on that text has seen those"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = StageParser(
        "build_pairs", "Tokenise records into a pair store.",
        "--input train.jsonl --output data/train --tokenizer models/Qwen2.5-0.5B-Instruct --max-length 4096",
        output="prefix of the store: writes PATH.bin, .idx, .meta.npz and, last, PATH.json",
    )  # fmt: skip
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="local Hugging Face tokenizer with a chat template")
    parser.add_argument("--kind", choices=("pairs", "sft", "text"), default="pairs", help=KINDS)
    parser.add_argument("--max-length", type=int, default=4096, metavar="TOKENS", help="of prompt + response (default %(default)s)")
    parser.add_argument("--truncate-prompt", action="store_true", help="cut long prompts from the left instead of dropping the pair")
    parser.add_argument("--every-assistant-turn", action="store_true", help="train on all assistant turns of a conversation (--kind sft)")
    parser.add_argument("--drop-empty", action="store_true", help="drop and count pairs with an empty answer (else an error)")
    parser.add_argument("--response-end", metavar="TOKEN", help=f"token that ends a response (default <|im_end|>, of a text {END_OF_TEXT})")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenise (default: one for each CPU; 1: this one)")
    return run_stage(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
