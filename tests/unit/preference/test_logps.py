"""The shift and the sums against transformers: a random Qwen2, one response at a time, one token at a time."""

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_patch.preference.inputs import PairLogps
from megatron_patch.preference.logps import ScoredTargets, scored_targets, sum_by_response
from megatron_patch.preference.losses import loss_options, preference_loss

VOCAB = 61


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double().eval()


def random_pairs(seed, count):
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(0, VOCAB, rng.integers(1, 9)).tolist()

    return [(ids(), ids()) for _ in range(count)]


def naive_sum(model, prompt, response):
    """log pi(response | prompt): the response grows token by token, and each next token is read off the last position."""
    total = 0.0
    for n, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:n]])).logits[0, -1]
        total += float(torch.log_softmax(logits, -1)[token])
    return total


@pytest.mark.parametrize("seed", range(4))
def test_packed_sums_are_the_naive_ones(model, seed):
    pairs = random_pairs(seed, 5)
    tokens = torch.tensor([t for prompt, response in pairs for t in prompt + response] + [0, 0, 0])
    owners = [owner for i, (prompt, response) in enumerate(pairs) for owner in [-1] * len(prompt) + [i] * len(response)]
    scored = scored_targets(tokens, torch.tensor([*owners, -1, -1, -1]), len(pairs))
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([prompt + response])).logits[0] for prompt, response in pairs])
        token_logps = torch.log_softmax(logits, -1)[scored.positions, scored.targets]
        sums = sum_by_response(token_logps, scored)
        expected = [naive_sum(model, prompt, response) for prompt, response in pairs]
    assert sums.dtype == torch.float64
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-12)


def test_every_response_token_and_no_other_is_a_target():
    tokens = torch.tensor([10, 11, 20, 21, 22, 12, 30, 0, 0])
    owner = torch.tensor([-1, -1, 0, 0, 0, -1, 1, -1, -1])
    scored = scored_targets(tokens, owner, 2)
    assert scored.targets.tolist() == [20, 21, 22, 30]
    assert tokens[scored.positions].tolist() == [11, 20, 21, 12]
    assert scored.response.tolist() == [0, 0, 0, 1] and scored.responses == 2


def scored_rows(response, responses):
    rows = torch.tensor(response, dtype=torch.long)
    return ScoredTargets(torch.zeros_like(rows), torch.zeros_like(rows), rows, responses)


def test_sum_gradient_goes_to_its_own_response_only():
    token_logps = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    sums = sum_by_response(token_logps, scored_rows([2, 0, 2, 0], 3))
    assert sums.tolist() == [-10.0, 0.0, -5.0]
    (sums * torch.tensor([3.0, 5.0, 7.0])).sum().backward()
    assert token_logps.grad.tolist() == [7.0, 3.0, 7.0, 3.0] and token_logps.grad.dtype == torch.float32
    double = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sum_by_response(x, scored_rows([0, 1, 1, 0, 2, 2], 3)), double)


def test_sums_are_taken_in_float64():
    # A sum of 4,096 float32 terms kept in float32 is wrong after the fourth digit, which is more than a log-ratio can stand.
    token_logps = torch.full((4096,), -0.1)
    total = sum_by_response(token_logps, scored_rows([0] * 4096, 1))
    assert total.item() == pytest.approx(4096 * float(token_logps[0].double()), rel=1e-14)


def test_no_scored_token_gives_zeros_with_a_gradient():
    nothing = torch.zeros(0, requires_grad=True)
    sums = sum_by_response(nothing, scored_rows([], 0))
    assert sums.shape == (0,)
    sums.sum().backward()
    assert nothing.grad.shape == (0,)


@pytest.mark.parametrize("name", ["lpo-ste", "sigmoid", "orpo", "kto"])
def test_tokens_that_are_not_scored_have_no_gradient(name):
    """Prompts, padding and the dummy sequence: nothing of a loss reaches the logits that predict them."""
    tokens = torch.tensor([3, 4, 5, 6, 3, 4, 7, 0, 0])
    owner = torch.tensor([-1, -1, 0, 0, -1, -1, 1, -1, -1])
    scored = scored_targets(tokens, owner, 2)
    torch.manual_seed(0)
    logits = torch.randn(9, VOCAB, dtype=torch.float64, requires_grad=True)
    sums = sum_by_response(torch.log_softmax(logits, -1)[scored.positions, scored.targets], scored)
    one = torch.ones(1, dtype=torch.float64)
    preference_loss(PairLogps(sums[:1], sums[1:], -8 * one, -4 * one, 2 * one, one), loss_options(name)).sum().backward()
    rows = logits.grad.abs().sum(dim=1)
    assert (rows[[1, 2, 5]] > 0).all() and (rows[[0, 3, 4, 6, 7, 8]] == 0).all()
