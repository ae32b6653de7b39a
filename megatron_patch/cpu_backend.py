"""What makes megatron-core's CUDA requests run on the CPU, and nothing else.

megatron-core's training loop asks for CUDA by name (``device='cuda'``, ``.cuda()``, streams, events, memory statistics).
On a machine without a GPU the very same loop runs once those requests are redirected: a ``TorchFunctionMode`` maps every
``device=`` argument to the CPU, and the table ``CUDA_STANDINS`` replaces the few functions of ``torch.cuda`` that touch the
driver. Nothing here knows about preferences, models or data.

``install()`` is called by entry points only, before megatron is imported. Importing this module changes nothing.
"""

import importlib
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")

# Dynamo would compile with inductor for a GPU that is not there; CUDA_DEVICE_MAX_CONNECTIONS=1 is asserted by
# megatron/training/arguments.py when TP or CP exceed 1.
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


_HERE = "LPO_CPU_BACKEND"
"""Set for the processes that this one starts."""


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    return isinstance(device, int) or str(device).startswith("cuda")


class _CpuForCuda(TorchFunctionMode):
    """Maps ``device=cuda...`` (string, ``torch.device`` or ordinal) of every torch call to the CPU."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # clip_grads.py:174 and distrib_optimizer.py:466 compare with the name of the CUDA tensor type.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        if func in (torch.Tensor.backward, torch.autograd.backward) and kwargs.get("inputs") is None:
            return self._backward(args[0], **kwargs)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]) and not isinstance(args[1], bool):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)

    def _backward(self, tensors: Any, gradient: Any = None, grad_tensors: Any = None, **rest: Any) -> None:
        """Backward with this mode on: torch switches it off while it is asked, yet megatron's backward methods ask for CUDA too.

        core/tensor_parallel/random.py:656 (recomputation) comes this way. Torch asks no mode when it is given edges instead of tensors.
        """
        outputs = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        with self:
            torch.autograd.backward(
                [torch.autograd.graph.get_gradient_edge(t) for t in outputs], gradient if grad_tensors is None else grad_tensors, **rest
            )


class _Stream:
    """A stream on a device that runs everything in order: all waits are already over."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...

    synchronize = wait_stream = wait_event = staticmethod(lambda *_: None)

    def record_event(self, event: Any = None) -> Any:
        """Return ``event`` or a new one, recorded now."""
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        """Return True: the work has always finished."""
        return True


