"""Imports point one way, and importing the library changes nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = sorted((ROOT / "megatron_patch").rglob("*.py"))
PYTHON = sys.stdlib_module_names
# What each part of the library may import of the library; a part not listed here may import no other.
INWARD = {
    "preference": set(),
    "evaluation": set(),
    "data": {"preference", "transfer"},
    "model": {"checkpoint", "preference", "transfer"},
    "checkpoint": {"data", "errors"},
    "objectives": {"data", "preference"},
    "arguments": {"preference", "model", "checkpoint", "data"},
    "entry": {"arguments", "checkpoint", "errors"},
    "step_checks": {"data", "errors"},
    "forward_step": {"data", "model", "objectives", "preference", "step_checks"},
    "throughput": {"data", "model"},
    "loop_hooks": {"best_so_far", "checkpoint", "data", "errors", "metric_writers", "metrics_file", "model", "throughput"},
    "metric_writers": set(),
    "metrics_file": {"data"},
    "best_so_far": set(),
    "checksums": {"checkpoint", "data"},
    "run_record": {"data", "streams"},
    "refusals": {"arguments", "checkpoint", "data", "preference"},
    "streams": {"checkpoint", "data", "model", "objectives", "throughput"},
    "built_model": {"checkpoint", "loop_hooks", "model", "refusals", "streams"},
    "scoring": {"built_model", "checkpoint", "data", "errors", "evaluation", "forward_step", "refusals"},
    "run": {
        "arguments", "best_so_far", "built_model", "checkpoint", "checksums", "data", "errors", "evaluation", "forward_step", "loop_hooks",
        "metrics_file", "model", "objectives", "preference", "refusals", "run_record", "scoring", "step_checks", "streams",
    },
    "memory_plan": {"data", "model", "preference"},
    "dry_run": {"built_model", "checkpoint", "memory_plan", "model", "refusals", "run"},
    "cpu_backend": set(),
    "display": set(),
    "transfer": set(),
}  # fmt: skip
# What these may import from outside, besides Python's own library; where the value is False, only inside a function.
OUTWARD = {
    "preference": {"torch": True},
    "evaluation": {"torch": True, "numpy": True, "transformers": False},
    "checkpoint/hf_mapping.py": {"torch": True, "numpy": True},
    "checkpoint/hf_files.py": {"torch": True, "safetensors": True},
    "data": {"torch": True, "numpy": True, "megatron": False, "transformers": False},
    "objectives": {"torch": True},
    "model": {"torch": True, "megatron": True},
    "arguments.py": {"torch": True},
    "entry.py": {"torch": True, "megatron": False},
    "cpu_backend.py": {"torch": True},
    "transfer.py": {"torch": True},
}


def name(path):
    return path.relative_to(ROOT / "megatron_patch").as_posix()


def part(path):
    return name(path).split("/")[0].removesuffix(".py")


def imports(path):
    """[(module, names, True if at the top of the file)]; a relative import has no place here."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, [], node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append((node.module, [alias.name for alias in node.names], node in tree.body))
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_library_imports_point_inwards(path):
    own = part(path)
    for module, names, _ in imports(path):
        root, *rest = module.split(".")
        assert root not in ("toolkits", "examples", "scripts", "tests"), module
        if root == "megatron_patch":
            targets = {rest[0]} if rest else set(names)
            assert "cpu_backend" not in targets, "only entries choose the device"
            assert targets <= INWARD.get(own, set()) | {own}, f"{own} imports {targets}"


@pytest.mark.parametrize("where", OUTWARD)
def test_inner_parts_need_little_from_outside(where):
    paths = [path for path in LIBRARY if name(path) == where or part(path) == where]
    assert paths
    for path in paths:
        for module, _, at_top in imports(path):
            root = module.split(".")[0]
            if root in PYTHON or root == "megatron_patch":
                continue
            assert root in OUTWARD[where], f"{name(path)} imports {module}"
            assert OUTWARD[where][root] or not at_top, f"{name(path)} imports {module} at its top"


def test_model_does_not_know_the_training_loop():
    for path in LIBRARY:
        if part(path) in ("model", "data", "forward_step", "objectives", "preference", "evaluation"):
            assert not [module for module, _, _ in imports(path) if module.startswith("megatron.training")], path


def test_toolkits_import_the_library_and_nothing_that_imports_them():
    for path in sorted((ROOT / "toolkits").rglob("*.py")):
        assert not [m for m, _, _ in imports(path) if m.split(".")[0] in ("examples", "scripts", "tests")], path


CHANGES = """
import importlib, json, pkgutil, sys
import torch
from megatron_patch import cpu_backend

def standins():
    return {f"{p.module}.{p.attribute}": getattr(cpu_backend._resolve(p.module), p.attribute) for p in cpu_backend.CUDA_STANDINS}

before = {name: value for name, value in vars(torch.cuda).items() if callable(value)} | standins()
import megatron_patch.arguments, megatron_patch.entry
early = sorted(m for m in sys.modules if m == "megatron" or m.startswith("megatron."))
names = [m.name for m in pkgutil.walk_packages(megatron_patch.__path__, "megatron_patch.")]
for name in names:
    importlib.import_module(name)
after = vars(torch.cuda) | standins()
changed = sorted(name for name, value in before.items() if after.get(name) is not value)
from torch.overrides import _get_current_function_mode_stack
print(json.dumps({"early": early, "count": len(names), "changed": changed, "modes": len(_get_current_function_mode_stack())}))
"""


def test_importing_everything_leaves_torch_alone():
    done = subprocess.run([sys.executable, "-c", CHANGES], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["changed"] == [] and seen["modes"] == 0
    assert seen["early"] == [], "entries install the CPU backend after importing these, and megatron must come later"
    assert seen["count"] == len(LIBRARY) - 1


def calls(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_habits(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert len(ast.get_docstring(tree) or "") > 20, "a module opens with what it is"
    assert "print" not in calls(path), "the library does not print"
    assert "get_args" not in calls(path) or name(path) == "loop_hooks.py"
    assert path.name != "utils.py" and "sys.path" not in path.read_text(encoding="utf-8")
    assert not any("*" in names for _, names, _ in imports(path))


def test_entries_are_short():
    entry = ROOT / "examples/qwen2_5/train_qwen.py"
    assert len(entry.read_text(encoding="utf-8").splitlines()) <= 80
