"""What the toolkit's tests share: records, JSONL files, the scripts as modules."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
QUESTIONS = [f"{name} has {a} pens and finds {b} more. How many pens?" for name in ("Ana", "Ben") for a in (12, 47) for b in (10, 35, 58)]


def load_script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_jsonl(path: Path, records: list) -> Path:
    """Records as lines; a string stands for itself (a broken line)."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    """All lines of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> list[str]:
    """Names in a folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


def record(i: int, question: str = "", chosen: str = "", **more) -> dict:
    """One normalised record."""
    prompt = [{"role": "user", "content": question or QUESTIONS[i % len(QUESTIONS)]}]
    return {"id": f"r{i}", "prompt": prompt, "chosen": chosen or f"{i}+1={i + 1}\n#### {i + 1}", "rejected": []} | more


def sampled(*texts: str, cut: tuple[int, ...] = ()) -> list[dict]:
    """Candidates; those whose number is in `cut` reached the length limit."""
    return [{"text": text, "finish_reason": "length" if i in cut else "stop"} for i, text in enumerate(texts)]
