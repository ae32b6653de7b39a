"""Our batched loop against transformers' own `generate`, and the promise about noise."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_patch.evaluation.generate import Generated, PerRowSampler, generate, greedy

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [30, 31], [11, 12, 13, 14]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def alone(model, prompt, stop_ids, max_new_tokens):
    """transformers' greedy continuation of one prompt."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": list(stop_ids) or None, "pad_token_id": 0}
    new = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    ended = bool(new) and new[-1] in stop_ids
    return Generated(new[:-1] if ended else new, "stop" if ended else "length")


def test_greedy_batch_equals_transformers_one_by_one(model):
    free = [alone(model, prompt, (), 12) for prompt in PROMPTS]
    stop_ids = (free[0].ids[3], free[2].ids[6])
    ours = generate(model, PROMPTS, max_new_tokens=12, stop_ids=stop_ids)
    assert ours == [alone(model, prompt, stop_ids, 12) for prompt in PROMPTS]
    assert {"stop"} <= {output.finish_reason for output in ours}  # rows did end early
    assert generate(model, PROMPTS, max_new_tokens=12, stop_ids=()) == free
    assert all(len(output.ids) == 12 for output in free)


def test_the_loop_ends_when_all_rows_have(model):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    outputs = generate(model, PROMPTS, max_new_tokens=50, stop_ids=range(41))
    handle.remove()
    assert outputs == [Generated([], "stop")] * 5 and len(calls) == 1


def test_finished_rows_leave_the_batch(model):
    free = generate(model, PROMPTS, max_new_tokens=12, stop_ids=())
    stop_ids = [output.ids[1] for output in free[1:]]
    sizes = []
    handle = model.register_forward_hook(lambda _m, _a, output: sizes.append(output.logits.shape[0]))
    generate(model, PROMPTS, max_new_tokens=12, stop_ids=stop_ids)
    handle.remove()
    assert sizes[0] == 5 and sizes[-1] < 5


def test_positions_start_at_the_first_real_token(model):
    fed = []
    handle = model.register_forward_pre_hook(lambda _m, _a, options: fed.append(options["position_ids"].tolist()), with_kwargs=True)
    generate(model, [[1, 2, 3], [4]], max_new_tokens=3, stop_ids=())
    handle.remove()
    assert fed == [[[0, 1, 2], [0, 0, 0]], [[3], [1]], [[4], [2]]]


def test_max_new_tokens_counts_the_stop_token(model):
    free = alone(model, PROMPTS[0], (), 4)
    assert generate(model, PROMPTS[:1], max_new_tokens=4, stop_ids=[free.ids[3]])[0].ids == free.ids[: free.ids.index(free.ids[3])]


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], max_new_tokens=2, stop_ids=())
    with pytest.raises(ValueError, match="got 0"):
        generate(model, [[1]], max_new_tokens=0, stop_ids=())
    assert generate(model, [], max_new_tokens=1, stop_ids=()) == []
    for temperature, top_p in ((0, 1), (-1, 1), (1, 0), (1, 1.1)):
        with pytest.raises(ValueError, match=r"temperature|top_p"):
            PerRowSampler([], 1, temperature, top_p)


def draw(keys, seed=1, steps=3, **options):
    """Tokens [steps][rows] of a sampler over a flat distribution of 1,000 tokens."""
    sampler = PerRowSampler(keys, seed, **options)
    rows = torch.arange(len(keys))
    return [sampler(torch.zeros(len(keys), 1000), rows, step).tolist() for step in range(steps)]


def test_noise_hangs_on_seed_and_key_alone():
    together = draw(["a/0", "b/0", "a/1"], steps=70)
    alone_b = draw(["b/0"], steps=70)
    assert [step[1] for step in together] == [step[0] for step in alone_b]
    assert draw(["b/0"], steps=70) == alone_b
    assert draw(["b/0"], seed=2, steps=70) != alone_b
    assert [step[0] for step in together] != [step[2] for step in together]


def test_noise_follows_a_row_after_others_have_left():
    sampler = PerRowSampler(["a", "b", "c"], 1)
    sampler(torch.zeros(3, 1000), torch.arange(3), 0)
    assert sampler(torch.zeros(1, 1000), torch.tensor([2]), 1).tolist() == [draw(["a", "b", "c"])[1][2]]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (1.0, 0.8, [0.5 / 0.8, 0.3 / 0.8, 0, 0]),
        (1.0, 0.81, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    ],
)
def test_sampled_frequencies(temperature, top_p, expected):
    n = 20_000
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    order = torch.tensor([2, 0, 3, 1])  # so that ids are not sorted by probability
    sampler = PerRowSampler([str(i) for i in range(n)], 3, temperature, top_p if top_p != 0.8 else 0.8 - 1e-9)
    drawn = sampler(logits[order].expand(n, 4), torch.arange(n), 0)
    frequencies = torch.bincount(order[drawn], minlength=4) / n
    assert torch.allclose(frequencies, torch.tensor(expected), atol=0.015)
    assert all(frequencies[i] == 0 for i in range(4) if expected[i] == 0)


def test_greedy_takes_the_first_of_equals():
    assert greedy(torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([0]), 0).tolist() == [1]
