"""Stage 3: records, with candidates or without -> preference pairs, split by prompt.

How pairs are chosen is one method of `selection.METHODS` (lppc, verify-math, perturb, scores), which also says what is left out. This
stage adds what all of them share: a limit of pairs per prompt, the exchange of labels to study noise (--swap-fraction), scores for losses
that know by how much (--scores), and the split.

Records of one prompt go to one side of the split, decided by a hash of the prompt alone: the same prompt lands on the same side in every
file and in every run with that seed.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path

from megatron_patch.evaluation.error_rates import character_error_rate
from toolkits.lpo_data_preprocessing.finished import Ingredients, make_once
from toolkits.lpo_data_preprocessing.records import (
    Record,
    StageParser,
    Tally,
    check_messages,
    close_stage,
    content_hash,
    get_field,
    jsonl_writer,
    progress,
    read_records,
    run_stage,
)
from toolkits.lpo_data_preprocessing.selection import METHODS, LeftOut, Options, Selection


def is_validation(record: Record, fraction: float, seed: int) -> bool:
    """Which side a record's prompt is on; `fraction` (0 to 1) of all prompts are validation prompts."""
    return _drawn(f"{seed}/{content_hash(record['prompt'])}", fraction)


def is_swapped(record: Record, fraction: float, seed: int) -> bool:
    """Whether a record's labels are exchanged; `fraction` (0 to 1) of all prompts, independent of the split."""
    return _drawn(f"swap/{seed}/{content_hash(record['prompt'])}", fraction)


