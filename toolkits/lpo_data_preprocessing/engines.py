"""What samples answers: a local model through transformers or vLLM, or any server that speaks OpenAI's chat completions.

An engine turns a block's requests into answers, in order; the stage around it (candidates.py) decides what a block is, writes it and goes
on after an interruption. What an engine promises about a block made twice is its `promise`, which the output's plan records. Nothing
here imports Megatron, so the stage runs in an environment of the engine's own (vLLM pins its torch).
"""

import argparse
import asyncio
import hashlib
import importlib.util
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.evaluation.generate import PerRowSampler, generate
from toolkits.lpo_data_preprocessing.records import Message
from toolkits.lpo_data_preprocessing.tokenise import ChatTokenizer

Answer = dict[str, str]
"""{"text", "finish_reason"}: "stop" if the model ended its turn, "length" if it was cut; a server may have further reasons.

Or {"refused"}: why there is no room for the prompt in the server's model.
"""


@dataclass(frozen=True)
class Request:
    """One sample to be made."""

    messages: list[Message]
    prompt: list[int]
    """The same as token ids; empty where no tokenizer is known."""
    key: str
    """"<record id>/<sample number>": what its noise depends on, beside the seed."""


Engine = Callable[[Sequence[Request]], list[Answer]]
"""One block's requests -> one answer each, in order."""


@dataclass(frozen=True)
class EngineKind:
    """One row of `ENGINES`."""

    load: Callable[[argparse.Namespace, ChatTokenizer | None], Engine]
    promise: str
    """What holds whatever was interrupted, sharded or made again."""
    is_local: bool
    """Whether --model is a folder with weights and tokenizer here, not a name on a server."""


def check_engine(args: argparse.Namespace) -> None:
    """ValueError if the engine lacks something it needs, before anything is written."""
    if args.engine == "openai" and not args.base_url:
        raise ValueError("--engine openai needs --base-url, for example http://localhost:8000/v1")
    if args.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("--engine vllm: this Python has no vLLM; CANDIDATES_PYTHON may name one that has it")


def transformers_engine(args: argparse.Namespace, tokenizer: ChatTokenizer | None) -> Engine:
    """Sample with a transformers model loaded from `args.model` on `args.device`, a block as one batch."""
    choose_gpus(1)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    assert tokenizer is not None
    logging.disable_progress_bar()
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    model.to(device).eval()

    def sample(requests: Sequence[Request]) -> list[Answer]:
        sampler = PerRowSampler([request.key for request in requests], args.seed, args.temperature, args.top_p)
        prompts = [request.prompt for request in requests]
        outputs = generate(model, prompts, max_new_tokens=args.max_new_tokens, stop_ids=tokenizer.stop_ids, sampler=sampler)
        return [{"text": tokenizer.decode(output.ids), "finish_reason": output.finish_reason} for output in outputs]

    return sample


def vllm_engine(args: argparse.Namespace, tokenizer: ChatTokenizer | None) -> Engine:
    """Sample with vLLM on `args.engine_tensor_parallel` GPUs. Written against vLLM's documented interface; never run here (no GPU)."""
    assert tokenizer is not None
    choose_gpus(args.engine_tensor_parallel)
    from vllm import LLM, SamplingParams

    llm = LLM(model=args.model, dtype=args.dtype, tensor_parallel_size=args.engine_tensor_parallel, trust_remote_code=False)

    def sample(requests: Sequence[Request]) -> list[Answer]:
        each = [
            SamplingParams(
                temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens, seed=seed_of(args.seed, request.key),
                stop_token_ids=list(tokenizer.stop_ids),
            )
            for request in requests
        ]  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": request.prompt} for request in requests], each, use_tqdm=False)
        return [_from_vllm(output.outputs[0], tokenizer) for output in outputs]

    return sample


def _from_vllm(output: Any, tokenizer: ChatTokenizer) -> Answer:
    ids = list(output.token_ids)
    if ids and ids[-1] in tokenizer.stop_ids:
        ids.pop()
    return {"text": tokenizer.decode(ids), "finish_reason": output.finish_reason}


def choose_gpus(each: int) -> None:
    """Leave this process its `each` of the node's GPUs, by its place on the node; before anything asks CUDA for devices.

    A process that was not started beside others (SLURM_LOCALID and LOCAL_RANK are unset) keeps what it sees.
    """
    place = os.environ.get("SLURM_LOCALID", os.environ.get("LOCAL_RANK"))
    if place is None:
        return
    first = int(place) * each
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = visible.split(",")[first : first + each] if visible else [str(first + number) for number in range(each)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)


