"""Which pairs make which micro-batch: a pure function of (seed, position).

Position k of a run is pair ``permutation(epoch)[k % N]`` of epoch ``k // N``; a global batch of G pairs is positions
[consumed, consumed + G). So a resumed run needs no loader state, and neither the layout nor the number of micro-batches
changes which pairs a step sees. Every rank computes the same plan and takes its own slots.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# G pairs of a global batch, M micro-batches, D data-parallel ranks.


class PairOrder:
    """The endless order in which pairs of one or several sources are visited.

    Sources are numbered end to end: pair i of source s is ``offset[s] + i``. Without weights an epoch visits every pair once.
    With weights an epoch has as many positions as there are pairs, shared by largest remainder, and each source walks through
    its own epochs: the counts per source are exact in every epoch. With ``keys`` (int64 [all pairs]) pairs of one key come one after
    another, where the first of them would have come; a source that is walked through twice in an epoch has its pairs apart.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        keys: np.ndarray | None = None,
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every source needs at least one pair, got sizes {list(sizes)}")
        if weights is not None and (len(weights) != len(sizes) or not all(0 < w < math.inf for w in weights)):
            raise ValueError(f"weights {list(weights)} must be positive, one for each of {len(sizes)} sources")
        self.sizes, self.seed, self.shuffle, self.keys = list(sizes), seed, shuffle, keys
        self.epoch_length = sum(sizes)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._shares = self.sizes if weights is None else _largest_remainder(weights, self.epoch_length)
        if min(self._shares) < 1:
            raise ValueError(f"weights {weights} leave source {self._shares.index(0)} without any of an epoch's {self.epoch_length} pairs")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Pair numbers (int64) at positions [start, stop)."""
        parts = []
        while start < stop:
            epoch, begin = divmod(start, self.epoch_length)
            end = min(self.epoch_length, begin + stop - start)
            parts.append(self._epoch(epoch)[begin:end])
            start += end - begin
        return np.concatenate(parts or [np.empty(0, dtype=np.int64)])

    def _make_epoch(self, epoch: int) -> np.ndarray:
        spans = [(epoch * share, (epoch + 1) * share) for share in self._shares]
        pairs = np.concatenate([self._from_source(source, *span) for source, span in enumerate(spans)])
        mixed = self._permutation(len(self.sizes), epoch, len(pairs))
        if self.keys is not None:
            laps = np.concatenate([np.arange(*span) // size for span, size in zip(spans, self.sizes, strict=True)])
            mixed = mixed[_one_after_another(self.keys[pairs[mixed]], laps[mixed])]
        return pairs[mixed]

    def _from_source(self, source: int, start: int, stop: int) -> np.ndarray:
        size, parts = self.sizes[source], []
        while start < stop:
            lap, begin = divmod(start, size)
            end = min(size, begin + stop - start)
            parts.append(self._permutation(source, lap, size)[begin:end])
            start += end - begin
        return np.concatenate(parts or [np.empty(0, dtype=np.int64)]) + self._offsets[source]

    def _permutation(self, stream: int, epoch: int, size: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng([self.seed, stream, epoch]).permutation(size)


def _one_after_another(keys: np.ndarray, laps: np.ndarray) -> np.ndarray:
    """The order in which positions of one key and lap follow the first of them."""
    _, dense = np.unique(keys, return_inverse=True)
    _, first, group = np.unique(dense * (int(laps.max(initial=0)) + 1) + laps, return_index=True, return_inverse=True)
    return np.argsort(first[group], kind="stable")


def _largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    for i in np.argsort(shares - exact, kind="stable")[: total - shares.sum()]:
        shares[i] += 1
    return shares.tolist()


class Shared(NamedTuple):
    """What pairs of one key save when they are in one micro-batch: each but the first these tokens and this cost; [pairs] each."""

    keys: np.ndarray
    tokens: np.ndarray
    cost: np.ndarray

    def of(self, pairs: np.ndarray) -> "Shared":
        """The same of some pairs."""
        return Shared(*(column[pairs] for column in self))


def split_by_cost(
    pairs: np.ndarray,
    tokens: np.ndarray,
    *,
    ranks: int,
    max_tokens: int,
    multiple_of: int,
    cost: np.ndarray | None = None,
    together: bool = False,
    shared: Shared | None = None,
) -> list[list[np.ndarray]]:
    """Split the pairs of one global batch into M micro-batches on each of D ranks, of nearly equal cost.

    Costliest pair first into the cheapest bin that has room for its tokens; M is the smallest multiple of ``multiple_of`` for which all
    find room (above a hundred, to within a percent). Bins may stay empty.

    Args:
        pairs: int64 [G] pair numbers. tokens: [G] tokens of each pair (prompt counted once per response).
        ranks: D. max_tokens: tokens a micro-batch may hold. multiple_of: PP under virtual PP, else 1.
        cost: [G] what each pair costs to compute; None: its tokens. (Attention makes long sequences cost more than their tokens.)
        together: which pairs share a micro-batch (of all ranks) must depend on M (and, with ``shared``, on ``max_tokens``) alone, not on
            D: for losses that look at the whole of it. Costs balance: ranks wait longer for the slowest of each micro-batch, by some
            percent and with few long pairs a bin by 15.
        shared: pairs of one key go into one bin, as far as it has room and they cost no more than a rank's part of the step.
    Returns:
        ``[M][D]`` arrays of pair numbers, each in the order of ``pairs``.
    """
    if len(tokens) and tokens.max() > max_tokens:
        worst = int(np.argmax(tokens))
        raise ValueError(
            f"pair number {pairs[worst]} has {tokens[worst]} tokens, more than --max-tokens-per-micro-batch {max_tokens}"
        )
    cost = tokens if cost is None else cost
    members = [[i] for i in range(len(pairs))]
    if shared is not None:
        members, tokens, cost = _units(tokens, cost, shared, max_tokens, math.inf if together else cost.sum() / ranks)
    slots = max(1, -(-int(tokens.sum()) // (ranks * max_tokens)))
    slots = -(-slots // multiple_of) * multiple_of
    split = _split_together if together else _split_by_load
    while (plan := split(cost, tokens, slots, ranks, max_tokens)) is None:
        slots += multiple_of * max(1, slots // (100 * multiple_of))
    return [[pairs[np.sort(np.array([i for unit in share for i in members[unit]], dtype=np.int64))] for share in slot] for slot in plan]


def _units(
    tokens: np.ndarray, cost: np.ndarray, shared: Shared, room: int, most: float
) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Pairs of one key together, up to ``room`` tokens and a cost of ``most``: (members, tokens, cost) of each unit."""
    members: list[list[int]] = []
    filled: list[int] = []
    loads: list[float] = []
    latest: dict[int, int] = {}
    for i, key in enumerate(shared.keys.tolist()):
        unit = latest.get(key)
        more, dearer = tokens[i] - shared.tokens[i], cost[i] - shared.cost[i]
        if unit is not None and filled[unit] + more <= room and loads[unit] + dearer <= most:
            members[unit].append(i)
            filled[unit] += more
            loads[unit] += dearer
        else:
            latest[key] = len(members)
            members.append([i])
            filled.append(int(tokens[i]))
            loads.append(float(cost[i]))
    return members, np.array(filled, dtype=np.int64), np.array(loads)


