"""Looking at a store: the exact text of a small one, a page that data cannot break, and one line for every mistake."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from toolkit_helpers import ROOT, files, record, write_jsonl

from megatron_patch.data.pair_store import PairStore, PairStoreWriter, write_reference_logps
from megatron_patch.display import visible
from toolkits.lpo_data_preprocessing import build_pairs, inspect
from toolkits.lpo_data_preprocessing.store_view import histogram, quantiles
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

EVIL = '</pre><script>alert("x")</script><img src=http://a.b/c>'
VOID = {"meta", "input"}


@pytest.fixture
def store(tiny_qwen, tmp_path):
    """Three pairs of two prompts, one dropped; the second pair's rejected answer was cut, the third has scores and a hostile text."""
    rows = [
        record(0, "12+10?", chosen="22", rejected=["21", "2\n<|im_end|>"], rejected_ended=[True, False]),
        record(1, "1+1?", chosen=EVIL, rejected=["3\x1b[2J"], chosen_score=1, rejected_scores=[0.25]),
        record(2, "9" * 300, chosen="1", rejected=["2"]),
    ]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    command = ["--input", str(path), "--output", str(tmp_path / "s"), "--tokenizer", str(tiny_qwen), "--max-length", "200"]
    assert build_pairs.main(command) == 0
    return tmp_path / "s"


def show(capsys, *argv):
    capsys.readouterr()
    assert inspect.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def score(prefix, logps):
    whose = {"store_fingerprint": PairStore(prefix).fingerprint, "weights_fingerprint": "ab" * 32}
    write_reference_logps(prefix, np.array(logps), **whose, dtype="float32")


def test_the_whole_text(store, tiny_qwen, capsys):
    chat = ChatTokenizer(tiny_qwen)
    prompt = [len(chat.prompt_ids([{"role": "user", "content": text}])) for text in ("12+10?", "1+1?")]
    evil, wild = (len(chat.response_ids(text)) for text in (EVIL, "3\x1b[2J"))
    cut = len(chat.response_ids("2\n<|im_end|>", ended=False))
    lengths = [[prompt[0], 3, 3], [prompt[0], 3, cut], [prompt[1], evil, wild]]
    total = sorted(p + max(c, r) for p, c, r in lengths)
    score(store, [[-1.5, -6.0], [-1.5, -float(cut)], [-float(evil), -float(wild)]])
    rows = {"prompt": sorted(n[0] for n in lengths), "chosen": [3, 3, evil], "rejected": sorted(n[2] for n in lengths)}
    out = show(capsys, store, "--pair", 1).splitlines()
    assert out[:11] == [
        f"{store}: 3 pairs",
        "  kept       3 pairs of 2 prompts",
        "  dropped    too_long_chosen 1",
        f"  tokens     {sum(map(sum, lengths))}, {sum(c + r for _, c, r in lengths)} of them scored",
        "  limits     max_length 200",
        "  options    template_exceptions 1",
        f"  made       from {store.parent}/in.jsonl (3 records)",
        f"  tokenizer  {tiny_qwen} (fingerprint {chat.fingerprint[:12]})",
        "  scores     1 pairs, mean of chosen 1.0000, of rejected 0.2500",
        "  reference  float32, weights abababababab, mean of nats per token: chosen -0.6667, rejected -1.3333",
        "",
    ]
    assert out[11] == f"  {'tokens':<24}      min  median     p90     max"
    for line, (name, values) in zip(out[12:], [*rows.items(), ("prompt + longer response", total)], strict=False):
        low, middle, high = values
        assert line == f"  {name:<24} {low:>8}{middle:>8}{middle:>8}{high:>8}"
    first = next(i for i, line in enumerate(out) if line.endswith("(prompt + longer response)"))
    assert sum(int(line.split()[1]) for line in out[first + 1 : out.index("", first)]) == 3
    assert out[out.index("", first) + 1 :] == [
        "pair 1: id r0-1, line 1, prompt of 0",
        f"  prompt: {prompt[0]} tokens",
        *(f"    {line}".rstrip() for line in chat.decode(chat.prompt_ids([{"role": "user", "content": "12+10?"}])).split("\n")),
        "  chosen: 3 tokens, reference -1.5000 nats, -0.5000 per token",
        "    22",
        "    [end] <|im_end|>",
        f"  rejected: {cut} tokens, reference -{cut:.4f} nats, -1.0000 per token",
        "    2",
        "    <|im_end|>",
        "    [cut] no end token",
    ]


def test_without_reference_and_without_pair(store, capsys):
    out = show(capsys, store)
    assert "  reference  none (reference_logps computes it)" in out and "pair 0" not in out
    assert "  chosen: 3 tokens\n    22\n" in show(capsys, store, "--pair", 0)


def test_data_does_not_steer_the_terminal(store, capsys):
    out = show(capsys, store, "--pair", 2)
    assert r"3\x1b[2J" in out and "\x1b" not in out and "scores 1, 0.25" in out


