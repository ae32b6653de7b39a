"""What a comparison's TOML file says, read strictly: an unknown key, a missing one or a bad value is one line that names file and key.

A run inherits what it does not say (preset, learning rates, steps) from the top of the file; after reading, every run is complete.
"""

import difflib
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SFT = "SFT"  # the untouched model: measured beside every comparison
DEFAULT_MATERIALS = Path("outputs/quickstart")
PRESETS = Path("examples/qwen2_5/presets")
# The comparison sets these itself; in a file's flags they would contradict it.
OWN_FLAGS = (
    "--hf-path", "--pair-data", "--valid-pair-data", "--train-iters", "--epochs", "--eval-interval", "--lr", "--seed", "--save",
    "--export-hf", "--load",
)  # fmt: skip


@dataclass(frozen=True)
class PairSet:
    """A training set other than the quickstart's, made of the same prompts: options of the data stages."""

    method: str
    """Of toolkits.lpo_data_preprocessing.select: lppc and verify-math use samples of the fine-tuned model, perturb the worked answer."""
    chosen: str
    """For verify-math: "answer" (the worked one) or "sampled" (the first right sample)."""
    n: int
    """Samples, or perturbed answers, per prompt."""
    noise_ratio: float | None
    """For perturb: of the words or Chinese characters; None: select's default."""
    max_pairs_per_prompt: int
    swap_fraction: float
    """Of the pairs, whose labels are exchanged."""
    scores: bool
    """Whether pairs carry scores: 1 minus the character error rate against the worked answer."""
    seed: int


@dataclass(frozen=True)
class Run:
    """One loss with its options; trained at several learning rates, then with several seeds."""

    name: str
    preset: Path
    flags: tuple[str, ...]
    """The file's common flags, then the run's own: later ones win."""
    learning_rates: tuple[float, ...]
    """Those to choose from; none where ``rates_from`` says where the choice is made."""
    steps: int
    pairs: str | None
    """Name of a pair set; None: the quickstart's pairs."""
    rates_from: str | None
    """The run whose chosen rate this one takes over."""
    x: float | None
    series: str
    """Runs of one series are joined by a line in a plot over x."""


