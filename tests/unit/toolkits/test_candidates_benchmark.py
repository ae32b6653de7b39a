"""The benchmark of candidates counts what was generated, on its own side as on the other."""

from argparse import Namespace

import torch
from toolkit_helpers import QUESTIONS

from benchmarks.candidates import ours
from megatron_patch.evaluation.generate import PerRowSampler, generate
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer


def test_tokens_are_those_that_the_model_made(tiny_qwen):
    """An untrained model's bytes are no text: tokenised again they would be more."""
    from transformers import AutoModelForCausalLM

    args = Namespace(model=str(tiny_qwen), device="cpu", dtype="float32", seed=1, temperature=1.0, top_p=1.0, max_new_tokens=24)
    chat = ChatTokenizer(tiny_qwen)
    prompts = [chat.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32).eval()
    sampler = PerRowSampler([f"{i}/0" for i in range(len(prompts))], 1, 1.0, 1.0)
    made = generate(model, prompts, max_new_tokens=24, stop_ids=chat.stop_ids, sampler=sampler)
    count = sum(len(one.ids) + (one.finish_reason == "stop") for one in made)
    run = ours(args)
    assert run(prompts) == run(prompts) == count
    again = sum(len(chat.tokenizer(chat.decode(one.ids), add_special_tokens=False)["input_ids"]) for one in made)
    assert again > count