def test_colours_are_for_terminals(store, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = show(capsys, store, "--pair", 1)
    assert "\033[32m22\033[0m" in out and "\033[1;33m[end] <|im_end|>\033[0m" in out and "\033[36m<|im_start|>\033[0m" in out
    assert "\033[31m<|im_end|>\033[0m" in out, "a token that is spelled out is text"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in show(capsys, store, "--pair", 1)


def test_sft(tiny_qwen, tmp_path, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", [record(0, chosen="#### 22"), record(1, chosen="8")])
    command = ["--input", str(path), "--output", str(tmp_path / "f"), "--tokenizer", str(tiny_qwen), "--kind", "sft"]
    assert build_pairs.main(command) == 0
    out = show(capsys, tmp_path / "f", "--pair", 1)
    assert "f: 2 samples" in out and "reference" not in out
    assert "sample 1: id r1, line 2" in out and "  response: 2 tokens\n    8\n    [end] <|im_end|>\n" in out
    inspect.main([str(tmp_path / "f"), "--html", str(tmp_path / "f.html")])
    assert Page(tmp_path / "f.html").texts("response") == ["#### 22 <|im_end|>", "8 <|im_end|>"]


def test_only_a_scored_part_has_an_end(tiny_qwen, tmp_path, capsys):
    """An earlier turn that the loss does not look at keeps its control token in the text."""
    chat = ChatTokenizer(tiny_qwen)
    with PairStoreWriter(tmp_path / "m", "sft") as writer:
        writer.add([chat.response_ids("12"), chat.response_ids("35"), [], chat.response_ids("58", ended=False)], id="a")
        writer.commit(tokenizer={"fingerprint": chat.fingerprint, "path": str(tiny_qwen)}, template={"fingerprint": "none"}, sources=[])
    assert show(capsys, tmp_path / "m", "--pair", 0).partition("sample 0: id a\n")[2].splitlines() == [
        "  prompt: 3 tokens", "    12<|im_end|>", "  response: 3 tokens", "    35", "    [end] <|im_end|>",
        "  prompt: 0 tokens", "  response: 2 tokens", "    58", "    [cut] no end token",
    ]  # fmt: skip


def test_text(tiny_qwen, tmp_path, capsys):
    """Every sequence is scored; several of them in a document."""
    chat = ChatTokenizer(tiny_qwen)
    ids = [chat.tokenizer(text)["input_ids"] for text in ("12 pens", "more")]
    with PairStoreWriter(tmp_path / "t", "text") as writer:
        writer.add([[*ids[0], chat.stop_ids[1]], ids[1]], id="a")
        writer.commit(tokenizer={"fingerprint": chat.fingerprint, "path": str(tiny_qwen)}, template={"fingerprint": "none"}, sources=[])
    out = show(capsys, tmp_path / "t", "--pair", 0)
    assert "  kept       1 texts\n" in out and "text 0: id a\n" in out
    assert f"  text: {len(ids[0]) + 1} tokens\n    12 pens\n    [end] <|endoftext|>\n  text: {len(ids[1])} token" in out
    assert out.endswith("    more\n    [cut] no end token\n")


class Page(HTMLParser):
    """Every element closed in its turn; the parts of the samples with their text; all other elements with their attributes."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.parts = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.parts.append([dict(attrs)["class"].split()[1], ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "pre" in self.open:
            self.parts[-1][1] += data

    def texts(self, name):
        """The text of the parts of this name."""
        return [text.removeprefix("\n") for kind, text in self.parts if kind == name]


def test_page(store, tmp_path, capsys):
    score(store, [[-1.5, -6.0], [-1.5, -3.0], [-4.0, -5.0]])
    out = show(capsys, store, "--html", tmp_path / "page.html")
    assert out.endswith(f"page: {tmp_path}/page.html (3 of 3 pairs)\n") and "[end]" not in out
    page = Page(tmp_path / "page.html")
    assert page.texts("chosen") == ["22 <|im_end|>", "22 <|im_end|>", f"{EVIL} <|im_end|>"]
    assert page.texts("rejected") == ["21 <|im_end|>", "2\n<|im_end|> cut: no end token", "3\\x1b[2J <|im_end|>"]
    assert page.texts("prompt")[0].endswith("12+10?<|im_end|>\n<|im_start|>assistant\n")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and tags.count("article") == 3 and tags.count("svg") == 1 and "img" not in tags
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)], "it needs no other file"
    assert "reference -1.5000 nats · -0.5000 per token" in page.source and "All pairs" in page.source
    prompt, chosen, rejected = PairStore(store).lengths.T
    totals = prompt + np.maximum(chosen, rejected)
    width = histogram(totals).width
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert sum(float(bar["height"]) > 0 for bar in bars) == len({int(n) for n in totals // width})
    assert "prefers-color-scheme: dark" in page.source


def test_the_page_allows_its_own_script_alone(store, tmp_path):
    inspect.main([str(store), "--html", str(tmp_path / "page.html")])
    page = Page(tmp_path / "page.html")
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    script = page.source.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_a_page_of_some(store, tmp_path, capsys):
    """The same ones every time, and the one that was asked for."""
    shown = []
    for words in ([], [], ["--pair", "0"], ["--pair", "2"]):
        show(capsys, store, "--html", tmp_path / "page.html", "--samples", "1", "--overwrite", *words)
        page = (tmp_path / "page.html").read_text()
        shown.append([i for i in range(3) if f"<b>pair {i}</b>" in page])
        assert "pairs, drawn at random" in page
    assert len(shown[0]) == 1 and shown[0] == shown[1] and 0 in shown[2] and 2 in shown[3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pair", 3], "s: there is no pair 3, its numbers are 0 to 2"),
        (["--pair", -1], "there is no pair of id '-1'"),
        (["--pair", "x"], "s: there is no pair of id 'x'"),
        (["--tokenizer", "{tmp}/nowhere", "--pair", 0], "nowhere: no such folder"),
        (["--html", "{tmp}/in.jsonl"], "in.jsonl: exists already"),
        (["--html", "{tmp}/x.html", "--samples", 0], "--samples must be at least 1, got 0"),
        (["--html", "{tmp}/x.html", "--pair", 9], "there is no pair 9"),
    ],
)
def test_mistakes(store, tmp_path, fails, capsys, words, message):
    before = files(tmp_path)
    capsys.readouterr()
    assert message in fails(inspect.main, store, *[str(word).replace("{tmp}", str(tmp_path)) for word in words])
    assert files(tmp_path) == before


def flip(path):
    """Change the last byte of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.with_name("s.json").unlink(), "s.json: the manifest of a pair store is missing"),
        (lambda s: s.with_name("s.json").write_text("{"), "s.json: the manifest of a pair store is not valid JSON"),
        (lambda s: s.with_name("s.bin").unlink(), "s.bin: missing"),
        (lambda s: s.with_name("s.idx").write_bytes(b"x"), "s.idx: 1 bytes, the manifest says"),
        (lambda s: flip(s.with_name("s.bin")), "s.bin: contents changed since the manifest was written"),
        (lambda s: flip(s.with_name("s.meta.npz")), "s.meta.npz: contents changed"),
        (lambda s: flip(s.with_name("s.ref.npy")), "s.ref.npy: contents changed"),
        (lambda s: s.with_name("s.ref.npy").unlink(), "s.ref.npy: missing"),
    ],
)
def test_damage(store, fails, capsys, damage, message):
    score(store, [[-1.5, -6.0], [-1.5, -3.0], [-4.0, -5.0]])
    damage(store)
    capsys.readouterr()
    assert message in fails(inspect.main, store)


