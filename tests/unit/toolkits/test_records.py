"""What the stages share: lines, errors by place, files whole or not at all, counts."""

import os
import signal
import subprocess
import sys
import time

import pytest
from toolkit_helpers import ROOT, files, read_jsonl, write_jsonl

from toolkits.lpo_data_preprocessing.records import (
    StageParser,
    Tally,
    check_messages,
    close_stage,
    content_hash,
    jsonl_writer,
    progress,
    read_records,
    run_stage,
)


def test_read_counts_lines_and_skips_blank_ones(tmp_path):
    path = write_jsonl(tmp_path / "a", [{"a": 1}, "", "   ", {"b": "ü"}])
    assert list(read_records(path)) == [(1, {"a": 1}), (4, {"b": "ü"})]


@pytest.mark.parametrize("line", ['{"a": 1', "[1]", '"text"', "nothing", "\udcff"])
def test_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: "):
        list(read_records(path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file"):
        list(read_records(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "messages", [[], "text", [{"role": "user"}], [{"role": "boss", "content": "x"}], [{"role": "user", "content": 1}], ["x"]]
)
def test_bad_messages(messages):
    with pytest.raises(ValueError, match="f:3: "):
        check_messages(messages, "f:3")


def test_writer_is_all_or_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), jsonl_writer(tmp_path / "sub" / "a") as write:
        write({"a": 1})
        assert len(files(tmp_path / "sub")) == 1
        raise KeyboardInterrupt
    assert files(tmp_path / "sub") == []
    with jsonl_writer(tmp_path / "sub" / "a") as write:
        write({"a": "ü\n"})
    assert read_jsonl(tmp_path / "sub" / "a") == [{"a": "ü\n"}] and files(tmp_path / "sub") == ["a"]


def test_content_hash_ignores_key_order_only():
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert len({content_hash(v) for v in ({"a": 1}, {"a": "1"}, [1, 2], [2, 1], "ü")}) == 5
    assert content_hash("\ud800")  # a lone surrogate, valid in JSON, is no reason to crash


def test_tally(tmp_path):
    tally = Tally(read=10, kept=5)
    tally.drop("long", 4)
    tally.left_out["same"] += 100
    tally.check(0.4)
    with pytest.raises(ValueError, match=r"4 of 10 records dropped, more than --max-drop-fraction 0\.39 \(same 100, long 4\)"):
        tally.check(0.39)
    with pytest.raises(ValueError, match=r"no records left \(empty input\)"):
        Tally().check(1.0)
    lines = close_stage(tally, tmp_path / "out").splitlines()
    assert lines[0] == f"10 records read, 5 kept, 4 dropped, 100 left out -> {tmp_path}/out"
    assert [line.split() for line in lines[1:]] == [["dropped", "long", "4"], ["left", "out", "same", "100"]]


def run(body, argv=("--input", "i", "--output", "o")):
    return run_stage(StageParser("demo", "d", "--input x", output="o"), body, argv)


def test_run_stage_codes(capsys):
    assert run(lambda args: f"{args.input} done\n  table") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("demo: i done (") and out[1] == "  table"

    def mistake(args):
        raise ValueError("file:3: bad\n  thing")

    for body, argv in ((mistake, ("--input", "i", "--output", "o")), (mistake, ("--input", "i")), (mistake, ("--nonsense",))):
        assert run(body, argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(ZeroDivisionError):  # a defect of ours is not dressed up as a user's mistake
        run(lambda args: str(1 // 0))


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        run(str, ["--help"])
    assert stop.value.code == 0 and "example:\n  python -m toolkits.lpo_data_preprocessing.demo --input x" in capsys.readouterr().out


def test_sigterm_leaves_nothing(tmp_path):
    body = f"""
import time
from toolkits.lpo_data_preprocessing.records import *
def body(args):
    with jsonl_writer({str(tmp_path / "out")!r}) as write:
        write({{"a": 1}})
        print("ready", flush=True)
        time.sleep(60)
run_stage(StageParser("demo", "d", "", output="o"), body, ["--input", "i", "--output", "o"])
"""
    process = subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout and process.stdout.readline() == b"ready\n"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75 and time.monotonic() - started < 10
    assert files(tmp_path) == []


def test_progress_makes_lines_when_not_a_terminal(capsys):
    assert list(progress(range(3), what="w", unit="u")) == [0, 1, 2]
    assert "\r" not in capsys.readouterr().err
