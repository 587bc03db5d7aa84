"""This module holds what rank 0 talks to in tools/bench_host.py: servers without a model, and a rank that takes
whatever is sent to it.

They run in processes of their own. The servers answer in SGLang's JSON at a given pace.
"""

import asyncio
import base64
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.lifeline import end_with_owner

FIRST_REPLY = 0.25  # of the phase; the others come evenly behind it
_SPAWN = multiprocessing.get_context("spawn")
_MOST_PROCESSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """Says what each reply is like, and over how many seconds from the first request on they come.

    routed: [layers, topk, experts] of router replay; None without it.
    """

    num_tokens: int
    vocab_size: int
    phase_seconds: float
    routed: tuple[int, int, int] | None = None


class StandIn:
    """Answers every request of one process's servers, and remembers when it began with the last reply."""

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self._started: float | None = None
        self._last_reply = 0.0
        self._num_requests = 0
        # One reply is kept for every prompt length: making them would take the time that rank 0 is to have.
        self._body = lru_cache(maxsize=4)(lambda prompt_tokens: reply_body(replies, prompt_tokens))

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until the client closes it."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = int(head.partition("content-length:")[2].partition("\r\n")[0] or 0)
                content = await reader.readexactly(length)
                body = await self._body_for(head.split(" ", 2)[1], content)
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                )
                writer.write(body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _body_for(self, route: str, content: bytes) -> bytes:
        if route == "/server_info":
            return json.dumps({"version": "0.5.23", "max_req_input_len": 2**30}).encode()
        if route == "/told":
            told = {"process": os.getpid(), "last_reply": self._last_reply, "num_requests": self._num_requests}
            return json.dumps(told).encode()
        if route != "/generate":
            return b'{"success": true}'
        asked = json.loads(content)
        self._num_requests += 1
        if self._started is None:
            self._started = time.monotonic()
        params, prompts = asked["sampling_params"], asked["input_ids"]
        several = isinstance(params, list)
        seeds = [one["sampling_seed"] for one in (params if several else [params])]
        lengths = [len(prompt) for prompt in prompts] if several else [len(prompts)]
        share = FIRST_REPLY + (1 - FIRST_REPLY) * max(seed % 9973 for seed in seeds) / 9973
        await asyncio.sleep(self._started + share * self._replies.phase_seconds - time.monotonic())
        bodies = [self._body(length) for length in lengths]
        self._last_reply = time.monotonic()
        return b"[" + b",".join(bodies) + b"]" if several else bodies[0]


def reply_body(replies: Replies, prompt_tokens: int) -> bytes:
    """Return the JSON of one reply, as SGLang writes it."""
    source = np.random.default_rng(0)
    ids = source.integers(256, replies.vocab_size, replies.num_tokens).tolist()
    logprobs = (-source.exponential(0.5, replies.num_tokens)).astype(np.float32).tolist()
    meta: dict[str, Any] = {
        "id": "0" * 32,
        "finish_reason": {"type": "stop", "matched": ids[-1]},
        "prompt_tokens": prompt_tokens,
        "weight_version": "0",
        "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)],
        "completion_tokens": len(ids),
        "cached_tokens": 0,
    }
    if replies.routed is not None:
        layers, topk, experts = replies.routed
        positions = prompt_tokens + len(ids) - 1
        # topk neighbours on a circle are different experts, wherever they begin.
        first = source.integers(0, experts, (positions, layers, 1))
        meta["routed_experts"] = base64.b64encode(
            ((first + np.arange(topk)) % experts).astype("<i4").tobytes()
        ).decode()
    return json.dumps({"output_ids": ids, "meta_info": meta}).encode()


def _serve(num_servers: int, replies: Replies, told: Connection) -> None:
    end_with_owner()

    async def run() -> None:
        stand_in = StandIn(replies)
        servers = [await asyncio.start_server(stand_in.answer, "127.0.0.1", 0) for _ in range(num_servers)]
        told.send([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers])
        await asyncio.to_thread(_until_closed, told)

    asyncio.run(run())


def _until_closed(pipe: Connection) -> None:
    """Wait until the other end is closed, by its process or by its end."""
    with suppress(EOFError):
        pipe.recv()


@contextmanager
def stand_in_servers(num_servers: int, replies: Replies) -> Iterator[list[str]]:
    """Start so many servers, in a process for each half of them, and give their urls."""
    count = min(_MOST_PROCESSES, num_servers)
    started, urls = [], []
    try:
        for number in range(count):
            ours, theirs = _SPAWN.Pipe()
            share = num_servers // count + (number < num_servers % count)
            process = _SPAWN.Process(target=_serve, args=(share, replies, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
            urls += ours.recv()
        yield urls
    finally:
        for process, pipe in started:
            pipe.close()
            process.join(10)
            process.terminate()  # ended by then, or this ends it


# The ranks that are sent to ------------------------------------------------------------------------------------------


class Funnel:
    """Takes the place of torch.distributed: whatever goes to any rank goes to the one sink, by real gloo messages."""

    def __init__(self, store: str) -> None:
        _join(0, store)
        self.num_bytes = 0

    def send(self, tensor: torch.Tensor, dst: int, group: Any) -> None:
        content = tensor.contiguous().view(-1).view(torch.uint8)
        self.num_bytes += content.numel()
        dist.send(torch.tensor([content.numel()]), dst=1)
        if content.numel():
            dist.send(content, dst=1)

    def broadcast(self, tensor: torch.Tensor, src: int, group: Any) -> None:
        self.send(tensor, 1, group)

    def close(self) -> None:
        dist.send(torch.tensor([-1]), dst=1)
        dist.destroy_process_group()


def _join(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def _sink(store: str) -> None:
    end_with_owner()
    _join(1, store)
    size = torch.zeros(1, dtype=torch.int64)
    while True:
        dist.recv(size, src=0)
        if size < 0:
            break
        if size:
            dist.recv(torch.empty(int(size), dtype=torch.uint8), src=0)
    dist.destroy_process_group()


@contextmanager
def sink_rank(store: str) -> Iterator[Funnel]:
    """Start a sink in a process of its own, and give the funnel to it."""
    process = _SPAWN.Process(target=_sink, args=(store,), daemon=True)
    process.start()
    try:
        funnel = Funnel(store)
        yield funnel
        funnel.close()
    finally:
        process.join(10)
        process.terminate()
