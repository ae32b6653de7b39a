"""Makes torch's AdamW resumable under megatron-core's distributed optimizer.

Without Transformer Engine and apex, ``DistributedOptimizer`` drives ``torch.optim.AdamW``. It trains, but in megatron-core 0.19.2
it cannot be resumed: three lines fail loudly, and one fails silently by giving all parameters the same ``step`` tensor, which then
advances once per parameter. Each row of ``PATCHES`` mends one of them; none applies when TE or apex is there.
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


PATCHES = (
    Patch("sharded_state_dict", _with_allocated_state, ":838 asserts one step value on a template that has no state yet"),
    Patch("load_state_dict", _with_own_steps, ":1025-1032 puts one step tensor into the state of every parameter"),
    Patch(
        "_set_main_param_and_optimizer_states",
        _without_step,
        ":1193-1225 looks for 'step' among the saved tensors, and copies into a leaf that requires grad",
    ),
)


def install() -> None:
    """Wrap the methods of ``PATCHES`` unless TE or apex provide the optimizer. Called by entries, once."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    for patch in PATCHES:
        setattr(DistributedOptimizer, patch.method, patch.make(getattr(DistributedOptimizer, patch.method)))
