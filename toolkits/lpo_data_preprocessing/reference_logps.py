"""Stage 5: the reference's log-probs of every response, computed by the training code itself.

    torchrun --nproc-per-node 2 -m toolkits.lpo_data_preprocessing.reference_logps \
        --hf-path outputs/sft/hf --pair-data data/train data/valid --tensor-model-parallel-size 2 --sequence-parallel

Same store, batches, model and log-prob code as training, forward only, at any TP x PP x DP. Writes ``<prefix>.ref.npy`` (float64
[pairs, 2], sums in nats) and ``<prefix>.ref.json`` (fingerprints of store and weights) beside each store. Work is done in blocks;
what is finished survives an interruption in ``<prefix>.ref.partial.npz`` and is not computed again; neither is a finished store. SIGTERM
ends a process with exit code 75 (torchrun makes 1 of it, the data job 75).
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_patch import cpu_backend
from megatron_patch.arguments import choose_device, requested_device
from megatron_patch.entry import parse_arguments, user_errors
from toolkits.lpo_data_preprocessing.preemption import end_between_writes, writing

_COMMAND = "torchrun --nproc-per-node {} -m toolkits.lpo_data_preprocessing.reference_logps {}"
_EXAMPLE = "--hf-path outputs/sft/hf --pair-data data/train data/valid --tensor-model-parallel-size 2 --sequence-parallel"
_DESCRIPTION = """Reference log-probs (sums in nats) of all responses in the stores of --pair-data, by the model in --hf-path.
The flags are those of training, Megatron-Core's among them; the pass adds the group "reference pass"."""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """Megatron's help is thousands of lines: what the pass is stands before them, and an example behind."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = _COMMAND.format("N", "--hf-path DIR --pair-data PREFIX ... [flags]")
    parser.description, parser.epilog = _DESCRIPTION, f"example:\n  {_COMMAND.format(2, _EXAMPLE)}"
    group = parser.add_argument_group(title="reference pass")
    group.add_argument(
        "--block-pairs", type=int, default=1024, metavar="PAIRS", help="between two saves of the partial result (default %(default)s)"
    )
    parser.set_defaults(skip_train=True, train_iters=1, global_batch_size=None)


