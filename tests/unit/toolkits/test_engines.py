"""The client of chat completions against a server that misbehaves: nothing lost, nothing twice, and what is hopeless ends at once."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from toolkit_helpers import files, read_jsonl, record, write_jsonl

from toolkits.lpo_data_preprocessing import candidates, engines, select
from toolkits.lpo_data_preprocessing.engines import ChatClient, Request, seed_of

RECORDS = [record(i) for i in range(10)]


class QuietServer(ThreadingHTTPServer):
    """A client that hangs up is no error here."""

    def handle_error(self, *_: Any) -> None:
        pass


class Server:
    """Answers "<last message> <seed>", or as `upstream` does; `faults[k]` is what happens to the k-th request instead."""

    def __init__(self, upstream: str | None = None) -> None:
        self.upstream = upstream
        self.refusal: tuple[str, int, Any] | None = None
        """(text, status, body): what a prompt with the text is answered."""
        self.faults: dict[int, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.answered: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        assert handler.path == "/v1/chat/completions"
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(handler.headers)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        if number in self.faults:
            self.faults[number](handler)
        elif self.refusal and self.refusal[0] in body["messages"][-1]["content"]:
            reply(handler, *self.refusal[1:])
        else:
            text = f"{body['messages'][-1]['content']} {body['seed']}"
            answer = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
            answer = httpx2.post(self.upstream, json=body, timeout=60).json() if self.upstream else answer
            self.answered[text] += 1
            reply(handler, 200, answer)
        with self._lock:
            self.at_once -= 1

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, body: Any, cut: int = 0, **headers: str) -> None:
    data = json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data[: len(data) - cut])
    if cut:
        drop(handler)


def drop(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.close()


FAULTS: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "too many requests": lambda handler: reply(handler, 429, {"error": "slow down"}, Retry_After="0.05"),
    "a date to wait for": lambda handler: reply(handler, 503, {}, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "internal error": lambda handler: reply(handler, 500, {"error": "oh"}),
    "connection dropped": drop,
    "answer cut": lambda handler: reply(handler, 200, {"choices": [{"message": {"content": "x" * 50}}]}, cut=20),
    "no choices": lambda handler: reply(handler, 200, {"choices": []}),
    "no finish reason": lambda handler: reply(handler, 200, {"choices": [{"message": {"content": "x"}}]}),
    "not JSON": lambda handler: reply(handler, 200, "text"),
}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, short waits, no proxy between us and this machine."""
    monkeypatch.setattr(candidates, "BLOCK", 4)
    monkeypatch.setattr(ChatClient, "__init__", _quick_init(ChatClient.__init__))
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def _quick_init(init: Callable[..., None]) -> Callable[..., None]:
    return lambda self, *args, **kwargs: init(self, *args, first_wait_s=0.01, **kwargs)


def command(folder: Any, *urls: str, more: tuple[str, ...] = ()) -> list[str]:
    if not (folder / "in.jsonl").exists():
        write_jsonl(folder / "in.jsonl", RECORDS)
    words = ["--engine", "openai", "--model", "served", "-n", "2", "--concurrency", "3", "--retries", "4", *more, "--base-url", *urls]
    return ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl"), *words]


def expected() -> list[dict[str, Any]]:
    def answer(row: dict[str, Any], sample: int) -> dict[str, str]:
        return {"text": f"{row['prompt'][-1]['content']} {seed_of(1, f'{row["id"]}/{sample}')}", "finish_reason": "stop"}

    return [row | {"candidates": [answer(row, sample) for sample in range(2)]} for row in RECORDS]


