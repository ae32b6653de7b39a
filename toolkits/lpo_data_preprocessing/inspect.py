"""Look at a pair store: counts, lengths, and single pairs as text, on the terminal or as one HTML file.

    python -m toolkits.lpo_data_preprocessing.inspect outputs/pairs/train --pair 3 --html train.html

Prompt, responses and end tokens have colours on a terminal (not with NO_COLOR set) and names everywhere. Every file of the store is
compared with the manifest's sha256 first; --quick compares sizes alone. Nothing of the store is changed.
"""

import argparse
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_patch.data.atomic_files import atomic_path
from megatron_patch.display import visible
from toolkits.lpo_data_preprocessing.records import ExampleParser, refuse_existing
from toolkits.lpo_data_preprocessing.store_page import page
from toolkits.lpo_data_preprocessing.store_view import Part, Sample, StoreView, histogram, quantiles

_BAR = 40  # characters
_STYLES = {"prompt": "2", "chosen": "32", "response": "32", "text": "32", "rejected": "31", "end": "1;33", "control": "36"}  # SGR codes


def text_report(view: StoreView) -> Iterator[str]:
    """The lines about the whole store."""
    yield f"{view.store.prefix}: {len(view)} {view.unit}s"
    yield from (f"  {name:<10} {visible(value)}" for name, value in view.facts().items())
    lengths = view.lengths()
    width = max(map(len, lengths))
    yield ""
    yield f"  {'tokens':<{width}} " + "".join(f"{name:>8}" for name in ("min", "median", "p90", "max"))
    for name, values in lengths.items():
        yield f"  {name:<{width}} " + "".join(f"{value:>8}" for value in quantiles(values).values())
    yield from _bars(*list(lengths.items())[-1], view.unit)


def _bars(name: str, lengths: np.ndarray, unit: str) -> Iterator[str]:
    bins = histogram(lengths)
    labels, most = bins.labels(), max(bins.counts)
    width = max(len("tokens"), *map(len, labels))
    yield ""
    yield f"  {'tokens':>{width}} {unit + 's':>8}  ({name})"
    for label, count in zip(labels, bins.counts, strict=True):
        yield f"  {label:>{width}} {count:>8}  {'#' * -(-count * _BAR // most)}".rstrip()


def text_sample(sample: Sample, unit: str, *, colour: bool) -> Iterator[str]:
    """The lines about one sample."""
    yield f"{unit} {sample.number}: {visible(', '.join(sample.about()))}"
    for part in sample.parts:
        yield f"  {_painted(part.name, part.name, colour)}: {', '.join(part.measures())}"
        yield from (f"    {line}".rstrip() for line in _lines(part, colour))
        if part.scored:
            yield f"    {_painted(f'[end] {part.end}' if part.end else '[cut] no end token', 'end', colour)}"


def _lines(part: Part, colour: bool) -> list[str]:
    """The text of a part, each line painted by itself."""
    whole = ""
    for segment in part.segments:
        style = "control" if segment.control else part.name
        whole += "\n".join(_painted(line, style, colour) for line in visible(segment.text).split("\n"))
    return whole.split("\n") if whole else []


def _painted(text: str, style: str, colour: bool) -> str:
    return f"\033[{_STYLES[style]}m{text}\033[0m" if colour and text else text


def _numbers(count: int, wanted: int, pair: int | None) -> list[int]:
    """`wanted` numbers below `count`, the same ones every time, in order; `pair` among them."""
    drawn = set(random.Random(1).sample(range(count), min(wanted, count)))
    return sorted(drawn | ({pair} if pair is not None else set()))


def _run(args: argparse.Namespace) -> None:
    if args.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {args.samples}")
    if args.html:
        refuse_existing(args.html, args.overwrite)
    view = StoreView(args.prefix, args.tokenizer, verify="size" if args.quick else "sha256")
    pair = None if args.pair is None else view.number(args.pair)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    lines = list(text_report(view))
    if pair is not None:
        lines += ["", *text_sample(view.sample(pair), view.unit, colour=colour)]
    if args.html:
        samples = [view.sample(number) for number in _numbers(len(view), args.samples, pair)]
        with atomic_path(args.html) as temporary:
            Path(temporary).write_text(page(view, samples), encoding="utf-8")
        lines += ["", f"page: {args.html} ({len(samples)} of {len(view)} {view.unit}s)"]
    print("\n".join(lines), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 2 after a one-line error for a user's mistake."""
    parser = ExampleParser(
        "inspect", "Look at a pair store: counts, lengths in tokens, log-probs in nats, pairs as text.",
        "outputs/pairs/train --pair 3 --html train.html",
    )  # fmt: skip
    parser.add_argument("prefix", metavar="PREFIX", help="of the store: PREFIX.json is its manifest")
    parser.add_argument("--pair", metavar="I|ID", help="show this pair (or sample) as text: its number from 0, or its id")
    parser.add_argument("--html", metavar="FILE", help="write all of it as one page, which needs no other file")
    parser.add_argument("--samples", type=int, default=50, metavar="N", help="pairs on the page, drawn at random (default %(default)s)")
    parser.add_argument("--tokenizer", metavar="DIR", help="where the store's tokenizer lies now (default: where the manifest says)")
    parser.add_argument("--quick", action="store_true", help="compare the files' sizes with the manifest, not their contents")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    try:
        _run(parser.parse_args(argv))
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"[error] inspect: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