class ReferencePass:
    """The model and the schedule, ready to score blocks of pairs."""

    def __init__(self, args: argparse.Namespace) -> None:
        from megatron.core.enums import ModelType
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training import training as mt
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.initialize import initialize_megatron

        from megatron_patch import run
        from megatron_patch.forward_step import ForwardStep
        from megatron_patch.model.qwen2 import read_qwen2_config
        from megatron_patch.refusals import uses_torch_spec

        self.args, self.run = args, run
        self.vocab = read_qwen2_config(args.hf_path).vocab
        config = pretrain_cfg_container_from_args(args, run.model_config(args, []))
        initialize_megatron()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.model, _, _ = mt.setup_model_and_optimizer(ModelType.encoder_or_decoder, cfg_container=config, pg_collection=groups)
        for chunk in self.model:
            chunk.eval()
        self.schedule = get_forward_backward_func()
        self.forward_step = ForwardStep(
            lambda batch, logps: (logps.sum(), batch.lengths.sum(), {}), self.vocab, args.logps_chunk_tokens,
            torch_spec=uses_torch_spec(args),
        )  # fmt: skip

    def score(self, stream: Any, numbers: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(pair numbers, float64 [pairs, 2] log-probs) parts of this rank; empty off the last stage, TP rank 0 and CP rank 0."""
        import torch
        from megatron.core import parallel_state

        slots = stream.plan.split(numbers)

        def micro_batches() -> Iterator[Any]:
            return (stream.batch(slot) for slot in slots)

        data = micro_batches() if len(self.model) == 1 else [micro_batches() for _ in self.model]
        with torch.no_grad():
            collected = self.schedule(
                forward_step_func=self.forward_step,
                data_iterator=data,
                model=self.model,
                num_microbatches=len(slots),
                seq_length=self.args.seq_length,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        copies = parallel_state.get_tensor_model_parallel_rank() + parallel_state.get_context_parallel_rank()
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True) or copies:
            return []
        parts = zip((slot[stream.rank] for slot in slots), collected, strict=True)
        return [(which, logps.numpy()) for which, (_, logps) in parts if len(which)]  # a slot may hold no pair


class PartialResult:
    """Scored pairs so far, kept beside the store; a partial result of another store or other weights is started over.

    Rank 0 alone reads the files and tells the others: on a network file system two ranks may see two states of one file, and ranks
    with different work lists wait for each other for ever. Making one is collective.
    """

    def __init__(self, prefix: str, pairs: int, identity: Mapping[str, str]) -> None:
        import torch

        self.prefix, self.pairs, self.identity = prefix, pairs, " ".join(identity.values())
        self.path = Path(f"{prefix}.ref.partial.npz")
        found: list[Any] = [(self._read(), self._is_finished(identity)) if torch.distributed.get_rank() == 0 else None]
        torch.distributed.broadcast_object_list(found, src=0)
        self.logps, self.finished = found[0]

    def _read(self) -> np.ndarray:
        from megatron_patch.data.atomic_files import remove_stale
        from megatron_patch.data.pair_store import reference_files

        for path in (self.path, *reference_files(self.prefix)):
            remove_stale(path)
        if self.path.exists():
            with np.load(self.path, allow_pickle=False) as saved:
                if str(saved["identity"]) == self.identity:
                    return saved["logps"]
        return np.full((self.pairs, 2), np.nan)

    def _is_finished(self, identity: Mapping[str, str]) -> bool:
        """Whether an earlier pass with this store, these weights and this dtype came to its end (a requeued job finds such stores)."""
        from megatron_patch.data.pair_store import PairStore, read_reference_logps, reference_record

        if self.path.exists() or not Path(f"{self.prefix}.ref.json").exists():
            return False
        store = PairStore(self.prefix, kind="pairs")
        try:
            read_reference_logps(store, weights_fingerprint=identity["weights"])
        except ValueError:  # of another store or other weights, or damaged: scored again
            return False
        return reference_record(store)["dtype"] == identity["dtype"]

    def missing(self) -> np.ndarray:
        """Numbers of the pairs not scored yet."""
        return np.flatnonzero(np.isnan(self.logps).any(axis=1))

    def save(self) -> None:
        """Write what there is, atomically."""
        from megatron_patch.data.atomic_files import atomic_path

        with writing, atomic_path(self.path) as temporary:
            with open(temporary, "wb") as stream:
                np.savez(stream, logps=self.logps, identity=np.array(self.identity))


def score_store(reference: ReferencePass, prefix: str, weights: str) -> None:
    """Score one store and write its reference log-probs; rank 0 reports and writes."""
    import torch

    from megatron_patch.checksums import weight_checksums
    from megatron_patch.data.pair_store import write_reference_logps
    from megatron_patch.loop_hooks import print_line

    args, run = reference.args, reference.run
    samples, _ = run.sample_set(args, [prefix], with_reference=False)
    stream = run.full_pass(args, samples, reference.vocab)
    dtype = str(run.precision(args)).removeprefix("torch.")
    partial = PartialResult(prefix, len(samples), {"store": samples.stores[0].fingerprint, "weights": weights, "dtype": dtype})
    if partial.finished:
        if args.rank == 0:
            print_line(f"[reference] {prefix}: finished before with these weights, kept (remove {prefix}.ref.json to score it again)")
        return
    started, todo, done = time.perf_counter(), partial.missing(), 0
    for start in range(0, len(todo), args.block_pairs):
        numbers = todo[start : start + args.block_pairs]
        everywhere: list[Any] = [None] * args.world_size
        torch.distributed.all_gather_object(everywhere, reference.score(stream, numbers))
        for part in everywhere:
            for which, logps in part:
                partial.logps[which] = logps
        done += len(numbers)
        if args.rank == 0:
            partial.save()
            rate = done / (time.perf_counter() - started)
            eta = (len(todo) - done) / rate
            scored = len(samples) - len(todo) + done
            print_line(f"[reference] {prefix}: {scored}/{len(samples)} pairs | {rate:.1f} pairs/s | ETA {eta:.0f} s")
    if args.rank == 0:
        sizes = ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel", "data_parallel")
        layout = {name: getattr(args, f"{size}_size") for name, size in zip(("tp", "pp", "cp", "dp"), sizes, strict=True)}
        identity = {"store_fingerprint": samples.stores[0].fingerprint, "weights_fingerprint": weights}
        extra = {"layout": layout, "hf_path": args.hf_path, "weight_files": weight_checksums(args.hf_path)}
        with writing:
            write_reference_logps(prefix, partial.logps, **identity, dtype=dtype, extra=extra)
            partial.path.unlink(missing_ok=True)
        chosen, rejected = partial.logps.sum(axis=0) / samples.scored_lengths.sum(axis=0)
        print_line(
            f"[reference] {prefix}: {len(samples)} pairs scored, on average {chosen:.4f} nats a chosen token, "
            f"{rejected:.4f} a rejected one -> {prefix}.ref.npy"
        )


def main(argv: list[str]) -> None:
    """Score every store of ``--pair-data`` (weights there are ignored)."""
    end_between_writes("[preempted] reference: the same command goes on\n" if os.environ.get("RANK", "0") == "0" else "")
    device = choose_device(requested_device(argv))
    if device == "cpu":
        cpu_backend.install()
    import torch

    from megatron_patch import run
    from megatron_patch.checkpoint.hf_files import weights_fingerprint
    from megatron_patch.refusals import check_arguments

    args = parse_arguments(device, _add_flags)
    run.announce(args, "reference", device)
    check_arguments(args)
    if args.load:
        raise ValueError("--load: the reference is the model of --hf-path; export a Megatron checkpoint with --save-hf first")
    prefixes = run.parse_weighted_prefixes(args.pair_data)[0]
    for prefix in prefixes:
        run.sample_set(args, [prefix], with_reference=False)
    weights = weights_fingerprint(args.hf_path)
    if args.check:
        return
    reference = ReferencePass(args)
    for prefix in prefixes:
        score_store(reference, prefix, weights)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
