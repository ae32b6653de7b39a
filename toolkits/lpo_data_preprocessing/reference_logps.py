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
from collections.abc import Mapping
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


def score_store(scorer: Any, prefix: str, weights: str) -> None:
    """Score one store with a ``Scorer`` and write its reference log-probs; rank 0 reports and writes."""
    from megatron_patch.built_model import precision_name
    from megatron_patch.checksums import weight_checksums
    from megatron_patch.data.pair_store import write_reference_logps
    from megatron_patch.loop_hooks import print_line
    from megatron_patch.streams import full_pass, sample_set

    args = scorer.args
    samples, _ = sample_set(args, [prefix], with_reference=False)
    stream = full_pass(args, samples, args.vocab_size)
    dtype = precision_name(args)
    partial = PartialResult(prefix, len(samples), {"store": samples.stores[0].fingerprint, "weights": weights, "dtype": dtype})
    if partial.finished:
        if args.rank == 0:
            print_line(f"[reference] {prefix}: finished before with these weights, kept (remove {prefix}.ref.json to score it again)")
        return
    started, todo, done = time.perf_counter(), partial.missing(), 0
    for start in range(0, len(todo), args.block_pairs):
        numbers = todo[start : start + args.block_pairs]
        for which, logps in scorer.score(stream, numbers):
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

    from megatron_patch.built_model import announce, built_model
    from megatron_patch.checkpoint.hf_files import weights_fingerprint
    from megatron_patch.data.pair_dataset import parse_weighted_prefixes
    from megatron_patch.refusals import check_arguments
    from megatron_patch.scoring import Scorer
    from megatron_patch.streams import sample_set

    args = parse_arguments(device, _add_flags)
    announce(args, "reference", device)
    check_arguments(args)
    if args.load:
        raise ValueError("--load: the reference is the model of --hf-path; export a Megatron checkpoint with scripts/export_hf.py first")
    prefixes = parse_weighted_prefixes(args.pair_data)[0]
    for prefix in prefixes:
        sample_set(args, [prefix], with_reference=False)
    weights = weights_fingerprint(args.hf_path)
    if args.check:
        return
    scorer = Scorer(args, built_model(args))
    for prefix in prefixes:
        score_store(scorer, prefix, weights)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