class _Event:
    """A CUDA event measured with the wall clock (milliseconds, as torch does)."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = 0.0

    def record(self, *_: Any) -> None:
        """Remember the present time."""
        self.seconds = time.perf_counter()

    wait = synchronize = staticmethod(lambda *_: None)

    def query(self) -> bool:
        """Return True: the event has always happened."""
        return True

    def elapsed_time(self, end: "_Event") -> float:
        """Milliseconds from this event to ``end``."""
        return 1000.0 * (end.seconds - self.seconds)


class _DeviceProperties(NamedTuple):
    """What validate_args and the logger ask of a device; an Ampere-like capability keeps their checks quiet."""

    name: str = "cpu"
    major: int = 8
    minor: int = 0
    total_memory: int = 0
    multi_processor_count: int = 1


@contextmanager
def _no_stream(_: Any = None) -> Any:
    yield


def _nothing(*_: Any, **__: Any) -> None: ...


def _zero(*_: Any, **__: Any) -> int:
    return 0


class Patch(NamedTuple):
    """One redirected attribute: where it lives, what stands in for it, who asks for it (megatron-core 0.19.2)."""

    module: str
    attribute: str
    standin: Any
    why: str


def _cpu_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


CUDA_STANDINS = (
    Patch("torch.cuda", "is_available", lambda: True, "training/initialize.py:66 asserts it"),
    Patch("torch.cuda", "current_device", _zero, "106 uses; int 0, because f'cuda:{current_device()}' is built from it"),
    Patch("torch.cuda", "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "training/initialize.py: rank to device"),
    Patch("torch.cuda", "set_device", _nothing, "training/initialize.py"),
    Patch("torch.cuda", "synchronize", _nothing, "core/timers.py, core/pipeline_parallel/p2p_communication.py"),
    Patch("torch.cuda", "empty_cache", _nothing, "training/training.py, --empty-unused-memory-level"),
    Patch("torch.cuda", "Stream", _Stream, "core/distributed, core/dist_checkpointing"),
    Patch("torch.cuda", "Event", _Event, "core/distributed, core/timers.py"),
    Patch("torch.cuda", "stream", _no_stream, "core/distributed/param_and_grad_buffer.py"),
    Patch("torch.cuda", "current_stream", _Stream, "core/distributed/param_and_grad_buffer.py"),
    Patch("torch.cuda", "default_stream", _Stream, "core/distributed"),
    Patch("torch.cuda", "set_stream", _nothing, "core/distributed"),
    Patch("torch.cuda", "is_current_stream_capturing", lambda: False, "torch/optim/optimizer.py, health check of every step"),
    Patch("torch.cuda", "get_device_capability", lambda *_: (8, 0), "training/arguments.py:1411"),
    Patch("torch.cuda", "get_device_properties", lambda *_: _DeviceProperties(), "training/arguments.py:1440"),
    Patch("torch.cuda", "get_device_name", lambda *_: "cpu", "core/timers.py, logging"),
    Patch("torch.cuda", "memory_stats", lambda *_, **__: {}, "training/utils: report_memory"),
    Patch("torch.cuda", "memory_allocated", _zero, "training/utils: report_memory"),
    Patch("torch.cuda", "memory_reserved", _zero, "training/utils: report_memory"),
    Patch("torch.cuda", "max_memory_allocated", _zero, "training/utils: report_memory"),
    Patch("torch.cuda", "max_memory_reserved", _zero, "training/utils: report_memory"),
    Patch("torch.cuda", "reset_peak_memory_stats", _nothing, "training/training.py"),
    Patch("torch.cuda", "device_memory_used", _zero, "training/training.py: theoretical memory report"),
    Patch("torch.cuda", "manual_seed", torch.manual_seed, "core/tensor_parallel/random.py: tracker seeds"),
    Patch("torch.cuda", "get_rng_state", _cpu_rng_state, "core/tensor_parallel/random.py"),
    Patch("torch.cuda", "set_rng_state", _set_cpu_rng_state, "core/tensor_parallel/random.py"),
    Patch("torch.cuda.random", "get_rng_state", _cpu_rng_state, "core/tensor_parallel/random.py:92"),
    Patch("torch.cuda.random", "set_rng_state", _set_cpu_rng_state, "core/tensor_parallel/random.py"),
    Patch("torch.cuda.nvtx", "range_push", _nothing, "core/utils.py: nvtx_range_push"),
    Patch("torch.cuda.nvtx", "range_pop", _nothing, "core/utils.py: nvtx_range_pop"),
    Patch("torch.accelerator", "current_accelerator", lambda *_, **__: _CPU, "core/dist_checkpointing device choice"),
    Patch("torch.Tensor", "pin_memory", lambda tensor, *_, **__: tensor, "copies to the device that nobody waits for"),
    Patch("torch.nn.Module", "cuda", lambda module, *_: module, "training/models/dist_utils.py: model to device"),
)

# Applied after megatron can be imported: names that megatron bound at import time.
MEGATRON_STANDINS = (
    Patch("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _cpu_rng_state, "graph-safe branch uses CUDA generators"),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
        "graph-safe branch uses CUDA generators",
    ),
    Patch("megatron.core.datasets.utils", "compile_helpers", _nothing, "the wheel ships the compiled helper but no Makefile"),
)

_installed: list[TorchFunctionMode] = []


def _resolve(path: str) -> Any:
    """The module, or the class of a module, called ``path``."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(importlib.import_module(parent), name)


def _apply(patches: tuple[Patch, ...]) -> None:
    for patch in patches:
        setattr(_resolve(patch.module), patch.attribute, patch.standin)


def install() -> None:
    """Redirect CUDA requests of this process to the CPU, for good. Idempotent.

    Raises:
        RuntimeError: this process has used a GPU already, so some of its tensors live there.
    """
    if _installed:
        return
    os.environ.update(ENVIRONMENT | {_HERE: "1"})
    if torch.cuda.is_initialized():
        raise RuntimeError("cpu_backend.install() must run before CUDA is initialised in this process")
    dynamo_config = importlib.import_module("torch._dynamo.config")  # read the environment already, where dynamo was imported earlier
    dynamo_config.disable = True  # type: ignore[attr-defined]
    _apply(CUDA_STANDINS)
    mode = _CpuForCuda()
    mode.__enter__()
    _installed.append(mode)
    _apply(MEGATRON_STANDINS)


def install_in_helper() -> None:
    """In a process that multiprocessing started: ``install()`` if its parent did. The writer of asynchronous saves asks for CUDA too."""
    if os.environ.get(_HERE):
        install()