def test_quick_compares_sizes_alone(store, capsys):
    flip(store.with_name("s.bin"))
    assert "3 pairs" in show(capsys, store, "--quick")


def test_another_tokenizer(store, tiny_qwen, tmp_path, fails, capsys):
    """One with other merges is refused; the same one elsewhere is taken."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tiny_qwen.glob("*.json*"):
        (moved / path.name).write_bytes(path.read_bytes())
    assert "  chosen: 3 tokens" in show(capsys, store, "--pair", 0, "--tokenizer", moved)
    state = json.loads((moved / "tokenizer.json").read_text())
    state["model"]["merges"].pop()
    (moved / "tokenizer.json").write_text(json.dumps(state))
    assert "moved: not the tokenizer of" in fails(inspect.main, store, "--pair", 0, "--tokenizer", moved)
    manifest = json.loads(store.with_name("s.json").read_text())
    manifest["tokenizer"]["path"] = "/nowhere"
    store.with_name("s.json").write_text(json.dumps(manifest))
    assert "its tokenizer (/nowhere) is not there, give --tokenizer DIR" in fails(inspect.main, store, "--pair", 0)


@pytest.mark.parametrize("lengths", [[7], [5, 5, 6], [1, 16], [1, 17], [0, 4096], list(range(100, 300)), [3, 10**6]])
def test_histogram(lengths):
    bins = histogram(np.array(lengths))
    assert len(bins.counts) <= 16 and sum(bins.counts) == len(lengths) and bins.counts[0] and bins.counts[-1]
    for i, count in enumerate(bins.counts):
        low = bins.first + i * bins.width
        assert count == sum(low <= length < low + bins.width for length in lengths)
    assert str(bins.width).rstrip("0") in ("1", "2", "5") and bins.first % bins.width == 0


def test_small_things():
    assert quantiles(np.array([1, 2, 3, 4])) == {"min": 1, "median": 2, "p90": 3, "max": 4}
    assert visible("a\tb\nc\r\x7f\x9b") == "a\tb\nc\\x0d\\x7f\\x9b"
    assert histogram(np.array([5, 6])).labels() == ["5", "6"] and histogram(np.array([1, 40])).labels()[0] == "0-4"


def test_the_stage_s_name_hides_nothing(store):
    """As a command it is found, and Python's own module of that name still is what everyone imports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "toolkits.lpo_data_preprocessing.inspect", str(store)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith(f"{store}: 3 pairs\n")
    code = "import toolkits.lpo_data_preprocessing.inspect as ours, inspect; print(hasattr(inspect, 'signature'), ours is not inspect)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stderr


def test_a_reader_that_stops_reading(store):
    command = f"{sys.executable} -m toolkits.lpo_data_preprocessing.inspect {store} | true; echo ${{PIPESTATUS[0]}}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")
