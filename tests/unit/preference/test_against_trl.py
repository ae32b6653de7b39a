"""Every loss of TRL that we also have, against TRL itself: the value, and the gradient of every parameter of a tiny Qwen2.

A row of `CASES` is one question put to both sides. Where the definitions differ on purpose, the row says so in `because`, and its
bench, factor or options undo exactly that difference. What TRL has and is not compared stands in `LEFT_OUT` and `OTHER_TRAINERS` with
the reason, so that a new TRL which brings something else makes the last tests fail. TRL's options that are no losses are not looked at:
`use_weighting` (WPO), `ld_alpha`, `f_divergence_type`.
"""

import inspect
import pkgutil
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import trl

from megatron_patch.preference.losses import LOSSES, loss_sum, preference_loss
from tests.unit.preference.trl_judge import CONFIGS, EVEN_LEN, TRAINERS, Bench, Judge, cpo, dpo, kto, kto_crossed, make_bench, orpo, tpo

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
TOLERANCE = 1e-5  # of the value, and of the largest gradient; TRL computes token log-probs in float32 even for a float64 model


@dataclass(frozen=True)
class Case:
    """One loss, or a weighted sum of several, named and parametrised as each side wants it."""

    ours: str
    judge: Judge
    theirs: dict[str, Any]  # TRL's configuration
    options: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    bench: str = "ragged"
    times: float = 1.0  # ours = times x TRL's
    because: str = ""  # why it is not one to one

    def __str__(self) -> str:
        kinds = self.theirs.get("loss_type", "")
        return f"{self.ours}-{self.judge.__name__}-{kinds if isinstance(kinds, str) else '+'.join(kinds)}"


TOKEN_MEAN = "TRL's likelihood is a mean over the tokens of the batch, ours over pairs: the same for chosen responses of one length"
NO_REFERENCE = "TRL's trainer has no reference: ours is given one with log-prob 0 everywhere"
SUMS = "ours is the log-prob's sum, theirs per token: the weights differ by the length"
BETA, SMOOTH = {"beta": 0.3}, {"beta": 0.3, "label_smoothing": 0.1}

