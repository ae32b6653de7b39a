"""The one room where megatron-core's training loop is extended, on CPU and GPU alike.

Every row of ``HOOKS`` is a module global of ``megatron.training`` that the loop looks up at call time, what replaces it, and why
upstream's own does not do (line numbers: megatron-core 0.19.2). ``install`` is called by entries, once.
"""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import state_dict_saver as saver
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing, get_args, wandb_utils
from megatron.training import training as mt

from megatron_patch import metrics_file
from megatron_patch.best_so_far import BestSoFar
from megatron_patch.checkpoint.saving import Saving, staged, watched
from megatron_patch.data.pair_dataset import MicroBatchStream
from megatron_patch.errors import AgreedError
from megatron_patch.metric_writers import Tolerant, tolerant, tolerated
from megatron_patch.model.qwen2 import Qwen2Config
from megatron_patch.throughput import PHASES, StepClock, peak_flops, peak_memory, useful_flops


@dataclass
class LoopState:
    """What the hooks know of a run."""

    mode: str  # first word of every console line
    model: Qwen2Config
    train: MicroBatchStream | None
    valid: MicroBatchStream | None
    save: Path | None
    saving: Saving | None = None
    skip_step: Callable[[], bool] = lambda: False  # whether the optimizer is to leave out the step whose gradients are there
    best: BestSoFar | None = None
    on_resume: Callable[[Any], None] = lambda checkpoint_args: None  # told the arguments that a loaded checkpoint was saved with
    console: Callable[[str], None] = field(default=lambda line: print_line(line))
    clock: StepClock = field(default_factory=StepClock)
    writers: dict[str, Tolerant] = field(default_factory=dict)
    last_evaluated: int = -1
    iteration: int | None = None  # steps done; None before the first of this process

    def evaluated(self, iteration: int, values: dict[str, float]) -> None:
        """Take notice of an evaluation, the same on all ranks."""
        assert self.best is not None
        try:
            self.best.observe(iteration, values)
        except ValueError as error:
            raise AgreedError(str(error)) from None
        get_args().best_so_far = self.best.state  # Megatron's args are saved in every checkpoint
        if self.saving is not None:
            self.saving.note_best()  # at the end of training evaluations come after the save


class Hook(NamedTuple):
    """One replaced global of a module of ``megatron.training``."""

    attribute: str
    make: Callable[[Callable, LoopState], Callable]
    why: str
    module: Any = mt


def print_line(line: str) -> None:
    """Write one line to the terminal at once; launchers show only lines that start with '['."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _schedule(upstream: Callable, state: LoopState) -> Callable:
    """The plan decides how many micro-batches a step has; the calculator keeps the nominal number, so samples are counted right."""

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable:
        schedule = upstream(*args, **kwargs)

        def run_schedule(*, num_microbatches: int, data_iterator: Any, forward_only: bool = False, **rest: Any) -> Any:
            stream, consumed = (state.valid, 0) if forward_only else (state.train, get_args().consumed_train_samples)
            planned = len(stream.plan.step(consumed)) if stream is not None else num_microbatches
            with state.clock.phase("forward_backward"):
                timed = _timed(data_iterator, state.clock)
                result = schedule(num_microbatches=planned, data_iterator=timed, forward_only=forward_only, **rest)
                torch.cuda.synchronize()  # once a step: kernels still running are not the optimizer's time
            return result

        return run_schedule

    return get_forward_backward_func


def _timed(data_iterator: Any, clock: StepClock) -> Any:
    """One iterator, or one for each virtual stage."""
    return [clock.waited_for(each) for each in data_iterator] if isinstance(data_iterator, list) else clock.waited_for(data_iterator)


def _train_step(upstream: Callable, state: LoopState) -> Callable:
    def train_step(forward_step: Callable, data_iterator: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """What of a step is neither data nor forward and backward is the optimizer's time."""
        if state.iteration is None:
            state.clock.lap()  # the first step does not pay for the start
            optimizer.step = _unless_skipped(optimizer.step, state)
        with state.clock.phase("optimizer"):
            return upstream(forward_step, data_iterator, model, optimizer, *args, **kwargs)

    return train_step


