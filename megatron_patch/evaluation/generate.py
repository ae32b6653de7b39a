"""Batched generation with a KV cache for any causal language model with transformers' call convention; greedy or sampled.

Own loop rather than `model.generate`, for one reason: the noise of a sample must depend on its own key alone, so that a block of prompts
made again (after a crash, on another machine, beside other blocks) gives the same samples. Upstream draws from one global generator.
Prompts are padded on the left; rows that have ended leave the batch once they are half of it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Shapes: B rows in the call, L rows still alive (L <= B), V vocabulary.
Sampler = Callable[[Tensor, Tensor, int], Tensor]
"""(logits [L, V], rows int64 [L] = places in the call's list of prompts, step from 0) -> next ids int64 [L]"""

_NOISE_CHUNK = 64


@dataclass(frozen=True)
class Generated:
    """One continuation."""

    ids: list[int]
    """Without the stop token."""
    finish_reason: str
    """"stop": the model produced a stop token; "length": it was cut at max_new_tokens."""


def greedy(logits: Tensor, rows: Tensor, step: int) -> Tensor:
    """The most probable token; of equals, the first."""
    return logits.argmax(dim=-1)


@dataclass
class PerRowSampler:
    """Temperature and nucleus sampling whose noise depends, row by row, on (seed, key, step) only."""

    keys: Sequence[str]
    """One per row of the call, e.g. "<prompt id>/<sample number>"."""
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    _generators: list[torch.Generator] = field(init=False, repr=False)
    _noise: Tensor = field(init=False, repr=False, default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive (greedy decoding is a sampler of its own), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        self._generators = [torch.Generator().manual_seed(_seed_of(self.seed, key)) for key in self.keys]

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """Inverse-CDF sampling in float64 (float32 cumulative sums are off by 1e-3 in a large vocabulary's tail)."""
        probabilities = torch.softmax(logits.double() / self.temperature, dim=-1)
        uniform = self._uniform(step)[rows.cpu()].to(logits.device).unsqueeze(1)
        if self.top_p == 1:
            return _invert(probabilities, uniform).squeeze(1)
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        nucleus = probabilities.masked_fill(before >= self.top_p, 0.0)
        return order.gather(1, _invert(nucleus, uniform)).squeeze(1)

    def _uniform(self, step: int) -> Tensor:
        """float64 [B] in [0, 1) for this step; drawn in chunks, for all rows at once, alive or not."""
        if step % _NOISE_CHUNK == 0:
            self._noise = torch.stack([torch.rand(_NOISE_CHUNK, generator=g, dtype=torch.float64) for g in self._generators])
        return self._noise[:, step % _NOISE_CHUNK]


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """First index [L, 1] whose cumulative weight [L, V] exceeds uniform [L, 1] times the total."""
    cumulative = weights.cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=weights.shape[-1] - 1)


def _seed_of(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") >> 1


@torch.inference_mode()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int], sampler: Sampler = greedy
) -> list[Generated]:
    """Continue each prompt (token ids) as one batch.

    `model`: called as transformers' causal models are (input_ids, attention_mask, position_ids, past_key_values, use_cache,
    logits_to_keep), in eval mode; its cache must have `batch_select_indices`. `max_new_tokens` counts the stop token.
    Returns one `Generated` per prompt, in order. Raises ValueError for an empty prompt or max_new_tokens < 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts:
        return []
    batch = _Batch.of(prompts, next(model.parameters()).device)
    stops = torch.tensor(list(stop_ids), device=batch.tokens.device)
    new: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    for step in range(max_new_tokens):
        logits = batch.forward(model)
        chosen = sampler(logits, batch.rows, step)
        is_stop = torch.isin(chosen, stops)
        for row, token, done, ended in zip(*(t.tolist() for t in (batch.rows, chosen, batch.done, is_stop)), strict=True):
            if not done and not ended:
                new[row].append(token)
            stopped[row] |= ended and not done
        batch.extend(chosen, is_stop)
        if not len(batch.rows):
            break
    return [Generated(ids, "stop" if ended else "length") for ids, ended in zip(new, stopped, strict=True)]


@dataclass
class _Batch:
    """The rows still in the batch: what the model is fed next, the mask over everything fed so far, and the cache."""

    tokens: Tensor  # int64 [L, new tokens to feed]
    mask: Tensor  # int64 [L, all tokens so far], 0 on the left padding
    rows: Tensor  # int64 [L], place in the call
    done: Tensor  # bool [L], ended but not yet taken out
    cache: Any = None

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], device: torch.device) -> "_Batch":
        """All prompts (token ids), padded on the left; ValueError for an empty one."""
        lengths = [len(prompt) for prompt in prompts]
        if not min(lengths):
            raise ValueError(f"prompt {lengths.index(0)} is empty")
        width = max(lengths)
        tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)).long().to(device)
        rows = torch.arange(len(prompts), device=device)
        return cls(tokens, mask, rows, torch.zeros_like(rows, dtype=torch.bool))

    def forward(self, model: Any) -> Tensor:
        """Logits [L, V] of the next token."""
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -self.tokens.shape[1] :]
        output = model(
            input_ids=self.tokens, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def extend(self, chosen: Tensor, is_stop: Tensor) -> None:
        """Feed `chosen` next; take ended rows out once they are half of the batch (each removal copies the cache)."""
        self.done |= is_stop
        self.tokens = chosen.unsqueeze(1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        if int(self.done.sum()) * 2 >= len(self.done):
            alive = (~self.done).nonzero().squeeze(1)
            self.cache.batch_select_indices(alive)
            self.tokens, self.mask, self.rows, self.done = (t[alive] for t in (self.tokens, self.mask, self.rows, self.done))
