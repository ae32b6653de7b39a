"""The same pairs and the same two models through TRL's trainers and through our losses: one number and its gradients from each.

TRL gets a batch that its own collator made, and is asked through `compute_loss`, as in its training loop. Each question gets a fresh
trainer (20 ms) with a configuration that TRL itself has checked, and copies of the models, because trainers rewrite a model's forward.
Our side sees the original models, one unpadded response at a time, so padding and masks are judged too. Everything is in float64.
"""

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_patch.preference.logps import scored_targets, sum_by_response
from megatron_patch.preference.losses import PairLogps

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns that its CPO, ORPO and TPO may change; the version is pinned
from datasets import Dataset
from tokenizers import Tokenizer, models
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

VOCAB, PAIRS = 61, 8
EVEN_LEN = 6  # tokens of every chosen response on the even bench
CONFIGS = {DPOTrainer: DPOConfig, KTOTrainer: KTOConfig, CPOTrainer: CPOConfig, ORPOTrainer: ORPOConfig, TPOTrainer: TPOConfig}


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Bench:
    """What both sides are given: policy, a reference that differs from it, pairs; and the log-probs that our losses see of them."""

    policy: Qwen2ForCausalLM
    reference: Qwen2ForCausalLM
    pairs: list[Pair]
    logps: PairLogps

    def gradients(self, loss: Tensor) -> Tensor:
        """d loss / d policy, every parameter, in one row; `loss` must come from `self.logps`."""
        found = torch.autograd.grad(loss, list(self.policy.parameters()), retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in found])


Judge = Callable[[Bench, dict[str, Any]], tuple[Tensor, Tensor]]  # bench, TRL's configuration -> loss, gradients in one row


def make_bench(kind: str) -> Bench:
    """Two tiny models and eight random pairs.

    ragged: prompts and responses of different lengths.
    even: prompts of one token and chosen responses of one length. Then a mean over all tokens of the batch is the mean over pairs of
        each pair's mean, and the likelihood of a whole sequence is that of its response: nothing predicts the first token.
    unreferenced: as ragged, but our losses see a reference whose log-probs are 0: their log-ratios are the policy's log-probs.
    """
    even = kind == "even"
    torch.manual_seed(0)
    reference, noise = _tiny_qwen(), _tiny_qwen()
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter, other in zip(policy.parameters(), noise.parameters(), strict=True):
            parameter.lerp_(other, 0.1)  # log-ratios of a few nats, positive on average: KTO's KL term is not clamped
    pairs = [Pair(_ids(1 if even else 9), _ids(EVEN_LEN, exactly=even), _ids(12)) for _ in range(PAIRS)]
    with torch.no_grad():
        ref = response_sums(reference, pairs) * (kind != "unreferenced")
    chosen_len, rejected_len = (torch.tensor([len(pair[side]) for pair in pairs]) for side in (1, 2))
    ours = response_sums(policy, pairs)
    return Bench(policy, reference, pairs, PairLogps(ours[:PAIRS], ours[PAIRS:], ref[:PAIRS], ref[PAIRS:], chosen_len, rejected_len))


def response_sums(model: Qwen2ForCausalLM, pairs: list[Pair]) -> Tensor:
    """log pi of every response [2P], chosen ones first: our shift and our sums on transformers' logits."""
    sequences = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    tokens = torch.tensor([token for prompt, response in sequences for token in prompt + response])
    owner = [k for i, (prompt, response) in enumerate(sequences) for k in [-1] * len(prompt) + [i] * len(response)]
    scored = scored_targets(tokens, torch.tensor(owner), len(sequences))
    logits = torch.cat([model(torch.tensor([prompt + response])).logits[0] for prompt, response in sequences])
    return sum_by_response(logits.log_softmax(-1)[scored.positions, scored.targets], scored)


def dpo(bench: Bench, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """DPOTrainer, which holds most of TRL's losses."""
    trainer = _trainer(DPOTrainer, bench, config)
    return _ask(trainer, [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in bench.pairs])


def tpo(bench: Bench, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """TPOTrainer with the chosen response as its third, the gold one."""
    trainer = _trainer(TPOTrainer, bench, config)
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected, "reference_ids": p.chosen} for p in bench.pairs]
    return _ask(trainer, rows)


def cpo(bench: Bench, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """CPOTrainer, whose losses (SimPO among them) have no reference."""
    return _ask(_trainer(CPOTrainer, bench, config), _labelled_rows(bench.pairs))


def orpo(bench: Bench, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """ORPOTrainer."""
    return _ask(_trainer(ORPOTrainer, bench, config), _labelled_rows(bench.pairs))


def kto(bench: Bench, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """KTOTrainer on all responses at once; its KL term is estimated on these same responses, each with its own prompt."""
    rows = [_kto_row(p.prompt, p.chosen, p.chosen, True) for p in bench.pairs]
    rows += [_kto_row(p.prompt, p.rejected, p.rejected, False) for p in bench.pairs]
    return _ask(_trainer(KTOTrainer, bench, config), rows)


def kto_crossed(bench: Bench, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """KTOTrainer once for each side, its KL term estimated on the other side's responses; the mean of the two."""
    desirable = [_kto_row(p.prompt, p.chosen, p.rejected, True) for p in bench.pairs]
    undesirable = [_kto_row(p.prompt, p.rejected, p.chosen, False) for p in bench.pairs]
    one, other = (_ask(_trainer(KTOTrainer, bench, config), rows) for rows in (desirable, undesirable))
    return (one[0] + other[0]) / 2, (one[1] + other[1]) / 2


TRAINERS: dict[Judge, type] = {
    dpo: DPOTrainer, kto: KTOTrainer, kto_crossed: KTOTrainer, cpo: CPOTrainer, orpo: ORPOTrainer, tpo: TPOTrainer,
}  # fmt: skip


def _tiny_qwen() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double()


def _ids(longest: int, exactly: bool = False) -> list[int]:
    length = longest if exactly else int(torch.randint(1, longest + 1, ()))
    return torch.randint(VOCAB, (length,)).tolist()


def _trainer(trainer: type, bench: Bench, config: dict[str, Any]) -> Any:
    """A trainer on copies of the models. It must be given a dataset and a tokenizer, and they are never used afterwards."""
    words = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<eos>")
    columns = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], **({"reference": ["b"]} if trainer is TPOTrainer else {})}
    reference = {"ref_model": copy.deepcopy(bench.reference)} if trainer in (DPOTrainer, KTOTrainer) else {}
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
        args = CONFIGS[trainer](output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, **quiet, **config)
        return trainer(
            model=copy.deepcopy(bench.policy), args=args, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer, **reference
        )


def _ask(trainer: Any, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(trainer.model, batch)
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def _labelled_rows(pairs: list[Pair]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        rows.append({"prompt_input_ids": pair.prompt, "prompt_attention_mask": [1] * len(pair.prompt)})
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids = pair.prompt + response
            labels = [-100] * len(pair.prompt) + response
            rows[-1] |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids), f"{side}_labels": labels}
    return rows


def _kto_row(prompt: list[int], response: list[int], kl_response: list[int], desirable: bool) -> dict[str, Any]:
    return {"prompt_ids": prompt, "completion_ids": response, "KL_completion_ids": kl_response, "label": desirable}
