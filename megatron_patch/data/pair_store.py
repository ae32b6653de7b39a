"""What a pair is on disk: one store = five files that appear whole or not at all.

    <prefix>.bin, <prefix>.idx   token ids, a Megatron IndexedDataset of int32 (unpadded, no log-probs hidden among the tokens)
    <prefix>.meta.npz            columns beside the tokens: id, group, scores, source_line
    <prefix>.json                manifest: counts kept and dropped by reason, fingerprints, size and sha256 of the files above
    <prefix>.ref.npy/.ref.json   later, by another stage: reference log-probs and whose they are (see `write_reference_logps`)

The manifest is renamed into place last: it is the commit marker, and a store without it does not exist. A document is one sample:

    kind "pairs"   three sequences: prompt, chosen, rejected; none empty
    kind "sft"     alternating unscored, scored, unscored, scored...; an unscored sequence may be empty, a scored one never
    kind "text"    one or more sequences, all scored, none empty

IndexedDataset holds empty sequences as they are. megatron.core takes seconds to import, so it is imported where it is used.
"""

import hashlib
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_patch.data.atomic_files import atomic_path, flush, read_json, remove_stale, sha256_file, temporary_path, write_json
from megatron_patch.data.indexed_file import IndexedFile
from megatron_patch.data.store_columns import ColumnBuilder, Columns

FORMAT = "lpo-pair-store"
FORMAT_VERSION = 2
KINDS = ("pairs", "sft", "text")
Tokens = Sequence[int] | np.ndarray
_DATA_SUFFIXES = (".bin", ".idx", ".meta.npz")
# A store copied to another folder or made again on another day is the same store: only these enter its fingerprint.
_IDENTITY = ("format", "format_version", "kind", "count", "files")


