"""A pair store for eyes: its facts, its lengths, and single samples as text. What is shown where is for `inspect` and `store_page`.

Token ids become text part by part (prompt, chosen, rejected), and a part becomes segments: a control token is told apart from a text that
merely spells one out, because the ids say which it is. The end of a response stands alone, so a cut one is seen at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_patch.data.pair_store import PairStore, read_reference_logps, reference_record
from megatron_patch.data.tokenizer_identity import tokenizer_fingerprint
from toolkits.lpo_data_preprocessing.tokenise import END_OF_TEXT, load_tokenizer

UNITS = {"pairs": "pair", "sft": "sample", "text": "text"}
_MOST_BINS = 16


@dataclass(frozen=True)
class Segment:
    """A stretch of text, or one control token."""

    text: str
    control: bool


@dataclass(frozen=True)
class Part:
    """One sequence of a sample."""

    name: str
    scored: bool
    """Whether the loss looks at it."""
    tokens: int
    """End token included."""
    segments: tuple[Segment, ...]
    """Without the end token."""
    end: str | None
    """The token that ends a scored part; None: it was cut, or is not scored."""
    logp: float | None
    """The reference's, sum in nats."""

    def measures(self) -> list[str]:
        """Tokens and, where the reference has seen the part, its log-prob."""
        counted = f"{self.tokens} token{'s' * (self.tokens != 1)}"
        return [counted] if self.logp is None else [counted, f"reference {self.logp:.4f} nats", f"{self.logp / self.tokens:.4f} per token"]


@dataclass(frozen=True)
class Sample:
    """One document of a store."""

    number: int
    id: str
    group: int
    """Number of the first sample of the same prompt; -1: unknown."""
    line: int
    """Of the input file, from 1; -1: unknown."""
    scores: tuple[float, float] | None
    """Of the chosen and the rejected answer."""
    parts: tuple[Part, ...]

    def about(self) -> list[str]:
        """Where it comes from, as far as the store knows."""
        known = {f"id {self.id}": True, f"line {self.line}": self.line >= 0, f"prompt of {self.group}": self.group >= 0}
        scores = [f"scores {self.scores[0]:g}, {self.scores[1]:g}"] if self.scores else []
        return [text for text, is_known in known.items() if is_known] + scores


@dataclass(frozen=True)
class Histogram:
    """How many samples have how many tokens: bin i holds lengths from ``first + i * width`` to below ``first + (i + 1) * width``."""

    first: int
    width: int
    counts: list[int]

    def labels(self) -> list[str]:
        """The lengths in each bin: "20-29", or "7" where a bin is one length."""
        starts = [self.first + i * self.width for i in range(len(self.counts))]
        return [str(start) if self.width == 1 else f"{start}-{start + self.width - 1}" for start in starts]


