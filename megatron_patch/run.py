"""A training run put together from its arguments: data streams, model config, checks, loop hooks, export.

``streams``, ``built_model`` and ``forward_step`` are shared with the reference pass, which is how policy and reference take the same path
from disk to log-probs. Entries own the process (device, argument parsing, exit code); this module owns what is built in it.
"""

import argparse
import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.training.global_vars import get_signal_handler

from megatron_patch import loop_hooks, metrics_file, run_record
from megatron_patch.arguments import given_losses
from megatron_patch.best_so_far import BestSoFar
from megatron_patch.built_model import announce, model_config, precision
from megatron_patch.checkpoint import torch_adam
from megatron_patch.checkpoint.hf_io import save_hf_weights
from megatron_patch.checkpoint.saving import Saving
from megatron_patch.checksums import verify_data
from megatron_patch.data.atomic_files import write_json
from megatron_patch.data.batch_plan import BatchPlan, PairOrder
from megatron_patch.data.pair_dataset import MicroBatchStream, parse_weighted_prefixes
from megatron_patch.errors import AgreedError
from megatron_patch.evaluation import parity
from megatron_patch.forward_step import ForwardStep, Objective, checked_finetune, checked_preference
from megatron_patch.model.qwen2 import read_qwen2_config
from megatron_patch.objectives.loss_statistics import LossStatistics
from megatron_patch.objectives.preference import PreferenceObjective
from megatron_patch.preference.losses import loss_entry, needs_peers, needs_reference
from megatron_patch.refusals import check_arguments, check_scores, uses_torch_spec
from megatron_patch.scoring import Scorer, check_export
from megatron_patch.step_checks import StepChecks, StepZero
from megatron_patch.streams import full_pass, initial_weights, sample_set, stream


def _asked_to_stop() -> bool:
    """True when ``--exit-signal`` reached any rank: saved and left, please requeue. Collective: all ranks leave the loop together."""
    return any(get_signal_handler().signals_received())


