"""Files, folders and globs; every kind of file gives the same records, and memory does not grow with them."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from toolkit_helpers import ROOT, read_jsonl, write_jsonl

from toolkits.lpo_data_preprocessing import sources
from toolkits.lpo_data_preprocessing.normalise import main
from toolkits.lpo_data_preprocessing.sources import as_record, find_inputs, read_items

ROWS = [{"question": f"q{i} ü", "answer": f"a{i} 山", "level": {"n": [i]}} for i in range(600)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
    ".jsonl": lambda path: path.write_bytes(LINES),
    ".json": lambda path: path.write_bytes(ARRAY),
    ".parquet": lambda path: parquet(path, ROWS),
    ".jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:5000]) + gzip.compress(LINES[5000:])),  # two members, as cat makes
    ".json.gz": lambda path: path.write_bytes(gzip.compress(ARRAY)),
    ".jsonl.zst": lambda path: path.write_bytes(pyarrow.compress(LINES, codec="zstd", asbytes=True)),
    ".json.zst": lambda path: path.write_bytes(pyarrow.compress(ARRAY, codec="zstd", asbytes=True)),
}
PLACES = {".jsonl": (":1", ":600"), ".json": ("[0]", "[599]"), ".parquet": (":row 1", ":row 600")}


@pytest.mark.parametrize("suffix", WRITERS)
def test_kinds_of_files(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path)
    items = list(read_items(path))
    assert [as_record(item, where) for where, item in items] == ROWS
    first, last = PLACES[suffix.removesuffix(".gz").removesuffix(".zst")]
    assert (items[0][0], items[-1][0]) == (f"{path}{first}", f"{path}{last}")


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_stage_makes_the_same_bytes_of_them(tmp_path, suffix):
    (tmp_path / "in").mkdir()
    WRITERS[suffix](tmp_path / "in" / f"data{suffix}")
    reference = write_jsonl(tmp_path / "plain.jsonl", ROWS)
    for source, output in ((tmp_path / "in", "a"), (reference, "b")):
        assert main(["--input", str(source), "--output", str(tmp_path / output)]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(read_jsonl(tmp_path / "a")) == 600


def test_words_become_files(tmp_path):
    known = ["b.jsonl", "a.parquet", "sub/c.json.gz", "sub/deep/d.jsonl.zst", "[1].jsonl"]
    for name in [*known, "notes.txt", "x.gz", "y.parquet.gz", ".cache/e.jsonl"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*words):
        return [path.relative_to(tmp_path).as_posix() for path in find_inputs([str(tmp_path / word) for word in words])]

    assert found("") == ["[1].jsonl", "a.parquet", "b.jsonl", "sub/c.json.gz", "sub/deep/d.jsonl.zst"]
    assert found("sub", "b.jsonl", "sub/c.json.gz") == ["sub/c.json.gz", "sub/deep/d.jsonl.zst", "b.jsonl"]
    assert found("*") == ["[1].jsonl", "a.parquet", "b.jsonl", "sub/c.json.gz", "sub/deep/d.jsonl.zst"]
    assert found("**/*.jsonl*") == ["[1].jsonl", "b.jsonl", "sub/deep/d.jsonl.zst"]
    assert found("?.jsonl") == ["b.jsonl"] and found("[1].jsonl") == ["[1].jsonl"]


def test_many_files_are_shown_by_format(tmp_path, capsys):
    for i in range(11):
        write_jsonl(tmp_path / f"{i}.jsonl", [{"question": "q", "answer": str(i)}] if i else [])
    assert main(["--input", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "format    10 files: question_answer" in out and "format    1 files: no record" in out


def test_output_among_the_inputs(tmp_path, fails):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    assert "one of the inputs" in fails(main, "--input", tmp_path, "--output", tmp_path / "a.jsonl", "--overwrite")


def test_a_large_array_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(ARRAY)
    monkeypatch.setattr(sources, "MAX_ARRAY_BYTES", len(ARRAY))
    assert len(list(read_items(path))) == 600
    monkeypatch.setattr(sources, "MAX_ARRAY_BYTES", len(ARRAY) - 1)
    with pytest.raises(ValueError, match=r"a\.json: a JSON array is read whole"):
        list(read_items(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    """The peak over 40 MB of text is less than 20 MB above that over 4 MB."""
    peaks = []
    for count in (500, 5000):
        rows = [{"question": f"{i}", "answer": f"{i} " * 1500} for i in range(count)]  # about 9 kB each
        path = tmp_path / f"{count}{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=200, compression="none", use_dictionary=False)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(lines, 1) if suffix.endswith("gz") else pyarrow.compress(lines, codec="zstd", asbytes=True))
        code = (
            "import sys; from pathlib import Path; from toolkits.lpo_data_preprocessing.sources import *\n"
            "n = sum(len(as_record(item, w)['answer']) for w, item in read_items(Path(sys.argv[1])))\n"
            "print(n, *(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
        characters, peak = map(int, done.stdout.split())
        assert characters == sum(len(row["answer"]) for row in rows)
        peaks.append(peak // 1024)
    assert peaks[1] - peaks[0] < 20, peaks  # MiB