def _unless_skipped(step: Callable, state: LoopState) -> Callable:
    """A step left out: weights and Adam's state stay, its pairs count as seen, the learning rate waits; upstream counts it as skipped."""
    return lambda *args, **kwargs: (False, None, None) if state.skip_step() else step(*args, **kwargs)


def _flops(_: Callable, state: LoopState) -> Callable:
    def num_floating_point_operations(args: Any, batch_size: int, **__: Any) -> float:
        """Of the step just done; 0 before the first."""
        if state.train is None or args.consumed_train_samples < batch_size:
            return 0.0
        return step_flops(state, args.consumed_train_samples - batch_size)

    return num_floating_point_operations


def step_flops(state: LoopState, consumed: int) -> float:
    """Useful FLOPs of the global batch that starts after ``consumed`` pairs, over all devices."""
    assert state.train is not None
    return float(useful_flops(state.model, state.train.work(consumed)[0]).sum())


def _training_log(upstream: Callable, state: LoopState) -> Callable:
    def training_log(loss_dict: dict, total_loss_dict: dict, learning_rate: float, iteration: int, *rest: Any, **kwargs: Any) -> Any:
        """Upstream's lines, then our own and a row of metrics.jsonl."""
        skipped, grad_norm = rest[2], rest[3]
        state.iteration = iteration
        reported = upstream(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **kwargs)
        measured = _largest(state.clock.lap() | {"peak_memory_bytes": peak_memory()})
        if _writes_metrics():
            args = get_args()
            consumed = args.consumed_train_samples - args.global_batch_size
            row: dict[str, Any] = {"iteration": iteration, "consumed_samples": args.consumed_train_samples}
            row |= {name: float(value) for name, value in loss_dict.items()}
            row |= {"grad_norm": grad_norm, "learning_rate": learning_rate, "skipped": int(skipped)}
            speed = measured | _speed(state, consumed, measured["seconds"], args.world_size)
            _show_elsewhere(speed, iteration)
            row |= speed
            record_metrics(state, row)
            state.console(_console_line(state.mode, f"step {iteration}/{args.train_iters}", row))
        return reported

    return training_log


