"""A store's columns against plain lists: what was added comes back, ids decoded one by one or all."""

import pickle
import random

import numpy as np
import pytest

from megatron_patch.data import store_columns as module
from megatron_patch.data.pair_store import PairStore, PairStoreWriter
from megatron_patch.data.store_columns import ColumnBuilder, Columns


def made(path, count, seed=0):
    """Ids and groups of all lengths; every third document without scores, some without a group."""
    rng, builder = random.Random(seed), ColumnBuilder()
    ids = [f"p{i}-" + "".join(rng.choices("abé漢😀 \n\0", k=rng.choice([0, 1, 3, 40]))) for i in range(count)]
    groups = [rng.choice(["", "one", "two", "漢"]) for _ in ids]
    scores = [None if i % 3 == 0 else (rng.random(), -rng.random()) for i in range(count)]
    for i, (id, group, pair) in enumerate(zip(ids, groups, scores, strict=True)):
        builder.add(id, group, pair, 2 * i + 1)
    builder.save(path)
    return ids, groups, scores


@pytest.mark.parametrize("count", [1, 7, 301])
@pytest.mark.parametrize("block", [1, 3, 65536])
def test_what_was_added_comes_back(tmp_path, monkeypatch, count, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    ids, groups, scores = made(tmp_path / "c.npz", count)
    loaded = Columns.load(tmp_path / "c.npz")
    assert list(loaded.id) == ids and [loaded.id[i] for i in range(-count, count)] == ids * 2
    assert loaded.id[1:5] == ids[1:5] and loaded.id[::-2] == ids[::-2]
    assert loaded.group.tolist() == [groups.index(group) if group else -1 for group in groups]
    assert loaded.source_line.tolist() == [2 * i + 1 for i in range(count)]
    nothing = (np.nan, np.nan)
    np.testing.assert_array_equal(loaded.scores, np.array([pair or nothing for pair in scores]))
    for i in (count, -count - 1):
        with pytest.raises(IndexError):
            loaded.id[i]


def test_ids_compare_and_show_like_lists(tmp_path):
    ids, _, _ = made(tmp_path / "c.npz", 12)
    id = Columns.load(tmp_path / "c.npz").id
    assert id == ids and id == Columns.load(tmp_path / "c.npz").id and id != ids[:-1] and id != [*ids, "x"]
    assert id != "p" and ids[3] in id and id.index(ids[3]) == 3 and "p12" not in id
    assert repr(id) == repr(ids[:10])[:-1] + ", ...]"


def test_a_store_does_not_carry_its_columns_to_other_processes(tmp_path):
    with PairStoreWriter(tmp_path / "s", "pairs") as writer:
        for i in range(2000):
            writer.add([[1], [2], [3]], id=f"{i:>50}")
        writer.commit(tokenizer={"fingerprint": "t"}, template={"fingerprint": "t"}, sources=[])
    store = PairStore(tmp_path / "s")
    assert store.columns.id[7].strip() == "7"
    there = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 50 * 2000 and there.columns.id == store.columns.id
