"""What the distributed tests train on: small random checkpoints and stores, and the layouts they are run at."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from megatron_patch.data.pair_store import PairStore, PairStoreWriter, read_reference_logps
from tests.distributed import harness

PAIRS = 48
BATCH = 10  # pairs a step; does not divide PAIRS, so that a batch runs across the border of an epoch
VOCABULARY = 501  # a multiple of neither 2 nor 128: TP pads it

_TP2 = ("--tensor-model-parallel-size", 2)
_PP2 = ("--pipeline-model-parallel-size", 2)
_CP2 = ("--context-parallel-size", 2)
_FULL = ("--recompute-granularity", "full")
_DO = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
_BF16 = ("--bf16", "--allow-reference-mismatch")
_ALL = (
    *_TP2, "--sequence-parallel", *_PP2, "--num-virtual-stages-per-pipeline-rank", 2, *_DO, *_FULL, "--recompute-method", "uniform",
    "--recompute-num-layers", 1, "--pad-micro-batches", "--max-tokens-per-micro-batch", 300,
)  # fmt: skip
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {  # name -> (processes, flags)
    "one": (1, ()),
    "small micro-batches": (1, ("--max-tokens-per-micro-batch", 90)),
    "tp2": (2, _TP2),
    "tp2-sp": (2, (*_TP2, "--sequence-parallel")),
    "pp2": (2, _PP2),
    "vpp2": (2, (*_PP2, "--num-virtual-stages-per-pipeline-rank", 2)),
    "pp4": (4, ("--pipeline-model-parallel-size", 4)),
    "pp4 small micro-batches": (4, ("--pipeline-model-parallel-size", 4, "--max-tokens-per-micro-batch", 90)),
    "dp2": (2, ()),
    "dp2 small micro-batches": (2, ("--max-tokens-per-micro-batch", 90)),
    "dp2-do": (2, _DO),
    "dp2-do small micro-batches": (2, (*_DO, "--max-tokens-per-micro-batch", 90, "--ddp-bucket-size", 10000)),
    "tp2-pp2": (4, (*_TP2, *_PP2)),
    "tp2-pp2-sp": (4, (*_TP2, *_PP2, "--sequence-parallel")),
    "cp2": (2, _CP2),
    "cp2-do": (2, (*_CP2, *_DO)),
    "cp2-dp2 small micro-batches": (4, (*_CP2, "--max-tokens-per-micro-batch", 100)),
    "tp2-cp2-sp": (4, (*_TP2, *_CP2, "--sequence-parallel")),
    "cp2-pp2": (4, (*_CP2, *_PP2)),
    "share-prompt": (1, ("--share-prompt",)),
    "share-prompt small micro-batches": (1, ("--share-prompt", "--max-tokens-per-micro-batch", 90)),
    "share-prompt tp2-sp": (2, (*_TP2, "--sequence-parallel", "--share-prompt")),
    "share-prompt pp2": (2, (*_PP2, "--share-prompt")),
    "share-prompt dp2-do": (2, (*_DO, "--share-prompt")),
    "full recompute": (1, (*_FULL, "--recompute-method", "uniform", "--recompute-num-layers", 1)),
    "full recompute tp2-pp2-sp": (
        4, (*_TP2, *_PP2, "--sequence-parallel", *_FULL, "--recompute-method", "block", "--recompute-num-layers", 1)
    ),
    "attention recompute": (1, ("--recompute-granularity", "selective", "--recompute-modules", "core_attn")),
    "mlp recompute cp2": (2, (*_CP2, "--recompute-granularity", "selective", "--recompute-modules", "mlp")),
    "everything cp2": (8, (*_ALL, *_CP2)),
    "everything dp2": (8, _ALL),
    "everything share-prompt dp2": (8, (*_ALL, "--share-prompt")),
    "everything bf16 cp2": (8, (*_ALL, *_CP2, *_BF16)),
    "everything bf16 share-prompt dp2": (8, (*_ALL, "--share-prompt", *_BF16)),
    "bf16": (1, _BF16),
    "small chunks": (1, ("--logps-chunk-tokens", 7)),
    "tp2-sp small chunks": (2, (*_TP2, "--sequence-parallel", "--logps-chunk-tokens", 7)),
    "dp2-do small chunks": (2, (*_DO, "--logps-chunk-tokens", 7)),
    "pp2 fixed rows": (2, (*_PP2, "--pad-micro-batches", "--max-tokens-per-micro-batch", 300)),
    "tp2-pp2-sp fixed rows": (4, (*_TP2, *_PP2, "--sequence-parallel", "--pad-micro-batches", "--max-tokens-per-micro-batch", 301)),
}  # fmt: skip


def make_model(folder: Path, *, tied: bool, seed: int, hidden: int = 64) -> Path:
    """A random 4-layer Qwen2 checkpoint with grouped-query attention, biases and norms that matter."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 3 // 2, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rope_theta=1e6, tie_word_embeddings=tied, rms_norm_eps=1e-6,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, spread = (0.0, 0.2) if "bias" in name else (1.0, 0.2) if "norm" in name else (0.0, 0.08)
            parameter.normal_(mean, spread)
    model.save_pretrained(folder)
    return folder


