"""Measure the generated tokens per second of the embedded server, end to end over HTTP, on a freshly made demo model.

    python tools/bench_embedded.py [--threads N] [--dtype float32] [--batches 1,8,64] [--repeats 5]

Starts a server on a model of about 1.8M parameters, sends B prompts at once (B separate requests, or with
--one-request one request that holds them all) and takes the median over repeats, after one warm-up. Prints one JSON
object. Every prompt is random: nothing is shared between them. The client is a few lines of asyncio, because httpx
spends more time on 64 open connections (about 13 ms a request) than the server spends generating.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from tiny_model import write_tiny_model  # noqa: E402

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "num_shared_experts": 0,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 1024,
}


def start_server(model: str, arguments: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-m", "megatron_rl.rollout.embedded", "--model-path", model, "--port", "0", "--lifeline"]
    command += ["--dtype", arguments.dtype]
    if arguments.threads:
        command += ["--threads", str(arguments.threads)]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert server.stderr is not None
    for line in server.stderr:
        if b" on http://" in line:
            return server, line.split(b" on ")[1].strip().decode()
    raise SystemExit(f"the server ended with code {server.wait()}")


class Connection:
    """Holds one keep-alive HTTP connection that can post JSON."""

    def __init__(self, url: str, key: str = "") -> None:
        self.authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)

    async def post(self, path: str, body: Any) -> Any:
        if not hasattr(self, "reader"):
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port, limit=2**26)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{self.authorization}Content-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        answer = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert " 200 " in answer.split("\r\n")[0], answer
        length = int(answer.split("content-length: ")[1].split("\r\n")[0])
        return json.loads(await self.reader.readexactly(length))


async def measure(connections: list[Connection], batch: int, arguments: argparse.Namespace) -> float:
    """Return the tokens per second of one round of `batch` prompts."""
    prompts = [[random.randrange(SHAPE["vocab_size"]) for _ in range(arguments.prompt_tokens)] for _ in range(batch)]
    params = {"max_new_tokens": arguments.new_tokens, "temperature": 1.0, "ignore_eos": True}
    routed = {"return_routed_experts": True} if arguments.routed_experts else {}
    bodies = [
        {"input_ids": ids, "sampling_params": params, "return_logprob": True, **routed}
        for ids in ([prompts] if arguments.one_request else prompts)
    ]
    started = time.perf_counter()
    replies = await asyncio.gather(*(c.post("/generate", b) for c, b in zip(connections, bodies, strict=False)))
    elapsed = time.perf_counter() - started
    answers = replies[0] if arguments.one_request else replies
    generated = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
    assert generated == batch * arguments.new_tokens, generated
    return generated / elapsed


async def bench(url: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    connections = [Connection(url) for _ in range(max(arguments.batches))]
    for batch in arguments.batches:
        await measure(connections, batch, arguments)
        rates = [await measure(connections, batch, arguments) for _ in range(arguments.repeats)]
        results[str(batch)] = {
            "tokens_per_second": round(statistics.median(rates)),
            "min": round(min(rates)),
            "max": round(max(rates)),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", type=lambda text: [int(b) for b in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one-request", action="store_true")
    parser.add_argument("--routed-experts", action="store_true", help="ask for them too")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_model(directory, **SHAPE)
        started = time.perf_counter()
        server, url = start_server(directory, arguments)
        startup = time.perf_counter() - started
        try:
            batches = asyncio.run(bench(url, arguments))
        finally:
            server.terminate()
            server.wait()
    print(json.dumps({"startup_seconds": round(startup, 2), **vars(arguments), "batches": batches}, indent=1))


if __name__ == "__main__":
    main()
