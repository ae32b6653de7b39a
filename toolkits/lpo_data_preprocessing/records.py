"""What every stage shares: reading and writing JSONL records, counting what was dropped, and how a stage starts, reports and fails.

A record is one line: {"id", "prompt": [{"role", "content"}...], "chosen": str, "rejected": [str...], ...}; fields a stage does not know
pass through it. A user's mistake is a ValueError that names file and line (or id); `run_stage` turns it into one line and exit code 2.
"""

import argparse
import codecs
import hashlib
import json
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tqdm import tqdm

from megatron_patch.data.atomic_files import atomic_path, write_json
from toolkits.lpo_data_preprocessing.preemption import PREEMPTED

Record = dict[str, Any]
Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")
MAX_LINE_BYTES = 64 * 2**20
"""A longer line is a mistake (a file of another kind), and would be read into memory whole."""


def read_lines(stream: BinaryIO, name: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (1-based line number, line) of the lines that are not blank; `name` opens the error about a line over `MAX_LINE_BYTES`.

    A byte order mark of UTF-8 is left out.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"{name}:{number}: longer than {MAX_LINE_BYTES} bytes; is this JSON Lines?")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def parse_record(line: bytes, where: str) -> Record:
    """One line as a record; ValueError naming `where` for anything but a JSON object in UTF-8.

    Refused too is what Python's reader takes and others do not: NaN, infinity, a field given twice, half of a surrogate pair.
    """
    try:
        record = _DECODER.decode(line.decode("utf-8"))
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: not valid text (half of a surrogate pair, \\ud800 to \\udfff)") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x} at {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg}, character {error.pos + 1})") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    if not isinstance(record, dict):
        hint = " (a JSON array belongs into a .json file)" if isinstance(record, list) else ""
        raise ValueError(f"{where}: a record must be a JSON object, got {type(record).__name__}{hint}")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> Record:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"field {repeated!r} was given twice")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_repeats)


def parse_json(text: str) -> Any:
    """A whole JSON text, as strictly as `parse_record`; ValueError or RecursionError without a place."""
    return _DECODER.decode(text)