def _largest(values: dict[str, float]) -> dict[str, float]:
    """The largest of any rank; collective."""
    reduced = torch.tensor(list(values.values()), dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(reduced, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(values, reduced.tolist(), strict=True))


def _speed(state: LoopState, consumed: int, seconds: float, devices: int) -> dict[str, float]:
    """How fast a step went and how well it was planned; docs/metrics.md says what each is."""
    assert state.train is not None
    plan, (work, packed) = state.train.plan, state.train.work(consumed)
    tokens, costs = float(work.tokens.sum()), useful_flops(state.model, work)
    flops, peak = float(costs.sum()) / seconds / devices, peak_flops()
    return {
        "pairs_per_second": plan.batch / seconds,
        "tokens_per_second": tokens / seconds,
        "tflops_per_device": flops / 1e12,
        **({"mfu": flops / peak} if peak else {}),
        "micro_batches": len(plan.step(consumed)),
        "imbalance": float(costs.max() / costs.mean()),
        "padding_fraction": 1 - tokens / packed,
    }


def _show_elsewhere(values: dict[str, float], iteration: int) -> None:
    """In TensorBoard, and in Weights & Biases with ``--wandb-project``; the losses' own metrics upstream writes there."""
    writer, wandb = mt.get_tensorboard_writer(), mt.get_wandb_writer()
    if writer:
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(values, iteration)


def _evaluate_and_print(_: Callable, state: LoopState) -> Callable:
    """One full pass over the validation stores; upstream's own prints a perplexity of every metric and evaluates twice at the end."""

    def evaluate_and_print_results(
        prefix: str, forward_step_func: Callable, data_iterator: Any, model: Any, iteration: int, process: Any, config: Any, **kwargs: Any
    ) -> None:
        iteration = iteration if state.iteration is not None else max(iteration, get_args().iteration)  # 0, where nothing was left to train
        if state.valid is None or iteration == state.last_evaluated or _evaluated_before(state, iteration):
            return
        state.last_evaluated = iteration
        groups = {name: kwargs.get(name) for name in ("pg_collection", "p2p_communicator")}
        results, _, timed_out = mt.evaluate(forward_step_func, data_iterator, model, process, config, verbose=False, **groups)
        state.clock.lap()  # no step pays for it
        if timed_out:
            return
        values = {f"eval_{name}": float(value) for name, value in results.items()}
        if state.best is not None:
            state.evaluated(iteration, _from_last_rank(values))
        if not _writes_metrics():
            return
        row = {"iteration": iteration, **values}
        record_metrics(state, row)
        _show_elsewhere({name: value for name, value in row.items() if name != "iteration"}, iteration)
        state.console(_console_line(state.mode, f"evaluation at step {iteration}", row))

    return evaluate_and_print_results


def _evaluated_before(state: LoopState, iteration: int) -> bool:
    """Whether an earlier start of this run did it, and this one has trained nothing since. Collective."""
    if state.iteration is not None or state.save is None:
        return False
    return _from_last_rank(_writes_metrics() and metrics_file.has_evaluation(state.save, iteration))


def _from_last_rank[T](values: T) -> T:
    """Other pipeline stages have no metrics. Collective."""
    told: list[Any] = [values]
    torch.distributed.broadcast_object_list(told, src=torch.distributed.get_world_size() - 1)
    return told[0]


def _decide_exit(upstream: Callable, state: LoopState) -> Callable:
    def checkpoint_and_decide_exit(
        model: Any, optimizer: Any, scheduler: Any, iteration: int, flops: float, context: Any, data_iterator: Any
    ) -> bool:
        """Upstream's saves and reasons to leave, then those that follow from an evaluation just done."""
        leaves = upstream(model, optimizer, scheduler, iteration, flops, context, data_iterator)
        best, args = state.best, get_args()
        if best is None or leaves or iteration != state.last_evaluated:
            return leaves
        if args.save and (best.improved_at(iteration) or best.stops) and not (args.save_interval and iteration % args.save_interval == 0):
            mt.save_checkpoint_and_time(iteration, model, optimizer, scheduler, flops, context, train_data_iterator=data_iterator)
        return best.stops

    return checkpoint_and_decide_exit


def _resume(upstream: Callable, state: LoopState) -> Callable:
    def check_checkpoint_args(checkpoint_args: Any, *args: Any, **kwargs: Any) -> None:
        """Upstream's check, then what the checkpoint holds of ours."""
        upstream(checkpoint_args, *args, **kwargs)
        state.on_resume(checkpoint_args)

    return check_checkpoint_args


def _saving(method: str) -> Callable[[Callable, LoopState], Callable]:
    """What ``Saving`` makes of an upstream function; nothing, for runs that save nothing."""
    return lambda upstream, state: getattr(state.saving, method)(upstream) if state.saving else upstream


def _manifest(upstream: Callable, state: LoopState) -> Callable:
    return state.saving.kept(state.saving.write_manifest) if state.saving else upstream


def _verify(upstream: Callable, state: LoopState) -> Callable:
    return state.saving.verify if state.saving else upstream


def _initialize(upstream: Callable, state: LoopState) -> Callable:
    def initialize_megatron(*args: Any, **kwargs: Any) -> None:
        """Upstream's, then a look at what will be loaded: the first moment at which all ranks can do that together."""
        upstream(*args, **kwargs)
        if state.saving:
            state.saving.before_load()

    return initialize_megatron


def _deaf(upstream: Callable, _: LoopState) -> Callable:
    """Processes that are started inside do not hear the warning that every process of a job gets: they would die of it."""

    def start(*args: Any, **kwargs: Any) -> Any:
        """With the signal blocked: what is started inherits that, and here it waits."""
        warning = {get_args().exit_signal}
        signal.pthread_sigmask(signal.SIG_BLOCK, warning)
        try:
            return upstream(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, warning)

    return start


HOOKS = (
    Hook("initialize_megatron", _initialize, "training.py:1091 goes on to load whatever the tracker names"),
    Hook("get_forward_backward_func", _schedule, "training.py:3614 and :4198 take M from the batch size; ours follows from the plan"),
    Hook("train_step", _train_step, "training.py:3856 calls it; its own timers want barriers"),
    Hook("training_log", _training_log, "training.py:2881 hides negative metrics, such as every log-prob"),
    Hook("get_tensorboard_writer", tolerant("TensorBoard"), "training.py:2881 writes on one rank, whose full disk would end the run"),
    Hook("get_wandb_writer", tolerant("Weights & Biases"), "training.py:2683 the same, of a service that may die"),
    Hook("on_save_checkpoint_success", tolerated, "training/checkpointing.py:1093 the same, after a save", wandb_utils),
    Hook("evaluate_and_print_results", _evaluate_and_print, "training.py:4418 prints a perplexity of every metric"),
    Hook("num_floating_point_operations", _flops, "training.py:391 counts padding and the logits of every prompt token"),
    Hook("check_checkpoint_args", _resume, "training/checkpointing.py:2498 restores only arguments that it knows", checkpointing),
    Hook("checkpoint_and_decide_exit", _decide_exit, "training.py:3226 knows no metrics"),
    Hook("save_checkpoint", _saving("guarded"), "training.py:3086 lets a full disk end the run, and rank 0's own failures hang it"),
    Hook("maybe_finalize_async_save", _saving("finalized"), "training.py:3740 the same, of asynchronous saves"),
    Hook("save_config", _saving("kept"), "core/dist_checkpointing/serialization.py:450 fails on rank 0 alone", serialization),
    Hook("save_state_dict_async_finalize", _saving("hashed"), "state_dict_saver.py:213 the same, and leaves hashing to rank 0", saver),
    Hook("save_integrity_manifest", _manifest, "validation.py:512 the same, and reads one file after another", serialization),
    Hook("add_finalize_fn", _saving("later"), "training/checkpointing.py:1070 the same, of an asynchronous save's tracker", AsyncRequest),
    Hook("preload_tensors", staged, "filesystem_async.py:227 shares with training what is in host memory", FileSystemWriterAsync),
    Hook("get_write_results_queue", _deaf, "filesystem_async.py:65 starts a process of which saving needs an answer", filesystem_async),
    Hook("_get_process", lambda start, state: watched(_deaf(start, state)), "async_utils.py:367 waits for ever for one that was killed",
         PersistentAsyncCaller),
    Hook("verify_integrity_manifest", _verify, "validation.py:590 reads again what was read before the start", serialization),
)


def install(state: LoopState) -> None:
    """Replace the rows of ``HOOKS`` in this process."""
    for hook in HOOKS:
        setattr(hook.module, hook.attribute, hook.make(getattr(hook.module, hook.attribute), state))


def _writes_metrics() -> bool:
    """The last rank: it is on the last pipeline stage, where metrics are, and upstream's writers live there too."""
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def record_metrics(state: LoopState, row: dict[str, Any]) -> None:
    """Append a row to the run's metrics.

    Raises:
        ValueError: it cannot be written, and the run was not told to go on.
    """
    if state.save is None:
        return
    try:
        metrics_file.append(state.save, row)
    except OSError as error:
        complaint = f"{state.save / metrics_file.FILE}: the row of step {row['iteration']} could not be written: {error}"
        if not get_args().continue_on_save_failure:
            raise ValueError(complaint) from error
        state.console(f"[{state.mode}] {complaint}")


_SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "lpo/chosen_logratio", "lpo/rejected_logratio", "grad_norm")


def _console_line(mode: str, where: str, row: dict[str, Any]) -> str:
    named = ((name, row.get(name, row.get(f"eval_{name}"))) for name in _SHOWN)
    parts = [f"{name.rpartition('/')[2] if name.startswith('lpo') else name} {value:.4f}" for name, value in named if value is not None]
    if "learning_rate" in row:
        parts += [f"lr {row['learning_rate'] or 0:.3g}"]
        parts += [f"{row['pairs_per_second']:.1f} samples/s, {row['tokens_per_second']:.0f} tokens/s"]
        parts += [f"{row['tflops_per_device']:.3g} TFLOP/s" + (f" (MFU {row['mfu']:.1%})" if "mfu" in row else "")]
        parts += [f"{row['peak_memory_bytes'] / 2**30:.1f} GiB", "s: " + ", ".join(f"{row[f'seconds/{p}']:.2f} {p}" for p in PHASES)]
    return f"[{mode}] {where} | " + " | ".join(parts)