def make_store(
    prefix: Path, kind: str, *, count: int = PAIRS, longest: int = 20, seed: int = 0, vocabulary: int = VOCABULARY, scored: bool = True,
    shortest: int = 1, same_prompt: int = 1,
) -> Path:
    """``count`` documents of random tokens; lengths from ``shortest`` tokens to ``longest``, the extremes included; pairs with scores.

    ``same_prompt``: so many pairs after each other have the same prompt.
    """
    rng = np.random.default_rng(seed)
    parts = {"pairs": 3, "sft": 2, "text": 1}[kind]
    prompt = np.empty(0)
    with PairStoreWriter(prefix, kind) as writer:
        for i in range(count):
            lengths = rng.integers(shortest, longest + 1, parts) if i > 1 else np.full(parts, (shortest, longest)[i])
            tokens = [rng.integers(0, vocabulary, length) for length in lengths]
            prompt = tokens[0] if i % same_prompt == 0 else prompt
            tokens[0] = prompt
            scores = (float(1 + i % 5), float(-(i % 3))) if scored and kind == "pairs" else None
            writer.add(tokens, id=f"p{i:03d}", group=str(i // same_prompt), scores=scores)
        writer.commit(tokenizer={"fingerprint": "t"}, template={"fingerprint": "x"}, sources=[])
    return prefix


def copy_store(prefix: Path, folder: Path) -> Path:
    """The store at ``prefix``, reference log-probs included, in another folder."""
    folder.mkdir(parents=True)
    for file in prefix.parent.glob(f"{prefix.name}.*"):
        shutil.copy(file, folder / file.name)
    return folder / prefix.name


def reference(prefix: Path) -> np.ndarray:
    """float64 [pairs, 2]: the reference log-probs beside a store, sums in nats."""
    return read_reference_logps(PairStore(prefix), weights_fingerprint=None)


def response_lengths(prefix: Path) -> np.ndarray:
    """int64 [pairs, 2]: tokens of the chosen and the rejected responses."""
    return PairStore(prefix).lengths[:, 1:].astype(np.int64)


def tensors(hf_path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder."""
    return {name: tensor for file in sorted(hf_path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def transformers_logps(hf_path: Path, prefix: Path) -> Iterator[tuple[float, float]]:
    """(chosen, rejected) log-prob sums in nats of each pair: transformers in float32, one response at a time, summed in float64."""
    from transformers import Qwen2ForCausalLM

    model, store = Qwen2ForCausalLM.from_pretrained(hf_path, dtype=torch.float32).eval(), PairStore(prefix)
    for i in range(len(store)):
        prompt, *responses = (torch.from_numpy(part).long() for part in store[i])
        sums = []
        for response in responses:
            with torch.no_grad():
                logits = model(torch.cat([prompt, response])[None]).logits[0]
            logps = torch.log_softmax(logits.double(), -1)
            sums.append(sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(response)))
        yield sums[0], sums[1]


@dataclass
class Bench:
    """Runs entries on the session's materials. A run is made once: the same arguments give the same folder."""

    root: Path
    models: dict[str, Path] = field(default_factory=dict)
    pairs: Path = Path()
    sft: Path = Path()
    text: Path = Path()
    _runs: dict[tuple, Path] = field(default_factory=dict)

    @classmethod
    def build(cls, root: Path) -> "Bench":
        """Make checkpoints and stores."""
        models = {"tied": (True, 0), "untied": (False, 1), "other": (True, 2)}
        bench = cls(root, {name: make_model(root / name, tied=tied, seed=seed) for name, (tied, seed) in models.items()})
        bench.pairs = make_store(root / "data/pairs", "pairs")
        bench.sft = make_store(root / "data/sft", "sft", seed=1)
        bench.text = make_store(root / "data/text", "text", longest=30, seed=3, shortest=2)
        return bench

    def folder(self, hint: str) -> Path:
        """A new path under the session's folder."""
        return self.root / f"{len(list(self.root.iterdir())):03d}-{hint.replace(' ', '-')}"

    def reference(self, model: str = "tied", layout: str = "one", *flags: object, alter: str = "") -> Path:
        """Prefix of a copy of the pairs whose reference log-probs ``model`` computed at ``layout``."""
        key = ("reference", model, layout, flags, alter)
        if key not in self._runs:
            prefix = copy_store(self.pairs, self.folder(f"reference-{model}-{layout}"))
            run = self.launch(layout, harness.REFERENCE, self.reference_flags(model, prefix, *flags), prefix.with_suffix(".log"), alter)
            assert run.ok, run.output[-4000:]
            self._runs[key] = prefix
        return self._runs[key]

    @staticmethod
    def launch(layout: str, entry: Path, argv: list[object], log: Path, alter: str = "", **environment: str) -> harness.Run:
        """Run ``entry`` at a layout, possibly with alterations (see altered.py)."""
        ranks, flags = LAYOUTS[layout]
        words = [alter, entry, *argv, *flags] if alter else [*argv, *flags]
        return harness.launch(ranks, harness.ALTERED if alter else entry, words, log, environment)

    def reference_flags(self, model: str, prefix: Path, *flags: object) -> list[object]:
        """The command line of a reference pass."""
        return ["--hf-path", self.models[model], "--pair-data", prefix, "--seq-length", 128, *flags]

    def flags(self, data: Path, *flags: object, model: str = "tied") -> list[object]:
        """The command line of a short training run; what stands last wins."""
        fixed = ["--hf-path", self.models[model], "--pair-data", data, "--seq-length", 128, "--global-batch-size", BATCH]
        return [*fixed, "--train-iters", 10, "--lr", 1e-3, "--lr-decay-iters", 100, "--clip-grad", 1.0, *flags]

    def train(self, layout: str, data: Path, *flags: object, model: str = "tied", alter: str = "unsaved") -> Path:
        """``--save`` folder of a run that succeeded."""
        key = ("train", layout, data, flags, model, alter)
        if key not in self._runs:
            save = self.folder(f"train-{layout}")
            run = self.attempt(layout, save, data, *flags, model=model, alter=alter)
            assert run.ok, run.output[-4000:]
            self._runs[key] = save
        return self._runs[key]

    def unmoved(self, model: str, layout: str) -> Path:
        """One lpo-ste step at learning rate 0; its reference was computed at another layout."""
        data = self.reference(model, "tp2-sp" if layout in ("one", "pp2") else "tp2" if model == "untied" else "one")
        return self.train(layout, data, "--train-iters", 1, "--lr", 0.0, model=model)

    def attempt(self, layout: str, save: Path, data: Path, *flags: object, model: str = "tied", alter: str = "unsaved") -> harness.Run:
        """A run that may fail; exports to ``<save>/hf``; ``recorded`` (see altered.py) writes to ``<save>.batches.<rank>``."""
        argv = [*self.flags(data, *flags, model=model), "--save", save, "--export-hf", save / "hf"]
        return self.launch(layout, harness.TRAIN, argv, Path(f"{save}.log"), alter, BATCH_LOG=f"{save}.batches")
