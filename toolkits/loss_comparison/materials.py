"""What a comparison needs on disk before its first training: the quickstart's model, problems and pairs, and other sets of pairs.

All of it is made by what makes it elsewhere too (scripts/quickstart.sh and the data stages), once: what is there and belongs to the
model is kept. The quickstart's folder is only read; stores made here go under the comparison's own. Their folders carry a digest of what
they are made of, so another definition or another model is another folder.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.hf_files import weights_fingerprint
from megatron_patch.data.pair_store import PairStore, read_reference_logps
from toolkits.loss_comparison.plan import Comparison, PairSet

DATA_JOB = "toolkits/lpo_data_preprocessing/scripts/gene_lpo_lam_cand.sh"
LIMITS = {"MAX_NEW_TOKENS": "64", "MAX_LENGTH": "128"}  # tokens, as in the quickstart
# Trained models are measured with transformers in float32: the reference that they are held against must be, too, also on a GPU.
MEASURED_IN = {"PRECISION": "fp32"}
# The quickstart's split: a prompt that its validation pairs hold is in no training set.
SPLIT = ("--seed", "1", "--valid-fraction", "0.1")
SPLITS = ("valid", "heldout")


@dataclass(frozen=True)
class Store:
    """A pair store with reference log-probs."""

    prefix: str
    fingerprint: str
    pairs: int


@dataclass(frozen=True)
class Materials:
    """Where everything is, and what identifies it."""

    model: Path
    """Hugging Face folder of the fine-tuned model: where every run starts, and the reference."""
    weights: str
    """Its fingerprint."""
    problems: Mapping[str, Path]
    """JSONL of the "valid" and "heldout" problems."""
    stores: Mapping[str, Store]
    """Pairs of the "valid" and "heldout" prompts."""
    training: Mapping[str | None, Store]
    """By the name of the pair set; None: the quickstart's."""


class StageError(Exception):
    """A script that makes materials failed; it has said why. ``code``: its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def make_materials(comparison: Comparison, out: Path) -> Materials:
    """Make what is missing; stores go under ``out``.

    Raises:
        StageError: a stage failed. ValueError: a file of the materials is damaged.
    """
    folder = comparison.materials
    if not _is_complete(folder):
        _run(["bash", "scripts/quickstart.sh"], QUICKSTART_UNTIL="pairs", QUICKSTART_OUT=str(folder))
    _refuse_small(folder)
    model = folder / "sft/hf"
    weights = weights_fingerprint(model)
    stores = {"valid": _store(folder / "pairs/valid"), "heldout": _store(_make_heldout(folder, weights, out))}
    training: dict[str | None, Store] = {None: _store(folder / "pairs/train")}
    for name, pairs in comparison.pair_sets.items():
        training[name] = _store(_make_pair_set(name, pairs, folder, weights, out))
    problems = {split: folder / f"problems/{split}.jsonl" for split in SPLITS}
    return Materials(model, weights, problems, stores, training)


def _is_complete(folder: Path) -> bool:
    """Whether the quickstart got as far as its pairs."""
    needed = ("sft/hf/config.json", "pairs/train.ref.json", "pairs/valid.ref.json", "heldout/train.json")
    return all((folder / name).exists() for name in needed)


def _refuse_small(folder: Path) -> None:
    """The numbers of a QUICKSTART_SMALL quickstart mean nothing; only a test wants them."""
    marker = folder / ".quickstart"
    if marker.exists() and "small" in marker.read_text(encoding="utf-8") and os.environ.get("QUICKSTART_SMALL", "0") != "1":
        raise ValueError(f"{folder} was made with QUICKSTART_SMALL=1: remove it, or name another folder as materials")


def _store(prefix: Path) -> Store:
    store = PairStore(prefix, kind="pairs")
    return Store(str(prefix), store.fingerprint, len(store))


def _has_reference(prefix: Path, weights: str) -> bool:
    try:
        read_reference_logps(PairStore(prefix, kind="pairs"), weights_fingerprint=weights)
    except ValueError:  # none, damaged, or of another model
        return False
    return True


def _make_heldout(materials: Path, weights: str, out: Path) -> Path:
    """The quickstart's held-out pairs with what an evaluation during training needs: reference log-probs, and scores for some losses."""
    folder = out / "pair_sets" / f"heldout-{_digest(weights)}"
    if not _has_reference(folder / "train", weights):
        _select(materials / "heldout/candidates.jsonl", folder, ["--scores"])
        _data_job("build_pairs reference_logps", materials / "sft/hf", folder)
    return folder / "train"


def _make_pair_set(name: str, pairs: PairSet, materials: Path, weights: str, out: Path) -> Path:
    """The prefix of a pair set's training store, made if it is not there."""
    folder = out / "pair_sets" / f"{name}-{_digest([asdict(pairs), weights])}"
    if _has_reference(folder / "train", weights):
        return folder / "train"
    model = materials / "sft/hf"
    stages, made = ("normalise", "records") if pairs.method == "perturb" else ("normalise candidates", "candidates")
    _data_job(stages, model, folder, INPUT=str(materials / "problems/pairs.jsonl"), N=str(pairs.n), SEED=str(pairs.seed))
    _select(folder / f"{made}.jsonl", folder, ["--valid-output", str(folder / "valid.jsonl"), *SPLIT, *_selection(pairs)])
    _data_job("build_pairs reference_logps", model, folder)
    return folder / "train"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _select(records: Path, folder: Path, words: Sequence[str]) -> None:
    words = ["--input", str(records), "--output", str(folder / "train.jsonl"), "--overwrite", *words]
    _run([sys.executable, "-m", "toolkits.lpo_data_preprocessing.select", *words])


def _selection(pairs: PairSet) -> list[str]:
    words = ["--method", pairs.method, "--max-pairs-per-prompt", str(pairs.max_pairs_per_prompt)]
    words += ["--chosen", pairs.chosen] if pairs.method == "verify-math" else []
    if pairs.method == "perturb":
        words += ["--n", str(pairs.n), "--noise-seed", str(pairs.seed)]
        words += ["--noise-ratio", str(pairs.noise_ratio)] if pairs.noise_ratio is not None else []
    words += ["--swap-fraction", str(pairs.swap_fraction)] if pairs.swap_fraction else []
    return words + (["--scores"] if pairs.scores else [])


def _data_job(stages: str, model: Path, output: Path, **environment: str) -> None:
    """Stages of the data job; only the first of them reads INPUT."""
    paths = {"HF_PATH": str(model), "OUTPUT": str(output)}
    _run(["bash", DATA_JOB], **{"INPUT": "unused", **environment, **LIMITS, **MEASURED_IN, "STAGES": stages, **paths})


def _run(command: Sequence[str], **environment: str) -> None:
    code = subprocess.run(command, env={**os.environ, **environment}, check=False).returncode
    if code:
        raise StageError(code)
