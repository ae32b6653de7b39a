"""What the code never does, read from the code: unpickle, run code that came with a model, build a shell's words from data."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.checkpoint import filesystem

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
            if names == ["numpy"] and any(alias.name == "load" for alias in node.names):
                yield "imports numpy.load by another name"
        if not isinstance(node, ast.Call):
            continue
        name, given = said(node.func), {word.arg: said(word.value) for word in node.keywords}
        if name in ("eval", "exec", "os.system", "os.popen", "torch.load", "torch.jit.load", "joblib.load"):
            yield f"calls {name}"
        if name in ("os.umask", "os.chmod", "tempfile.mkstemp", "tempfile.NamedTemporaryFile") or name.endswith(".chmod"):
            yield f"{name}: permissions are the umask's"
        words = [said(word) for word in node.args[0].elts[:2]] if node.args and isinstance(node.args[0], ast.List) else []
        if name.startswith("subprocess.") and (given.get("shell", "False") != "False" or words in (["'bash'", "'-c'"], ["'sh'", "'-c'"])):
            yield f"{name} with a shell"
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            yield f"{name} may unpickle"
        if name.endswith("from_pretrained") and name.split(".")[-2].startswith("Auto"):
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
    assert not list(shell_complaints(path.read_text(encoding="utf-8")))


def shell_complaints(text: str) -> Iterator[str]:
    """Each line that should not be there."""
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue
        if re.search(r"(^|[;&|(]\s*)eval\b|\b(ba)?sh\s+-c\b|\b(umask (?!077)|chmod\s)", line):
            yield line
        if re.match(r"\s*(source|\.)\s", line) and "scripts/launch.sh" not in line:
            yield line


@pytest.mark.parametrize("text", ['eval "$words"', 'x; eval "$words"', 'bash -c "$words"', "chmod 777 file", 'source "$CONFIG"', ". file"])
def test_what_is_looked_for_in_shells_is_found(text: str) -> None:
    assert list(shell_complaints(text))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "torch.load(path)",
        "np.load(path)",
        "subprocess.run(words, shell=True)",
        "eval(text)",
        "AutoTokenizer.from_pretrained(folder)",
        "transformers.AutoTokenizer.from_pretrained(folder)",
        "from numpy import load",
        "subprocess.run(['bash', '-c', words])",
        "path.chmod(0o777)",
        "os.umask(0)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)",
    ],
)
def test_what_is_looked_for_is_found(source: str) -> None:
    assert list(complaints(source))


def test_torchs_reader_unpickles_where_we_think() -> None:
    """``foreign_code.forbid`` gives that module a stand-in with these two functions."""
    assert set(re.findall(r"\bpickle\.(\w+)", inspect.getsource(filesystem))) == {"load", "dump"}
