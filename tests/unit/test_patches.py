"""Every monkey-patch is a row of a table, in one of three files, and what it replaces still exists as we know it."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType, SimpleNamespace

import megatron.core
import pytest
import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.optimizer import distrib_optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.training import checkpointing, initialize
from megatron.training import training as mt

from megatron_patch import cpu_backend, loop_hooks
from megatron_patch.checkpoint import torch_adam

ROOT = Path(__file__).parents[2]
PATCH_FILES = {
    "megatron_patch/cpu_backend.py", "megatron_patch/loop_hooks.py", "megatron_patch/checkpoint/torch_adam.py",
    "megatron_patch/checkpoint/foreign_code.py",
}  # fmt: skip
SOURCES = sorted(path for folder in ("megatron_patch", "toolkits", "examples", "scripts") for path in (ROOT / folder).rglob("*.py"))
STANDINS = cpu_backend.CUDA_STANDINS + cpu_backend.MEGATRON_STANDINS


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("patch", STANDINS, ids=lambda p: f"{p.module}.{p.attribute}")
def test_redirected_attribute_exists_and_is_still_its_own(patch):
    original = getattr(cpu_backend._resolve(patch.module), patch.attribute)
    assert callable(original) and callable(patch.standin)
    assert original is not patch.standin or patch.standin is torch.manual_seed, "the CPU backend is installed in a pytest process"


def test_nothing_is_compiled_where_dynamo_was_imported_before():
    code = """
import torch._dynamo
from megatron_patch import cpu_backend
assert not torch._dynamo.config.disable
cpu_backend.install()
assert torch._dynamo.config.disable
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_no_attribute_is_redirected_twice():
    rows = [(patch.module, patch.attribute) for patch in STANDINS]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize(
    "row",
    [*STANDINS, *loop_hooks.HOOKS, *torch_adam.PATCHES, *torch_adam.PADDING_PATCHES],
    ids=lambda row: str(row[0]) + "." + str(row[1])[:30],
)
def test_every_row_says_why_and_names_files_that_exist(row):
    assert len(row.why) > 10
    package = Path(megatron.core.__file__).parents[1]
    for name, line in re.findall(r"\b((?:core|training)/[\w/]+\.py)(?::(\d+))?", row.why):
        assert (package / name).is_file(), name
        assert int(line or 1) <= len((package / name).read_text().splitlines())


def test_standins_take_what_upstream_passes():
    standin = next(p.standin for p in cpu_backend.MEGATRON_STANDINS if p.attribute == "_set_cuda_rng_state")
    original = megatron.core.tensor_parallel.random._set_cuda_rng_state
    assert [p.replace("new_state", "state") for p in parameters(original)] == parameters(standin)
    for mine, theirs in ((cpu_backend._Stream, torch.cuda.Stream), (cpu_backend._Event, torch.cuda.Event)):
        public = [name for name in vars(mine) if not name.startswith("_")]
        assert public and all(hasattr(theirs, name) for name in public)


@pytest.mark.parametrize("hook", loop_hooks.HOOKS, ids=lambda hook: hook.attribute)
def test_hooked_global_exists_and_the_loop_looks_it_up(hook):
    assert callable(getattr(hook.module, hook.attribute))
    callers = (mt.train, mt.evaluate, mt.pretrain, mt.save_checkpoint_and_time, checkpointing.load_checkpoint, serialization.save)
    callers += (serialization.load, filesystem_async.FileSystemWriterAsync.prepare_write_data, initialize.initialize_megatron)
    callers += (mt.training_log, checkpointing.save_checkpoint, torch_strategy._import_mcore_async)
    callers += (filesystem_async.FileSystemWriterAsync.get_save_function_and_args, async_utils.PersistentAsyncCaller.schedule_async_call)
    assert any(hook.attribute in names_in(caller.__code__) for caller in callers)


def names_in(code):
    """Globals and attributes that a function looks up, those of functions inside it too."""
    return {*code.co_names, *(name for inner in code.co_consts if isinstance(inner, CodeType) for name in names_in(inner))}