def _split_by_load(cost: np.ndarray, tokens: np.ndarray, slots: int, ranks: int, room: int) -> list[list[np.ndarray]] | None:
    """Bins of similar load share a micro-batch, so that ranks finish it together; which rank has the fullest alternates."""
    bins = _costliest_first(cost, tokens, slots * ranks, room)
    if bins is None:
        return None
    return [bins[m * ranks : (m + 1) * ranks][:: -1 if m % 2 else 1] for m in range(slots)]


def _split_together(cost: np.ndarray, tokens: np.ndarray, slots: int, ranks: int, room: int) -> list[list[np.ndarray]] | None:
    """First into micro-batches, then each over the ranks, its fullest share to the rank that has had least so far."""
    so_far = np.zeros(ranks)
    plan = []
    for members in _costliest_first(cost, tokens, slots, int(tokens.sum())) or []:
        parts = _costliest_first(cost[members], tokens[members], ranks, room)
        if parts is None:
            return None
        of_rank = dict(zip(np.argsort(so_far, kind="stable").tolist(), parts, strict=True))
        plan.append([members[of_rank[rank]] for rank in range(ranks)])
        so_far += [float(cost[share].sum()) for share in plan[-1]]
    return plan


def _costliest_first(cost: np.ndarray, tokens: np.ndarray, count: int, room: int) -> list[np.ndarray] | None:
    """``count`` bins of nearly equal cost and at most ``room`` tokens, costliest first: ascending indices. None: some find no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads, filled = np.zeros(count), np.zeros(count, dtype=np.int64)
    for i in np.argsort(-cost, kind="stable"):
        b = int(np.argmin(np.where(filled + tokens[i] <= room, loads, math.inf)))
        if filled[b] + tokens[i] > room:
            return None
        bins[b].append(int(i))
        loads[b] += cost[i]
        filled[b] += tokens[i]
    return [np.sort(np.array(bins[b], dtype=np.int64)) for b in np.argsort(-loads, kind="stable")]


class BatchPlan:
    """Steps of a run: which pairs each rank's micro-batches hold.

    Args:
        order: positions to pairs. tokens: int64 [all pairs], what counts towards ``max_tokens``. cost: [all pairs], what is balanced;
            None: the tokens. shared: of all pairs. batch: G pairs a step. ranks, max_tokens, multiple_of, together: as in
            ``split_by_cost``.
    """

    def __init__(
        self,
        order: PairOrder,
        tokens: np.ndarray,
        *,
        batch: int,
        ranks: int,
        max_tokens: int,
        multiple_of: int = 1,
        together: bool = False,
        cost: np.ndarray | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.order, self.tokens, self.batch, self.ranks, self.max_tokens = order, tokens, batch, ranks, max_tokens
        self.multiple_of, self.together = multiple_of, together
        self.cost, self.shared = tokens if cost is None else cost, shared
        self.step = lru_cache(maxsize=4)(self._make_step)

    def pairs(self, consumed: int) -> np.ndarray:
        """int64 [G]: the pairs of the step that starts after ``consumed`` pairs, in order."""
        return self.order.positions(consumed, consumed + self.batch)

    def split(self, pairs: np.ndarray) -> list[list[np.ndarray]]:
        """``[M][D]`` micro-batches of any pairs."""
        return split_by_cost(
            pairs,
            self.tokens[pairs],
            ranks=self.ranks,
            max_tokens=self.max_tokens,
            multiple_of=self.multiple_of,
            cost=self.cost[pairs],
            together=self.together,
            shared=self.shared.of(pairs) if self.shared is not None else None,
        )

    def first_split_step(self, consumed: int, end: int) -> int | None:
        """Where, from ``consumed`` pairs to ``end``, the first step starts that has several micro-batches; None when there is none.

        A pair finds no room only if all ranks hold more than max - its own tokens, so below mean + (1 - 1/D) longest all find some: most
        steps need no planning to be sure.
        """
        for start in range(consumed, end, self.batch):
            tokens = self.tokens[self.pairs(start)]
            surely_one = tokens.sum() / self.ranks + (1 - 1 / self.ranks) * tokens.max() <= self.max_tokens
            if not (surely_one and self.multiple_of == 1 and self.shared is None) and len(self.step(start)) > 1:
                return start
        return None

    def _make_step(self, consumed: int) -> list[list[np.ndarray]]:
        """``step(consumed)``: the pairs of a step as ``[M][D]`` micro-batches."""
        return self.split(self.pairs(consumed))