def seed_of(seed: int, key: str) -> int:
    """31 bits for engines that take one seed a sample."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:4], "big") >> 1


def openai_engine(args: argparse.Namespace, tokenizer: ChatTokenizer | None) -> Engine:
    """Ask the servers at `args.base_url`, `args.concurrency` requests at a time; the key, if any, is in $OPENAI_API_KEY."""
    client = ChatClient(
        [url.rstrip("/") for url in args.base_url], args.concurrency, args.retries, args.request_timeout, os.environ.get("OPENAI_API_KEY")
    )
    fixed = {"model": args.model, "temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_new_tokens}

    def sample(requests: Sequence[Request]) -> list[Answer]:
        bodies = [fixed | {"messages": r.messages, "seed": seed_of(args.seed, r.key), "stream": False} for r in requests]
        return asyncio.run(client.ask_all(bodies, [r.key for r in requests]))

    return sample


# How servers say that a prompt is too long: OpenAI and vLLM "maximum context length", SGLang "longer than the model's context length"...
_NO_ROOM = re.compile(r"context.{0,3}(length|window|size)|(prompt|input)\b.{0,80}(too long|longer than|exceed)", re.IGNORECASE | re.DOTALL)
# Too many requests, and what a server or a proxy before it says while it is overloaded, restarting or gone.
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class ChatClient:
    """Chat completions from several equal servers: limited concurrency, and every failure that may pass is tried again elsewhere."""

    base_urls: Sequence[str]
    concurrency: int
    retries: int
    timeout_s: float
    """Of one answer."""
    key: str | None = None
    first_wait_s: float = 0.5
    """Before the first retry; doubled every time, up to a minute, with jitter. A server's Retry-After is a lower bound."""

    async def ask_all(self, bodies: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[Answer]:
        """One answer a body, in order; `keys` name them in errors.

        Raises:
            ValueError: a server refuses a request for good. OSError: no answer after all retries.
        """
        import httpx2

        turn = asyncio.Semaphore(self.concurrency)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        async with httpx2.AsyncClient(timeout=self.timeout_s, headers=headers, limits=limits) as client:

            async def ask(number: int, body: dict[str, Any]) -> Answer:
                async with turn:
                    try:
                        return await self._ask(client, number, body)
                    except (ValueError, OSError) as error:
                        kind = ValueError if isinstance(error, ValueError) else OSError
                        raise kind(f"sample {keys[number]}: {error}; finished blocks are kept, the same command goes on") from None

            return list(await asyncio.gather(*(ask(number, body) for number, body in enumerate(bodies))))

    async def _ask(self, client: Any, number: int, body: dict[str, Any]) -> Answer:
        failure = ""
        for attempt in range(self.retries + 1):
            url = f"{self.base_urls[(number + attempt) % len(self.base_urls)]}/chat/completions"
            answer, failure, wait = await self._try_once(client, url, body)
            if answer is not None:
                return answer
            if attempt < self.retries:
                backoff = min(_LONGEST_WAIT_S, self.first_wait_s * 2**attempt) * random.uniform(0.5, 1.0)
                await asyncio.sleep(max(wait, backoff))
        raise OSError(f"no answer after {self.retries + 1} attempts, the last: {failure}")

    async def _try_once(self, client: Any, url: str, body: dict[str, Any]) -> tuple[Answer | None, str, float]:
        """(answer, or why there is none, seconds the server asks to wait)."""
        import httpx2

        try:
            response = await client.post(url, json=body)
        except httpx2.TransportError as error:
            return None, f"{url}: {type(error).__name__} {error}", 0.0
        if response.status_code in _TRY_AGAIN:
            return None, f"{url}: HTTP {response.status_code}", _seconds(response.headers.get("Retry-After"))
        if response.status_code != 200:
            said = f"HTTP {response.status_code}: {' '.join(response.text.split())[:300]}"
            if response.status_code in (400, 413, 422) and _NO_ROOM.search(response.text):
                return {"refused": said}, "", 0.0
            raise ValueError(f"{url}: {said}")
        answer = _from_json(response)
        return answer, f"{url}: an answer without choices[0].message.content and finish_reason", 0.0


def _seconds(retry_after: str | None) -> float:
    """Seconds in a Retry-After header, at most a minute; its other form, a date, counts as none."""
    try:
        return min(_LONGEST_WAIT_S, max(0.0, float(retry_after or 0)))
    except ValueError:
        return 0.0


def _from_json(response: Any) -> Answer | None:
    """The answer in a response, None if it holds none (cut on its way, or of another shape)."""
    try:
        choice = response.json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    if not isinstance(reason, str) or not isinstance(text, str | None):
        return None
    return {"text": text or "", "finish_reason": reason}


ENGINES = {
    "transformers": EngineKind(transformers_engine, "byte-identical in float32, whatever was interrupted or sharded", is_local=True),
    "vllm": EngineKind(vllm_engine, "every sample exactly once; its text may differ from run to run", is_local=True),
    "openai": EngineKind(openai_engine, "every sample exactly once; its text may differ from run to run", is_local=False),
}
