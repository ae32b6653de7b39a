"""What the code never does, read from the code: unpickle, run code that came with a model, build a shell's words from data."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_patch", "toolkits", "examples", "scripts", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SHELL = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.sh"))


def said(node: ast.expr) -> str:
    """A called name as it is written: ``torch.load``."""
    return ast.unparse(node)


def complaints(source: str) -> Iterator[str]:
    """Each call or import that should not be there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "cloudpickle"))
        if not isinstance(node, ast.Call):
            continue
        name, given = said(node.func), {word.arg: said(word.value) for word in node.keywords}
        if name in ("eval", "exec", "os.system", "os.popen", "torch.load", "torch.jit.load", "joblib.load"):
            yield f"calls {name}"
        if name.startswith("subprocess.") and given.get("shell", "False") != "False":
            yield f"{name} with a shell"
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            yield f"{name} may unpickle"
        if name.endswith("from_pretrained") and name.split(".")[0].startswith("Auto"):
            wanted = {"trust_remote_code": "False"} | ({"use_safetensors": "True"} if "Model" in name else {})
            yield from (f"{name} without {word}={value}" for word, value in wanted.items() if given.get(word) != value)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    if path.name == "foreign_code.py":  # refuses pickles with an unpickler of its own
        source = source.replace("import pickle ", "")
        assert "pickle.Unpickler" in source and "pickle.load" not in source
    assert not list(complaints(source))


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shell(path: Path) -> None:
    """No eval, no `bash -c`, no `source` of anything but our own file."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    bad = [line for line in lines if re.search(r"(^|[;&|(]\s*)eval\b|\b(ba)?sh\s+-c\b", line)]
    assert not bad
    assert all("scripts/launch.sh" in line for line in lines if re.match(r"\s*(source|\.)\s", line))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "torch.load(path)",
        "np.load(path)",
        "subprocess.run(words, shell=True)",
        "eval(text)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)",
    ],
)
def test_what_is_looked_for_is_found(source: str) -> None:
    assert list(complaints(source))
