"""Vocabulary-parallel log-probs against torch's own log_softmax on the whole, unpadded logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("response_logps_worker.py")


def logps_case(vocab, count, scale=1.0, shift=0.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocab, generator=generator) * scale + shift
    targets = torch.randint(vocab, (count,), generator=generator)
    if count > 1:
        targets[0], targets[1] = 0, vocab - 1
    return {"logits": logits.to(dtype), "targets": targets, "weights": torch.randn(count, generator=generator)}


# 11 on two ranks leaves one padded row; 2 ranks and a vocabulary of 1 leave a rank with nothing but padding.
LOGPS = {
    "plain": logps_case(12, 9),
    "one padded row": logps_case(11, 9),
    "nothing but padding on rank 1": logps_case(1, 4),
    "large logits": logps_case(11, 9, scale=300.0),
    "far from zero": logps_case(11, 9, shift=-500.0),  # a padded row of zeros would take all the probability
    "nothing scored": logps_case(11, 0),
    "bfloat16": logps_case(11, 9, scale=3.0, dtype=torch.bfloat16),
}


def processor_case(scored, responses, tied, vocab=11, tokens=8, hidden=6):
    generator = torch.Generator().manual_seed(5)
    rows = [torch.tensor([row[i] for row in scored], dtype=torch.long) for i in range(3)]
    return {
        "hidden": torch.randn(tokens, hidden, generator=generator), "weight": torch.randn(vocab, hidden, generator=generator),
        "scored": (*rows, responses), "response_weights": torch.randn(responses, generator=generator), "tied": tied,
    }  # fmt: skip


# (position that predicts, target, response)
PROCESSOR = {
    "untied": processor_case([(0, 3, 0), (1, 10, 0), (4, 0, 2), (6, 5, 1)], 3, tied=False),
    "tied": processor_case([(0, 3, 0), (1, 10, 0), (4, 0, 2), (6, 5, 1)], 3, tied=True),
    "nothing scored": processor_case([], 0, tied=False),
}


def dense_case(main_grad, embeds=False):
    """Position 2 predicts three tokens."""
    case = processor_case([(0, 3, 0), (2, 10, 0), (2, 0, 1), (6, 5, 1), (2, 7, 2)], 3, tied=False)
    return case | {"main_grad": main_grad, "embeds": embeds, "token_weights": torch.tensor([0.3, -1.2, 0.7, 2.0, -0.4])}


DENSE = {
    "gradient returned": dense_case(False),
    "gradient added to Megatron's buffer": dense_case(True),
    "and an embedding's besides": dense_case(True, embeds=True),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    torch.save({"logps": list(LOGPS.values()), "processor": list(PROCESSOR.values()), "dense": list(DENSE.values())}, folder / "cases.pt")
    command = [sys.executable, str(WORKER), str(folder / "cases.pt"), str(folder / "results")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"results.{rank}") for rank in range(2)]


def expected_logps(case):
    logits = case["logits"].float().double().requires_grad_()
    logps = torch.log_softmax(logits, dim=-1).gather(1, case["targets"].unsqueeze(1)).squeeze(1)
    (logps * case["weights"]).sum().backward()
    return logps.detach(), logits.grad


@pytest.mark.parametrize("name", LOGPS)
@pytest.mark.parametrize("world", [1, 2])
def test_logps_and_gradients_are_those_of_the_unpadded_softmax(results, name, world):
    case, index = LOGPS[name], list(LOGPS).index(name)
    logps, grad = expected_logps(case)
    parts = [results[rank][f"world{world}"][index] for rank in range(2)]
    for part in parts:
        assert part["logps"].dtype == torch.float32 and part["grad"].dtype == case["logits"].dtype
        torch.testing.assert_close(part["logps"].double(), logps, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part["grad_again"], part["grad"], rtol=1e-6, atol=1e-6)
    assert torch.equal(parts[0]["logps"], parts[1]["logps"]), "ranks must not differ by a bit: they judge by these numbers"
    whole = parts[0]["grad"] if world == 1 else torch.cat([part["grad"] for part in parts], dim=-1)
    vocab = case["logits"].size(1)
    tolerance = 1e-2 if case["logits"].dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(whole[:, :vocab].double(), grad, rtol=tolerance, atol=tolerance)
    assert whole.size(1) - vocab == (-vocab) % world and not whole[:, vocab:].any(), "padded rows take no gradient"


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("world", [1, 2])
def test_a_position_may_predict_several_tokens(results, name, world):
    case, index = DENSE[name], list(DENSE).index(name)
    hidden, weight = (case[key].double().requires_grad_() for key in ("hidden", "weight"))
    positions, targets, *_ = case["scored"]
    logps = torch.log_softmax(hidden[positions] @ weight.T, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    (logps * case["token_weights"]).sum().backward()
    parts = [results[rank][f"dense{world}"][index] for rank in range(world)]
    hidden_grad, grad = sum(part["hidden_grad"] for part in parts), torch.cat([part["grad"] for part in parts])
    grad = grad - 0.5 if case["main_grad"] else grad  # what was there stays
    if case["embeds"]:  # the first two rows of each rank
        for first in range(0, len(grad), len(grad) // world):
            grad[first : first + 2] -= 0.25
    for part in parts:
        torch.testing.assert_close(part["logps"].double(), logps.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden_grad.double(), hidden.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[:11].double(), weight.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PROCESSOR)
@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_response_sums_and_gradients_are_those_of_one_dense_layer(results, name, layout):
    case = PROCESSOR[name]
    hidden, weight = (case[key].double().requires_grad_() for key in ("hidden", "weight"))
    positions, targets, owners, responses = case["scored"]
    logps = torch.log_softmax(hidden @ weight.T, dim=-1)
    sums = torch.stack([logps[positions[owners == r], targets[owners == r]].sum() for r in range(responses)] or [logps.sum() * 0])
    (sums[:responses] * case["response_weights"]).sum().backward()
    parts = [results[rank][layout][list(PROCESSOR).index(name)] for rank in range(2)]
    for part in parts:
        assert part["sums"].dtype == torch.float64 and part["sums"].shape == (responses,)
        torch.testing.assert_close(part["sums"], sums[:responses].detach(), rtol=1e-6, atol=1e-6)
    weight_grad = torch.cat([part["weight_grad"] for part in parts])
    torch.testing.assert_close(weight_grad[:11].double(), weight.grad, rtol=1e-6, atol=1e-6)
    assert not weight_grad[11:].any()
    if layout == "tp2":  # every rank has all tokens, and the gradient is summed over the ranks
        hidden_grads = [part["hidden_grad"].squeeze(1) for part in parts]
    else:  # each rank has half of the tokens
        hidden_grads = [torch.cat([part["hidden_grad"].squeeze(1) for part in parts])]
    for grad in hidden_grads:
        torch.testing.assert_close(grad.double(), hidden.grad, rtol=1e-6, atol=1e-6)
