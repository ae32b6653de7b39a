"""What a run was, from the files that it leaves: texts by hand, the picture by its size and by what it refuses."""

import base64
import json
import re
import runpy
from pathlib import Path

import pytest

from megatron_patch.run_record import append, starts

show = runpy.run_path(str(Path(__file__).parents[3] / "scripts/show_run.py"))


@pytest.fixture
def run(tmp_path):
    """Two starts, three steps, an evaluation, a row that is being written."""
    folder = tmp_path / "math"
    store = {"use": "training", "prefix": "data/train", "samples": 48, "fingerprint": "ab" * 32}
    store["reference"] = {"weights": "cd" * 32, "dtype": "bfloat16"}
    held_out = store | {"use": "validation", "prefix": "data/held-out", "samples": 6, "reference": None}
    record = {
        "started": "2026-01-01T10:00:00+00:00", "command": ["train_qwen.py", "--lr", "1e-6", "a b"], "mode": "xpo",
        "device": "cuda", "processes": 16,
        "layout": {"tp": 4, "pp": 2, "cp": 1, "dp": 2}, "versions": {"python": "3.12.1", "torch": "2.13.0"}, "revision": "0123abc+changes",
        "weights": {"path": "Qwen2.5-7B", "fingerprint": "cd" * 32}, "stores": [store, held_out],
        "settings": {"lr": 1e-6, "loss_type": "lpo-ste\x1b[2J"},
    }  # fmt: skip
    append(folder, record)
    append(folder, record | {"started": "2026-01-01T12:00:00+00:00"})
    rows = [{"iteration": i, "loss": 2.0 / i, "grad_norm": None if i == 2 else 1.0} for i in (1, 2, 3)]
    rows.append({"iteration": 3, "eval_loss": 0.7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 4, "lo')
    (folder / "run_state.json").write_text('{"state": "preempted", "iteration": 3}')
    (folder / "best.json").write_text('{"step": 3, "metric": "eval_loss", "value": 0.7}')
    for step in (2, 3):
        (folder / f"iter_{step:07d}").mkdir()
    return folder


def test_facts(run, capsys):
    assert show["main"]([str(run)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "2026-01-01T10:00:00+00:00, 2 times, last 2026-01-01T12:00:00+00:00", "preempted at step 3",
        "xpo on cuda, 16 processes: TP 4 PP 2 CP 1 DP 2",
        "Qwen2.5-7B (cdcdcdcdcdcd)", "data/train: 48 (abababababab), reference by cdcdcdcdcdcd in bfloat16", "0123abc+changes",
        "validation data      data/held-out: 6", "train_qwen.py --lr 1e-6 'a b'",
        "torch 2.13.0", "2, 3", "step 3, eval_loss 0.7", "2 at step 1, 0.666667 at step 3",
    ):  # fmt: skip
        assert part in shown, part
    assert "--loss-type" not in shown
    assert show["main"]([str(run), "--settings"]) == 0
    shown = capsys.readouterr().out
    assert "--loss-type" in shown and "--lr                 1e-06" in shown and "\x1b" not in shown


def test_curves_of_several_runs(run, tmp_path, capsys):
    picture = tmp_path / "curves.png"
    assert show["main"]([str(run), str(run), "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert show["main"]([str(run), "--png", str(picture), "--metrics", "losss"]) == 2
    assert "no run has a metric 'losss'; there are eval_loss, grad_norm, loss" in capsys.readouterr().err


def test_a_page_that_needs_no_other_file(run, tmp_path):
    page = tmp_path / "runs.html"
    assert show["main"]([str(run), "--html", str(page)]) == 0
    text = page.read_text()
    assert "xpo on cuda, 16 processes: TP 4 PP 2 CP 1 DP 2" in text and "0.666667 at step 3" in text
    (picture,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert "data/train: 48" in text and "data/held-out: 6" in text and "--loss-type" in text
    assert b"<svg" in base64.b64decode(picture) and not re.search(r'(src|href)="(?!data:)', text)


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert show["main"]([str(tmp_path)]) == 2
    assert "run.json: the record of a run's starts is missing" in capsys.readouterr().err


def test_a_run_without_steps_yet(run, tmp_path, capsys):
    (run / "metrics.jsonl").unlink()
    assert show["main"]([str(run), "--png", str(tmp_path / "curves.png")]) == 2
    assert "nothing to draw yet" in capsys.readouterr().err


def test_starts_are_appended(tmp_path):
    for number in range(3):
        append(tmp_path / "new", {"number": number})
    assert [start["number"] for start in starts(tmp_path / "new")] == [0, 1, 2]
