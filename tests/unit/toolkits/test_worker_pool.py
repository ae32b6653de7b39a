"""Results against the built-in map; and what happens when a worker, or the parent, does not live to see them."""

import pool_tasks
import psutil
import pytest

from toolkits.lpo_data_preprocessing.worker_pool import AHEAD, ordered_map


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_order_is_the_inputs(workers):
    assert list(ordered_map(pool_tasks.slow_square, (0.3,), range(40), workers)) == [n * n for n in range(40)]
    assert list(ordered_map(pool_tasks.slow_square, (0,), [], workers)) == []


def test_no_more_is_read_than_needed():
    taken = []
    results = ordered_map(pool_tasks.slow_square, (1.0,), (taken.append(n) or n for n in range(1000)), 2)
    assert next(results) == 0
    assert len(taken) <= (AHEAD + 1) * 2, "others ran ahead of the first"
    results.close()


def children():
    return [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]


def test_mistakes_come_back_in_their_place_and_nobody_stays_behind():
    list(ordered_map(pool_tasks.refuse, (-1,), range(4), 2))  # the server that workers are forked from stays
    before = children()
    results = ordered_map(pool_tasks.refuse, (5,), range(40), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5 is refused"):
        next(results)
    assert children() == before


def test_a_killed_worker_is_an_error():
    with pytest.raises(OSError, match=r"worker process \d+ was ended by signal 9 .out of memory"):
        list(ordered_map(pool_tasks.killed_at, (7,), range(40), 2))


@pytest.mark.parametrize("size", [1, 5_000_000])
def test_why_a_worker_could_not_start(size):
    """Also if its first item is more than the pipe holds, so that it ends while that is handed over."""
    with pytest.raises(ValueError, match="no tokenizer here"):
        list(ordered_map(pool_tasks.fails_to_start, (), ["x" * size] * 4, 2))


def test_a_worker_that_ends_while_it_is_given_something():
    with pytest.raises(OSError, match=r"worker process \d+ ended with code 3"):
        list(ordered_map(pool_tasks.leaves, (), ["x" * 5_000_000] * 4, 2))