@contextmanager
def _indexed_dataset() -> Iterator[Any]:
    """Upstream's module, with its warnings (about GPUs, ranks and packages that nobody needs here) silenced inside the block."""
    silenced = logging.root.manager.disable
    logging.disable(max(silenced, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset

            yield indexed_dataset
    finally:
        logging.disable(silenced)


class Document(NamedTuple):
    """One document to be written; `PairStoreWriter.add` says what the columns are."""

    tokens: np.ndarray
    """int32, its sequences end to end."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    id: str
    group: str = ""
    scores: tuple[float, float] | None = None
    source_line: int = -1


def _check_document(kind: str, lengths: Sequence[int], id: str) -> None:
    if kind == "pairs":
        if len(lengths) != 3:
            raise ValueError(f"pair {id!r}: {len(lengths)} sequences given, a pair has 3 (prompt, chosen, rejected)")
    elif kind == "sft" and (not lengths or len(lengths) % 2):
        raise ValueError(f"document {id!r}: {len(lengths)} sequences given, sft alternates unscored and scored ones")
    if not lengths:
        raise ValueError(f"document {id!r}: no sequences")
    empty = [i for i, length in enumerate(lengths) if length == 0 and (kind != "sft" or i % 2)]
    if empty:
        names = {"pairs": ("prompt", "chosen", "rejected")}.get(kind)
        name = names[empty[0]] if names else f"{'scored ' if kind == 'sft' else ''}sequence {empty[0]}"
        raise ValueError(f"{'pair' if kind == 'pairs' else 'document'} {id!r}: empty {name}")


def _as_tokens(sequence: Tokens, id: str) -> np.ndarray:
    array = np.asarray(sequence, dtype=np.int64) if len(sequence) else np.zeros(0, dtype=np.int64)
    if array.ndim != 1:
        raise ValueError(f"{id!r}: a sequence must be one-dimensional, got shape {array.shape}")
    if len(array) and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"{id!r}: token ids must lie in [0, 2**31), got {array.min()}..{array.max()}")
    return array.astype(np.int32)


class PairStoreWriter:
    """Writes one store under temporary names; `commit` makes it appear, leaving the block without `commit` removes every trace.

    with PairStoreWriter("out/train", "pairs") as writer:
        writer.add([prompt_ids, chosen_ids, rejected_ids], id="17-0", group="17")
        writer.drop("too_long_chosen")
        writer.commit(tokenizer={...}, template={...}, sources=[...], seed=1)
    """

    def __init__(self, prefix: str | Path, kind: str, *, overwrite: bool = False) -> None:
        """`prefix`: path without suffix. Raises ValueError for an unknown kind or, without `overwrite`, a committed store."""
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
        self.prefix, self.kind = Path(prefix), kind
        if _file(self.prefix, ".json").exists() and not overwrite:
            raise ValueError(f"{_file(self.prefix, '.json')}: store exists already, give another name or ask to overwrite it")
        self.dropped: Counter[str] = Counter()
        self._columns = ColumnBuilder()
        self._scored_tokens = 0
        self._sequences: IndexedFile

    def __enter__(self) -> "PairStoreWriter":
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        for path in store_files(self.prefix):
            remove_stale(path)
        self._sequences = IndexedFile(self._temporary(".bin"))
        return self

    def __exit__(self, *exception: object) -> None:
        self._sequences.close()
        for suffix in _DATA_SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._columns)

    def _temporary(self, suffix: str) -> Path:
        return temporary_path(_file(self.prefix, suffix))

    def add(
        self, sequences: Sequence[Tokens], *, id: str, group: str = "", scores: tuple[float, float] | None = None, source_line: int = -1
    ) -> None:
        """Append one document (see the module's table of kinds).

        `id` unique in the store; `group` ties samples of one prompt; `scores` of (chosen, rejected), any unit; `source_line` 1-based.
        Raises ValueError, naming the id, for an empty or missing sequence, a token id outside int32 and an id given twice.
        """
        arrays = [_as_tokens(sequence, id) for sequence in sequences]
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
        self.write(Document(tokens, tuple(map(len, arrays)), id, group, scores, source_line))

    def write(self, document: Document) -> None:
        """`add` for a document whose token ids are known to be int32, none negative."""
        if not document.id:
            raise ValueError(f"id {document.id!r} is empty")
        _check_document(self.kind, document.lengths, document.id)
        self._columns.add(document.id, document.group, document.scores, document.source_line)
        self._sequences.add(document.tokens, document.lengths)
        self._scored_tokens += sum(document.lengths[_scored(self.kind)])

    def drop(self, reason: str, count: int = 1) -> None:
        """Count records left out under `reason`; the manifest and the stage's table show them."""
        self.dropped[reason] += count

    def commit(
        self,
        *,
        tokenizer: dict[str, Any],
        template: dict[str, Any],
        sources: list[dict[str, Any]],
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        limits: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Make the store appear and return its manifest.

        `tokenizer` and `template` need a key "fingerprint"; `sources` is one {"path", "sha256", ...} per input file; `limits` e.g.
        {"max_length": 4096} in tokens. Raises ValueError if a fingerprint is missing or no document was kept.
        """
        for name, value in (("tokenizer", tokenizer), ("template", template)):
            if not value.get("fingerprint"):
                raise ValueError(f"{self.prefix}: the {name} entry of a manifest needs a fingerprint, got {value!r}")
        if not len(self):
            raise ValueError(f"{self.prefix}: nothing to keep, {sum(self.dropped.values())} dropped ({_counts(self.dropped)})")
        self._finish_data()
        manifest = {
            "format": FORMAT, "format_version": FORMAT_VERSION, "kind": self.kind, "count": len(self),
            "tokens": self._sequences.tokens, "scored_tokens": self._scored_tokens, "dropped": dict(sorted(self.dropped.items())),
            "tokenizer": tokenizer, "template": template, "sources": sources, "seed": seed, "options": options or {},
            "limits": limits or {}, "files": {suffix: _describe(self._temporary(suffix)) for suffix in _DATA_SUFFIXES},
        }  # fmt: skip
        self._publish(manifest)
        return manifest

    def _finish_data(self) -> None:
        self._sequences.finish(self._temporary(".idx"))
        self._columns.save(self._temporary(".meta.npz"))
        for suffix in _DATA_SUFFIXES:
            flush(self._temporary(suffix))

    def _publish(self, manifest: dict[str, Any]) -> None:
        """Take an old manifest away first: at no moment does a manifest stand beside data that is not its own."""
        _file(self.prefix, ".json").unlink(missing_ok=True)
        for suffix in _DATA_SUFFIXES:
            os.replace(self._temporary(suffix), _file(self.prefix, suffix))
        write_json(_file(self.prefix, ".json"), manifest)


def _scored(kind: str) -> slice:
    """Which sequences of a document the loss looks at."""
    return {"pairs": slice(1, None), "sft": slice(1, None, 2), "text": slice(None)}[kind]


def store_files(prefix: str | Path) -> list[Path]:
    """The files of a store without reference log-probs."""
    return [_file(Path(prefix), suffix) for suffix in (*_DATA_SUFFIXES, ".json")]


def reference_files(prefix: str | Path) -> list[Path]:
    """The files of the reference log-probs beside a store: the values and what commits them."""
    return [_file(Path(prefix), suffix) for suffix in (".ref.npy", ".ref.json")]


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _counts(counter: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counter.items())) or "no reason given"


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


class PairStore:
    """Read-only view of a committed store. Cheap to open, safe to pickle into data-loader workers, memory-mapped."""

    def __init__(self, prefix: str | Path, *, kind: str | None = None, verify: str = "size") -> None:
        """`kind`: refuse any other kind. `verify`: "size" compares file sizes with the manifest, "sha256" the contents too.

        Raises ValueError naming the file: missing, of another size or content, of an unknown format version, of another kind.
        """
        if verify not in ("size", "sha256"):
            raise ValueError(f"verify must be 'size' or 'sha256', got {verify!r}")
        self.prefix = Path(prefix)
        self.manifest = _read_manifest(self.prefix)
        self.kind: str = self.manifest["kind"]
        if kind is not None and kind != self.kind:
            raise ValueError(f"{_file(self.prefix, '.json')}: store of kind {self.kind!r}, {kind!r} is needed here")
        for suffix in _DATA_SUFFIXES:
            _verify_file(_file(self.prefix, suffix), self.manifest["files"].get(suffix), contents=verify == "sha256")
        with _indexed_dataset() as upstream:
            self._dataset = upstream.IndexedDataset(str(self.prefix))
        self._bounds = np.array(self._dataset.document_indices)
        self._columns: Columns | None = None
        if len(self) != self.manifest["count"]:
            raise ValueError(f"{_file(self.prefix, '.idx')}: {len(self)} documents, the manifest says {self.manifest['count']}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_columns": None}  # read again rather than copied

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
        """The sequences of document i, each int32 [length]: see the module's table of kinds. Copies, so they outlive the store."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.prefix}: document {i} of {len(self)}")
        return tuple(np.array(sequence) for sequence in self._dataset[int(self._bounds[i]) : int(self._bounds[i + 1])])

    def sequence_lengths(self, i: int) -> np.ndarray:
        """int32 [sequences of document i], in tokens."""
        return np.array(self._dataset.sequence_lengths[self._bounds[i] : self._bounds[i + 1]])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per document: pairs int32 [N, 3] (prompt, chosen, rejected); sft and text int32 [N, 2] (total, scored)."""
        flat = np.array(self._dataset.sequence_lengths)
        if self.kind == "pairs":
            return flat.reshape(len(self), 3)
        total = np.add.reduceat(flat, self._bounds[:-1])
        if self.kind == "text":
            return np.stack([total, total], axis=1).astype(np.int32)
        scored = np.where(np.arange(len(flat)) % 2 == 1, flat, 0)  # every sft document has an even number of sequences
        return np.stack([total, np.add.reduceat(scored, self._bounds[:-1])], axis=1).astype(np.int32)

    @property
    def columns(self) -> Columns:
        """id, group, scores and source_line of every document; read on first use."""
        if self._columns is None:
            self._columns = Columns.load(_file(self.prefix, ".meta.npz"))
        return self._columns

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of what the store holds (its files, kind, tokenizer, template), whatever its path."""
        identity = {key: self.manifest[key] for key in _IDENTITY}
        identity |= {name: self.manifest[name]["fingerprint"] for name in ("tokenizer", "template")}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _read_manifest(prefix: Path) -> dict[str, Any]:
    path = _file(prefix, ".json")
    manifest = read_json(path, "the manifest of a pair store")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not the manifest of a pair store (format {manifest.get('format')!r})")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format version {manifest.get('format_version')!r}, this program reads {FORMAT_VERSION}")
    if manifest.get("kind") not in KINDS:
        raise ValueError(f"{path}: unknown kind {manifest.get('kind')!r}")
    missing = [key for key in ("count", "files", "tokenizer", "template") if key not in manifest]
    if missing:
        raise ValueError(f"{path}: manifest without {', '.join(missing)}")
    return manifest


def _verify_file(path: Path, recorded: dict[str, Any] | None, *, contents: bool) -> None:
    if recorded is None:
        raise ValueError(f"{path}: not in the manifest")
    if not path.exists():
        raise ValueError(f"{path}: missing")
    if path.stat().st_size != recorded["size"]:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, the manifest says {recorded['size']}")
    if contents and sha256_file(path) != recorded["sha256"]:
        raise ValueError(f"{path}: contents changed since the manifest was written (sha256 differs)")


def write_reference_logps(
    prefix: str | Path,
    logps: np.ndarray,
    *,
    store_fingerprint: str,
    weights_fingerprint: str,
    dtype: str,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the reference's response log-probs beside the store at `prefix`; `<prefix>.ref.json` appears last and commits them.

    `logps`: float64 [pairs, 2], chosen and rejected, SUMS in nats over the response's tokens. `dtype`: what the model computed in, e.g.
    "float32". `extra`: anything worth keeping (layout, command). Raises ValueError for a wrong shape, NaN, infinity or a positive value.
    """
    logps = np.asarray(logps, dtype=np.float64)
    store = PairStore(prefix, kind="pairs")
    _check_logps(store, logps, store.prefix)
    values, commit_marker = reference_files(store.prefix)
    commit_marker.unlink(missing_ok=True)
    with atomic_path(values) as temporary, open(temporary, "wb") as stream:
        np.save(stream, logps)
    record = {"format_version": FORMAT_VERSION, "store": store_fingerprint, "weights": weights_fingerprint, "dtype": dtype}
    write_json(commit_marker, record | {"extra": extra or {}, "file": _describe(values)})


def reference_record(store: PairStore) -> dict[str, Any]:
    """Whose the reference log-probs beside a store are: fingerprints of store and weights, dtype, extra; ValueError if there are none."""
    path = _file(store.prefix, ".ref.json")
    record = read_json(path, "the reference log-probs' record")
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format version {record.get('format_version')!r}, this program reads {FORMAT_VERSION}")
    return record


def read_reference_logps(store: PairStore, *, weights_fingerprint: str | None) -> np.ndarray:
    """Reference log-probs of `store`, float64 [pairs, 2], sums in nats.

    Raises ValueError if they are missing or damaged, belong to another store or (unless None) other weights, or are no log-probabilities.
    """
    path, record = _file(store.prefix, ".ref.json"), reference_record(store)
    expected = {"store": store.fingerprint} | ({} if weights_fingerprint is None else {"weights": weights_fingerprint})
    for what, fingerprint in expected.items():
        if record.get(what) != fingerprint:
            raise ValueError(f"{path}: reference log-probs of another {what}: made for {record.get(what)}, needed for {fingerprint}")
    values = _file(store.prefix, ".ref.npy")
    _verify_file(values, record.get("file"), contents=True)
    logps = np.load(values, allow_pickle=False)
    _check_logps(store, logps, values)
    return logps


def _check_logps(store: PairStore, logps: np.ndarray, name: Path) -> None:
    if logps.shape != (len(store), 2) or logps.dtype != np.float64:
        raise ValueError(f"{name}: reference log-probs are {logps.dtype} {list(logps.shape)}, expected float64 [{len(store)}, 2]")
    bad = np.flatnonzero(~(np.isfinite(logps) & (logps <= 0)).all(axis=1))
    if len(bad):
        shown = ", ".join(f"{store.columns.id[i]} ({logps[i, 0]:g}, {logps[i, 1]:g})" for i in bad[:5])
        raise ValueError(f"{name}: {len(bad)} pairs whose log-probs are no sums of log-probabilities (finite, <= 0): {shown}")