def histogram(lengths: np.ndarray) -> Histogram:
    """At most 16 bins of a round width (1, 2 or 5 times a power of ten), shortest to longest. `lengths`: integers [N], N > 0."""
    low, high = int(lengths.min()), int(lengths.max())
    widths = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < _MOST_BINS)
    counts = np.bincount(lengths // width - low // width, minlength=high // width - low // width + 1)
    return Histogram(low // width * width, width, counts.tolist())


class StoreView:
    """One store with its reference log-probs, where there are any. The tokenizer is loaded when text is first asked for."""

    def __init__(self, prefix: str | Path, tokenizer: str | Path | None = None, *, verify: str = "sha256") -> None:
        """`tokenizer`: a folder, in place of the one in the manifest. `verify`: as in PairStore.

        ValueError for a damaged store, or reference log-probs that are damaged or another store's.
        """
        self.store = PairStore(prefix, verify=verify)
        self.manifest, self.kind, self.unit = self.store.manifest, self.store.kind, UNITS[self.store.kind]
        self._folder = tokenizer
        scored_before = self.kind == "pairs" and Path(f"{prefix}.ref.json").exists()
        self.reference = read_reference_logps(self.store, weights_fingerprint=None) if scored_before else None
        """float64 [pairs, 2], sums in nats; None: not computed yet."""

    def __len__(self) -> int:
        return len(self.store)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that made the store; ValueError if it cannot be found or another one is there."""
        recorded = self.manifest["tokenizer"]
        folder = self._folder or recorded.get("path")
        if folder is None or (self._folder is None and not Path(folder).is_dir()):
            raise ValueError(f"{self.store.prefix}.json: its tokenizer ({folder or 'no path'}) is not there, give --tokenizer DIR")
        tokenizer = load_tokenizer(folder)
        found, needed = tokenizer_fingerprint(tokenizer), recorded["fingerprint"]
        if found != needed:
            raise ValueError(f"{folder}: not the tokenizer of {self.store.prefix} (fingerprint {found[:12]}, the store has {needed[:12]})")
        return tokenizer

    @cached_property
    def _end_tokens(self) -> set[str]:
        return {self.manifest["template"].get("response_end", "<|im_end|>"), END_OF_TEXT}

    def number(self, name: str) -> int:
        """The document of this id, else of this number; ValueError if it is neither."""
        found = np.flatnonzero(np.asarray(self.store.columns.id[:]) == name)
        if len(found):
            return int(found[0])
        if not name.isdecimal():
            raise ValueError(f"{self.store.prefix}: there is no {self.unit} of id {name!r}")
        return int(name)

    def sample(self, number: int) -> Sample:
        """Document `number` as text; ValueError if there is no such document."""
        if not 0 <= number < len(self):
            raise ValueError(f"{self.store.prefix}: there is no {self.unit} {number}, its numbers are 0 to {len(self) - 1}")
        columns, sequences = self.store.columns, self.store[number]
        logps = [None, *self.reference[number]] if self.reference is not None else [None] * len(sequences)
        named = zip(self._names(len(sequences)), sequences, logps, strict=True)
        parts = tuple(self._part(name, scored, ids, logp) for (name, scored), ids, logp in named)
        scores = columns.scores[number]
        return Sample(
            number, columns.id[number], int(columns.group[number]), int(columns.source_line[number]),
            None if np.isnan(scores).any() else (float(scores[0]), float(scores[1])), parts,
        )  # fmt: skip

    def _names(self, count: int) -> list[tuple[str, bool]]:
        """(name, scored) of a document's sequences."""
        if self.kind == "pairs":
            return [("prompt", False), ("chosen", True), ("rejected", True)]
        return [("text", True)] * count if self.kind == "text" else [("prompt", False), ("response", True)] * (count // 2)

    def _part(self, name: str, scored: bool, ids: np.ndarray, logp: float | None) -> Part:
        segments = list(self._segments(ids.tolist()))
        ends = scored and segments and segments[-1].control and segments[-1].text in self._end_tokens
        end = segments.pop().text if ends else None
        return Part(name, scored, len(ids), tuple(segments), end, None if logp is None else float(logp))

    def _segments(self, ids: list[int]) -> Iterator[Segment]:
        control, text = set(self.tokenizer.added_tokens_decoder), list[int]()
        for id in [*ids, None]:
            if id is not None and id not in control:
                text.append(id)
                continue
            if text:
                yield Segment(self._decode(text), False)
                text = []
            if id is not None:
                yield Segment(self._decode([id]), True)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of every sample, integers [N], by what was counted; the last one is what the limit of build_pairs looks at."""
        columns = self.store.lengths
        if self.kind == "text":
            return {"text": columns[:, 0]}
        if self.kind == "sft":
            return {"scored": columns[:, 1], "all": columns[:, 0]}
        prompt, chosen, rejected = columns.T
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "prompt + longer response": prompt + np.maximum(chosen, rejected)}

    def facts(self) -> dict[str, str]:
        """What the manifest and the columns say, in words."""
        manifest = self.manifest
        sources = ", ".join(f"{source['path']} ({source.get('records', '?')} records)" for source in manifest.get("sources", []))
        dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(manifest.get("dropped", {}).items()))
        prompts = set(self.store.columns.group.tolist()) - {-1}
        facts = {
            "kept": f"{len(self)} {self.unit}s" + (f" of {len(prompts)} prompts" if prompts else ""),
            "dropped": dropped or "none",
            "tokens": f"{manifest.get('tokens', '?')}, {manifest.get('scored_tokens', '?')} of them scored",
            "limits": ", ".join(f"{name} {value}" for name, value in manifest.get("limits", {}).items()) or "none",
            "options": self._options(),
            "made": f"from {sources or '?'}",
            "tokenizer": f"{manifest['tokenizer'].get('path', '?')} (fingerprint {manifest['tokenizer']['fingerprint'][:12]})",
        }
        return facts | ({"scores": self._scores(), "reference": self._reference()} if self.kind == "pairs" else {})

    def _options(self) -> str:
        """Options and counts that are not off or zero."""
        said = self.manifest.get("options", {}) | {"template_exceptions": self.manifest["template"].get("exceptions", 0)}
        return ", ".join(name if value is True else f"{name} {value}" for name, value in said.items() if value) or "none"

    def _scores(self) -> str:
        scores = self.store.columns.scores
        scores = scores[~np.isnan(scores).any(axis=1)]
        if not len(scores):
            return "none"
        chosen, rejected = scores.mean(axis=0)
        return f"{len(scores)} pairs, mean of chosen {chosen:.4f}, of rejected {rejected:.4f}"

    def _reference(self) -> str:
        if self.reference is None:
            return "none (reference_logps computes it)"
        record = reference_record(self.store)
        chosen, rejected = (self.reference / self.store.lengths[:, 1:]).mean(axis=0)
        whose = f"{record.get('dtype', '?')}, weights {record.get('weights', '?')[:12]}"
        return f"{whose}, mean of nats per token: chosen {chosen:.4f}, rejected {rejected:.4f}"


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Shortest, median, nine tenths and longest, in tokens: each a length that is there (the lower one of two)."""
    at = {"min": 0.0, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: int(np.quantile(lengths, q, method="lower")) for name, q in at.items()}