def read_records(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Yield (1-based line number, record) of a JSONL file; blank lines are skipped. ValueError naming file:line for anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as stream:
        for number, line in read_lines(stream, path):
            yield number, parse_record(line, f"{path}:{number}")


def get_field(record: Record, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`, checked to be a `kind` (or one of them); `where` ("file:line") opens the error."""
    if name not in record:
        raise ValueError(f"{where}: field {name!r} is missing (fields: {', '.join(record) or 'none'})")
    if not isinstance(record[name], kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}: field {name!r} must be a {wanted}, got {type(record[name]).__name__}")
    return record[name]


def get_texts(record: Record, name: str, where: str) -> list[str]:
    """`record[name]`, checked to be a list of texts: one text alone would be read letter by letter."""
    texts = get_field(record, name, list, where)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name}[{i}] must be text, got {type(text).__name__}")
    return texts


def check_messages(messages: Any, where: str) -> list[Message]:
    """A non-empty list of {"role", "content"} with known roles and text contents, else ValueError."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a non-empty list, got {messages!r:.80}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or message.get("role") not in ROLES:
            raise ValueError(f"{where}: a message needs 'content' (text) and 'role' (one of {', '.join(ROLES)}), got {message!r:.80}")
    return messages


def content_hash(value: Any) -> str:
    """16 hex digits of the sha256 of a JSON value, the same whatever the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@contextmanager
def jsonl_writer(path: str | Path) -> Iterator[Callable[[Record], None]]:
    """Yield a function that appends one record; the file appears when the block ends without an exception, or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as stream:
            yield lambda record: print(json.dumps(record, ensure_ascii=False), file=stream)


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """ValueError if `path` is there and the user did not ask to overwrite it."""
    if Path(path).exists() and not overwrite:
        raise ValueError(f"{path}: exists already, give another --output or --overwrite")


@dataclass
class Tally:
    """What came in, what went out, and why the rest did not."""

    unit: str = "records"
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Losses, by reason: too many are an error."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Left out by design (a sample equal to the chosen answer...): shown, never an error."""
    altered: Counter[str] = field(default_factory=Counter)
    """Kept, but not as it came (labels exchanged...): shown."""

    def drop(self, reason: str, count: int = 1) -> None:
        """Count a loss."""
        self.dropped[reason] += count

    def check(self, max_drop_fraction: float) -> None:
        """ValueError if more than `max_drop_fraction` (0..1) of what was read was dropped, or if nothing was kept."""
        lost = sum(self.dropped.values())
        reasons = ", ".join(f"{reason} {count}" for reason, count in (self.dropped + self.left_out).most_common()) or "empty input"
        if lost > max_drop_fraction * self.read:
            raise ValueError(f"{lost} of {self.read} {self.unit} dropped, more than --max-drop-fraction {max_drop_fraction:g} ({reasons})")
        if not self.kept:
            raise ValueError(f"no {self.unit} left ({reasons})")

    def table(self) -> str:
        """The counts by reason, one line each; empty if everything was kept as it came."""
        counts = {"dropped": self.dropped, "left out": self.left_out, "altered": self.altered}
        rows = [(what, *item) for what, count in counts.items() for item in count.most_common()]
        return "\n".join(f"  {what:<8}  {reason:<28} {count:>9}" for what, reason, count in rows)


class ExampleParser(argparse.ArgumentParser):
    """An argument parser whose help ends with an example and whose errors are one line, like every other error of a stage."""

    def __init__(self, stage: str, description: str, example: str) -> None:
        super().__init__(
            prog=f"python -m toolkits.lpo_data_preprocessing.{stage}",
            description=description,
            epilog=f"example:\n  python -m toolkits.lpo_data_preprocessing.{stage} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.stage = stage

    def error(self, message: str) -> NoReturn:
        """argparse's complaint as a ValueError."""
        raise ValueError(f"{message} (see --help)")


class CommandParser(ExampleParser):
    """The parser of a stage that has an output."""

    def __init__(self, stage: str, description: str, example: str, *, output: str) -> None:
        super().__init__(stage, description, example)
        self.add_argument("--output", required=True, metavar="PATH", help=output)
        self.add_argument("--overwrite", action="store_true", help="replace an existing output")
        self.add_argument("--update", action="store_true", help="replace an existing output unless it is of the same input and options")


class StageParser(CommandParser):
    """The parser of a stage that reads records."""

    def __init__(
        self, stage: str, description: str, example: str, *, output: str, max_drop_fraction: float = 0.5, many_inputs: bool = False
    ) -> None:
        super().__init__(stage, description, example, output=output)
        if many_inputs:
            self.add_argument("--input", required=True, nargs="+", metavar="PATH", help="files, folders or globs to read, in this order")
        else:
            self.add_argument("--input", required=True, metavar="JSONL", help="records to read")
        self.add_argument(
            "--max-drop-fraction", type=float, default=max_drop_fraction, metavar="F",
            help="more than this fraction (0 to 1) of the input dropped is an error (default %(default)s)",
        )  # fmt: skip


class _Preempted(SystemExit):
    """SIGTERM: SLURM's preemption, a cancelled job, a user's kill."""


def _preempt(*_: Any) -> NoReturn:
    raise _Preempted(PREEMPTED)


def run_stage(parser: CommandParser, run: Callable[[argparse.Namespace], str], argv: Sequence[str] | None) -> int:
    """Parse, run, print the stage's closing lines (what `run` returns); 0, or 2 after a one-line error on stderr for a user's mistake.

    SIGTERM ends the stage through an exception, so that its temporary files are removed, and the process with exit code 75.
    """
    before = signal.signal(signal.SIGTERM, _preempt)
    started = time.monotonic()
    try:
        summary, *table = run(parser.parse_args(argv)).split("\n")
    except (ValueError, OSError) as error:
        print(f"[error] {parser.stage}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except _Preempted:
        print(f"[preempted] {parser.stage}: the same command goes on", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n".join([f"{parser.stage}: {summary} ({time.monotonic() - started:.1f} s)", *table]))
    return 0


def tally_path(output: str | Path) -> Path:
    """Where a stage's counts are kept."""
    return Path(f"{Path(output)}.tally.json")


def close_stage(tally: Tally, output: str | Path) -> str:
    """Write the counts to ``<output>.tally.json`` and return them for the terminal: a summary line and the table under it."""
    reasons = {"dropped": dict(tally.dropped), "left_out": dict(tally.left_out), "altered": dict(tally.altered)}
    write_json(tally_path(output), {"unit": tally.unit, "read": tally.read, "kept": tally.kept, **reasons})
    lost, left_out = sum(tally.dropped.values()), sum(tally.left_out.values())
    summary = f"{tally.read} {tally.unit} read, {tally.kept} kept, {lost} dropped, {left_out} left out -> {output}"
    return f"{summary}\n{tally.table()}".strip()


class _Lines:
    """A stream on which a progress bar makes lines instead of overwriting one."""

    def write(self, text: str) -> None:
        """One line, unless there is nothing in it."""
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        """As of any stream."""
        sys.stderr.flush()


def progress(items: Iterable[Any] | None, *, what: str, unit: str, total: int | None = None, initial: int = 0) -> Any:
    """A progress bar on stderr; a line every 30 s where stderr is not a terminal. Without items its `update` is for the caller to call."""
    terminal = sys.stderr.isatty()
    return tqdm(
        items, desc=what, unit=unit, total=total, initial=initial, file=sys.stderr if terminal else _Lines(), leave=False,
        mininterval=0.2 if terminal else 30.0, maxinterval=10.0 if terminal else 60.0, delay=0.0 if terminal else 30.0,
    )  # fmt: skip
