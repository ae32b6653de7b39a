"""A tokenizer and a model made by the repository's own maker, and a way to call a stage that must refuse."""

from pathlib import Path

import pytest
from toolkit_helpers import QUESTIONS, load_script, write_jsonl


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory) -> Path:
    """A checkpoint folder: 1 layer, 16 wide, its own tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    texts = write_jsonl(folder / "text.jsonl", [{"question": q, "answer": "7+5=12, 4+3+1=8\n#### 82"} for q in QUESTIONS])
    sizes = ["--layers", "1", "--hidden", "16", "--ffn", "24", "--heads", "2", "--kv-groups", "1"]
    assert load_script("make_tiny_qwen").main(["--input", str(texts), "--output", str(folder / "model"), *sizes]) == 0
    return folder / "model"


@pytest.fixture
def fails(capsys):
    """Call a stage that must refuse: exit code 2 and exactly one line on stderr, which is returned."""

    def call(main, *argv) -> str:
        assert main([str(a) for a in argv]) == 2
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("[error] "), captured.err
        return lines[0]

    return call