def test_every_sample_once_and_in_place(server: Server, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    assert candidates.main(command(tmp_path, server.url + "/")) == 0
    assert read_jsonl(tmp_path / "out.jsonl") == expected()
    assert set(server.answered.values()) == {1} and len(server.bodies) == 20 and server.most_at_once <= 3
    body = server.bodies[0]
    assert {name: body[name] for name in ("model", "temperature", "top_p", "max_tokens", "stream")} == {
        "model": "served", "temperature": 1.0, "top_p": 1.0, "max_tokens": 1024, "stream": False,
    }  # fmt: skip
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret-key"}
    assert not [name for name in files(tmp_path) if "secret-key" in (tmp_path / name).read_text()]
    assert "exactly once" in json.loads((tmp_path / "out.jsonl.plan.json").read_text())["plan"]["promise"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes(server: Server, tmp_path: Any, fault: str) -> None:
    server.faults = dict.fromkeys((0, 1, 5, 6, 7), FAULTS[fault])
    assert candidates.main(command(tmp_path, server.url)) == 0
    assert read_jsonl(tmp_path / "out.jsonl") == expected()
    assert len(server.bodies) == 25


def test_a_server_that_is_gone_is_left_to_its_equals(server: Server, tmp_path: Any) -> None:
    gone = Server()
    gone.close()
    assert candidates.main(command(tmp_path, gone.url, server.url)) == 0
    assert read_jsonl(tmp_path / "out.jsonl") == expected() and len(server.bodies) == 20


def test_what_is_hopeless_ends_at_once(server: Server, tmp_path: Any, fails: Any) -> None:
    server.faults = {9: lambda handler: reply(handler, 400, {"error": {"message": "temperature\nis odd"}})}
    line = fails(candidates.main, *command(tmp_path, server.url))
    assert f"{server.url}/chat/completions: HTTP 400" in line and "temperature\\nis odd" in line
    assert any(f"sample r{i}/" in line for i in range(4, 8)) and "finished blocks are kept" in line
    assert files(tmp_path / "out.jsonl.blocks") == ["000000.jsonl", "plan.json"]  # 8 requests a block: the first is kept
    server.faults = {}
    assert candidates.main(command(tmp_path, server.url)) == 0
    assert read_jsonl(tmp_path / "out.jsonl") == expected()


LIMITS = {
    "vllm": (400, {"error": {"message": "This model's maximum context length is 8 tokens. However, you requested 99 tokens"}}),
    "sglang": (400, {"message": "The input (99 tokens) is longer than the model's context length (8 tokens)."}),
    "openai": (400, {"error": {"code": "context_length_exceeded", "message": "Please reduce the length of the messages."}}),
    "another": (422, {"error": "`inputs` tokens + `max_new_tokens` must be <= 8. Given: prompt is too long"}),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_prompt_over_the_server_s_limit_is_dropped(server: Server, tmp_path: Any, capsys: Any, limit: str) -> None:
    """As with --max-prompt-length: counted, its id shown, and every other sample made."""
    write_jsonl(tmp_path / "in.jsonl", [*RECORDS[:5], record(5, "why? " * 20), *RECORDS[6:]])
    server.refusal = ("why? why?", *LIMITS[limit])
    assert candidates.main(command(tmp_path, server.url)) == 0
    assert read_jsonl(tmp_path / "out.jsonl") == expected()[:5] + expected()[6:]
    shown = capsys.readouterr().out
    assert "9 kept, 1 dropped" in shown and f"prompt_too_long: r5 (HTTP {LIMITS[limit][0]}: " in shown
    assert json.loads((tmp_path / "out.jsonl.tally.json").read_text())["dropped"] == {"prompt_too_long": 1}


def test_a_server_without_room_for_any_prompt(server: Server, tmp_path: Any, fails: Any) -> None:
    server.refusal = ("pens", *LIMITS["vllm"])
    line = fails(candidates.main, *command(tmp_path, server.url))
    assert "10 of 10 records dropped" in line and "r0 (HTTP 400: " in line and "maximum context length is 8" in line


def test_an_answer_that_a_server_filtered(server: Server, tmp_path: Any, capsys: Any) -> None:
    """It is kept with its reason, once, and select counts it; one odd answer does not stop the rest."""
    odd = {"choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "content_filter"}]}
    server.faults = {0: lambda handler: reply(handler, 200, odd)}
    assert candidates.main(command(tmp_path, server.url, more=("--concurrency", "1"))) == 0
    wanted = expected()
    wanted[0]["candidates"][0] = {"text": "", "finish_reason": "content_filter"}
    assert read_jsonl(tmp_path / "out.jsonl") == wanted and len(server.bodies) == 20
    assert "finish reason 'content_filter': 1 (select leaves such samples out)" in capsys.readouterr().out
    assert select.main(["--input", str(tmp_path / "out.jsonl"), "--output", str(tmp_path / "pairs.jsonl")]) == 0
    assert sum(len(row["rejected"]) for row in read_jsonl(tmp_path / "pairs.jsonl")) == 19
    assert "left out  finish_reason_content_filter         1" in capsys.readouterr().out


def test_it_gives_up_after_its_retries(server: Server, tmp_path: Any, fails: Any) -> None:
    server.faults = dict.fromkeys(range(1000), FAULTS["internal error"])
    line = fails(candidates.main, *command(tmp_path, server.url, more=("--concurrency", "1")))
    assert "no answer after 5 attempts" in line and "HTTP 500" in line and "finished blocks are kept" in line


def test_another_server_name_is_another_plan(server: Server, tmp_path: Any, fails: Any) -> None:
    """Where the servers are is no part of it: a job comes back to other nodes."""
    assert candidates.main(command(tmp_path, server.url)) == 0
    other = command(tmp_path, "http://elsewhere:1/v1")
    assert candidates.main(other) == 0
    other[other.index("served")] = "better"
    assert "made with another model (model was 'served', is 'better')" in fails(candidates.main, *other)


def test_long_prompts_with_a_tokenizer(server: Server, tiny_qwen: Any, tmp_path: Any) -> None:
    write_jsonl(tmp_path / "in.jsonl", [*RECORDS[:1], record(3, "why? " * 200)])
    more = ("--tokenizer", str(tiny_qwen), "--max-prompt-length", "100")
    assert candidates.main(command(tmp_path, server.url, more=more)) == 0
    assert [row["id"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["r0"] and len(server.bodies) == 2


@pytest.fixture
def transformers_serve(tiny_qwen: Any, tmp_path: Any) -> Iterator[str]:
    """`transformers serve` on loopback; its URL of chat completions."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", tiny_qwen, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "serve.log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "serve.log")
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(url).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.3)
    raise AssertionError(log.read_text())


@pytest.mark.ci
def test_a_real_server_behind_a_proxy_that_fails(transformers_serve: str, tiny_qwen: Any, tmp_path: Any) -> None:
    """Nearly cold, so that the judge is greedy decoding by a local model; a fault of every kind, and some of them in a row."""
    proxy = Server(upstream=transformers_serve)
    proxy.faults = {number: list(FAULTS.values())[number % len(FAULTS)] for number in (0, 1, 2, 5, 8, 11, 12, 13, 15, 20, 22)}
    cold = ("--temperature", "1e-6", "--max-new-tokens", "6")
    words = command(tmp_path, proxy.url, more=(*cold, "--retries", "11"))  # one sample may meet them all while the others wait
    words[words.index("served")] = str(tiny_qwen)
    assert candidates.main(words) == 0
    proxy.close()
    found = read_jsonl(tmp_path / "out.jsonl")
    local = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "local.jsonl"), "--model", str(tiny_qwen), "--device", "cpu"]
    assert candidates.main([*local, "-n", "2", *cold]) == 0
    assert found == read_jsonl(tmp_path / "local.jsonl")
    assert len(proxy.bodies) == 20 + 11 and set(proxy.answered.values()) == {1}


@pytest.mark.parametrize(
    ("environment", "each", "left"),
    [
        ({}, 1, None),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, 1, "2,3"),
        ({"SLURM_LOCALID": "1"}, 1, "1"),
        ({"SLURM_LOCALID": "1"}, 4, "4,5,6,7"),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 2, "6,7"),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 1, "GPU-a"),
    ],
)
def test_a_process_s_own_gpus(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], each: int, left: str | None) -> None:
    for name in ("SLURM_LOCALID", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    engines.choose_gpus(each)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left


def test_vllm_s_answers(tiny_qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub that records what it is asked, in place of the package: the end token goes, a cut answer stays as it is."""
    from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

    chat, asked = ChatTokenizer(tiny_qwen), {}
    word = chat.tokenizer("word", add_special_tokens=False)["input_ids"]

    class LLM:
        def __init__(self, **options: Any) -> None:
            asked["options"] = options

        def generate(self, prompts: list[dict[str, Any]], parameters: list[Any], use_tqdm: bool) -> list[Any]:
            asked["prompts"], asked["seeds"] = [prompt["prompt_token_ids"] for prompt in prompts], [p.seed for p in parameters]
            asked["stops"] = parameters[0].stop_token_ids
            outputs = (((*word, chat.end_id), "stop"), (word, "length"))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason=reason)]) for ids, reason in outputs]

    stub = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", stub)
    args = SimpleNamespace(model="m", dtype="bfloat16", engine_tensor_parallel=2, temperature=1.0, top_p=1.0, max_new_tokens=6, seed=7)
    sample = engines.ENGINES["vllm"].load(args, chat)
    answers = sample([Request([], [1, 2], "a/0"), Request([], [3], "a/1")])
    assert answers == [{"text": "word", "finish_reason": "stop"}, {"text": "word", "finish_reason": "length"}]
    assert asked["prompts"] == [[1, 2], [3]] and asked["seeds"] == [seed_of(7, "a/0"), seed_of(7, "a/1")]
    assert asked["stops"] == list(chat.stop_ids)
    assert asked["options"] == {"model": "m", "dtype": "bfloat16", "tensor_parallel_size": 2, "trust_remote_code": False}