class TrainingRun:
    """What ``pretrain`` needs: ``forward_step`` and ``dataset_provider``; built before megatron is initialised.

    Args:
        args: validated arguments (``parse_and_validate_args``). device: "cuda" or "cpu", shown first.
    """

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        if not args.dry_run:
            announce(args, args.train_mode, device)
        check_arguments(args)
        if device == "cpu" and args.optimizer_cpu_offload:
            raise ValueError("--optimizer-cpu-offload: moves the optimizer off a GPU, and this run has none")
        self.args, self.model = args, read_qwen2_config(args.hf_path)
        self.chunks: list[Any] = []
        self.losses = given_losses(args)
        self.with_reference = with_reference = bool(self.losses) and (needs_reference(self.losses) or self._finds_a_reference())
        self.train, self.weights = sample_set(args, args.pair_data, with_reference)
        self.valid = sample_set(args, args.valid_pair_data, with_reference)[0] if args.valid_pair_data else None
        for samples in filter(None, (self.train, self.valid)):
            check_scores(self.losses, samples)
        self.save = Path(args.save) if args.save else None
        self.statistics = LossStatistics(self.losses, changed=self._keep_statistics)
        self.checks = StepChecks(
            dtype=precision(args),
            fresh=self._is_first_step,
            on_step_zero=self._report_step_zero,
            allow_mismatch=args.allow_reference_mismatch,
            may_skip=args.skip_bad_batches,
            on_skip=lambda why: self._say(f"this step is left out: {why}"),
        )
        self.forward_step = ForwardStep(self._objective(), self.model.vocab, args.logps_chunk_tokens, torch_spec=uses_torch_spec(args))
        followed = args.best_metric or args.early_stop_metric
        self.best = BestSoFar(args.best_metric, args.early_stop_metric, args.early_stop_patience) if followed else None
        self.saving = Saving(args, lambda: self.best.best if self.best is not None else None, self._say)
        if not args.check:
            self._begin(device)
        self.hooks = loop_hooks.LoopState(
            args.train_mode,
            self.model,
            None,
            None,
            self.save,
            self.saving,
            skip_step=lambda: self.checks.skips_step,
            best=self.best,
            on_resume=self._take_over,
        )

    def _begin(self, device: str) -> None:
        """What is looked at and noted once before a run starts; rank 0 does it before it joins the others."""
        args, train, valid = self.args, self.train.stores, self.valid.stores if self.valid is not None else []
        origin = run_record.origins(args, train, valid)
        args.origins = json.dumps(origin)  # Megatron's args are saved in every checkpoint
        self._say(f"fingerprint of the initial weights: {initial_weights(args.hf_path)[1]:.1f} s")
        if args.rank == 0:
            if self.save is not None:
                (self.save / "run_state.json").unlink(missing_ok=True)  # of the start before
            if args.verify_data:
                verify_data([str(store.prefix) for store in (*train, *valid)], args.hf_path, self._say)
            if self.save is not None:
                run_record.append(self.save, run_record.start_record(args, device) | origin)

    def _finds_a_reference(self) -> bool:
        """For losses that need no reference: one that is there gives metrics their log-ratios and the step-0 gate its judge."""
        try:
            for words in filter(None, (self.args.pair_data, self.args.valid_pair_data)):
                sample_set(self.args, words, with_reference=True)
        except ValueError as why:
            self._say(f"no reference is used, so no log-ratios are shown and step 0 is not judged: {why}")
            return False
        return True

    def _say(self, line: str) -> None:
        if self.args.rank == 0:
            loop_hooks.print_line(f"[{self.args.train_mode}] {line}")

    def _objective(self) -> Objective:
        if not self.losses:
            return checked_finetune(self.checks)
        group = parallel_state.get_data_parallel_group
        return checked_preference(PreferenceObjective(self.losses, self.statistics, group, self.with_reference), self.checks)

    def _keep_statistics(self, state: str) -> None:
        self.args.loss_statistics = state  # Megatron's args are saved in every checkpoint

    def _take_over(self, checkpoint_args: argparse.Namespace) -> None:
        """What a checkpoint that is being loaded holds of ours.

        Raises:
            AgreedError: it lies in this run's folder, but another run's it is.
        """
        began, now = (json.loads(getattr(of, "origins", None) or "null") for of in (checkpoint_args, self.args))
        other = run_record.of_another_run(began, now) if began and self.saving.own else None
        if other is not None:
            raise AgreedError(f"{self.save} holds the checkpoints of another run: {other}; give this one a folder of its own")
        if not began or run_record.same_stores(began, now):
            self._refuse_another_order(checkpoint_args)
        if not self.statistics.restore(getattr(checkpoint_args, "loss_statistics", None)):
            self._say("the checkpoint was saved with other losses: the running statistics of these start anew")
        self._keep_statistics(self.statistics.state)
        if self.best is not None:
            self.best.restore(getattr(checkpoint_args, "best_so_far", None))
            self.args.best_so_far = self.best.state
            if self.best.stops:
                self._say("nothing is left to train: evaluations had stopped getting better when this checkpoint was saved")
                self.args.train_iters = 0

    def _refuse_another_order(self, began: argparse.Namespace) -> None:
        """AgreedError if these arguments, unlike those that the checkpoint's run began with, put an epoch's pairs into another order."""
        if self.args.finetune:  # begins anew, with another run's weights
            return
        weights = parse_weighted_prefixes(getattr(began, "pair_data", self.args.pair_data))[1]
        orders = {"the weights in --pair-data decide": (weights, self.weights)}
        for name in ("share_prompt", "seed"):
            now = getattr(self.args, name)
            orders[f"--{name.replace('_', '-')} decides"] = (getattr(began, name, now), now)
        for what, (before, now) in orders.items():
            if before != now:
                raise AgreedError(
                    f"{what} the order of an epoch's pairs, and this checkpoint's run began with {before}, not {now}: going on otherwise "
                    "would leave pairs out and repeat others"
                )

    def _fit_epochs(self) -> None:
        """What is left of ``--epochs``, in steps of this --global-batch-size; those that are done may have had another."""
        args, done = self.args, self.args.consumed_train_samples
        if not args.epochs or not args.iteration or not args.train_iters:
            return
        left = max(0, math.ceil(args.epochs * len(self.train)) - done)
        steps = args.iteration + -(-left // args.global_batch_size)
        if steps != args.train_iters:
            self._say(f"--epochs {args.epochs:g}: {steps} steps in all, since the {args.iteration} done took {done} samples")
            args.train_iters = steps

    def model_config(self) -> Any:
        """The model's config, with the step checks in front of the optimizer; installs the loop hooks and the resumable AdamW."""
        loop_hooks.install(self.hooks)
        torch_adam.install()
        config = model_config(self.args, self.chunks)
        config.transformer.finalize_model_grads_func = self.statistics.wrap(
            self.checks.wrap(finalize_model_grads), skipped=lambda: self.checks.skips_step
        )
        return config

    def _check_parity(self) -> None:
        """Rank 0 compares the stored reference of two pairs with transformers; all ranks share its verdict. Collective."""
        args, reference = self.args, self.train.shortest_references(2)
        if not args.parity_check or args.allow_reference_mismatch or args.iteration or reference is None:
            return
        complaint: list[str | None] = [self._parity_complaint(reference) if args.rank == 0 else None]
        torch.distributed.broadcast_object_list(complaint, src=0)
        if complaint[0] is not None:
            raise AgreedError(complaint[0])

    def _parity_complaint(self, reference: tuple[list[tuple[np.ndarray, ...]], np.ndarray, str]) -> str | None:
        if not parity.affordable(self.args.hf_path, [sum(len(part) for pair in reference[0] for part in pair)]):
            self.hooks.console(
                f"[{self.args.train_mode}] parity check skipped: {self.args.hf_path} would take one process too much memory or time"
            )
            return None
        try:
            difference = parity.check_parity(self.args.hf_path, *reference)
        except ValueError as error:
            return str(error)
        self.hooks.console(f"[{self.args.train_mode}] parity with transformers: {difference:.2g} nats per token on two pairs")
        return None

    def _is_first_step(self) -> bool:
        return self.with_reference and self.args.consumed_train_samples == 0

    def _report_step_zero(self, outcome: StepZero) -> None:
        if torch.distributed.get_rank() != 0:
            return
        if self.save is not None:
            (self.save / "step_zero.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
        largest = max(outcome.max_abs_chosen_logratio_per_token, outcome.max_abs_rejected_logratio_per_token)
        self.hooks.console(
            f"[{self.args.train_mode}] step 0: loss {outcome.loss:.6f} (policy = reference gives {outcome.identity_loss:.6f}), "
            f"|log-ratio| per token up to {largest:.2g} nats over {outcome.pairs} pairs"
        )

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Run training inside it; afterwards ``<save>/run_state.json`` says finished, preempted or stopped, and at which step."""
        state = "stopped"
        try:
            yield
            state = "finished"
        except SystemExit as stop:  # how upstream leaves the loop early
            if self.hooks.iteration is None and not stop.code:
                raise SystemExit(1) from stop  # it never got to a step
            if self.best is not None and self.best.stops and not stop.code:
                state = "finished"
                self._say(f"{self.args.early_stop_metric} got no better in {self.args.early_stop_patience} evaluations: training ends here")
            else:
                state = "preempted" if self.args.exit_signal_handler and _asked_to_stop() else "stopped"
                raise
        finally:
            if self.args.exit_signal_handler:  # the warning is repeated, and when Python ends, and takes its handlers away, it would kill
                signal.signal(self.args.exit_signal, signal.SIG_IGN)
            self._note_state(state)

    def _note_state(self, state: str) -> None:
        if self.save is None or self.args.rank or not self.save.is_dir():
            return
        done = self.hooks.iteration if self.hooks.iteration is not None else getattr(self.args, "iteration", 0)
        try:
            write_json(self.save / "run_state.json", {"state": state, "iteration": done})
        except OSError as error:
            self._say(f"run_state.json could not be written: {error}")
            if state == "preempted":  # the exit code alone would say finished
                raise SystemExit(1) from error

    def export(self) -> None:
        """Write ``--export-hf`` from the trained chunks, and compare what transformers makes of it with them. Collective."""
        if not self.args.export_hf:
            return

        def check(written: Path) -> None:
            """By transformers."""
            if self.args.parity_check:
                scorer = Scorer(self.args, self.chunks)
                check_export(scorer, full_pass(self.args, self.train, self.model.vocab), written, self._say)

        save_hf_weights(self.chunks, self.args.export_hf, self.args.hf_path, dtype=precision(self.args), check=check)
        self._say(f"Hugging Face checkpoint: {self.args.export_hf}")

    def train_stream(self) -> MicroBatchStream:
        """The training pairs in their order, as this rank's micro-batches."""
        args = self.args
        keys = self.train.prompt_keys() if args.share_prompt else None
        order = PairOrder(self.train.sizes, seed=args.seed, weights=self.weights, keys=keys)
        return stream(args, self.train, order, args.global_batch_size, self.model.vocab, needs_peers(self.losses))

    def dataset_provider(self, _sizes: Any = None, vp_stage: int | None = None) -> tuple[Any, Any, None]:
        """(train, validation, None) iterators of this rank, from the pairs consumed so far; one call per virtual stage."""
        args = self.args
        train = self.train_stream()
        valid = full_pass(args, self.valid, self.model.vocab, needs_peers(self.losses)) if self.valid is not None else None
        self.hooks.train, self.hooks.valid = train, valid
        self._fit_epochs()
        self._refuse_split_batches(train.plan)
        if not vp_stage:
            self._check_parity()
        if self.save is not None and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1 and not vp_stage:
            self.save.mkdir(parents=True, exist_ok=True)
            metrics_file.rewind(self.save, args.iteration)
        return train.from_position(args.consumed_train_samples), valid.repeated() if valid is not None else None, None

    def _refuse_split_batches(self, plan: BatchPlan) -> None:
        """Some losses are defined on the whole global batch: every step left must be one micro-batch. The same on all ranks."""
        needing = [part.options.loss_type for part in self.losses if loss_entry(part.options.loss_type).needs_whole_batch]
        if not needing:
            return
        begin = self.args.consumed_train_samples
        split = plan.first_split_step(begin, begin + (self.args.train_iters - self.args.iteration) * plan.batch)
        if split is not None:
            step, parts = self.args.iteration + (split - begin) // plan.batch + 1, len(plan.step(split))
            raise AgreedError(
                f"loss {needing[0]} sorts the pairs of a whole step, but step {step} needs {parts} micro-batches; raise "
                "--max-tokens-per-micro-batch, lower --global-batch-size, or leave virtual pipelining off"
            )

    dataset_provider.is_distributed = True  # type: ignore[attr-defined]
