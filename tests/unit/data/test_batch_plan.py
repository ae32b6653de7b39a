"""The batch plan against counting: which pairs a step holds follows from (seed, position) alone, and how they are cut loses none."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megatron_patch.data import batch_plan
from megatron_patch.data.batch_plan import BatchPlan, PairOrder, Shared, split_by_cost


def flat(slots):
    return sorted(int(n) for slot in slots for share in slot for n in share)


@pytest.mark.parametrize("sizes", [[1], [7], [5, 3], [1, 9, 4]])
@pytest.mark.parametrize("step", [1, 4, 6, 29])
def test_every_epoch_visits_every_pair_once_whatever_the_batch(sizes, step):
    total = sum(sizes)
    stop = 5 * total
    order = PairOrder(sizes, seed=3)
    walked = np.concatenate([order.positions(k, min(k + step, stop)) for k in range(0, stop, step)])
    for epoch in range(5):
        assert sorted(walked[epoch * total : (epoch + 1) * total]) == list(range(total))


def test_order_is_a_function_of_seed_and_position():
    def order(seed=1, **options):
        return PairOrder([40, 10], seed=seed, **options)

    straight = order().positions(0, 300)
    # Another object, asked backwards and in odd pieces: the answer has no memory.
    asked = order()
    pieces = [asked.positions(a, b) for a, b in ((200, 300), (90, 200), (0, 90))]
    np.testing.assert_array_equal(np.concatenate(pieces[::-1]), straight)
    assert not np.array_equal(order(seed=2).positions(0, 50), straight[:50])
    assert not np.array_equal(straight[:50], straight[50:100]), "epochs are shuffled alike"
    assert not np.array_equal(straight[:50], np.arange(50))
    np.testing.assert_array_equal(order(shuffle=False).positions(45, 55), [45, 46, 47, 48, 49, 0, 1, 2, 3, 4])
    assert order().positions(7, 7).tolist() == []


def test_order_is_the_same_in_another_process():
    code = (
        "from megatron_patch.data.batch_plan import PairOrder; import hashlib;"
        "print(hashlib.sha256(PairOrder([300, 41], seed=9, weights=[1, 2]).positions(5, 1005).tobytes()).hexdigest())"
    )
    answers = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        answers.add(done.stdout.strip())
    numbers = PairOrder([300, 41], seed=9, weights=[1, 2]).positions(5, 1005)
    assert answers == {hashlib.sha256(numbers.tobytes()).hexdigest()}


@pytest.mark.parametrize(
    "sizes, weights",
    [([60, 40], [0.5, 0.5]), ([90, 10], [0.3, 0.7]), ([50, 30, 21], [1, 1, 1]), ([7, 100, 3], [0.2, 0.2, 0.6]), ([11, 13], [0.1, 0.2])],
)
def test_weighted_sources_get_exact_counts_in_every_epoch(sizes, weights):
    total = sum(sizes)
    order = PairOrder(sizes, seed=5, weights=weights)
    ends = np.cumsum(sizes)
    drawn: list[Counter] = [Counter() for _ in sizes]
    seen_by_epoch = []
    for epoch in range(4):
        counts = Counter()
        for number in order.positions(epoch * total, (epoch + 1) * total):
            source = int(np.searchsorted(ends, number, side="right"))
            counts[source] += 1
            drawn[source][int(number)] += 1
        seen_by_epoch.append([counts[s] for s in range(len(sizes))])
    assert all(row == seen_by_epoch[0] for row in seen_by_epoch) and sum(seen_by_epoch[0]) == total
    for share, weight in zip(seen_by_epoch[0], weights, strict=True):
        exact = Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) * total
        assert abs(share - exact) < 1
    # Each source walks through its own pairs: none is drawn twice more often than another.
    for source, counter in enumerate(drawn):
        often = [counter[n] for n in range(int(ends[source]) - sizes[source], int(ends[source]))]
        assert max(often) - min(often) <= 1


@pytest.mark.parametrize("seed", range(40))
def test_random_weights_share_an_epoch_to_less_than_one_pair(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 200, rng.integers(1, 6)).tolist()
    weights = rng.uniform(0.05, 1, len(sizes)).tolist()
    total = sum(sizes)
    if total * min(weights) / sum(weights) < 1:
        sizes[0] += 200
        total += 200
    numbers = PairOrder(sizes, seed=seed, weights=weights).positions(0, total)
    counts = np.bincount(np.searchsorted(np.cumsum(sizes), numbers, side="right"), minlength=len(sizes))
    assert counts.sum() == total
    assert (np.abs(counts - np.array(weights) / sum(weights) * total) < 1 + 1e-9).all()


@pytest.mark.parametrize(
    "sizes, weights, complaint",
    [
        ([], None, "at least one pair"), ([3, 0], None, "at least one pair"), ([3, 4], [1.0], "one for each of 2"),
        ([3, 4], [1.0, 0.0], "positive"), ([3, 4], [1.0, -1.0], "positive"), ([3, 4], [float("nan"), 1.0], "positive"),
        ([3, 4], [float("inf"), 1.0], "positive"), ([3, 4], [1e6, 1.0], "source 1"),
    ],
)  # fmt: skip
def test_impossible_sources_are_refused(sizes, weights, complaint):
    with pytest.raises(ValueError, match=complaint):
        PairOrder(sizes, seed=0, weights=weights)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_split_keeps_every_pair_and_every_limit(seed, together):
    rng = np.random.default_rng(seed)
    count, ranks, multiple = int(rng.integers(1, 60)), int(rng.integers(1, 5)), int(rng.integers(1, 5))
    pairs = rng.permutation(1000)[:count]
    tokens = rng.integers(1, 500, count)
    limit = int(tokens.max() + rng.integers(0, 1500))
    slots = split_by_cost(pairs, tokens, ranks=ranks, max_tokens=limit, multiple_of=multiple, together=together)
    assert flat(slots) == sorted(pairs.tolist())
    assert len(slots) % multiple == 0 and all(len(slot) == ranks for slot in slots)
    cost = dict(zip(pairs.tolist(), tokens.tolist(), strict=True))
    place = {pair: i for i, pair in enumerate(pairs.tolist())}
    for slot in slots:
        for share in slot:
            assert share.dtype == np.int64 and sum(cost[n] for n in share.tolist()) <= limit
            assert [place[n] for n in share.tolist()] == sorted(place[n] for n in share.tolist())
    # A filling that overflows has filled every bin to more than half (the pair that overflows is no longer than those before it), so
    # twice the least conceivable number of micro-batches always suffices.
    least = -(-int(tokens.sum()) // (ranks * limit))
    assert together or len(slots) <= -(-max(2 * least, 1) // multiple) * multiple


def test_no_smaller_number_of_micro_batches_would_do():
    tokens = np.array([60, 60, 60, 40, 40, 40])
    # By hand: all; 60+60+40 and 60+40+40; three times 60+40; 40+40 and the others alone; every pair alone.
    for limit, expected in ((300, 1), (160, 2), (100, 3), (99, 5), (79, 6)):
        assert len(split_by_cost(np.arange(6), tokens, ranks=1, max_tokens=limit, multiple_of=1)) == expected


@pytest.mark.parametrize("seed", range(20))
def test_bins_are_balanced_near_the_optimum(seed):
    """Longest-first keeps the fullest bin within 4/3 of the optimum (Graham 1969), which is at least the mean and the longest pair."""
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(6, 0.7, 96), 20, 4000).astype(np.int64)
    slots = split_by_cost(np.arange(96), tokens, ranks=4, max_tokens=16384, multiple_of=2)
    loads = np.array([[tokens[share].sum() for share in slot] for slot in slots])
    optimum_at_least = max(tokens.max(), tokens.sum() / loads.size)
    assert loads.max() <= 4 / 3 * optimum_at_least
    # Ranks wait for the slowest of each micro-batch: what they lose is small.
    assert loads.max(axis=1).sum() <= 1.1 * loads.mean(axis=1).sum()


@pytest.mark.parametrize("seed", range(5))
def test_cost_and_not_tokens_is_balanced(seed):
    """Long-tailed pairs, the longest of which cost five times their share of the tokens."""
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(6, 0.8, 64), 20, 2000).astype(np.int64)
    cost = tokens * 500.0 + tokens.astype(float) ** 2

    def imbalance(**options):
        slots = split_by_cost(np.arange(64), tokens, ranks=2, max_tokens=12000, multiple_of=2, **options)
        loads = np.array([cost[share].sum() for slot in slots for share in slot])
        return loads.max() / loads.mean()

    assert imbalance(cost=cost) < 1.01 < 1.02 < imbalance()


def test_many_micro_batches_are_planned_in_a_few_attempts(monkeypatch):
    """A validation set in one pass: the number of micro-batches is found to a percent, not one after another."""
    tokens = np.random.default_rng(0).integers(300, 700, 3000)
    attempts = []
    monkeypatch.setattr(batch_plan, "_split_by_load", lambda *of, real=batch_plan._split_by_load: attempts.append(of) or real(*of))
    slots = split_by_cost(np.arange(3000), tokens, ranks=1, max_tokens=1000, multiple_of=1)
    assert flat(slots) == list(range(3000)) and len(attempts) < 70 < len(slots) - 3000 * 500 // 1000 + 70
    assert all(tokens[share].sum() <= 1000 for slot in slots for share in slot)


def test_pairs_of_a_key_follow_the_first_of_them():
    keys = np.random.default_rng(0).integers(0, 12, 50)
    plain, ordered = (PairOrder([30, 20], seed=4, keys=k).positions(0, 150).reshape(3, 50) for k in (None, keys))
    for before, after in zip(plain, ordered, strict=True):
        assert sorted(after) == list(range(50))
        expected = [n for key in dict.fromkeys(keys[before].tolist()) for n in before[keys[before] == key]]
        assert after.tolist() == expected


def test_a_source_walked_through_twice_has_its_pairs_apart():
    keys = np.zeros(10, dtype=np.int64)
    walked = PairOrder([4, 6], seed=1, weights=[0.8, 0.2], keys=keys).positions(0, 10)  # source 0 twice, and 2 of source 1
    assert Counter(walked[walked < 4].tolist()) == dict.fromkeys(range(4), 2)
    halves = [i for i, n in enumerate(walked) if n < 4]
    assert len(set(walked[halves[:4]])) == len(set(walked[halves[4:]])) == 4


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_pairs_of_a_key_share_a_bin_as_far_as_it_goes(seed, together):
    rng = np.random.default_rng(seed)
    count, ranks = int(rng.integers(4, 60)), int(rng.integers(1, 4))
    keys, pairs = rng.integers(0, 8, count), rng.permutation(1000)[:count]
    prompts = 50 + 10 * keys
    tokens = prompts + rng.integers(20, 100, count)
    shared = Shared(keys, prompts, prompts.astype(float))
    slots = split_by_cost(pairs, tokens, ranks=ranks, max_tokens=700, multiple_of=1, shared=shared, together=together)
    assert flat(slots) == sorted(pairs.tolist())
    place = {pair: i for i, pair in enumerate(pairs.tolist())}
    bins: Counter[int] = Counter()
    for share in (share for slot in slots for share in slot):
        held = [place[n] for n in share.tolist()]
        assert held == sorted(held)
        known = set(keys[held].tolist())
        assert sum(tokens[held]) - sum(prompts[held]) + sum(50 + 10 * key for key in known) <= 700
        bins.update(known)
    mean = tokens.sum() / ranks
    for key, spread in bins.items():  # a key's pairs are cut where a bin is full or a rank would get more than its part
        whole = tokens[keys == key].sum()
        assert spread <= max(1, 2 * -(-whole // 700), 1 if together else 2 * -(-whole // mean))


# (mean tokens, G, D, max_tokens, multiple_of) and what the ranks' waiting may cost: long pairs, few to a bin.
HARD = [(2500, 128, 8, 8192, 4, 1.06), (3500, 64, 4, 8192, 1, 1.035), (2500, 64, 8, 8192, 1, 1.06), (2500, 24, 2, 8192, 1, 1.03)]


@pytest.mark.parametrize(("mean", "count", "ranks", "limit", "multiple", "bound"), HARD)
def test_ranks_wait_little_when_pairs_are_long(mean, count, ranks, limit, multiple, bound):
    rng = np.random.default_rng(0)
    waits = []
    for _ in range(20):
        tokens = np.clip(rng.lognormal(np.log(mean), 0.6, count), 20, limit).astype(np.int64)
        slots = split_by_cost(np.arange(count), tokens, ranks=ranks, max_tokens=limit, multiple_of=multiple)
        loads = np.array([[tokens[share].sum() for share in slot] for slot in slots])
        waits.append(loads.max(axis=1).sum() / loads.mean(axis=1).sum())
    assert np.mean(waits) <= bound


@pytest.mark.parametrize("seed", range(10))
def test_together_means_the_same_company_at_every_number_of_ranks(seed):
    tokens = np.random.default_rng(seed).integers(50, 400, 48)
    company = []
    for ranks in (1, 2, 3):
        slots = split_by_cost(np.arange(48), tokens, ranks=ranks, max_tokens=3600 // ranks, multiple_of=1, together=True)
        company.append({frozenset(int(n) for share in slot for n in share) for slot in slots})
        loads = np.array([[tokens[share].sum() for share in slot] for slot in slots]).sum(axis=0)
        assert loads.max() <= 1.03 * loads.mean(), "over a whole step no rank has much more than another"
    assert company[0] == company[1] == company[2]


@pytest.mark.parametrize("limit", [260, 330, 420, 2000])
def test_first_split_step_is_found_without_planning_every_step(limit):
    tokens = np.random.default_rng(1).integers(10, 100, 50)
    plan = BatchPlan(PairOrder([50], seed=3), tokens, batch=10, ranks=2, max_tokens=limit, together=True)
    split = [consumed for consumed in range(20, 600, 10) if len(plan.split(plan.pairs(consumed))) > 1]
    assert plan.first_split_step(20, 600) == (split[0] if split else None)
    assert BatchPlan(PairOrder([50], seed=3), tokens, batch=10, ranks=2, max_tokens=9999, multiple_of=2).first_split_step(0, 10) == 0
    pairs_of_two = Shared(np.arange(6) // 2, np.full(6, 2), np.full(6, 2.0))  # kept together they find less room
    whole = BatchPlan(PairOrder([6], seed=3), np.full(6, 28), batch=6, ranks=2, max_tokens=100, together=True, shared=pairs_of_two)
    assert whole.first_split_step(0, 6) == 0


def test_fewer_pairs_than_slots_leave_slots_empty():
    slots = split_by_cost(np.array([8, 5]), np.array([10, 20]), ranks=2, max_tokens=100, multiple_of=4)
    assert len(slots) == 4 and flat(slots) == [5, 8]
    assert sum(len(share) == 0 for slot in slots for share in slot) == 6
    assert all(share.dtype == np.int64 for slot in slots for share in slot)


def test_a_pair_longer_than_a_micro_batch_is_named():
    with pytest.raises(ValueError, match=r"pair number 31 has 101 tokens, more than --max-tokens-per-micro-batch 100"):
        split_by_cost(np.array([30, 31]), np.array([100, 101]), ranks=1, max_tokens=100, multiple_of=1)


def test_a_step_holds_the_same_pairs_under_any_layout():
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 300, 50)
    order = PairOrder([30, 20], seed=4)
    layouts = [(1, 300, 1), (1, 10_000, 1), (2, 700, 2), (4, 400, 1), (6, 2000, 4), (12, 300, 2)]
    plans = [BatchPlan(order, tokens, batch=12, ranks=d, max_tokens=m, multiple_of=k) for d, m, k in layouts]
    for consumed in range(0, 120, 12):  # crosses the border of two epochs
        expected = sorted(order.positions(consumed, consumed + 12).tolist())
        for plan in plans:
            assert flat(plan.step(consumed)) == expected
            assert plan.pairs(consumed).tolist() == order.positions(consumed, consumed + 12).tolist()
    together = [n for consumed in range(0, 300, 12) for n in flat(plans[3].step(consumed))]
    assert Counter(together) == Counter(list(range(50)) * 6)


def test_split_of_any_pairs_is_the_plan_of_a_step():
    tokens = np.array([5, 9, 7, 3])
    plan = BatchPlan(PairOrder([4], seed=0), tokens, batch=4, ranks=2, max_tokens=12)
    for slot, again in zip(plan.step(4), plan.split(plan.pairs(4)), strict=True):
        for share, same in zip(slot, again, strict=True):
            assert share.tolist() == same.tolist()