CASES = [
    # DPOTrainer
    Case("sigmoid", dpo, {"loss_type": "sigmoid", **BETA}, BETA),
    Case("sigmoid-norm", dpo, {"loss_type": "sigmoid_norm", **BETA}, BETA),
    Case("robust", dpo, {"loss_type": "robust", **SMOOTH}, SMOOTH),
    Case("ipo", dpo, {"loss_type": "ipo", **BETA}, BETA),
    Case("hinge", dpo, {"loss_type": "hinge", **BETA}, BETA),
    Case("exo", dpo, {"loss_type": "exo_pair", **SMOOTH}, SMOOTH),
    Case("nca", dpo, {"loss_type": "nca_pair", **BETA}, BETA),
    Case("bco", dpo, {"loss_type": "bco_pair", **BETA}, BETA, because="TRL has no running mean of rewards: ours is at its start, 0"),
    Case("sppo-hard", dpo, {"loss_type": "sppo_hard", **BETA}, BETA),
    Case("aot", dpo, {"loss_type": "aot", **SMOOTH}, SMOOTH),
    Case("aot-unpaired", dpo, {"loss_type": "aot_unpaired", **SMOOTH}, SMOOTH),
    Case("apo-zero", dpo, {"loss_type": "apo_zero", **BETA}, BETA),
    Case("apo-down", dpo, {"loss_type": "apo_down", **BETA}, BETA),
    Case("discopop", dpo, {"loss_type": "discopop", "discopop_tau": 0.7, **BETA}, {"discopop_tau": 0.7, **BETA}),
    Case("sft", dpo, {"loss_type": "sft"}, bench="even", because=TOKEN_MEAN),
    Case(
        "irpo", dpo, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4], **BETA},
        {"sft_weight": 0.4, **BETA}, bench="even", because=TOKEN_MEAN),
    Case(
        "rpo", dpo, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4 * 0.3 * EVEN_LEN], **BETA},
        {"sft_weight": 0.4, **BETA}, bench="even", because=f"{TOKEN_MEAN}; {SUMS}, and by beta"),
    Case(
        "sigmoid bco sft", dpo, {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], **BETA},
        BETA, (0.8, 0.2, 1.0), "even", because=f"mixed preference optimisation; {TOKEN_MEAN}"),
    # KTOTrainer
    Case(
        "kto", kto, {"loss_type": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.6, **BETA},
        {"desirable_weight": 1.3, "undesirable_weight": 0.6, **BETA}, because="our KL term comes from the responses themselves"),
    Case("kto-pair", kto_crossed, {"loss_type": "kto", **BETA}, BETA, because="our KL term comes from the other side's responses"),
    Case("apo-zero", kto, {"loss_type": "apo_zero_unpaired", **BETA}, BETA, times=2, because="TRL's mean is over responses"),
    # CPOTrainer
    Case("cpo", cpo, {"loss_type": "sigmoid", "cpo_alpha": 0.4, **BETA}, {"sft_weight": 0.4, **BETA}, bench="even", because=TOKEN_MEAN),
    Case(
        "slic", cpo, {"loss_type": "hinge", "beta": 1.0, "cpo_alpha": 0.4 * EVEN_LEN}, {"margin": 1.0, "sft_weight": 0.4},
        bench="even", because=f"{TOKEN_MEAN}; {SUMS}; TRL's margin is 1"),
    Case("simpo", cpo, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 2.0}, {"margin": 0.5, "beta": 2.0}),
    Case("sigmoid", cpo, {"loss_type": "sigmoid", "cpo_alpha": 0.0, **SMOOTH}, SMOOTH, bench="unreferenced", because=NO_REFERENCE),
    Case("hinge", cpo, {"loss_type": "hinge", "cpo_alpha": 0.0, **BETA}, BETA, bench="unreferenced", because=NO_REFERENCE),
    Case("ipo", cpo, {"loss_type": "ipo", "cpo_alpha": 0.0, **BETA}, BETA, bench="unreferenced", because=NO_REFERENCE),
    # ORPOTrainer
    Case("orpo", orpo, BETA, BETA, bench="even", because=f"{TOKEN_MEAN}; and it covers the prompt, whose only token here is not predicted"),
    # TPOTrainer
    Case("cpo", tpo, {"loss_type": "sigmoid", "tpo_alpha": 0.4, **BETA}, {"sft_weight": 0.4, **BETA}, bench="even", because=TOKEN_MEAN),
    Case("simpo", tpo, {"loss_type": "tpo-l", "tpo_alpha": 0.0, "tpo_l_gamma": 0.5, "beta": 2.0}, {"margin": 0.5, "beta": 2.0}),
    Case("hinge", tpo, {"loss_type": "hinge", "tpo_alpha": 0.0, **BETA}, BETA, bench="unreferenced", because=NO_REFERENCE),
    Case("ipo", tpo, {"loss_type": "ipo", "tpo_alpha": 0.0, **BETA}, BETA, bench="unreferenced", because=NO_REFERENCE),
]  # fmt: skip

OURS_ALONE = "dpop odpo alpha-dpo stapo lpo lpo-paper lpo-r lpo-ste lpo-ste-paper lpo-ste-dynamic"  # TRL has none of these
LEFT_OUT = {
    ("CPOTrainer", "alphapo"): "AlphaPO (arXiv 2501.03884) transforms SimPO's probabilities; we have no such loss",
    ("CPOTrainer", "kto_pair"): "CPOTrainer knows the name only to refuse it",
}
OTHER_TRAINERS = {
    "no pairs": "SFTTrainer gkd gold iw_opd sdft sdpo async_distillation server_distillation distillation DistillationTrainer",
    "learns a reward model": "RewardTrainer",
    "samples its own responses and rewards them": "GRPOTrainer RLOOTrainer a2po async_grpo gmpo",
    "samples its own pairs; its losses are sigmoid and (on sums) ipo": "online_dpo",
    "DPOTrainer or KTOTrainer again, under an older name or with a moving reference": "kto bema_for_ref_model",
    "no trainer": "harbor openreward merge_model_callback utils",
}


