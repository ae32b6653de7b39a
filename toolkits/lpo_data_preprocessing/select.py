"""Stage 3: records with candidates -> preference pairs, split by prompt.

    lppc       Algorithm 1 of LPO (arXiv 2508.14947): the reference answer is chosen and every sample of the policy is the rejected of a
               pair of its own, whatever its quality
    verified   the same, with only those samples whose final number is wrong: hard and right
    judged     both sides are samples: chosen the first whose final number is right, rejected those whose is wrong. Easier prompts (the
               policy solves them at times), and no reference answer

Left out: samples equal to the chosen text (nothing to prefer), repeats among one prompt's samples, empty samples. A sample cut at the
length limit stays, marked in "rejected_ended": build_pairs then writes it without the end token; "judged" wants samples that ended.
--swap-fraction exchanges the labels of some pairs, to study noise; --scores adds what losses that know by how much need.

Records of one prompt go to one side of the split, decided by a hash of the prompt alone: the same prompt lands on the same side in every
file and in every run with that seed.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from megatron_patch.evaluation.answers import same_answer
from megatron_patch.evaluation.error_rates import character_error_rate
from toolkits.lpo_data_preprocessing.records import (
    Record,
    StageParser,
    Tally,
    check_messages,
    close_stage,
    content_hash,
    get_field,
    get_texts,
    jsonl_writer,
    progress,
    read_records,
    refuse_existing,
    run_stage,
)


def is_validation(record: Record, fraction: float, seed: int) -> bool:
    """Which side a record's prompt is on; `fraction` (0 to 1) of all prompts are validation prompts."""
    return _drawn(f"{seed}/{content_hash(record['prompt'])}", fraction)


def is_swapped(record: Record, fraction: float, seed: int) -> bool:
    """Whether a record's labels are exchanged; `fraction` (0 to 1) of all prompts, independent of the split."""
    return _drawn(f"swap/{seed}/{content_hash(record['prompt'])}", fraction)


