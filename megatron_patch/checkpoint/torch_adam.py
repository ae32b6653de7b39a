"""Makes the state of megatron-core's distributed optimizer resumable, with torch's AdamW above all.

Without Transformer Engine and apex, ``DistributedOptimizer`` drives ``torch.optim.AdamW``. It trains, but in megatron-core 0.19.2
it cannot be resumed: three lines fail loudly, and one fails silently by giving all parameters the same ``step`` tensor, which then
advances once per parameter. Each row of ``PATCHES`` mends one of them; none applies when TE or apex is there.

``PADDING_PATCHES`` mends what concerns every optimizer: the fully reshardable format cuts parameters out of a buffer at the wrong
place, silently, as soon as a bucket is not a multiple of lcm(DP, 128) elements and another follows it. That is so with a tied
embedding on the last pipeline stage (a bucket of its own), and with several buckets at DP 3, 6, 12...
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class Patch(NamedTuple):
    """One wrapped method of ``DistributedOptimizer`` (core/optimizer/distrib_optimizer.py, 0.19.2)."""

    method: str
    make: Callable[[Callable], Callable]
    why: str


def _allocate_state(adam: torch.optim.Optimizer) -> None:
    """Give every parameter the state that AdamW makes at its first step."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }


def _with_allocated_state(sharded_state_dict: Callable) -> Callable:
    @functools.wraps(sharded_state_dict)
    def wrapped(self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading:
            _allocate_state(self.optimizer)
        return sharded_state_dict(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    return wrapped


def _with_own_steps(load_state_dict: Callable) -> Callable:
    @functools.wraps(load_state_dict)
    def wrapped(self: Any, state_dict: Any) -> Any:
        result = load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()
        return result

    return wrapped


def _without_step(set_states: Callable) -> Callable:
    @functools.wraps(set_states)
    def wrapped(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        with torch.no_grad():
            return set_states(self, model_param, {"step": None, **tensors})

    return wrapped


def _pad_buckets(buffers: list[Any], state: dict[Any, Any]) -> None:
    """Put the padding between buckets back into gathered tensors: parameters are looked up at positions that count it."""
    for index, buffer in enumerate(buffers):
        for tensors in state[index].values():
            for key, packed in tensors.items():
                if not isinstance(packed, torch.Tensor):
                    continue
                padded, start = packed.new_zeros(buffer.numel), 0
                for bucket in buffer.buckets:
                    size = bucket.numel_unpadded
                    padded[bucket.offset : bucket.offset + size] = packed[start : start + size]
                    start += size
                tensors[key] = padded


def _with_bucket_padding(sharded_param_state: Callable) -> Callable:
    @functools.wraps(sharded_param_state)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero

        def gather_padded(**options: Any) -> Any:
            state = gather(**options)
            if state is not None:
                _pad_buckets(self.buffers, state)
            return state

        self.get_parameter_state_dp_zero = gather_padded
        try:
            return sharded_param_state(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    return wrapped


PATCHES = (
    Patch("sharded_state_dict", _with_allocated_state, ":838 asserts one step value on a template that has no state yet"),
    Patch("load_state_dict", _with_own_steps, ":1025-1032 puts one step tensor into the state of every parameter"),
    Patch(
        "_set_main_param_and_optimizer_states",
        _without_step,
        ":1193-1225 looks for 'step' among the saved tensors, and copies into a leaf that requires grad",
    ),
)


PADDING_PATCHES = (
    Patch(
        "sharded_param_state_fully_reshardable",
        _with_bucket_padding,
        ":1403 drops the padding between buckets, :1790 cuts with offsets that count it",
    ),
)


def install() -> None:
    """Wrap the methods of ``PADDING_PATCHES``, and those of ``PATCHES`` unless TE or apex provide the optimizer. Once, by entries."""
    for patch in (*PADDING_PATCHES, *(() if distrib_optimizer.HAVE_APEX_OR_TE else PATCHES)):
        setattr(DistributedOptimizer, patch.method, patch.make(getattr(DistributedOptimizer, patch.method)))
