"""A store of a million pairs opens and gives its first batch at once, also where a run is resumed, and it is the right batch."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import million_pairs
from megatron_patch.data.pair_store import PairStore

PAIRS = 1_000_000
pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the store."""
    prefix = tmp_path_factory.mktemp("million") / "pairs"
    million_pairs.make_store(prefix, PAIRS)
    return prefix


@pytest.mark.parametrize("step", [0, 50_000])
def test_first_batch_is_cheap_and_right(store: Path, step: int) -> None:
    """Against the order by its definition (one of each source's pairs, one of all) and the ids by numpy's own reader."""
    row = million_pairs.in_a_process(store, step)
    assert million_pairs.within_budget(row), row
    epoch, position = divmod(step * million_pairs.BATCH, PAIRS)
    of_source, of_all = (np.random.default_rng([1, stream, epoch]).permutation(PAIRS) for stream in (0, 1))
    expected = of_source[of_all[position : position + million_pairs.BATCH]]
    with np.load(f"{store}.meta.npz") as arrays:
        text, ends = arrays["id_utf8"].tobytes().decode(), np.cumsum(arrays["id_bytes"])
    ids = {text[ends[i] - 18 : ends[i]] for i in expected}  # 16 hex digits and "-0"
    found = {name.split()[0] for name in row["names"]}
    assert len(found) == len(row["names"]) == pytest.approx(million_pairs.BATCH / million_pairs.RANKS, abs=3) and found <= ids


def test_the_store_is_one(store: Path) -> None:
    """What the benchmark writes by itself is what the reader verifies."""
    opened = PairStore(store, kind="pairs", verify="sha256")
    assert len(opened) == PAIRS and 10 <= opened.lengths.sum(axis=1).min() and opened.lengths.sum(axis=1).max() <= 20
    assert len(set(opened.columns.id)) == PAIRS