def _drawn(key: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def check_candidates(record: Record, where: str) -> list[Record]:
    """The record's candidates, each {"text": str, "finish_reason": "stop" or "length"}; ValueError naming `where`."""
    candidates = get_field(record, "candidates", list, where)
    for i, candidate in enumerate(candidates):
        if not isinstance(candidate, dict) or not isinstance(candidate.get("text"), str):
            raise ValueError(f"{where}: candidate {i} has no text")
        if candidate.get("finish_reason") not in ("stop", "length"):
            raise ValueError(f"{where}: candidate {i} has finish_reason {candidate.get('finish_reason')!r}, expected 'stop' or 'length'")
    return candidates


def select_lppc(record: Record, where: str, max_pairs: int | None, tally: Tally) -> Record | None:
    """The record with its rejected answers, or None if no candidate is left; what is left out is counted in `tally`.

    Rejected answers that were in the data before come first, then the candidates in the order they were sampled.
    """
    chosen = get_field(record, "chosen", str, where)
    kept = [(text, True) for text in (get_texts(record, "rejected", where) if "rejected" in record else [])]
    seen = {text.strip() for text, _ in kept}
    for candidate in check_candidates(record, where):
        text = candidate["text"]
        reason = _why_not(text.strip(), chosen.strip(), seen)
        if reason is None:
            seen.add(text.strip())
            kept.append((text, candidate["finish_reason"] == "stop"))
        else:
            tally.left_out[reason] += 1
    if max_pairs is not None and len(kept) > max_pairs:
        tally.left_out["over_max_pairs_per_prompt"] += len(kept) - max_pairs
        kept = kept[:max_pairs]
    if not kept:
        return None
    rest = {name: value for name, value in record.items() if name != "candidates"}
    return rest | {"rejected": [text for text, _ in kept], "rejected_ended": [ended for _, ended in kept]}


def _why_not(text: str, chosen: str, seen: set[str]) -> str | None:
    if not text:
        return "empty_candidate"
    if text == chosen:
        return "equal_to_chosen"
    return "duplicate_candidate" if text in seen else None


def select_verified(record: Record, where: str, max_pairs: int | None, tally: Tally) -> Record | None:
    """`select_lppc` without the samples that end in the reference's final number."""
    wrong = [candidate for candidate in check_candidates(record, where) if not _is_right(candidate, record, where)]
    tally.left_out["right_candidate"] += len(record["candidates"]) - len(wrong)
    return select_lppc(record | {"candidates": wrong}, where, max_pairs, tally)


def select_judged(record: Record, where: str, max_pairs: int | None, tally: Tally) -> Record | None:
    """`select_lppc` with the first right sample in place of the reference answer, against the wrong ones."""
    ended = [candidate for candidate in check_candidates(record, where) if candidate["finish_reason"] == "stop"]
    tally.left_out["cut_candidate"] += len(record["candidates"]) - len(ended)
    right = [candidate["text"] for candidate in ended if _is_right(candidate, record, where)]
    if not right:
        tally.left_out["no_right_candidate"] += 1
        return None
    wrong = [candidate for candidate in ended if not _is_right(candidate, record, where)]
    return select_lppc(record | {"chosen": right[0], "rejected": [], "candidates": wrong}, where, max_pairs, tally)


def _is_right(candidate: Record, record: Record, where: str) -> bool:
    """Whether a sample ended and has the final number of the record's answer."""
    try:
        return candidate["finish_reason"] == "stop" and same_answer(candidate["text"], get_field(record, "chosen", str, where))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


Selector = Callable[[Record, str, int | None, Tally], Record | None]
METHODS: dict[str, Selector] = {"lppc": select_lppc, "verified": select_verified, "judged": select_judged}


def swapped(record: Record) -> Record:
    """The record's one pair with its labels exchanged, marked "swapped"."""
    (rejected,) = record["rejected"]
    return record | {"chosen": rejected, "rejected": [record["chosen"]], "rejected_ended": [True], "swapped": True}


def scored(record: Record, answer: str) -> Record:
    """The record with "chosen_score" and "rejected_scores": 1 minus the character error rate against `answer`."""
    chosen, *rejected = (1.0 - character_error_rate([text], [answer]) for text in (record["chosen"], *record["rejected"]))
    return record | {"chosen_score": chosen, "rejected_scores": rejected}


def _selected(args: argparse.Namespace, tally: Tally) -> Iterator[Record]:
    for number, record in progress(read_records(args.input), what="select", unit="record"):
        where = f"{args.input}:{number}"
        check_messages(get_field(record, "prompt", list, where), where)
        tally.read += 1
        result = METHODS[args.method](record, where, args.max_pairs_per_prompt, tally)
        if result is None:
            tally.drop("no_candidate_left")
            continue
        tally.kept += 1
        if is_swapped(result, args.swap_fraction, args.seed):
            result = swapped(result)
            tally.altered["labels_exchanged"] += 1
        yield scored(result, record["chosen"]) if args.scores else result


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.valid_fraction < 1:
        raise ValueError(f"--valid-fraction must lie in [0, 1), got {args.valid_fraction:g}")
    if (args.valid_fraction > 0) != (args.valid_output is not None):
        raise ValueError("--valid-fraction and --valid-output go together")
    if args.max_pairs_per_prompt is not None and args.max_pairs_per_prompt < 1:
        raise ValueError(f"--max-pairs-per-prompt must be at least 1, got {args.max_pairs_per_prompt}")
    if not 0 <= args.swap_fraction < 1:
        raise ValueError(f"--swap-fraction must lie in [0, 1), got {args.swap_fraction:g}")
    if args.swap_fraction and (args.max_pairs_per_prompt != 1 or args.method != "judged"):
        raise ValueError("--swap-fraction needs --method judged (both sides ended) and --max-pairs-per-prompt 1 (one pair to swap)")
    if args.swap_fraction and args.scores:
        raise ValueError("--scores: a swapped pair would prefer the lower score; leave out --swap-fraction")


def _run(args: argparse.Namespace) -> str:
    _check(args)
    outputs = [args.output] + ([args.valid_output] if args.valid_output else [])
    for output in outputs:
        refuse_existing(output, args.overwrite)
    tally, pairs = Tally(), dict.fromkeys(outputs, 0)
    with ExitStack() as stack:
        write = {output: stack.enter_context(jsonl_writer(output)) for output in outputs}
        for record in _selected(args, tally):
            output = outputs[-1] if is_validation(record, args.valid_fraction, args.seed) else args.output
            write[output](record)
            pairs[output] += len(record["rejected"])
        tally.check(args.max_drop_fraction)
        if empty := [output for output in outputs if not pairs[output]]:
            raise ValueError(f"{empty[0]}: no pair on this side of the split (--valid-fraction {args.valid_fraction:g})")
    return close_stage(tally, args.output) + "".join(f"\n  pairs     {output}: {count}" for output, count in pairs.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = StageParser(
        "select", "Turn sampled candidates into preference pairs and split them by prompt.",
        "--input candidates.jsonl --output train.jsonl --valid-output valid.jsonl --valid-fraction 0.05",
        output="records with rejected answers, one per line", max_drop_fraction=0.95,
    )  # fmt: skip
    parser.add_argument("--method", choices=list(METHODS), default="lppc", help="how pairs are chosen (default %(default)s)")
    parser.add_argument(
        "--max-pairs-per-prompt", type=int, metavar="N", help="keep the first N rejected answers of a record (default: all)"
    )
    parser.add_argument(
        "--swap-fraction", type=float, default=0.0, metavar="F", help="of the pairs get their labels exchanged (default %(default)s)"
    )
    parser.add_argument("--scores", action="store_true", help="add scores: 1 minus the character error rate against the reference answer")
    parser.add_argument("--valid-fraction", type=float, default=0.0, metavar="F", help="of the prompts, 0 to 1 (default %(default)s)")
    parser.add_argument("--valid-output", metavar="PATH", help="where the validation records go")
    parser.add_argument("--seed", type=int, default=1, help="of the split and the swaps (default %(default)s)")
    return run_stage(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
