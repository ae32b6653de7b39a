"""Response log-probs in processes of their own: `python response_logps_worker.py CASES.pt RESULTS` (see test_response_logps.py).

It forks two gloo processes after the slow imports. Each computes every case alone (world 1) and as one half of a tensor-parallel pair
(world 2), and saves what it got; the judgement is the test's.
"""

import multiprocessing
import sys
import tempfile
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron_patch import cpu_backend

cpu_backend.install()

from megatron.core import parallel_state  # noqa: E402

from megatron_patch.model.response_logps import response_logps, token_logps  # noqa: E402
from megatron_patch.preference.logps import ScoredTargets  # noqa: E402


def shard(logits, rank, world):
    """This rank's columns of [N, vocab], the vocabulary padded to a multiple of the ranks with zeros: rows that nobody trained."""
    rows = -(-logits.size(-1) // world)
    padded = torch.cat([logits, logits.new_zeros(*logits.shape[:-1], rows * world - logits.size(-1))], dim=-1)
    return padded[..., rank * rows : (rank + 1) * rows].contiguous()


def logps_of(case, rank, world, group, chunk):
    """Log-probs of the targets and the gradient of their weighted sum with respect to this rank's logits (hidden states: unit vectors)."""
    weight = shard(case["logits"], rank, world).T.contiguous().requires_grad_()
    hidden, everywhere = torch.eye(weight.size(1), dtype=weight.dtype), torch.arange(weight.size(1))
    scored = ScoredTargets(everywhere, case["targets"], everywhere, weight.size(1))
    logps = token_logps(hidden, weight, scored, vocab_size=case["logits"].size(-1), group=group, chunk=chunk)
    total = (logps * case["weights"]).sum()
    first, second = (torch.autograd.grad(total, weight, retain_graph=True)[0].T for _ in range(2))
    return {"logps": logps.detach(), "grad": first, "grad_again": second}


def dense_of(case, rank, world, group, chunk):
    """The same of hidden states in general, some of which predict two tokens, as the last of a shared prompt does."""
    weight = shard(case["weight"].T, rank, world).T.contiguous().requires_grad_()
    if case["main_grad"]:
        as_under_ddp(weight)
    hidden = case["hidden"].clone().requires_grad_()
    scored = ScoredTargets(*case["scored"])
    logps = token_logps(hidden, weight, scored, vocab_size=case["weight"].size(0), group=group, chunk=chunk, embeds=case["embeds"])
    total = (logps * case["token_weights"]).sum()
    if case["embeds"]:
        total = total + 0.25 * torch.nn.functional.embedding(torch.tensor([0, 1]), weight).sum()
    total.backward()
    grad = weight.main_grad if case["main_grad"] else weight.grad
    return {"logps": logps.detach(), "hidden_grad": hidden.grad, "grad": grad}


def as_under_ddp(weight):
    """A buffer for its gradient, which holds something already, and the hook of core/distributed/distributed_data_parallel.py:476."""
    weight.main_grad, weight.grad_added_to_main_grad = torch.full_like(weight, 0.5), False

    def hook(parameter):
        assert parameter.grad is not None
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(hook)


def processor_of(case, rank, sequence_parallel):
    """`response_logps` at TP2, as GPTModel calls it, with an output layer whose pre-hook must be called before its weight is read."""
    hidden = case["hidden"].unsqueeze(1)
    mine = (hidden.chunk(2)[rank] if sequence_parallel else hidden).clone().requires_grad_()
    rows = shard(case["weight"].T, rank, 2).T.contiguous()
    layer = torch.nn.Linear(1, 1)
    layer.weight = torch.nn.Parameter(torch.full_like(rows, torch.nan))  # as before DDP's all-gather of the parameters has arrived

    def arrive(module, *_):
        module.weight.data.copy_(rows)

    layer.register_forward_pre_hook(arrive)
    tied = torch.nn.Parameter(rows.clone()) if case["tied"] else None
    sums = response_logps(
        hidden_states=mine, output_layer=layer, output_weight=tied, context=ScoredTargets(*case["scored"]),
        config=SimpleNamespace(sequence_parallel=sequence_parallel), vocab_size=case["weight"].size(0), chunk=3,
        an_argument_of_later_versions=1,
    )  # fmt: skip
    torch.autograd.backward((sums * case["response_weights"]).sum())
    return {"sums": sums.detach(), "hidden_grad": mine.grad, "weight_grad": (tied if case["tied"] else layer.weight).grad}


def run(rank, store, cases, out):
    """Everything that one process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    alone, both = [dist.new_group([r]) for r in range(2)][rank], parallel_state.get_tensor_model_parallel_group()
    results = {
        "world1": [logps_of(case, 0, 1, alone, chunk=4) for case in cases["logps"]],
        "world2": [logps_of(case, rank, 2, both, chunk=5) for case in cases["logps"]],
        "dense1": [dense_of(case, 0, 1, alone, chunk=3) for case in cases["dense"]],
        "dense2": [dense_of(case, rank, 2, both, chunk=2) for case in cases["dense"]],
        "tp2": [processor_of(case, rank, False) for case in cases["processor"]],
        "tp2_sp": [processor_of(case, rank, True) for case in cases["processor"]],
    }
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            multiprocessing.get_context("fork").Process(target=run, args=(rank, f"{folder}/store", torch.load(sys.argv[1]), sys.argv[2]))
            for rank in range(2)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        sys.exit(max(abs(job.exitcode) for job in jobs))
