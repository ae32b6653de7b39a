"""Any number of worker processes makes the same store, reports the same first mistake, and is gone when told to stop."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from toolkit_helpers import ROOT, files, record, write_jsonl

from toolkits.lpo_data_preprocessing import build_pairs

RECORDS = [
    record(i, chosen=f"{'word ' * (i % 7)}é {i}", rejected=[f"{i}", "9" * (i % 5 * 30 + 1), "x<|im_end|>" if i % 11 == 0 else " "])
    for i in range(60)
]


def command(folder, tokenizer, name, workers, *more):
    paths = ["--input", folder / "in.jsonl", "--output", folder / name, "--tokenizer", tokenizer, "--workers", workers]
    return [str(word) for word in (*paths, "--drop-empty", "--max-length", 150, *more)]


def contents(folder, name):
    """Everything a store holds but its own name."""
    manifest = json.loads((folder / f"{name}.json").read_text())
    tally = json.loads((folder / f"{name}.tally.json").read_text())
    return manifest, tally, [(folder / f"{name}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".meta.npz")]


def test_the_store_does_not_depend_on_the_number_of_workers(tiny_qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(build_pairs, "CHUNK_BYTES", 700)
    write_jsonl(tmp_path / "in.jsonl", RECORDS)
    for workers in (1, 2, 3):
        assert build_pairs.main(command(tmp_path, tiny_qwen, f"s{workers}", workers)) == 0
    manifest, tally, _ = contents(tmp_path, "s1")
    assert manifest["count"] == tally["kept"] > 50 and set(tally["dropped"]) == {"empty_rejected", "too_long_rejected"}
    assert manifest["template"]["exceptions"] == 6
    assert contents(tmp_path, "s1") == contents(tmp_path, "s2") == contents(tmp_path, "s3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({20: "{", 21: "["}, "in.jsonl:21: not valid JSON"),
        ({20: record(20, chosen=7, rejected=["1"]), 22: "{"}, "in.jsonl:21: field 'chosen' must be a str"),
        ({20: record(3, rejected=["1"]), 23: "{"}, "in.jsonl:21: id 'r3-0' is in the store already"),
        ({20: record(20, rejected=["1"]) | {"prompt": [{"role": "user"}]}, 21: record(3, rejected=["1"])}, "in.jsonl:21: a message needs"),
    ],
)
def test_the_first_mistake_is_reported(tiny_qwen, tmp_path, monkeypatch, fails, changes, message):
    monkeypatch.setattr(build_pairs, "CHUNK_BYTES", 700)
    write_jsonl(tmp_path / "in.jsonl", [changes.get(i, item) for i, item in enumerate(RECORDS)])
    for workers in (1, 2):
        assert message in fails(build_pairs.main, *command(tmp_path, tiny_qwen, "s", workers))
        assert files(tmp_path) == ["in.jsonl"]


def test_a_mistake_inside_a_chunk_is_found_before_a_later_one(tiny_qwen, tmp_path, fails):
    records = [*RECORDS[:5], record(5, chosen=" ", rejected=["1"]), record(0, rejected=["1"]), "{"]
    write_jsonl(tmp_path / "in.jsonl", records)
    argv = [word for word in command(tmp_path, tiny_qwen, "s", 2) if word != "--drop-empty"]
    assert "in.jsonl:1: empty rejected answer of r0-2" not in fails(build_pairs.main, *command(tmp_path, tiny_qwen, "s", 2))
    write_jsonl(tmp_path / "in.jsonl", [record(i, rejected=["1"]) for i in range(5)] + records[5:])
    assert "in.jsonl:6: empty chosen answer of r5-0" in fails(build_pairs.main, *argv)


def start(folder, tokenizer):
    """The stage on an input that keeps it busy for long, once its workers are at work."""
    with open(folder / "in.jsonl", "w", encoding="utf-8") as stream:
        for i in range(40_000):
            stream.write(json.dumps(record(i, chosen=f"{i} " * 100, rejected=[f"{i}"])) + "\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkits.lpo_data_preprocessing.build_pairs", *command(folder, tokenizer, "s", 2, "--max-length", 9999)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells start background jobs with it ignored
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in folder.glob(".s.bin.tmp-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, -signal.SIGINT)])
def test_told_to_stop_nothing_stays_behind(tiny_qwen, tmp_path, number, code):
    process, helpers = start(tmp_path, tiny_qwen)
    os.killpg(process.pid, number)  # to the workers too, as Ctrl-C in a terminal or SLURM do it
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert files(tmp_path) == ["in.jsonl"]
    assert len(helpers) >= 3 and not psutil.wait_procs(helpers, timeout=10)[1]
    assert "Traceback" not in errors or code != 75
