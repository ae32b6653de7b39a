"""One micro-batch as one packed (THD) row: sequences end to end, no attention across them, positions restarting at each.

Padding is at the end: dummy, unscored sequences that bring the row to a multiple of what sequence parallelism needs, or to a fixed length
where one is asked for. Under context parallelism alone each sequence is padded besides, to two chunks a rank, and a rank keeps its two of
each: one from the front and the one as far from the back, so that causal attention costs all ranks the same.

Responses may share a prompt (``share_prompts``): it is in the row once, for the two of a pair and for all pairs that have it, and each of
its responses is a sequence of its own *behind* it. "Sequence" below is what the row is made of end to end, so prompts and responses then.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_patch.preference.logps import ScoredTargets, scored_targets
from megatron_patch.transfer import to_device

# P pairs (samples), R responses, S sequences, T packed tokens, N scored tokens.

PAD_TOKEN = 0  # never scored and never attended to by a real token, so any id will do
_LONGEST_DUMMY = 128  # tokens: padding attends to itself, which costs the square


class Sample(NamedTuple):
    """What one document of a store contributes: a pair has two sequences, a fine-tuning conversation or a text has one.

    sequences: int32 token ids, prompt and response end to end. scored: bool per token, False for the first of a sequence.
    reference: float64 [responses] reference log-prob sums (nats), or None. name: the id shown in errors.
    scores: float64 [responses] an outside judge's scores, NaN where there are none.
    prompt: tokens that all its sequences begin with, 0 if it has but one. prompt_key: samples of one key have the same prompt.
    """

    sequences: tuple[np.ndarray, ...]
    scored: tuple[np.ndarray, ...]
    reference: np.ndarray | None
    name: str
    scores: np.ndarray | None = None
    prompt: int = 0
    prompt_key: object = None


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch. Response r of sample p is row ``r * P + p`` of everything of size R, so chosen rows come first."""

    tokens: Tensor  # int64 [1, T]; T / CP under context parallelism
    cu_seqlens: Tensor  # int32 [S + 1], dummy sequences included, of the whole row
    scored: ScoredTargets  # where the model predicts what, for which of R responses
    lengths: Tensor  # int64 [R], scored tokens of each response
    reference: Tensor  # float64 [R], nats; NaN when the store has no reference
    names: tuple[str, ...]  # P sample names
    scores: Tensor  # float64 [R], NaN when the store has none
    samples_by_rank: tuple[int, ...]  # P of this micro-batch on every data-parallel rank
    behind: tuple[int, ...]  # S: the number of the sequence that each goes on from, -1 if it begins by itself

    def of_context_rank(self, rank: int, ranks: int) -> "PackedBatch":
        """What one of several context-parallel ranks keeps: chunks ``rank`` and ``2 ranks - 1 - rank`` of each sequence."""
        if ranks == 1:
            return self
        starts, chunk = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long() // (2 * ranks)
        first = torch.stack([starts + rank * chunk, starts + (2 * ranks - 1 - rank) * chunk], dim=1).view(-1)  # [2 S]
        sizes = chunk.repeat_interleave(2)
        offset = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        kept = first.repeat_interleave(sizes) + offset
        here = torch.full((self.tokens.size(1),), -1).index_copy(0, kept, torch.arange(len(kept)))
        positions = here[self.scored.positions]
        mine = positions >= 0
        scored = ScoredTargets(positions[mine], self.scored.targets[mine], self.scored.response[mine], self.scored.responses)
        return replace(self, tokens=self.tokens[:, kept], scored=scored)

    @property
    def samples(self) -> int:
        """P: pairs, conversations or texts in this micro-batch."""
        return len(self.names)

    def to(self, device: torch.device | str | int) -> "PackedBatch":
        """The same batch with its tensors on ``device``."""
        tensors: dict[str, Any] = {name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        positions, targets, response, responses = self.scored
        scored = ScoredTargets(to_device(positions, device), to_device(targets, device), to_device(response, device), responses)
        return replace(self, scored=scored, **tensors)


class _Row:
    """A packed row that grows."""

    def __init__(self, sequence_multiple: int) -> None:
        self.sequence_multiple = sequence_multiple
        self.sequences: list[np.ndarray] = []
        self.owners: list[np.ndarray] = []
        self.behind: list[int] = []
        self.length = 0
        self._ends: list[int] = []
        self._first_behind: list[tuple[int, int]] = []  # (position of a sequence's first token, that of the token before it)

    def add(self, ids: np.ndarray, owners: np.ndarray, behind: int = -1) -> int:
        """Append a sequence, padded; returns its number. owners: the response each token is scored for, or -1."""
        padding = (0, -len(ids) % self.sequence_multiple)
        self.sequences.append(np.pad(ids, padding, constant_values=PAD_TOKEN))
        self.owners.append(np.pad(owners, padding, constant_values=-1))
        self.behind.append(behind)
        if behind >= 0:
            self._first_behind.append((self.length, self._ends[behind] - 1))
        self.length += len(self.sequences[-1])
        self._ends.append(self.length)
        return len(self.sequences) - 1

    def fill(self, length: int) -> None:
        """Append dummy sequences up to ``length`` tokens."""
        longest = -(-_LONGEST_DUMMY // self.sequence_multiple) * self.sequence_multiple
        while self.length < length:
            dummy = min(longest, length - self.length)
            self.add(np.full(dummy, PAD_TOKEN, dtype=np.int32), np.full(dummy, -1))

    def scored(self, responses: int) -> tuple[Tensor, ScoredTargets]:
        """(int64 [T] tokens, where they are predicted)."""
        tokens, owners = (torch.from_numpy(np.concatenate(parts)).long() for parts in (self.sequences, self.owners))
        before = torch.arange(-1, self.length - 1)
        for position, previous in self._first_behind:
            before[position] = previous
        return tokens, scored_targets(tokens, owners, responses, before)


def pack(
    samples: Sequence[Sample],
    *,
    multiple_of: int,
    vocab_size: int,
    responses_per_sample: int,
    samples_by_rank: tuple[int, ...] | None = None,
    at_least: int = 1,
    sequence_multiple: int = 1,
    share_prompts: bool = False,
) -> PackedBatch:
    """Pack ``samples`` (possibly none) into one row of ``at_least`` so many tokens and a multiple of ``multiple_of``.

    ``sequence_multiple``: what each sequence's tokens, padding included, are a multiple of; divides ``multiple_of``.
    ``samples_by_rank``: how many samples every data-parallel rank packs at the same time; None when this rank is alone.
    ``share_prompts``: each prompt is in the row once.

    Raises:
        ValueError: a sample scores nothing, scores the first token of a sequence, has a token id outside the vocabulary, or another prompt
            than its group; names it.
    """
    row = _Row(sequence_multiple)
    prompts: dict[object, int] = {}
    for p, sample in enumerate(samples):
        behind, shared = -1, sample.prompt if share_prompts else 0
        if shared and sample.prompt_key not in prompts:
            prompts[sample.prompt_key] = row.add(sample.sequences[0][:shared], np.full(shared, -1))
        if shared:
            behind = prompts[sample.prompt_key]
            if not np.array_equal(row.sequences[behind][:shared], sample.sequences[0][:shared]):
                raise ValueError(f"pair {sample.name}: its prompt differs from that of another pair of its prompt group: a damaged store?")
        for r, (ids, is_scored) in enumerate(zip(sample.sequences, sample.scored, strict=True)):
            _check(sample.name, ids, is_scored, vocab_size)
            row.add(ids[shared:], np.where(is_scored, r * len(samples) + p, -1)[shared:], behind)
    row.fill(-(-max(row.length, at_least) // multiple_of) * multiple_of)
    responses = len(samples) * responses_per_sample
    tokens, scored = row.scored(responses)
    return PackedBatch(
        tokens=tokens.unsqueeze(0),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(len, row.sequences)], dtype=np.int32)),
        scored=scored,
        lengths=torch.bincount(scored.response, minlength=responses),
        reference=_by_response([s.reference for s in samples], responses_per_sample),
        names=tuple(s.name for s in samples),
        scores=_by_response([s.scores for s in samples], responses_per_sample),
        samples_by_rank=samples_by_rank or (len(samples),),
        behind=tuple(row.behind),
    )


def _check(name: str, tokens: np.ndarray, scored: np.ndarray, vocab_size: int) -> None:
    if not scored.any():
        raise ValueError(f"pair {name}: a response is empty")
    if scored[0]:
        raise ValueError(f"pair {name}: a prompt is empty, so nothing predicts the first response token")
    if tokens.max() >= vocab_size:
        raise ValueError(f"pair {name}: token id {tokens.max()} is outside the model's vocabulary of {vocab_size}: wrong tokenizer?")


def _by_response(rows: Sequence[np.ndarray | None], responses: int) -> Tensor:
    """float64 [R] of one row of numbers per sample; NaN where a sample has none."""
    filled = [row if row is not None else np.full(responses, np.nan) for row in rows]
    return torch.from_numpy(np.array(filled, dtype=np.float64).reshape(len(rows), responses).T.reshape(-1).copy())
