"""What stands between the gradients and the optimizer: verdicts of two processes, judged here by numbers worked out by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_patch.step_checks import StepZero

WORKER = Path(__file__).with_name("step_checks_worker.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("worker") / "results"
    done = subprocess.run(
        [sys.executable, str(WORKER), str(out)], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]
    assert all(part["reached"] for rank in ranks for part in rank.values()), "upstream's function: called once a step, with its arguments"
    return ranks


def both(seen, name):
    """What the two ranks saw, which must be the same."""
    first, second = (rank[name] for rank in seen)
    assert json.dumps(first) == json.dumps(second), "ranks must leave or stay together"
    return first


@pytest.mark.parametrize("name", ["equal", "equal within float32", "bfloat16 within", "empty micro-batches", "last stage elsewhere"])
def test_agreement_passes_and_is_reported(seen, name):
    result = both(seen, name)
    assert result["error"] is None and result["answer"] == "answer"
    (outcome,) = result["outcome"]
    assert outcome["loss"] == outcome["identity_loss"] == 2.0


def test_reported_numbers_cover_both_ranks(seen):
    result = both(seen, "off, allowed")
    assert result["error"] is None and result["answer"] == "answer"
    (outcome,) = result["outcome"]
    assert outcome["pairs"] == 5 and outcome["worst_pair"] == "p3" and outcome["identity_loss"] == 2.0
    assert outcome["loss"] == pytest.approx((2 + 1 + 2.5 + 2.5 + 2) / 5)
    assert outcome["max_abs_chosen_logratio_per_token"] == pytest.approx(0.25)
    assert outcome["max_abs_rejected_logratio_per_token"] == pytest.approx(0.2)
    assert outcome["mean_abs_logratio_per_token"] == pytest.approx((1e-7 + 0.03 + 0.2 + 0.1 + 0.25 + 0.1) / 10)


def test_disagreement_names_the_worst_pair_and_the_numbers(seen):
    result = both(seen, "off")
    error = result["error"]
    for part in ("0.25 nats (allowed 1e-05 in torch.float32)", "mean 0.068 ", "worst at pair p3", "loss 2.000000, expected 2.000000"):
        assert part in error
    assert "\n" not in error and "--allow-reference-mismatch" in error
    assert len(result["outcome"]) == 1, "it is reported before it is judged"


def test_pairs_that_ranks_share_count_once(seen):
    (outcome,) = both(seen, "off, on both ranks alike")["outcome"]
    assert outcome["pairs"] == 3 and outcome["worst_pair"] == "p1"
    assert outcome["loss"] == pytest.approx((2 + 1 + 2.5) / 3)


def test_infinite_gradient_of_one_rank_stops_both(seen):
    error = both(seen, "infinite gradient")["error"]
    assert error.startswith("gradients are NaN or infinite (log-probs are finite), nothing was stepped; pairs: a, b. Look at one with")


def test_tolerances(seen):
    assert "a; loss" in both(seen, "just outside float32")["error"]
    assert "loss 2.100000, expected 2.000000" in both(seen, "loss differs")["error"]
    assert both(seen, "bfloat16 loss differs")["error"] is None, "there rounding alone moves a loss with a penalty"
    # In bfloat16 each pair may be far off, but not all of them.
    assert "mean 0.006 (allowed 0.005)" in both(seen, "bfloat16 mean")["error"]


def test_later_steps_are_not_judged(seen):
    result = both(seen, "not fresh")
    assert result == {"outcome": [], "error": None, "answer": "answer", "reached": True}


def test_nan_names_the_pairs_of_every_rank(seen):
    result = both(seen, "nan")
    assert result["error"].startswith("log-probs are NaN or infinite for 2 pairs, nothing was stepped: n1, n2. ") and not result["outcome"]
    assert "for 1 pairs, nothing was stepped: n1. " in both(seen, "nan later")["error"]
    assert "--skip-bad-batches N leaves out" in both(seen, "nan, mismatch allowed")["error"]


def test_a_missing_reference_does_not_pass(seen):
    assert "worst at pair a" in both(seen, "missing reference")["error"]


def test_complaint_follows_the_larger_side_and_nan_never_passes():
    def outcome(chosen, rejected, mean):
        return StepZero(2.0, 2.0, chosen, rejected, mean, 1, "p")

    assert outcome(1e-5, 1e-5, 1e-5).complaint(torch.float32) is None
    for bad in (outcome(2e-5, 0.0, 0.0), outcome(0.0, 2e-5, 0.0), outcome(0.0, 0.0, 2e-5), outcome(0.0, 0.0, math.nan)):
        assert bad.complaint(torch.float32)
    assert outcome(5e-2, 0.0, 5e-3).complaint(torch.bfloat16) is None and outcome(6e-2, 0.0, 0.0).complaint(torch.bfloat16)
