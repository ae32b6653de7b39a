"""``--train-mode pretrain``: the loss of the first step against transformers, and two ranks against one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_patch.data.pair_store import PairStore
from tests.distributed import harness
from tests.distributed.materials import PAIRS, Bench


def losses(model: Path, store: PairStore) -> Iterator[tuple[float, int]]:
    """(sum of cross-entropies in nats, predicted tokens) of each text, transformers in float32."""
    from transformers import Qwen2ForCausalLM

    judge = Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for i in range(len(store)):
        ids = torch.from_numpy(store[i][0]).long()[None]
        with torch.no_grad():
            yield float(judge(ids, labels=ids).loss) * (ids.shape[1] - 1), ids.shape[1] - 1


@pytest.mark.parametrize("layout", ["dp2", *(pytest.param(each, marks=pytest.mark.ci) for each in ("tp2-pp2-sp", "vpp2", "tp2-cp2-sp"))])
def test_first_loss_is_transformers_and_ranks_agree(bench: Bench, layout: str) -> None:
    flags = ("--train-mode", "pretrain", "--global-batch-size", PAIRS, "--train-iters", 3)
    one, two = (harness.metrics(bench.train(each, bench.text, *flags)) for each in ("one", layout))
    sums, counts = zip(*losses(bench.models["tied"], PairStore(bench.text)), strict=True)
    assert one[0]["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert one[-1]["loss"] < one[0]["loss"]
