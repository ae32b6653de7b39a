"""The store against plain Python lists and hashlib: what goes in comes out, and anything else is refused by name."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.data.pair_store import PairStore, PairStoreWriter, read_reference_logps, write_reference_logps

TOKENIZER = {"fingerprint": "tok", "path": "/somewhere/else"}
TEMPLATE = {"fingerprint": "tpl"}
PAIRS = [
    ([1, 2, 3], [4, 5], [6]),
    ([151_663, 0], [7], [8, 9, 2**31 - 1]),
    ([3], [1, 1, 1, 1], [2, 2]),
]


def write_pairs(prefix: Path, pairs=PAIRS, *, tokenizer=TOKENIZER, overwrite=False, **add) -> dict:
    with PairStoreWriter(prefix, "pairs", overwrite=overwrite) as writer:
        for i, pair in enumerate(pairs):
            writer.add(pair, id=f"p{i}-ü", group=f"g{i // 2}", source_line=i + 1, **add)
        writer.drop("too_long_chosen")
        writer.drop("too_long_chosen")
        sources = [{"path": "a", "sha256": "b"}]
        return writer.commit(tokenizer=tokenizer, template=TEMPLATE, sources=sources, seed=7, limits={"max_length": 9})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pairs_come_back(tmp_path):
    write_pairs(tmp_path / "s", scores=(1.5, -2.0))
    store = PairStore(tmp_path / "s", kind="pairs", verify="sha256")
    assert len(store) == 3 and store.kind == "pairs"
    for i, pair in enumerate(PAIRS):
        assert [part.tolist() for part in store[i]] == [list(part) for part in pair]
        assert all(part.dtype == np.int32 for part in store[i])
        assert store.sequence_lengths(i).tolist() == [len(part) for part in pair]
    assert store.lengths.dtype == np.int32
    assert store.lengths.tolist() == [[3, 2, 1], [2, 1, 3], [1, 4, 2]]
    columns = store.columns
    assert columns.id == ["p0-ü", "p1-ü", "p2-ü"] and columns.group.tolist() == [0, 0, 2]
    assert columns.scores.tolist() == [[1.5, -2.0]] * 3 and columns.source_line.tolist() == [1, 2, 3]
    with pytest.raises(IndexError):
        store[3]


def test_manifest_says_what_happened(tmp_path):
    returned = write_pairs(tmp_path / "s")
    manifest = json.loads((tmp_path / "s.json").read_text())
    assert manifest == returned
    assert (manifest["kind"], manifest["count"], manifest["tokens"], manifest["scored_tokens"]) == ("pairs", 3, 19, 13)
    assert manifest["dropped"] == {"too_long_chosen": 2} and manifest["limits"] == {"max_length": 9} and manifest["seed"] == 7
    for suffix, recorded in manifest["files"].items():
        data = (tmp_path / f"s{suffix}").read_bytes()
        assert recorded == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert files(tmp_path) == ["s.bin", "s.idx", "s.json", "s.meta.npz"]
    assert (tmp_path / "s.bin").read_bytes() == np.array([t for pair in PAIRS for part in pair for t in part], dtype="<i4").tobytes()


def test_upstream_reads_it_as_its_own(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write_pairs(tmp_path / "s")
    dataset = IndexedDataset(str(tmp_path / "s"))
    assert dataset.document_indices.tolist() == [0, 3, 6, 9]
    assert np.array(dataset[4]).tolist() == [7]


def test_unscored_pairs_have_nan_scores(tmp_path):
    write_pairs(tmp_path / "s")
    assert np.isnan(PairStore(tmp_path / "s").columns.scores).all()


def test_sft_alternates_and_may_start_empty(tmp_path):
    documents = [[[], [1, 2]], [[3, 4, 5], [6], [7], [8, 9]], [[1], [2]]]
    with PairStoreWriter(tmp_path / "s", "sft") as writer:
        for i, document in enumerate(documents):
            writer.add(document, id=str(i))
        writer.commit(tokenizer=TOKENIZER, template=TEMPLATE, sources=[])
    store = PairStore(tmp_path / "s")
    assert [[part.tolist() for part in store[i]] for i in range(3)] == documents
    assert store.lengths.tolist() == [[2, 2], [7, 3], [2, 1]]
    assert store.manifest["scored_tokens"] == 6


def test_text_is_all_scored(tmp_path):
    with PairStoreWriter(tmp_path / "s", "text") as writer:
        writer.add([[1, 2, 3]], id="a")
        writer.add([[4], [5, 6]], id="b")
        writer.commit(tokenizer=TOKENIZER, template=TEMPLATE, sources=[])
    store = PairStore(tmp_path / "s")
    assert store.lengths.tolist() == [[3, 3], [3, 3]] and [len(store[i]) for i in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("kind", "sequences", "message"),
    [
        ("pairs", ([], [1], [2]), "'x': empty prompt"),
        ("pairs", ([1], [], [2]), "'x': empty chosen"),
        ("pairs", ([1], [1], np.zeros(0, int)), "'x': empty rejected"),
        ("pairs", ([1], [1]), "2 sequences"),
        ("pairs", ([1], [-1], [2]), "-1"),
        ("pairs", ([1], [2**31], [2]), "2147483648"),
        ("pairs", ([[1, 2]], [1], [2]), "one-dimensional"),
        ("sft", ([1], []), "empty scored sequence 1"),
        ("sft", ([1], [2], [3]), "alternates"),
        ("sft", (), "alternates"),
        ("text", ([],), "empty sequence 0"),
        ("text", (), "no sequences"),
    ],
)
def test_bad_document_is_refused_with_its_id(tmp_path, kind, sequences, message):
    with PairStoreWriter(tmp_path / "s", kind) as writer, pytest.raises(ValueError, match="'x'") as error:
        writer.add(sequences, id="x")
    assert message in str(error.value)
    assert files(tmp_path) == []


@pytest.mark.parametrize("id", ["", "twice"])
def test_id_must_be_there_and_unique(tmp_path, id):
    with PairStoreWriter(tmp_path / "s", "pairs") as writer:
        writer.add(PAIRS[0], id="twice")
        with pytest.raises(ValueError, match=r"empty|already"):
            writer.add(PAIRS[1], id=id)


def test_leaving_without_commit_leaves_nothing(tmp_path):
    with PairStoreWriter(tmp_path / "s", "pairs") as writer:
        writer.add(PAIRS[0], id="a")
        assert len(files(tmp_path)) == 1  # it does write as it goes, under a hidden name
    assert files(tmp_path) == []


@pytest.mark.parametrize("where", ["add", "data", "rename", "manifest"])
def test_an_exception_anywhere_leaves_no_store(tmp_path, monkeypatch, where):
    def explode(*_args, **_kwargs):
        raise KeyboardInterrupt

    module = "megatron_patch.data.pair_store"
    if where != "add":
        target = {"data": f"{module}.sha256_file", "rename": f"{module}.os.replace", "manifest": f"{module}.write_json"}[where]
    with pytest.raises(KeyboardInterrupt), PairStoreWriter(tmp_path / "s", "pairs") as writer:
        writer.add(PAIRS[0], id="a")
        if where == "add":
            explode()
        monkeypatch.setattr(target, explode)
        writer.commit(tokenizer=TOKENIZER, template=TEMPLATE, sources=[])
    monkeypatch.undo()
    assert not any("tmp" in name for name in files(tmp_path))
    with pytest.raises(ValueError, match=r"s\.json: the manifest of a pair store is missing"):
        PairStore(tmp_path / "s")
    write_pairs(tmp_path / "s")  # and what is left does not stand in the way
    assert len(PairStore(tmp_path / "s", verify="sha256")) == 3


def test_existing_store_is_kept_unless_asked(tmp_path):
    write_pairs(tmp_path / "s")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(ValueError, match=r"s\.json: store exists"):
        write_pairs(tmp_path / "s", PAIRS[:1])
    assert before == {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    write_pairs(tmp_path / "s", PAIRS[:1], overwrite=True)
    assert len(PairStore(tmp_path / "s")) == 1


def test_nothing_kept_and_missing_fingerprint_are_errors(tmp_path):
    with PairStoreWriter(tmp_path / "s", "pairs") as writer:
        writer.drop("duplicate")
        with pytest.raises(ValueError, match=r"nothing to keep, 1 dropped .duplicate 1."):
            writer.commit(tokenizer=TOKENIZER, template=TEMPLATE, sources=[])
        with pytest.raises(ValueError, match="tokenizer entry"):
            writer.commit(tokenizer={}, template=TEMPLATE, sources=[])
    assert files(tmp_path) == []
    with pytest.raises(ValueError, match="'triples'"):
        PairStoreWriter(tmp_path / "s", "triples")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".meta.npz"])
def test_damage_is_refused_by_name(tmp_path, suffix):
    write_pairs(tmp_path / "s")
    path = tmp_path / f"s{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"s{suffix}: {len(whole) - 1} bytes, the manifest says {len(whole)}"):
        PairStore(tmp_path / "s")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"s{suffix}: contents changed"):
        PairStore(tmp_path / "s", verify="sha256")
    path.unlink()
    with pytest.raises(ValueError, match=f"s{suffix}: missing"):
        PairStore(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format version 1, this program reads 2"),
        ({"format": "other"}, "not the manifest"),
        ({"kind": "x"}, "unknown kind 'x'"),
        ({"count": 4}, "3 documents, the manifest says 4"),
    ],
)
def test_foreign_manifest_is_refused(tmp_path, change, message):
    manifest = write_pairs(tmp_path / "s")
    (tmp_path / "s.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=message):
        PairStore(tmp_path / "s")


def test_wrong_kind_bad_json_bad_verify(tmp_path):
    write_pairs(tmp_path / "s")
    with pytest.raises(ValueError, match="kind 'pairs', 'sft' is needed"):
        PairStore(tmp_path / "s", kind="sft")
    with pytest.raises(ValueError, match="'md5'"):
        PairStore(tmp_path / "s", verify="md5")
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(ValueError, match=r"s\.json: .* not valid JSON"):
        PairStore(tmp_path / "s")


def test_fingerprint_follows_content_not_place(tmp_path):
    write_pairs(tmp_path / "a")
    write_pairs(tmp_path / "b", tokenizer={"fingerprint": "tok", "path": "/other"})
    same = PairStore(tmp_path / "a").fingerprint
    assert PairStore(tmp_path / "b").fingerprint == same and len(same) == 64
    write_pairs(tmp_path / "c", [*PAIRS[:2], ([3], [1, 1, 1, 1], [2, 3])])
    write_pairs(tmp_path / "d", tokenizer={"fingerprint": "tok2"})
    write_pairs(tmp_path / "e", scores=(0.0, 0.0))
    assert len({PairStore(tmp_path / name).fingerprint for name in "acde"}) == 4


def test_store_survives_pickling(tmp_path):
    write_pairs(tmp_path / "s")
    store = pickle.loads(pickle.dumps(PairStore(tmp_path / "s")))
    assert store[1][2].tolist() == [8, 9, 2**31 - 1] and store.columns.id[1] == "p1-ü"


LOGPS = np.array([[-1.5, -2.0], [-0.25, 0.0], [-3.0, -1e3]])


def write_reference(prefix: Path, logps=LOGPS, weights: str = "w1") -> PairStore:
    store = PairStore(prefix)
    write_reference_logps(prefix, logps, store_fingerprint=store.fingerprint, weights_fingerprint=weights, dtype="float32", extra={"tp": 2})
    return store


def test_reference_comes_back(tmp_path):
    write_pairs(tmp_path / "s")
    store = write_reference(tmp_path / "s")
    assert read_reference_logps(store, weights_fingerprint="w1").tolist() == LOGPS.tolist()
    assert read_reference_logps(store, weights_fingerprint=None).dtype == np.float64
    record = json.loads((tmp_path / "s.ref.json").read_text())
    assert (record["store"], record["weights"], record["dtype"], record["extra"]) == (store.fingerprint, "w1", "float32", {"tp": 2})


def test_reference_of_other_weights_or_store_is_refused(tmp_path):
    write_pairs(tmp_path / "s")
    store = write_reference(tmp_path / "s")
    with pytest.raises(ValueError, match="another weights: made for w1, needed for w2"):
        read_reference_logps(store, weights_fingerprint="w2")
    write_pairs(tmp_path / "t", PAIRS[::-1])
    for suffix in (".ref.json", ".ref.npy"):
        shutil.copy(tmp_path / f"s{suffix}", tmp_path / f"t{suffix}")
    other = PairStore(tmp_path / "t")
    with pytest.raises(ValueError, match=f"another store: made for {store.fingerprint}, needed for {other.fingerprint}"):
        read_reference_logps(other, weights_fingerprint="w1")


@pytest.mark.parametrize("value", [float("nan"), 1e-9, float("-inf")])
def test_impossible_logps_are_refused_with_pair_ids(tmp_path, value):
    write_pairs(tmp_path / "s")
    bad = LOGPS.copy()
    bad[1, 0] = value
    with pytest.raises(ValueError, match=r"1 pairs .*p1-ü"):
        write_reference(tmp_path / "s", bad)
    assert not (tmp_path / "s.ref.json").exists()
    store = write_reference(tmp_path / "s")
    np.save(tmp_path / "s.ref.npy", bad)
    record = json.loads((tmp_path / "s.ref.json").read_text())
    record["file"]["sha256"] = hashlib.sha256((tmp_path / "s.ref.npy").read_bytes()).hexdigest()
    (tmp_path / "s.ref.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="p1-ü"):
        read_reference_logps(store, weights_fingerprint="w1")


def test_damaged_reference_is_refused(tmp_path, monkeypatch):
    write_pairs(tmp_path / "s")
    with pytest.raises(ValueError, match=r"s\.ref\.json: .* missing"):
        read_reference_logps(PairStore(tmp_path / "s"), weights_fingerprint=None)
    with pytest.raises(ValueError, match=r"\[2, 2\], expected float64 \[3, 2\]"):
        write_reference(tmp_path / "s", LOGPS[:2])
    store = write_reference(tmp_path / "s")
    data = (tmp_path / "s.ref.npy").read_bytes()
    (tmp_path / "s.ref.npy").write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"s\.ref\.npy: \d+ bytes"):
        read_reference_logps(store, weights_fingerprint=None)

    def explode(*_args):
        raise OSError("disk full")

    monkeypatch.setattr("megatron_patch.data.atomic_files.os.replace", explode)
    with pytest.raises(OSError, match="disk full"):
        write_reference(tmp_path / "s")
    assert not (tmp_path / "s.ref.json").exists() and not any("tmp" in name for name in files(tmp_path))


def test_writing_and_opening_a_store_is_quiet(tmp_path):
    body = f"""
import sys
from megatron_patch.data.pair_store import PairStore, PairStoreWriter
assert not {{"torch", "megatron"}} & set(sys.modules), "importing the store must stay cheap"
with PairStoreWriter({str(tmp_path / "s")!r}, "pairs") as writer:
    writer.add([[1], [2], [3]], id="a")
    writer.commit(tokenizer={{"fingerprint": "t"}}, template={{"fingerprint": "t"}}, sources=[])
PairStore({str(tmp_path / "s")!r})[0]
"""
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