@pytest.fixture(scope="module")
def benches() -> dict[str, Bench]:
    return {kind: make_bench(kind) for kind in ("ragged", "even", "unreferenced")}


@pytest.fixture(scope="module", params=CASES, ids=str)
def judged(request: pytest.FixtureRequest, benches: dict[str, Bench]) -> tuple[Case, Bench, torch.Tensor]:
    """A case, its bench, and TRL's answer in our scale: the value, then the gradients, in one row."""
    case = request.param
    bench = benches[case.bench]
    value, gradients = case.judge(bench, case.theirs)
    return case, bench, case.times * torch.cat((value.reshape(1), gradients))


def our_answer(case: Case, bench: Bench, **changed: Any) -> torch.Tensor:
    losses = preference_loss(bench.logps, loss_sum(case.ours.split(), case.weights, **{**case.options, **changed}))
    return torch.cat((losses.mean().detach().reshape(1), bench.gradients(losses.mean())))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The larger of two relative differences: of the value, and of the gradients (against the largest one)."""
    value, gradients = (ours - theirs).abs().tensor_split([1])
    return max((value / theirs[0].abs()).item(), (gradients.max() / theirs[1:].abs().max()).item())


def test_value_and_gradients_are_those_of_trl(judged):
    case, bench, theirs = judged
    assert theirs[1:].abs().max() > 1e-3, "TRL's loss does not depend on the model here: nothing would be compared"
    assert difference(our_answer(case, bench), theirs) < TOLERANCE, case.because


def test_each_constant_off_by_one_percent_shows(judged):
    case, bench, theirs = judged
    for name, value in case.options.items():
        assert difference(our_answer(case, bench, **{name: 1.01 * value}), theirs) > 10 * TOLERANCE, name


def test_benches_are_what_the_cases_assume(benches):
    ragged, even = benches["ragged"].logps, benches["even"].logps
    for logps in (ragged, even):
        log_ratios = torch.cat((logps.policy_chosen - logps.ref_chosen, logps.policy_rejected - logps.ref_rejected)).detach()
        assert log_ratios.abs().min() > 0.01, "the reference must differ from the policy everywhere"
        assert log_ratios[:8].mean() > 0 and log_ratios[8:].mean() > 0, "KTO's KL term would be clamped to 0"
    assert len(set(ragged.chosen_len.tolist())) > 2 and len(set(ragged.rejected_len.tolist())) > 2
    assert set(even.chosen_len.tolist()) == {EVEN_LEN} and {len(pair.prompt) for pair in benches["even"].pairs} == {1}


def test_every_loss_of_ours_is_compared_or_has_no_counterpart():
    compared = {name for case in CASES for name in case.ours.split()}
    assert not compared & set(OURS_ALONE.split())
    assert compared | set(OURS_ALONE.split()) == set(LOSSES)


def test_every_loss_type_of_these_trainers_is_compared_or_left_out():
    source = {trainer.__name__: inspect.getsource(trainer) + inspect.getsource(config) for trainer, config in CONFIGS.items()}
    known = {(name, kind) for name, text in source.items() for kind in re.findall(r'loss_type == "([\w-]+)"', text) or [""]}
    compared = set()
    for case in CASES:
        kinds = case.theirs.get("loss_type", "")
        compared |= {(TRAINERS[case.judge].__name__, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)}
    assert not compared & set(LEFT_OUT)
    assert compared | set(LEFT_OUT) == known


def test_every_trainer_is_compared_or_left_out():
    stable = {name for name in dir(trl) if name.endswith("Trainer")}
    experimental = {module.name for module in pkgutil.iter_modules(trl.experimental.__path__)}
    compared = {trainer.__module__.split(".")[2] if ".experimental." in trainer.__module__ else trainer.__name__ for trainer in CONFIGS}
    assert stable | experimental == compared | set(" ".join(OTHER_TRAINERS.values()).split())
