"""What must hold before the optimizer may step: log-probs and gradients are finite, and at step 0 the policy is its own reference.

Both verdicts are reached after the backward passes and before the optimizer, through ``config.finalize_model_grads_func``: no
extra forward pass, every rank takes part, and when a check fails all ranks leave together with nothing stepped and nothing saved.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_patch.data.packed_batch import PackedBatch
from megatron_patch.errors import AgreedError

# Largest |log-ratio| per token (nats) of any response, and its mean over responses, that count as "the same model".
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-2, 5e-3)}
# Relative difference between the loss and its value at policy = reference; sums over long responses add up what is allowed per token.
# In bfloat16 the log-ratios alone are judged: losses with a penalty (dpop: 50 per nat) multiply what rounding makes of them.
LOSS_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: float("inf")}

LOOK_AT_PAIRS = (
    "Look at one with `python -m toolkits.lpo_data_preprocessing.inspect STORE --pair ID`; --skip-bad-batches N leaves out up to N such "
    "steps"
)


@dataclass(frozen=True)
class StepZero:
    """What the first global batch of a fresh run showed. Log-ratios in nats per token, over the distinct pairs of the batch."""

    loss: float
    identity_loss: float
    max_abs_chosen_logratio_per_token: float
    max_abs_rejected_logratio_per_token: float
    mean_abs_logratio_per_token: float
    pairs: int
    worst_pair: str

    def complaint(self, dtype: torch.dtype) -> str | None:
        """None when policy and reference agree within the tolerance of ``dtype``, else one line that says what differs."""
        largest = max(self.max_abs_chosen_logratio_per_token, self.max_abs_rejected_logratio_per_token)
        max_allowed, mean_allowed = TOLERANCE[dtype]
        same_model = largest <= max_allowed and self.mean_abs_logratio_per_token <= mean_allowed
        if same_model and abs(self.loss - self.identity_loss) <= LOSS_TOLERANCE[dtype] * max(1.0, abs(self.identity_loss)):
            return None
        return (
            f"at step 0 the policy is not its reference: |log-ratio| per token up to {largest:.3g} nats (allowed {max_allowed:g} in "
            f"{dtype}), mean {self.mean_abs_logratio_per_token:.3g} (allowed {mean_allowed:g}), worst at pair {self.worst_pair}; loss "
            f"{self.loss:.6f}, expected {self.identity_loss:.6f}. Recompute the reference log-probs with these weights and this dtype, "
            "or say --allow-reference-mismatch"
        )


class _Observed(NamedTuple):
    """One micro-batch: names [P], finite bool [P], and at step 0 log-ratios per token [2, P], losses and identity losses [2, P]."""

    names: tuple[str, ...]
    finite: Tensor
    ratios: Tensor | None
    losses: Tensor | None

    def rows(self) -> list[tuple[str, float, float, float, float]]:
        """(name, chosen log-ratio, rejected log-ratio, loss, identity loss) of each pair."""
        if self.ratios is None or self.losses is None:
            return []
        return list(zip(self.names, *self.ratios.tolist(), *self.losses.tolist(), strict=True))


class StepChecks:
    """Collects what each micro-batch showed and judges once per step, on every rank.

    Args:
        dtype: what the model computes in.
        fresh: says whether the step under way is the first of a run that starts from its reference's weights.
        on_step_zero: told the outcome on every rank, before it is judged.
        allow_mismatch: go on although the gate complains.
        may_skip: how many steps with NaN or infinity may be left out before one ends the run; never the first of a fresh run.
        on_skip: told on every rank why a step is left out.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        fresh: Callable[[], bool] = lambda: False,
        on_step_zero: Callable[[StepZero], None] = lambda outcome: None,
        allow_mismatch: bool = False,
        may_skip: int = 0,
        on_skip: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.dtype, self.fresh = dtype, fresh
        self.on_step_zero, self.allow_mismatch = on_step_zero, allow_mismatch
        self.may_skip, self.on_skip = may_skip, on_skip
        self.skips_step = False
        """Whether the step just judged is one to leave out. The same on all ranks."""
        self._observed: list[_Observed] = []

    def at_step_zero(self) -> bool:
        """True while the micro-batches that the gate judges run: ``observe`` then wants the losses."""
        return self.fresh() and torch.is_grad_enabled()

    def observe(self, batch: PackedBatch, response_logps: Tensor, losses: Tensor | None = None, identity: Tensor | None = None) -> None:
        """Remember one micro-batch: response log-probs [R] (nats), and at step 0 each pair's loss and what it is at identity, [P] each.

        No synchronisation. Evaluation has no step to hold back, so what it shows is not remembered.
        """
        if not batch.samples or not torch.is_grad_enabled():
            return
        logps = response_logps.detach().view(-1, batch.samples)
        ratios, kept = None, None
        if losses is not None and identity is not None:
            ratios = (logps - batch.reference.view_as(logps)) / batch.lengths.view_as(logps)
            kept = torch.stack((losses, identity)).detach()  # detached: the graph of a micro-batch must not outlive its backward
        self._observed.append(_Observed(batch.names, torch.isfinite(logps).all(0), ratios, kept))

    def wrap(self, finalize_model_grads: Callable) -> Callable:
        """Upstream's ``finalize_model_grads`` followed by the judgement: the last call before the optimizer steps."""

        def checked(model: list[Any], *args: Any, **kwargs: Any) -> Any:
            result = finalize_model_grads(model, *args, **kwargs)
            self._judge(model)
            return result

        return checked

    def _judge(self, model: list[Any]) -> None:
        observed, self._observed = self._observed, []
        # A sum is NaN or infinite as soon as one term is; clipping would turn a NaN norm into NaN weights.
        sums = [buffer.grad_data.sum() for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        bad_gradient = ~torch.isfinite(torch.stack(sums)).all() if sums else torch.zeros(())
        bad_logps = torch.stack([(~o.finite).any() for o in observed]).any() if observed else torch.zeros(())
        device = torch.cuda.current_device()
        verdict = torch.stack([bad_logps.float().to(device), bad_gradient.float().to(device)])
        torch.distributed.all_reduce(verdict, op=torch.distributed.ReduceOp.MAX)
        logps_failed, gradient_failed = verdict.tolist()
        self.skips_step = bool(logps_failed or gradient_failed)
        if self.skips_step:
            self._skip_or_stop(_why_bad(observed, bool(logps_failed)))
        elif self.at_step_zero():
            self._judge_step_zero(_gather([row for o in observed for row in o.rows()]))

    def _skip_or_stop(self, why: str) -> None:
        if self.at_step_zero() or not self.may_skip:
            raise AgreedError(f"{why}. {LOOK_AT_PAIRS}")
        self.may_skip -= 1
        self.on_skip(why)

    def _judge_step_zero(self, rows: list[Any]) -> None:
        rows = list({row[0]: row for row in rows}.values())  # by name: ranks that share a pair may differ in its last bit
        worst = max(rows, key=lambda row: max(abs(row[1]), abs(row[2])))
        outcome = StepZero(
            loss=sum(row[3] for row in rows) / len(rows),
            identity_loss=sum(row[4] for row in rows) / len(rows),
            max_abs_chosen_logratio_per_token=max(abs(row[1]) for row in rows),
            max_abs_rejected_logratio_per_token=max(abs(row[2]) for row in rows),
            mean_abs_logratio_per_token=sum(abs(row[1]) + abs(row[2]) for row in rows) / (2 * len(rows)),
            pairs=len(rows),
            worst_pair=worst[0],
        )
        self.on_step_zero(outcome)
        complaint = outcome.complaint(self.dtype)
        if complaint and not self.allow_mismatch:
            raise AgreedError(complaint)


def _why_bad(observed: list[_Observed], logps_failed: bool) -> str:
    """Which pairs a step with NaN or infinity had. Collective."""
    if logps_failed:
        names = _gather([n for o in observed for n, ok in zip(o.names, o.finite.tolist(), strict=True) if not ok])
        return f"log-probs are NaN or infinite for {len(names)} pairs, nothing was stepped: {', '.join(names[:8])}"
    names = _gather([n for o in observed for n in o.names])
    return f"gradients are NaN or infinite (log-probs are finite), nothing was stepped; pairs: {', '.join(names)}"


def _gather(local: list[Any]) -> list[Any]:
    """The distinct items of all ranks, sorted (tensor-parallel ranks hold the same ones)."""
    everywhere: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everywhere, local)
    return sorted({item for part in everywhere for item in part})
