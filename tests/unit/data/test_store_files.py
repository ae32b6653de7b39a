"""The store's own writers against upstream's builder and against plain dictionaries."""

import random

import numpy as np
import pytest

from megatron_patch.data.indexed_file import IndexedFile
from megatron_patch.data.store_columns import ColumnBuilder, Columns, FirstSeen


def test_indexed_file_is_upstreams_byte_for_byte(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    ours, theirs = IndexedFile(tmp_path / "o.bin"), IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=np.int32)
    for _ in range(50):
        lengths = rng.integers(0, 9, rng.integers(1, 5)).tolist()
        tokens = rng.integers(0, 2**31, sum(lengths)).astype(np.int32)
        ours.add(tokens, lengths)
        theirs.add_document(tokens, lengths)
    ours.finish(tmp_path / "o.idx")
    theirs.finalize(str(tmp_path / "t.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"o.{suffix}").read_bytes() == (tmp_path / f"t.{suffix}").read_bytes()


def test_first_seen_is_a_dictionary():
    rng, table, judge = random.Random(0), FirstSeen(), {}
    for number in range(5000):
        key = str(rng.randrange(3000)).encode()
        assert table.first(key, number) == judge.setdefault(key, number)


def test_columns_come_back_and_are_small(tmp_path):
    rng, builder, judge, first = random.Random(1), ColumnBuilder(), [], {}
    for number in range(3000):
        group = rng.choice(["", f"g{rng.randrange(1000)}"])
        row = (f"é{number}-{rng.getrandbits(8)}", group, (rng.random(), -1.0) if number % 2 else None, rng.choice([-1, number + 1]))
        builder.add(*row)
        judge.append((row[0], first.setdefault(group, number) if group else -1, row[2], row[3]))
    with pytest.raises(ValueError, match="in the store already"):
        builder.add(judge[7][0], "", None, 1)
    builder.save(tmp_path / "c.npz")
    columns = Columns.load(tmp_path / "c.npz")
    assert columns.id == [row[0] for row in judge] and columns.group.tolist() == [row[1] for row in judge]
    assert columns.source_line.tolist() == [row[3] for row in judge]
    for found, (_, _, scores, _) in zip(columns.scores.tolist(), judge, strict=True):
        assert found == list(scores) if scores else np.isnan(found).all()


def test_bytes_a_pair(tmp_path):
    """One pair a prompt, no scores, ids of a running number: 44 (.idx) + 16 (reference) + 4 make the budget of 64."""
    builder = ColumnBuilder()
    for number in range(20_000):
        builder.add(f"train-{number}-0", f"{random.Random(number).getrandbits(64):x}", None, number + 1)
    builder.save(tmp_path / "c.npz")
    assert (tmp_path / "c.npz").stat().st_size < 4 * 20_000
