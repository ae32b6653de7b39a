"""One training each: its exact configuration, its folder, and how a finished one is known.

A folder's name ends in a digest of the configuration, so a changed configuration is another folder; ``finished.json`` with the whole
configuration is written last. An interrupted training is started again by the same command, which goes on from a checkpoint where the
run script finds one. What is measured on a trained model is kept beside it and measured again only if what it is measured on changed.
"""

import hashlib
import json
import os
import re
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.data.atomic_files import read_json, sha256_file, write_json
from toolkits.loss_comparison.materials import SPLITS, Materials
from toolkits.loss_comparison.measure import measure
from toolkits.loss_comparison.plan import SFT, Run

RUN_SCRIPT = "examples/qwen2_5/run_mcore_qwen_xpo.sh"
SETTINGS = ("DEVICE", "PRECISION", "TP", "PP", "NPROC_PER_NODE")  # choices by environment that the run script listens to
DIVERGED = "NaN or infinite"  # in the line that ends such a training (megatron_patch/step_checks.py)
LAST_LINES = 25  # of a failed training's output: what launch.sh explains, and a little before it


class TrialFailed(Exception):
    """A training ended with another exit code than 0; the message is for the terminal."""


class Diverged(TrialFailed):
    """Its log-probs or gradients were no longer finite, and would not be the next time either."""


@dataclass(frozen=True)
class Trial:
    """A run of the file at one learning rate and one seed."""

    run: Run
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.run.name}, rate {self.learning_rate:g}, seed {self.seed}"


Subject = Trial | None
"""What is measured; None: the untouched model."""
Numbers = dict[str, float]


@dataclass(frozen=True)
class Bench:
    """Where trainings happen, and what with."""

    out: Path
    materials: Materials
    eval_interval: int
    """Steps between two evaluations on the held-out pairs."""

    def configuration(self, trial: Trial) -> dict[str, Any]:
        """Everything that decides what a training gives."""
        materials, run = self.materials, trial.run
        return {
            "preset": run.preset.read_text(encoding="utf-8"), "flags": list(run.flags), "steps": run.steps, "seed": trial.seed,
            "learning_rate": trial.learning_rate, "eval_interval": self.eval_interval, "weights": materials.weights,
            "pairs": materials.training[run.pairs].fingerprint, "evaluated_on": materials.stores["heldout"].fingerprint,
            **{name: os.environ[name] for name in SETTINGS if name in os.environ},
        }  # fmt: skip

    def folder(self, subject: Subject) -> Path:
        """Where a training and what is measured on it are kept."""
        if subject is None:
            return self.out / "runs" / SFT.lower()
        digest = hashlib.sha256(json.dumps(self.configuration(subject), sort_keys=True).encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.=-]+", "-", subject.run.name).strip("-")
        return self.out / "runs" / name / f"lr{subject.learning_rate:g}-seed{subject.seed}-{digest}"

    def model(self, subject: Subject) -> Path:
        """The Hugging Face folder to measure."""
        return self.materials.model if subject is None else self.folder(subject) / "hf"

    def is_trained(self, subject: Subject) -> bool:
        """Whether there is nothing left to train."""
        marker = self.folder(subject) / "finished.json"
        return subject is None or (
            marker.exists() and read_json(marker, "a finished training")["configuration"] == self.configuration(subject)
        )

    def is_diverged(self, subject: Subject) -> bool:
        """Whether this very training ended as `Diverged`."""
        marker = self.folder(subject) / "diverged.json"
        return subject is not None and (
            marker.exists() and read_json(marker, "a diverged training")["configuration"] == self.configuration(subject)
        )

    def training_seconds(self, trial: Trial) -> float:
        """Wall-clock seconds of a finished training, start-up and evaluations included."""
        return read_json(self.folder(trial) / "finished.json", "a finished training")["seconds"]

    def train(self, trial: Trial) -> None:
        """One training, from the fine-tuned model to an exported folder.

        Raises:
            TrialFailed: with the last lines of its output. Diverged: the same, and it is noted.
        """
        folder, started = self.folder(trial), time.monotonic()
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        for split in SPLITS:  # numbers of an earlier training
            self._numbers_path(trial, split).unlink(missing_ok=True)
        terminal = folder / "logs/terminal.log"
        environment = {**os.environ, "PRESET": str(trial.run.preset), "OUTPUT": str(folder), "ON_TERM": "TERM"}  # ended at once
        with open(terminal, "w", encoding="utf-8") as stream:
            done = subprocess.run(["bash", RUN_SCRIPT, *self._flags(trial)], env=environment, stdout=stream, stderr=stream, check=False)
        if done.returncode:
            failure = _failure(trial, done.returncode, terminal)
            if DIVERGED in failure:
                write_json(folder / "diverged.json", {"configuration": self.configuration(trial)})
                raise Diverged(failure)
            raise TrialFailed(failure)
        write_json(folder / "finished.json", {"configuration": self.configuration(trial), "seconds": time.monotonic() - started})

    def _flags(self, trial: Trial) -> Sequence[str]:
        materials, run = self.materials, trial.run
        return [
            "--hf-path", str(materials.model), "--pair-data", materials.training[run.pairs].prefix,
            "--valid-pair-data", materials.stores["heldout"].prefix, "--eval-interval", str(self.eval_interval),
            "--train-iters", str(run.steps), *run.flags, "--lr", repr(trial.learning_rate), "--seed", str(trial.seed),
        ]  # fmt: skip

    def measured(self, subject: Subject, split: str) -> Numbers | None:
        """Numbers of a trained model on "valid" or "heldout", if they were measured on what is there now."""
        path = self._numbers_path(subject, split)
        if not self.is_trained(subject) or not path.exists():
            return None
        found = read_json(path, "numbers of a trained model")
        return found["numbers"] if found["on"] == self._measured_on(split) else None

    def measure(self, subject: Subject, split: str) -> None:
        """Measure a trained model and keep the numbers."""
        materials = self.materials
        numbers = measure(self.model(subject), materials.problems[split], materials.stores[split].prefix, materials.weights)
        path = self._numbers_path(subject, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"on": self._measured_on(split), "numbers": numbers})

    def _numbers_path(self, subject: Subject, split: str) -> Path:
        return self.folder(subject) / f"{split}.json"

    def _measured_on(self, split: str) -> dict[str, str]:
        materials = self.materials
        problems, pairs = sha256_file(materials.problems[split]), materials.stores[split].fingerprint
        return {"problems": problems, "pairs": pairs, "weights": materials.weights}


def _failure(trial: Trial, code: int, terminal: Path) -> str:
    with open(terminal, encoding="utf-8", errors="replace") as stream:
        last = deque((line.rstrip() for line in stream), maxlen=LAST_LINES)
    return "\n".join([f"[failed] {trial}: exit code {code}", *last, f"[failed] {trial}: its logs: {terminal.parent}"])