@dataclass(frozen=True)
class Comparison:
    """A whole file."""

    title: str
    materials: Path
    """A folder that the quickstart makes (or one laid out like it)."""
    seeds: tuple[int, ...]
    """The first is the one learning rates are chosen with."""
    eval_interval: int
    baseline: str | None
    """The run that the others are held against; None: the best one."""
    x: str | None
    """What a run's x is; None: accuracies are bars."""
    character_error_rate: bool
    runs: tuple[Run, ...]
    pair_sets: Mapping[str, PairSet]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a text, got {value!r}")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, got {value!r}")
    return float(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number, got {value!r}")
    return value


def _count(value: Any) -> int:
    if _integer(value) < 1:
        raise ValueError(f"must be at least 1, got {value!r}")
    return value


def _fraction(value: Any) -> float:
    if not 0 <= _number(value) < 1:
        raise ValueError(f"must lie in [0, 1), got {value!r}")
    return float(value)


def _ratio(value: Any) -> float:
    if not 0 < _number(value) <= 1:
        raise ValueError(f"must lie in (0, 1], got {value!r}")
    return float(value)


def _rate(value: Any) -> float:
    if not 0 < _number(value) < float("inf"):
        raise ValueError(f"must be > 0, got {value!r}")
    return float(value)


def _distinct(item: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read(values: Any) -> tuple[Any, ...]:
        if not isinstance(values, list) or not values:
            raise ValueError(f"must be a list with at least one entry, got {values!r}")
        items = tuple(map(item, values))
        if len(set(items)) < len(items):
            raise ValueError(f"holds an entry twice: {values!r}")
        return items

    return read


def _one_of(*names: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, got {value!r}")
        return value

    return read


def _flags(value: Any) -> tuple[str, ...]:
    """Words as a shell would split them."""
    if not isinstance(value, str):
        raise ValueError(f"must be a text of flags, got {value!r}")
    words = tuple(shlex.split(value))
    own = [word for word in words if word.split("=")[0] in OWN_FLAGS]
    if own:
        raise ValueError(f"{own[0]} is set by the comparison itself")
    return words


def _preset(value: Any) -> Path:
    """The name of a preset or the path of a file of flags, with or without argparse's "@"."""
    name = _text(value).removeprefix("@")
    path = Path(name) if Path(name).is_file() else PRESETS / f"{name}.args"
    if not path.is_file():
        raise ValueError(f"neither a file of flags nor a preset in {PRESETS}: {value!r}")
    return path


@dataclass(frozen=True)
class _Key:
    read: Callable[[Any], Any]
    default: Any = None
    required: bool = False


_RUN_DEFAULTS = {
    "preset": _Key(_preset), "flags": _Key(_flags, ()), "learning_rates": _Key(_distinct(_rate)), "steps": _Key(_count),
}  # fmt: skip
_TOP = {
    "title": _Key(_text, required=True), "materials": _Key(lambda value: Path(_text(value)), DEFAULT_MATERIALS),
    "seeds": _Key(_distinct(_integer), required=True), "eval_interval": _Key(_count, required=True), "baseline": _Key(_text),
    "x": _Key(_text), "character_error_rate": _Key(_bool, False), **_RUN_DEFAULTS,
}  # fmt: skip
_RUN = {
    "name": _Key(_text, required=True), **_RUN_DEFAULTS, "pairs": _Key(_text), "rates_from": _Key(_text), "x": _Key(_number),
    "series": _Key(_text, ""),
}  # fmt: skip
_PAIR_SET = {
    "method": _Key(_one_of("lppc", "verify-math", "perturb"), "lppc"), "chosen": _Key(_one_of("answer", "sampled"), "answer"),
    "n": _Key(_count, 1), "noise_ratio": _Key(_ratio), "max_pairs_per_prompt": _Key(_count, 1), "swap_fraction": _Key(_fraction, 0.0),
    "scores": _Key(_bool, False), "seed": _Key(_integer, 1),
}  # fmt: skip


def read_comparison(path: Path) -> Comparison:
    """The comparison in a TOML file.

    Raises:
        ValueError: one line with the file and the key.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from None
    runs, pair_sets = raw.pop("runs", None), raw.pop("pair_sets", {})
    top = _read_table(raw, _TOP, f"{path}: ")
    if not isinstance(runs, list) or not runs:
        raise ValueError(f"{path}: runs: at least one [[runs]] is needed")
    if not isinstance(pair_sets, dict):
        raise ValueError(f"{path}: pair_sets: must be tables, [pair_sets.NAME]")
    inherited = {name: top.pop(name) for name in _RUN_DEFAULTS}
    comparison = Comparison(
        **top,
        runs=tuple(_read_run(entry, inherited, f"{path}: run {number}") for number, entry in enumerate(runs, start=1)),
        pair_sets={name: PairSet(**_read_table(table, _PAIR_SET, f"{path}: pair_sets.{name}.")) for name, table in pair_sets.items()},
    )
    _check_names(comparison, path)
    _check_shared_rates(comparison, path)
    _check_pair_sets(comparison, path)
    return comparison


def _read_table(raw: Any, keys: Mapping[str, _Key], where: str) -> dict[str, Any]:
    """The values of a table; ``where`` opens every error and stands directly before a key's name."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where.rstrip('. :')}: must be a table, got {raw!r}")
    for name in raw:
        if name not in keys:
            close = difflib.get_close_matches(name, keys, n=1)
            hint = f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(keys)})"
            raise ValueError(f"{where}{name}: unknown key{hint}")
    values = {}
    for name, key in keys.items():
        if name not in raw and key.required:
            raise ValueError(f"{where}{name}: is missing")
        try:
            values[name] = key.read(raw[name]) if name in raw else key.default
        except ValueError as error:
            raise ValueError(f"{where}{name}: {error}") from None
    return values


def _read_run(raw: Any, inherited: Mapping[str, Any], where: str) -> Run:
    if isinstance(raw, dict) and isinstance(raw.get("name"), str):
        where = f"{where} ({raw['name']})"
    values = _read_table(raw, _RUN, f"{where}: ")
    if values["rates_from"] is not None and "learning_rates" in raw:
        raise ValueError(f"{where}: learning_rates: the run takes its rate from {values['rates_from']!r}; give one of the two")
    flags = (*inherited["flags"], *values.pop("flags"))
    complete: dict[str, Any] = {name: inherited.get(name) if value is None else value for name, value in values.items()}
    if complete["rates_from"] is not None:
        complete["learning_rates"] = ()
    for name in ("preset", "learning_rates", "steps"):
        if complete[name] is None:
            raise ValueError(f"{where}: {name}: is missing here and at the top of the file")
    return Run(flags=flags, **complete)


def _check_names(comparison: Comparison, path: Path) -> None:
    names = [run.name for run in comparison.runs]
    for number, run in enumerate(comparison.runs, start=1):
        where = f"{path}: run {number} ({run.name}): "
        if run.name == SFT or run.name in names[: number - 1]:
            raise ValueError(f"{where}name: {'stands for the untouched model' if run.name == SFT else 'was given to another run already'}")
        if run.pairs is not None and run.pairs not in comparison.pair_sets:
            raise ValueError(f"{where}pairs: there is no [pair_sets.{run.pairs}]")
        if run.steps < comparison.eval_interval:
            raise ValueError(f"{where}steps: {run.steps} steps end before the first evaluation (eval_interval {comparison.eval_interval})")
        if run.x is not None and comparison.x is None:
            raise ValueError(f"{where}x: the file does not say what x is (x = \"...\" at its top)")
    if comparison.x is not None and all(run.x is None for run in comparison.runs):
        raise ValueError(f"{path}: x: no run has a value of x")
    if comparison.baseline not in (None, SFT, *names):
        raise ValueError(f"{path}: baseline: there is no run {comparison.baseline!r}")


def _check_shared_rates(comparison: Comparison, path: Path) -> None:
    choosing = {run.name for run in comparison.runs if run.rates_from is None}
    for number, run in enumerate(comparison.runs, start=1):
        if run.rates_from is not None and run.rates_from not in choosing:
            raise ValueError(f"{path}: run {number} ({run.name}): rates_from: {run.rates_from!r} is no run that chooses its own rate")


def _check_pair_sets(comparison: Comparison, path: Path) -> None:
    for name, pairs in comparison.pair_sets.items():
        where = f"{path}: pair_sets.{name}."
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{where.rstrip('.')}: its name is a folder's: letters, digits, _ and -")
        if pairs.chosen == "sampled" and pairs.method != "verify-math":
            raise ValueError(f'{where}chosen: "sampled" is for method = "verify-math"')
        if pairs.noise_ratio is not None and pairs.method != "perturb":
            raise ValueError(f'{where}noise_ratio: is for method = "perturb"')
        if name not in {run.pairs for run in comparison.runs}:
            raise ValueError(f"{where.rstrip('.')}: no run uses it")
        if pairs.swap_fraction and (pairs.chosen != "sampled" or pairs.max_pairs_per_prompt > 1):
            raise ValueError(f'{where}swap_fraction: needs chosen = "sampled" and max_pairs_per_prompt = 1')
        if pairs.swap_fraction and pairs.scores:
            raise ValueError(f"{where}scores: a swapped pair would prefer the lower score; give one of swap_fraction and scores")
