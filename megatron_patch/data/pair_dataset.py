"""Stores -> samples -> the stream of packed micro-batches that Megatron's external data loader iterates over.

Every rank reads the memory-mapped stores itself and takes its own slots of the batch plan; nothing is broadcast and no loader
state is saved, because the plan is a function of the pairs consumed so far.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_patch.data.batch_plan import BatchPlan
from megatron_patch.data.packed_batch import PackedBatch, Sample, pack
from megatron_patch.data.pair_store import PairStore, read_reference_logps, reference_record

RESPONSES_PER_SAMPLE = {"pairs": 2, "sft": 1, "text": 1}


def parse_weighted_prefixes(words: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """``["a", "b"]`` -> prefixes without weights; ``["0.7", "a", "0.3", "b"]`` -> prefixes and weights (Megatron's --data-path form).

    Raises:
        ValueError: a weight without a prefix, or weights for some prefixes only.
    """

    def number(word: str) -> float | None:
        """A weight, or None for a prefix."""
        try:
            return float(word)
        except ValueError:
            return None

    prefixes = [w for w in words if number(w) is None]
    weights = [number(w) for w in words if number(w) is not None]
    if not prefixes:
        raise ValueError(f"data prefixes: no prefix in {' '.join(words)!r}")
    if not weights:
        return prefixes, None
    alternating = all((number(w) is None) == bool(i % 2) for i, w in enumerate(words)) and len(words) % 2 == 0
    if not alternating:
        raise ValueError(f"data prefixes: give a weight before every prefix or none at all, got {' '.join(words)!r}")
    return prefixes, [float(w) for w in weights if w is not None]


class Work(NamedTuple):
    """What samples or micro-batches take to compute, int64 [as many] each: linear in the first and the last, attention in the second."""

    tokens: np.ndarray
    squares: np.ndarray
    """Sum over the sample's sequences of length^2; for a response behind a prompt (prompt + response)^2 - prompt^2."""
    scored: np.ndarray


class SampleSet:
    """Samples of one or several stores of one kind, numbered end to end.

    Args:
        prefixes: stores. kind: "pairs", "sft" or "text". weights_fingerprint: refuse reference log-probs of other weights
            (None: any). with_reference: read reference log-probs (pairs only). tokenizer: refuse stores of another tokenizer.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        kind: str,
        *,
        with_reference: bool = False,
        weights_fingerprint: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        self.kind = kind
        self.stores = [PairStore(prefix, kind=kind) for prefix in prefixes]
        for store in self.stores:
            made_with = store.manifest["tokenizer"]["fingerprint"]
            if tokenizer is not None and made_with != tokenizer:
                raise ValueError(
                    f"{store.prefix}.json: made with another tokenizer (fingerprint {made_with}) than the model's ({tokenizer})"
                )
        self.sizes = [len(store) for store in self.stores]
        self._ends = np.cumsum(self.sizes)
        self.lengths, self.scored_lengths = self._sequence_lengths()
        self._reference = (
            [read_reference_logps(store, weights_fingerprint=weights_fingerprint) for store in self.stores] if with_reference else None
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def responses_per_sample(self) -> int:
        """2 for pairs, 1 for everything else."""
        return RESPONSES_PER_SAMPLE[self.kind]

    def _sequence_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [samples, responses] tokens of each sequence, and of these the scored ones."""
        stored = np.concatenate([store.lengths.astype(np.int64) for store in self.stores])
        if self.kind == "pairs":
            return stored[:, :1] + stored[:, 1:], stored[:, 1:]
        return stored[:, :1], stored[:, 1:] - (self.kind == "text")  # nothing predicts a text's first token

    @property
    def tokens(self) -> np.ndarray:
        """int64 [samples]: tokens of each sample's sequences; a pair's prompt counts once for each response."""
        return self.lengths.sum(axis=1)

    def prompts(self, numbers: Any = slice(None)) -> np.ndarray:
        """int64 [samples]: tokens that all sequences of a sample begin with; 0 where there is but one sequence."""
        shared = self.lengths[numbers, 0] - self.scored_lengths[numbers, 0]
        return shared if self.kind == "pairs" else np.zeros_like(shared)

    def prompt_keys(self, numbers: np.ndarray | None = None) -> np.ndarray:
        """int64 [samples]: equal for samples (some, or all) whose prompts are the same: a store's group, and length (some may be cut)."""
        numbers = np.arange(len(self)) if numbers is None else numbers
        firsts = np.empty(len(numbers), dtype=np.int64)
        which = np.searchsorted(self._ends, numbers, side="right")
        for store in np.unique(which):
            mine, offset = which == store, self._ends[store] - self.sizes[store]
            groups = self.stores[store].columns.group[numbers[mine] - offset]
            firsts[mine] = np.where(groups >= 0, groups + offset, numbers[mine])
        return firsts << 24 | self.prompts(numbers)

    def work(self, share_prompts: bool, numbers: Any = slice(None)) -> "Work":
        """What samples take to compute, all or some; with ``share_prompts`` a sample's prompt is computed once."""
        lengths, answers = self.lengths[numbers], self.scored_lengths[numbers].sum(axis=1)
        tokens, squares = lengths.sum(axis=1), np.square(lengths).sum(axis=1)
        if not share_prompts:
            return Work(tokens, squares, answers)
        copies, prompts = self.responses_per_sample - 1, self.prompts(numbers)
        return Work(tokens - copies * prompts, squares - copies * np.square(prompts), answers)

    def locate(self, number: int) -> tuple[int, int]:
        """(store, document) of sample ``number``."""
        store = int(np.searchsorted(self._ends, number, side="right"))
        return store, int(number - (self._ends[store] - self.sizes[store]))

    def __getitem__(self, number: int) -> Sample:
        which, document = self.locate(int(number))
        parts = self.stores[which][document]
        sequences = _scored_parts(self.kind, parts)
        return Sample(
            sequences=tuple(np.concatenate([part for part, _ in sequence]) for sequence in sequences),
            scored=tuple(np.concatenate([np.full(len(part), scored) for part, scored in sequence]) for sequence in sequences),
            reference=None if self._reference is None else self._reference[which][document],
            name=self.name(which, document),
            scores=self.stores[which].columns.scores[document] if self.kind == "pairs" else None,
            prompt=int(self.prompts(number)),
            prompt_key=int(self.prompt_keys(np.array([number]))[0]),
        )

    def without_score_gap(self) -> list[str]:
        """Names of the pairs that are unscored, or whose chosen response does not score higher than the rejected one."""
        gaps = [store.columns.scores[:, 0] - store.columns.scores[:, 1] for store in self.stores]
        return [self.name(which, int(i)) for which, gap in enumerate(gaps) for i in np.flatnonzero(~(gap > 0))]

    def shortest_references(self, count: int) -> tuple[list[tuple[np.ndarray, ...]], np.ndarray, str] | None:
        """The shortest pairs of the first store, their reference log-probs [count, 2] and the dtype these were computed in."""
        if self._reference is None:
            return None
        shortest = np.argsort(self.tokens[: self.sizes[0]], kind="stable")[:count]
        dtype = reference_record(self.stores[0])["dtype"]
        return [self.stores[0][int(i)] for i in shortest], self._reference[0][shortest], dtype

    def name(self, store: int, document: int) -> str:
        """What errors call a sample: its id and the store it is in."""
        return f"{self.stores[store].columns.id[document]} ({self.stores[store].prefix})"


def _scored_parts(kind: str, parts: tuple[np.ndarray, ...]) -> list[list[tuple[np.ndarray, bool]]]:
    """The sequences that the model sees for one document, each as runs of tokens that are scored or not."""
    if kind == "pairs":
        prompt, *responses = parts
        return [[(prompt, False), (response, True)] for response in responses]
    if kind == "sft":
        return [[(part, bool(i % 2)) for i, part in enumerate(parts)]]
    first, *rest = parts
    return [[(first[:1], False), (first[1:], True), *((part, True) for part in rest)]]


def round_up(tokens: Any, multiple: int) -> Any:
    """The next multiple; of a number or of each number of an array."""
    return -(-tokens // multiple) * multiple


class RowShape(NamedTuple):
    """What the parallel layout asks of packed rows, in tokens."""

    multiple_of: int = 1
    """Of every row: context ranks x tensor ranks under sequence parallelism."""
    context_ranks: int = 1
    at_least: int = 1
    """Of every row; with a multiple of the budget all rows are alike."""
    share_prompts: bool = False
    """Each prompt is in a row once (data/packed_batch.py)."""

    @property
    def sequence_multiple(self) -> int:
        """Of every sequence: two chunks a context rank."""
        return 2 * self.context_ranks if self.context_ranks > 1 else 1

    def tokens(self, samples: SampleSet, numbers: Any = slice(None)) -> np.ndarray:
        """int64 [samples]: tokens that all or some samples take in a row, where they share a prompt with no other."""
        if self.share_prompts:
            return samples.work(True, numbers).tokens
        return round_up(samples.lengths[numbers], self.sequence_multiple).sum(axis=1)


@dataclass(frozen=True)
class MicroBatchStream:
    """Everything a rank needs to turn its slots of the plan into packed micro-batches."""

    samples: SampleSet
    plan: BatchPlan
    rank: int  # data-parallel rank
    vocab_size: int
    shape: RowShape
    context_rank: int = 0

    def batch(self, slot: Sequence[np.ndarray]) -> PackedBatch:
        """This rank's packed micro-batch of a slot of the plan, which holds the sample numbers of every rank."""
        whole = pack(
            [self.samples[n] for n in slot[self.rank]],
            multiple_of=self.shape.multiple_of,
            sequence_multiple=self.shape.sequence_multiple,
            at_least=self.shape.at_least,
            share_prompts=self.shape.share_prompts,
            vocab_size=self.vocab_size,
            responses_per_sample=self.samples.responses_per_sample,
            samples_by_rank=tuple(map(len, slot)),
        )
        return whole.of_context_rank(self.context_rank, self.shape.context_ranks)

    def work(self, consumed: int) -> tuple[Work, int]:
        """(what each micro-batch of the step after ``consumed`` pairs takes, [M x D]; tokens of all their rows, padding included)."""
        shape, packed = self.shape, 0
        works = []
        for share in (share for slot in self.plan.step(consumed) for share in slot):
            saved = self._prompts_met_again(share) if shape.share_prompts else np.zeros(0, dtype=np.int64)
            work = self.samples.work(shape.share_prompts, share)
            works.append([work.tokens.sum() - saved.sum(), work.squares.sum() - np.square(saved).sum(), work.scored.sum()])
            held = int(shape.tokens(self.samples, share).sum() - saved.sum())
            packed += round_up(max(held, shape.at_least), shape.multiple_of)
        return Work(*np.array(works).T), packed

    def _prompts_met_again(self, share: np.ndarray) -> np.ndarray:
        """int64: the lengths of the prompts in a micro-batch that another of its samples brought already."""
        _, first = np.unique(self.samples.prompt_keys(share), return_index=True)
        return np.delete(self.samples.prompts(share), first)

    def from_position(self, consumed: int) -> Iterator[PackedBatch]:
        """Endless: this rank's micro-batches of the step after ``consumed`` pairs, of the next one, and so on."""
        while True:
            for slot in self.plan.step(consumed):
                yield self.batch(slot)
            consumed += self.plan.batch

    def repeated(self) -> Iterator[PackedBatch]:
        """Endless: the same full pass over and over, for evaluation."""
        while True:
            for slot in self.plan.step(0):
                yield self.batch(slot)
