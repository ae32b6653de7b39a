"""One micro-batch as one packed (THD) row: sequences end to end, no attention across them, positions restarting at each.

The only padding is at the end: dummy, unscored sequences that bring the row to a multiple of what sequence parallelism needs, or to a fixed
length where one is asked for. Under context parallelism each sequence is padded to two chunks a rank, and a rank keeps its two of each:
one from the front and the one as far from the back, so that causal attention costs all ranks the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_patch.preference.logps import ScoredTargets, scored_targets

# P pairs (samples), R responses, S sequences, T packed tokens, N scored tokens.

PAD_TOKEN = 0  # never scored and never attended to by a real token, so any id will do
_LONGEST_DUMMY = 128  # tokens: padding attends to itself, which costs the square


class Sample(NamedTuple):
    """What one document of a store contributes: a pair has two sequences, a fine-tuning conversation or a text has one.

    sequences: int32 token ids, prompt and response end to end. scored: bool per token, False for the first of a sequence.
    reference: float64 [responses] reference log-prob sums (nats), or None. name: the id shown in errors.
    scores: float64 [responses] an outside judge's scores, NaN where there are none.
    """

    sequences: tuple[np.ndarray, ...]
    scored: tuple[np.ndarray, ...]
    reference: np.ndarray | None
    name: str
    scores: np.ndarray | None = None


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
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            scored=self.scored.to(device),
            lengths=self.lengths.to(device, non_blocking=True),
            reference=self.reference.to(device, non_blocking=True),
            scores=self.scores.to(device, non_blocking=True),
        )


def pack(
    samples: Sequence[Sample],
    *,
    multiple_of: int,
    vocab_size: int,
    responses_per_sample: int,
    samples_by_rank: tuple[int, ...] | None = None,
    at_least: int = 1,
    sequence_multiple: int = 1,
) -> PackedBatch:
    """Pack ``samples`` (possibly none) into one row of ``at_least`` so many tokens and a multiple of ``multiple_of``.

    ``sequence_multiple``: what each sequence's tokens, padding included, are a multiple of; divides ``multiple_of``.
    ``samples_by_rank``: how many samples every data-parallel rank packs at the same time; None when this rank is alone.

    Raises:
        ValueError: a sample scores nothing, scores the first token of a sequence, or has a token id outside the vocabulary; names it.
    """
    sequences: list[np.ndarray] = []
    response_of_token: list[np.ndarray] = []
    for p, sample in enumerate(samples):
        for r, (ids, is_scored) in enumerate(zip(sample.sequences, sample.scored, strict=True)):
            _check(sample.name, ids, is_scored, vocab_size)
            padding = (0, -len(ids) % sequence_multiple)
            sequences.append(np.pad(ids, padding, constant_values=PAD_TOKEN))
            response_of_token.append(np.pad(np.where(is_scored, r * len(samples) + p, -1), padding, constant_values=-1))
    length = sum(map(len, sequences))
    filler = -(-max(length, at_least) // multiple_of) * multiple_of - length
    longest = -(-_LONGEST_DUMMY // sequence_multiple) * sequence_multiple
    for start in range(0, filler, longest):
        dummy = min(longest, filler - start)
        sequences.append(np.full(dummy, PAD_TOKEN, dtype=np.int32))
        response_of_token.append(np.full(dummy, -1))
    tokens = torch.from_numpy(np.concatenate(sequences)).long()
    responses = len(samples) * responses_per_sample
    scored = scored_targets(tokens, torch.from_numpy(np.concatenate(response_of_token)).long(), responses)
    return PackedBatch(
        tokens=tokens.unsqueeze(0),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(len, sequences)], dtype=np.int32)),
        scored=scored,
        lengths=torch.bincount(scored.response, minlength=responses),
        reference=_by_response([s.reference for s in samples], responses_per_sample),
        names=tuple(s.name for s in samples),
        scores=_by_response([s.scores for s in samples], responses_per_sample),
        samples_by_rank=samples_by_rank or (len(samples),),
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