def test_hooked_signatures():
    log = parameters(mt.training_log)
    assert log[:4] == ["loss_dict", "total_loss_dict", "learning_rate", "iteration"] and log[6:8] == ["skipped_iter", "grad_norm"]
    report = parameters(mt.evaluate_and_print_results)
    assert report[:7] == ["prefix", "forward_step_func", "data_iterator", "model", "iteration", "process_non_loss_data_func", "config"]
    assert {"pg_collection", "p2p_communicator"} <= set(report)
    evaluate = parameters(mt.evaluate)
    assert evaluate[:6] == ["forward_step_func", "data_iterator", "model", "process_non_loss_data_func", "config", "verbose"]
    assert {"pg_collection", "p2p_communicator"} <= set(evaluate)
    wanted = ["model", "optimizer", "opt_param_scheduler", "iteration", "num_floating_point_operations_so_far", "checkpointing_context"]
    assert parameters(mt.checkpoint_and_decide_exit) == [*wanted, "train_data_iterator"]
    assert parameters(mt.save_checkpoint_and_time)[-1] == "train_data_iterator" and parameters(mt.save_checkpoint)[0] == "iteration"
    assert parameters(mt.train_step)[:4] == ["forward_step_func", "data_iterator", "model", "optimizer"]
    assert parameters(serialization.save_integrity_manifest) == parameters(serialization.verify_integrity_manifest) == ["checkpoint_dir"]
    assert parameters(checkpointing.check_checkpoint_args)[0] == "checkpoint_args"
    assert parameters(mt.num_floating_point_operations)[:2] == ["args", "batch_size"]


@pytest.mark.parametrize("name", ["no_pipelining", "pipelining_with_interleaving", "pipelining_without_interleaving"])
def test_schedules_take_the_number_of_micro_batches_by_name(name):
    by_name = inspect.signature(getattr(schedules, f"forward_backward_{name}")).parameters
    for parameter in ("num_microbatches", "forward_only", "collect_non_loss_data"):
        assert by_name[parameter].kind is inspect.Parameter.KEYWORD_ONLY


def test_schedule_gets_the_plans_number_of_micro_batches(monkeypatch):
    def stream(slots_by_consumed):
        return SimpleNamespace(plan=SimpleNamespace(step=lambda consumed: [None] * slots_by_consumed[consumed]))

    monkeypatch.setattr(loop_hooks, "get_args", lambda: SimpleNamespace(consumed_train_samples=24))
    state = loop_hooks.LoopState("xpo", None, stream({24: 5}), stream({0: 3}), None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    called = []
    hook = next(hook for hook in loop_hooks.HOOKS if hook.attribute == "get_forward_backward_func")
    run = hook.make(lambda *args, **kwargs: lambda **given: called.append(given), state)(schedule_pg_collection=None)
    run(num_microbatches=12, data_iterator=iter("ab"), model="m")
    run(num_microbatches=12, data_iterator=[iter("ab"), iter("ab")], forward_only=True)
    state.valid = None
    run(num_microbatches=7, data_iterator=iter(""), forward_only=True)
    streams = [given.pop("data_iterator") for given in called]
    assert [[*map("".join, each)] if isinstance(each, list) else "".join(each) for each in streams] == ["ab", ["ab", "ab"], ""]
    assert called == [
        {"num_microbatches": 5, "forward_only": False, "model": "m"},
        {"num_microbatches": 3, "forward_only": True},
        {"num_microbatches": 7, "forward_only": True},
    ]


@pytest.mark.parametrize(
    "method, expected",
    [
        ("sharded_state_dict", ["self", "model_sharded_state_dict", "is_loading"]),
        ("load_state_dict", ["self", "state_dict"]),
        ("_set_main_param_and_optimizer_states", ["self", "model_param", "tensors"]),
    ],
)
def test_wrapped_optimizer_methods(method, expected):
    assert method in {patch.method for patch in torch_adam.PATCHES} and len(torch_adam.PATCHES) == 3
    assert parameters(getattr(distrib_optimizer.DistributedOptimizer, method))[: len(expected)] == expected
    assert isinstance(distrib_optimizer.HAVE_APEX_OR_TE, bool)


def root_name(node):
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def patches_in(path):
    """Lines that set an attribute of something imported: ``setattr(name, ...)`` or ``name.attribute = ...``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    foreign = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            lines.append(node.lineno)
        targets = getattr(node, "targets", []) if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
        lines += [node.lineno for target in targets if isinstance(target, ast.Attribute) and root_name(target) in foreign]
    return lines


def test_monkey_patches_live_in_four_files():
    found = {str(path.relative_to(ROOT)): patches_in(path) for path in SOURCES}
    assert {name for name, lines in found.items() if lines} == PATCH_FILES
    assert all(len(found[name]) == 1 for name in PATCH_FILES), "one place a file, where its table is applied"


def test_the_scan_sees_a_patch(tmp_path):
    lines = ["import torch.cuda", "from x import Y as Z", "z = 1", "z.a = 2", "torch.cuda.f = 3", "Z.g = 4", "setattr(z, 'a', 5)"]
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert sorted(patches_in(tmp_path / "a.py")) == [5, 6, 7]
