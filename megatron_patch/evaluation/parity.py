"""The independent judge of log-probs: transformers, from the checkpoint's own files, without any code of the training path.

The Megatron path is compared with it through the stored reference log-probs; the step-0 gate then compares the policy with the
reference. So an error that both Megatron passes share, such as a shifted mask, cannot hide.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

# Nats per token, by the dtype the reference was computed in (transformers computes in float32).
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}

MAX_FLOPS = 3e13  # 2 per parameter and token: two minutes on four cores or six on one, of the ten that a collective waits


def checkpoint_bytes(hf_path: str | Path) -> int:
    """Size of a checkpoint's safetensors files, in bytes."""
    return sum(file.stat().st_size for file in Path(hf_path).glob("*.safetensors"))


def affordable(hf_path: str | Path, tokens: Sequence[int] | np.ndarray) -> int:
    """How many samples, of so many tokens each, one process can score one after another while the other ranks wait.

    A float32 copy of the checkpoint may take a quarter of this machine's memory, and all forward passes together ``MAX_FLOPS``.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = checkpoint_bytes(hf_path)  # two bytes a parameter, as published; a float32 checkpoint counts double
    if 2 * size > memory // 4:
        return 0
    return int((size * np.cumsum(tokens, dtype=np.float64) <= MAX_FLOPS).sum())


Pair = tuple[np.ndarray, ...]  # prompt, chosen and rejected token ids


def transformers_logps(hf_path: str | Path, pairs: Sequence[Pair]) -> np.ndarray:
    """float64 [pairs, 2] sums in nats of the chosen and the rejected response.

    Args:
        pairs: (prompt, chosen, rejected) token ids.
    """
    return sequence_logps(hf_path, [[_behind(prompt, response) for response in responses] for prompt, *responses in pairs])


def _behind(prompt: np.ndarray, response: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([prompt, response]), np.arange(len(prompt) + len(response)) >= len(prompt)


def sequence_logps(hf_path: str | Path, samples: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]) -> np.ndarray:
    """float64 [samples, sequences] sums in nats of each sequence's scored tokens, float32 on the CPU.

    Args:
        samples: as many sequences each: (token ids, which of them are scored; never the first).
    """
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # the other ranks wait
    model = AutoModelForCausalLM.from_pretrained(
        hf_path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    ).eval()
    sums = np.zeros((len(samples), len(samples[0])))
    for row, sequences in enumerate(samples):
        for column, (ids, scored) in enumerate(sequences):
            with torch.no_grad():
                logps = model(input_ids=torch.tensor(ids.tolist()).unsqueeze(0)).logits[0].double().log_softmax(-1)
            where = np.flatnonzero(scored)
            sums[row, column] = float(logps[where - 1, ids[where].astype(np.int64)].sum())
    torch.set_num_threads(threads)
    return sums


def check_parity(hf_path: str | Path, pairs: Sequence[Pair], stored: np.ndarray, dtype: str) -> float:
    """Largest difference per token (nats) between transformers and the ``stored`` reference log-probs [pairs, 2].

    Raises:
        ValueError: it exceeds the tolerance of ``dtype``.
    """
    lengths = np.array([[len(chosen), len(rejected)] for _, chosen, rejected in pairs])
    difference = float(np.abs((transformers_logps(hf_path, pairs) - stored) / lengths).max())
    if not difference <= TOLERANCE[dtype]:
        raise ValueError(
            f"parity check: reference log-probs differ from transformers' by {difference:.3g} nats per token (allowed "
            f"{TOLERANCE[dtype]:g} in {dtype}); recompute them, or say --no-parity-check"
        )
    return difference