def _drawn(key: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def swapped(record: Record) -> Record:
    """The record's one pair with its labels exchanged, marked "swapped"."""
    (rejected,) = record["rejected"]
    return record | {"chosen": rejected, "rejected": [record["chosen"]], "rejected_ended": [True], "swapped": True}


def scored(record: Record, answer: str) -> Record:
    """The record with "chosen_score" and "rejected_scores": 1 minus the character error rate against `answer`."""
    chosen, *rejected = (1.0 - character_error_rate([text], [answer]) for text in (record["chosen"], *record["rejected"]))
    return record | {"chosen_score": chosen, "rejected_scores": rejected}


class PairLimit:
    """How many pairs a prompt may still have, over all its records: `options` with that number."""

    def __init__(self, options: Options) -> None:
        self.options, self._used = options, Counter[str]()

    def before(self, record: Record) -> Options:
        """The options for a record; LeftOut if its prompt has all its pairs."""
        if self.options.max_pairs is None:
            return self.options
        left = self.options.max_pairs - self._used[content_hash(record["prompt"])]
        if left < 1:
            raise LeftOut("prompt_has_its_pairs")
        return replace(self.options, max_pairs=left)

    def after(self, result: Record) -> None:
        """Count a record's pairs."""
        if self.options.max_pairs is not None:
            self._used[content_hash(result["prompt"])] += len(result["rejected"])


def _selected(args: argparse.Namespace, tally: Tally) -> Iterator[Record]:
    limit = PairLimit(_options(args))
    for number, record in progress(read_records(args.input), what="select", unit="record"):
        where = f"{args.input}:{number}"
        check_messages(get_field(record, "prompt", list, where), where)
        tally.read += 1
        try:
            result = METHODS[args.method].select(Selection(record, where, limit.before(record), tally))
        except LeftOut as reason:
            tally.drop(str(reason))
            continue
        limit.after(result)
        tally.kept += 1
        if is_swapped(result, args.swap_fraction, args.seed):
            result = swapped(result)
            tally.altered["labels_exchanged"] += 1
        yield scored(result, record["chosen"]) if args.scores else result


def _options(args: argparse.Namespace) -> Options:
    """What the user said, else the defaults. ValueError for a bad value or an option of another method."""
    known = ("max_pairs", *METHODS[args.method].options)
    given = {field.name: getattr(args, field.name) for field in fields(Options) if getattr(args, field.name) is not None}
    for name in given:
        if name not in known:
            owners = ", ".join(method for method, row in METHODS.items() if name in row.options)
            raise ValueError(f"{_flag(name)}: --method {args.method} does not use it ({owners})")
    given.setdefault("noise_seed", args.seed)
    options = Options(**given)
    for name in ("n", "max_pairs"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"{_flag(name)} must be at least 1, got {value}")
    distance = options.min_edit_distance
    if not (0 <= distance < 1 or (distance >= 1 and float(distance).is_integer())):
        raise ValueError(f"{_flag('min_edit_distance')} must be a whole number of characters or a fraction below 1, got {distance:g}")
    if not 0 < options.noise_ratio <= 1:
        raise ValueError(f"--noise-ratio must lie in (0, 1], got {options.noise_ratio:g}")
    return options


def _flag(name: str) -> str:
    return {"max_pairs": "--max-pairs-per-prompt"}.get(name, f"--{name.replace('_', '-')}")


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.valid_fraction < 1:
        raise ValueError(f"--valid-fraction must lie in [0, 1), got {args.valid_fraction:g}")
    if (args.valid_fraction > 0) != (args.valid_output is not None):
        raise ValueError("--valid-fraction and --valid-output go together")
    if not 0 <= args.swap_fraction < 1:
        raise ValueError(f"--swap-fraction must lie in [0, 1), got {args.swap_fraction:g}")
    if args.swap_fraction and (args.max_pairs != 1 or args.chosen != "sampled"):
        raise ValueError("--swap-fraction needs --chosen sampled (both sides ended) and --max-pairs-per-prompt 1 (one pair to swap)")
    if args.swap_fraction and args.scores:
        raise ValueError("--scores: a swapped pair would prefer the lower score; leave out --swap-fraction")
    if args.scores and args.method == "scores":
        raise ValueError("--scores adds error rates, but --method scores has scores already; give one of the two")


def _run(args: argparse.Namespace) -> str:
    _check(args)
    _options(args)
    if not Path(args.input).is_file():
        raise ValueError(f"{args.input}: no such file")
    outputs = [args.output] + ([args.valid_output] if args.valid_output else [])
    return make_once(args, Ingredients([Path(args.input)], list(map(Path, outputs))), lambda: _select(args, outputs))


def _select(args: argparse.Namespace, outputs: Sequence[str]) -> str:
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


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `Options`; None: not given."""
    default = Options()
    parser.add_argument(
        "--max-pairs-per-prompt", type=int, dest="max_pairs", metavar="N",
        help="keep the first N rejected answers of a prompt (default: all; 1 of a record with --method scores)",
    )  # fmt: skip
    parser.add_argument(
        "--min-edit-distance", type=float, metavar="N",
        help="leave out samples closer than this to the chosen text: in characters, or below 1 as a fraction of its characters (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--chosen", choices=("answer", "sampled"),
        help=f"verify-math: the record's answer, or the first right sample (default {default.chosen})",
    )  # fmt: skip
    parser.add_argument("-n", "--n", type=int, metavar="N", help=f"perturb: noisy answers per record (default {default.n})")
    parser.add_argument(
        "--noise-ratio", type=float, metavar="F", help=f"perturb: of the words or Chinese characters (default {default.noise_ratio})"
    )
    parser.add_argument("--noise-seed", type=int, metavar="N", help="perturb: of the noise (default: --seed)")
    parser.add_argument("--score-field", metavar="NAME", help=f"scores: where a candidate has its score (default {default.score_field!r})")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    parser = StageParser(
        "select", "Turn sampled candidates into preference pairs and split them by prompt.",
        "--input candidates.jsonl --output train.jsonl --valid-output valid.jsonl --valid-fraction 0.05",
        output="records with rejected answers, one per line", max_drop_fraction=0.95,
    )  # fmt: skip
    parser.add_argument("--method", choices=list(METHODS), default="lppc", help="how pairs are chosen (default %(default)s)")
    _add_method_options(parser)
    parser.add_argument(
        "--swap-fraction", type=float, default=0.0, metavar="F", help="of the pairs get their labels exchanged (default %(default)s)"
    )
    parser.add_argument("--scores", action="store_true", help="add scores: 1 minus the character error rate against the reference answer")
    parser.add_argument("--valid-fraction", type=float, default=0.0, metavar="F", help="of the prompts, 0 to 1 (default %(default)s)")
    parser.add_argument("--valid-output", metavar="PATH", help="where the validation records go")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the split, the swaps and the noise (default %(default)s)")
    return run_stage(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
