"""Step checks in two gloo processes: `python step_checks_worker.py RESULTS` writes what each rank saw (see test_step_checks.py).

A scenario is, per rank, a list of micro-batches; a micro-batch is a list of pairs (name, log-ratio per token chosen, rejected, loss).
"""

import dataclasses
import json
import multiprocessing
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

from megatron_patch.data.packed_batch import Sample, pack
from megatron_patch.errors import AgreedError
from megatron_patch.step_checks import StepChecks

NAN, INF = float("nan"), float("inf")
OFF = [[("p0", 0.0, 1e-7, 2.0), ("p1", 0.03, -0.2, 1.0)], [("p2", -0.1, 0.0, 2.5)]]
MORE = [[("p3", -0.25, 0.1, 2.5), ("p4", 0.0, 0.0, 2.0)]]
EQUAL = [[(f"q{i}", 0.0, 0.0, 2.0) for i in range(3)]]
SCENARIOS = {
    "equal": ((EQUAL, EQUAL), {}),
    "equal within float32": (([[("a", 9e-6, -9e-6, 2.0)]], [[]]), {}),
    "just outside float32": (([[("a", 0.0, 1.2e-5, 2.0)]], [[]]), {}),
    "off": ((OFF, MORE), {}),
    "off, on both ranks alike": ((OFF, [[(name, a, b + 1e-9, loss) for name, a, b, loss in pairs] for pairs in OFF]), {}),
    "off, allowed": ((OFF, MORE), {"allow_mismatch": True}),
    "bfloat16 within": (([[("a", 0.04, 0.0, 2.0)], [(f"b{i}", 0.0, 0.0, 2.0) for i in range(19)]], [[]]), {"dtype": torch.bfloat16}),
    "bfloat16 mean": (([[(f"b{i}", 0.006, -0.006, 2.0) for i in range(4)]], [[]]), {"dtype": torch.bfloat16}),
    "not fresh": ((OFF, MORE), {"fresh": lambda: False}),
    "loss differs": (([[("a", 0.0, 0.0, 2.1)]], [[]]), {}),
    "bfloat16 loss differs": (([[("a", 0.0, 0.0, 2.1)]], [[]]), {"dtype": torch.bfloat16}),
    "nan": ((EQUAL, [[("n0", 0.0, 0.0, 2.0), ("n1", NAN, 0.0, 2.0)], [("n2", 0.0, INF, 2.0)]]), {}),
    "nan later": (([[("a", 0.0, 0.0, 2.0)]], [[("n1", NAN, NAN, 2.0)]]), {"fresh": lambda: False}),
    "nan, mismatch allowed": (([[("a", NAN, 0.0, 2.0)]], [[]]), {"allow_mismatch": True}),
    "empty micro-batches": (([[], [("a", 0.0, 0.0, 2.0)], []], [[], []]), {}),
    "last stage elsewhere": ((EQUAL, []), {}),
    "infinite gradient": (([[("a", 0.0, 0.0, 2.0)]], [[("b", 0.0, 0.0, 2.0)]]), {"gradient": {1: float("inf")}}),
    "missing reference": (([[("a", "no reference", 0.0, 2.0)]], [[]]), {}),
}


def batch_of(pairs):
    """A packed batch whose responses have 4 and 2 tokens, and policy log-probs that give the wanted log-ratios per token."""
    samples, ratios, losses = [], [[], []], []
    for name, chosen, rejected, loss in pairs:
        missing = chosen == "no reference"
        sequences = tuple(torch.ones(2 + n, dtype=torch.int32).numpy() for n in (4, 2))
        scored = tuple((torch.arange(2 + n) >= 2).numpy() for n in (4, 2))
        samples.append(Sample(sequences, scored, None if missing else torch.tensor([-8.0, -5.0]).double().numpy(), name))
        ratios[0].append(0.0 if missing else chosen * 4)
        ratios[1].append(rejected * 2)
        losses.append(loss)
    batch = pack(samples, multiple_of=2, vocab_size=5, responses_per_sample=2)
    policy = torch.tensor([-8.0 + r for r in ratios[0]] + [-5.0 + r for r in ratios[1]], dtype=torch.float64).requires_grad_()
    return batch, policy, torch.tensor(losses, dtype=torch.float64)


def chunk(gradient=1.0):
    """A model chunk as DDP wraps it, with one gradient buffer."""
    return SimpleNamespace(buffers=[SimpleNamespace(grad_data=torch.tensor([0.5, gradient]))], expert_parallel_buffers=[])


def play(rank, scenario, options):
    """One step: what was reported, what was raised, and whether upstream's function was reached with its arguments and answer."""
    outcomes, reached = [], []
    settings = {"dtype": torch.float32, "fresh": lambda: True, "on_step_zero": outcomes.append, **options}
    gradient = settings.pop("gradient", {}).get(rank, 1.0)
    checks = StepChecks(**settings)
    finalize = checks.wrap(lambda *args, **kwargs: reached.append((args, kwargs)) or "answer")
    for pairs in scenario[rank]:
        batch, policy, losses = batch_of(pairs)
        checks.observe(batch, policy, losses, torch.full_like(losses, 2.0))
    try:
        answer, error = finalize([chunk(gradient)], count=3), None
    except AgreedError as refused:
        answer, error = None, str(refused)
    # The next step starts with nothing remembered.
    checks.fresh = lambda: False
    finalize([chunk()], count=4)
    return {
        "outcome": [dataclasses.asdict(o) for o in outcomes], "error": error, "answer": answer,
        "reached": [kwargs for _, kwargs in reached] == [{"count": 3}, {"count": 4}],
    }  # fmt: skip


def run(rank, store, out):
    """Everything that one process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with mock.patch("torch.cuda.current_device", return_value="cpu"):
        seen = {name: play(rank, scenario, options) for name, (scenario, options) in SCENARIOS.items()}
    with open(f"{out}.{rank}", "w", encoding="utf-8") as stream:
        json.dump(seen, stream)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        jobs = [fork.Process(target=run, args=(rank, f"{folder}/store", sys.argv[1])) for rank in range(2)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        sys.exit(max(abs(job.exitcode) for job in jobs))
