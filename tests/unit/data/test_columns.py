"""Mapped columns against plain lists and numpy's own reader of .npz files."""

import pickle
import random

import numpy as np
import pytest

from megatron_patch.data import columns as module
from megatron_patch.data.columns import Columns
from megatron_patch.data.pair_store import PairStore, PairStoreWriter


def made(count, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abé漢😀 \n\0", k=rng.choice([0, 1, 3, 40]))) for _ in range(count)]
    scores = np.random.default_rng(seed).normal(size=(count, 2))
    scores[::3] = np.nan
    return Columns([f"p{i}-ü" for i in range(count)], words, scores, np.arange(count) - 1)


@pytest.mark.parametrize("count", [1, 7, 301])
@pytest.mark.parametrize("block", [1, 3, 65536])
def test_what_was_saved_comes_back(tmp_path, monkeypatch, count, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    saved = made(count)
    saved.save(tmp_path / "c.npz")
    loaded = Columns.load(tmp_path / "c.npz")
    assert list(loaded.id) == saved.id and list(loaded.group) == saved.group
    assert [loaded.group[i] for i in range(-count, count)] == saved.group * 2
    assert loaded.group[1:5] == saved.group[1:5] and loaded.group[::-2] == saved.group[::-2]
    np.testing.assert_array_equal(loaded.scores, saved.scores)
    assert loaded.source_line.tolist() == saved.source_line.tolist()
    for i in (count, -count - 1):
        with pytest.raises(IndexError):
            loaded.id[i]
    with np.load(tmp_path / "c.npz") as judge:
        assert judge["group_utf8"].tobytes().decode() == "".join(loaded.group)
        np.testing.assert_array_equal(judge["scores"], loaded.scores)
        assert judge["scores"].dtype == loaded.scores.dtype == np.float64


def test_strings_compare_and_show_like_lists(tmp_path):
    made(12).save(tmp_path / "c.npz")
    id = Columns.load(tmp_path / "c.npz").id
    assert id == made(12).id and id == Columns.load(tmp_path / "c.npz").id and id != made(11).id and id != [*made(11).id, "x"]
    assert id != "p" and "p3-ü" in id and id.index("p3-ü") == 3 and "p12-ü" not in id
    assert repr(id).startswith("['p0-ü', 'p1-ü',") and repr(id).endswith("'p9-ü', ...]")


def test_all_strings_empty(tmp_path):
    Columns(["", ""], ["", ""], np.zeros((2, 2)), np.zeros(2, dtype=np.int64)).save(tmp_path / "c.npz")
    assert list(Columns.load(tmp_path / "c.npz").group) == ["", ""]


def test_nothing_is_read_that_nobody_asks_for(tmp_path):
    """Arrays lie on the file's pages, and are not to be written."""
    made(9).save(tmp_path / "c.npz")
    loaded = Columns.load(tmp_path / "c.npz")
    assert isinstance(loaded.scores.base, np.memmap) and not loaded.scores.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        loaded.scores[0] = 1.0


def test_a_store_does_not_carry_its_columns_to_other_processes(tmp_path):
    with PairStoreWriter(tmp_path / "s", "pairs") as writer:
        for i in range(2000):
            writer.add([[1], [2], [3]], id=f"{i:>50}")
        writer.commit(tokenizer={"fingerprint": "t"}, template={"fingerprint": "t"}, sources=[])
    store = PairStore(tmp_path / "s")
    assert store.columns.id[7].strip() == "7"
    there = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 50 * 2000 and there.columns.id == store.columns.id
