"""Send requests of every kind to a real embedded server: none may end, freeze or starve it, or get an answer of 500.

    python tools/fuzz_server.py [--requests 20000] [--seed 1] [--workers 8]

Starts a server on a tiny model and sends it requests over the whole schema of every route, several at a time: valid
ones, ones with fields of other types, sizes, ends of ranges, nesting and Unicode, clients that hang up in the middle,
bodies that are no JSON, bytes that are no HTTP. Every complete request must be answered with 2xx or 4xx. A client
beside them asks for the same greedy response every second and must get it, in time and with the same tokens. The
server's memory must stay where it was after the first fifth. Prints one JSON object; exit code 1 when something was
found.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
from fuzz_requests import Case, World, case, http

from megatron_rl.stores import host_store

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from tiny_model import tensors_of, write_tiny_model  # noqa: E402

SHAPE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 256}
ANSWER_SECONDS = 180.0  # of a request for as many tokens as one may ask for
MAX_FINDINGS = 10  # then it stops
PROBE_SECONDS = 30.0
PROBE = {"input_ids": [5, 6, 7], "return_logprob": True}
PROBE |= {"sampling_params": {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}}
# While memory is released, or too much is in flight, an honest client is told so and asks again.
NOT_NOW = re.compile("memory is released|no new ones came since|are in flight")
MEMORY_SLACK_BYTES, MEMORY_FACTOR = 64 * 2**20, 1.3


class Server:
    """Holds the server under test. Pauses and sessions end soon, because nobody here takes care to end them."""

    def __init__(self, folder: Path, *more: str) -> None:
        model = write_tiny_model(folder / "model", **SHAPE)
        shutil.copytree(model, folder / "elsewhere/copy")
        (folder / "elsewhere/fifo").mkdir()
        os.mkfifo(folder / "elsewhere/fifo/a.safetensors")
        self._store = host_store("127.0.0.1", 2, 5.0)
        self.world = World(
            model=model,
            other=folder / "elsewhere/copy",
            fifo=folder / "elsewhere/fifo",
            vocab=SHAPE["vocab_size"],
            context=SHAPE["max_position_embeddings"],
            tensors={name: list(tensor.shape) for name, tensor in tensors_of(model).items()},
            port=self._store.port,
        )
        options = ["--hold-timeout", "2", "--update-timeout", "0.5", "--weights-root", str(folder / "elsewhere"), *more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rl.rollout.embedded", "--model-path", str(model), "--port", "0", *options],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if match := re.search(r"serving .* on http://([^:]+):(\d+)", line):
                self.host, self.port = match[1], int(match[2])
                break
        else:
            raise SystemExit("the server did not start: " + "".join(self.log))
        threading.Thread(target=self._read, daemon=True).start()

    def rss(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            del self.log[:-1000]

    async def ask(self, path: str, body: Any, seconds: float) -> tuple[int, Any]:
        content = http(path, json.dumps(body).encode())
        async with self.connection() as (reader, writer):
            async with asyncio.timeout(seconds):
                await self.send(writer, content)
                status, answer = await answer_of(reader)
        return status, json.loads(answer) if answer else None

    async def send(self, writer: asyncio.StreamWriter, content: bytes) -> None:
        head, end, body = content.partition(b"\r\n\r\n")
        writer.write(head.replace(b"HOST", f"{self.host}:{self.port}".encode()) + end + body)
        await writer.drain()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**26)
        try:
            yield reader, writer
        finally:
            writer.close()


async def answer_of(reader: asyncio.StreamReader, has_body: bool = True) -> tuple[int, bytes]:
    """Return status and body of one answer. EOFError when there is none."""
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split()[1])
        if status >= 200:
            break
    if not has_body or status == 204:
        return status, b""
    if "transfer-encoding: chunked" in head:
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        return status, b"".join(parts)
    if found := re.search(r"content-length: (\d+)", head):
        return status, await reader.readexactly(int(found[1]))
    return status, await reader.read()


class Fuzzer:
    """Sends the cases and notes what should not be."""

    def __init__(self, server: Server, requests: int, seed: int, workers: int) -> None:
        self._server, self._requests, self._seed, self._workers = server, requests, seed, workers
        self._next = 0
        self.statuses: dict[str, Counter[str]] = {}
        self.findings: list[dict[str, Any]] = []
        self.probe_seconds: list[float] = []
        self.rss_before = 0

    async def run(self) -> None:
        self._expected = await self._probe()
        self.probe_seconds.clear()
        probing = asyncio.create_task(self._keep_probing())
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._workers):
                    tasks.create_task(self._work())
        finally:
            probing.cancel()
        await self._probe()
        rss = self._server.rss()
        if rss > MEMORY_FACTOR * self.rss_before + MEMORY_SLACK_BYTES:
            self._found("memory", f"{self.rss_before} bytes after a fifth of the requests, {rss} at the end")

    async def _work(self) -> None:
        while self._next < self._requests and len(self.findings) < MAX_FINDINGS:
            number, self._next = self._next, self._next + 1
            if number == self._requests // 5:
                self.rss_before = self._server.rss()
            seed = f"{self._seed}/{number}"
            one = case(seed, self._server.world)
            try:
                outcome = await self._send(one)
            except (OSError, EOFError, ValueError) as error:
                outcome = repr(error)[:200]
            self.statuses.setdefault(one.kind, Counter())[outcome] += 1
            if outcome[0] not in "24" and one.is_complete and one.leave_after is None:
                self._found("answer", outcome, seed, one)

    async def _send(self, one: Case) -> str:
        """Send a case. Return the status, or what came instead."""
        async with self._server.connection() as (reader, writer):
            await self._server.send(writer, one.content)
            if one.leave_after is not None:
                await asyncio.sleep(one.leave_after)
                return "left"
            try:
                async with asyncio.timeout(ANSWER_SECONDS if one.is_complete else 0.2):
                    status, _ = await answer_of(reader, not one.content.startswith(b"HEAD"))
                return str(status)
            except TimeoutError:
                return "no answer in time"

    async def _repair(self) -> None:
        """Do what the server asks for where memory is released."""
        for tag in ("weights", "kv_cache", "cuda_graph"):
            await self._server.ask("/resume_memory_occupation", {"tags": [tag]}, PROBE_SECONDS)
        await self._server.ask("/end_weight_update", {}, PROBE_SECONDS)
        update = {"model_path": str(self._server.world.model), "flush_cache": False}
        await self._server.ask("/update_weights_from_disk", update, PROBE_SECONDS)

    async def _keep_probing(self) -> None:
        while True:
            started = time.perf_counter()
            try:
                answer = await self._probe()
                if answer != self._expected:
                    self._found("probe", f"other tokens than before: {answer}")
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                self._found("probe", f"{error!r} after {time.perf_counter() - started:.1f} s")
            await asyncio.sleep(1)

    async def _probe(self) -> Any:
        """Return the tokens of the greedy response. Ask again where a well-meaning client has to."""
        started = time.perf_counter()
        async with asyncio.timeout(PROBE_SECONDS):
            while True:
                status, answer = await self._server.ask("/generate", PROBE, PROBE_SECONDS)
                if status == 200 and answer["meta_info"]["finish_reason"]["type"] == "length":
                    self.probe_seconds.append(time.perf_counter() - started)
                    return answer["output_ids"]
                if status != 200 and not NOT_NOW.search(json.dumps(answer)):
                    raise ValueError(f"answered {status}: {answer}")
                if status != 200:
                    await self._repair()
                await asyncio.sleep(0.05)

    def _found(self, what: str, how: str, seed: str = "", one: Case | None = None) -> None:
        found = {"what": what, "how": how}
        if one is not None:
            found |= {"seed": seed, "kind": one.kind, "path": one.path, "request": repr(one.content[:300])}
        self.findings.append(found)


def fuzz(requests: int, seed: int, workers: int) -> dict[str, Any]:
    """Run the cases and return the report."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, closing(Server(Path(folder))) as server:
        fuzzer = Fuzzer(server, requests, seed, workers)
        with contextlib.suppress(OSError, EOFError, TimeoutError):  # of the last probe; a dead server is found below
            asyncio.run(fuzzer.run())
        if server.process.poll() is not None:
            fuzzer.findings.append({"what": "end", "how": f"code {server.process.poll()}", "log": server.log[-30:]})
            rss = 0
        else:
            rss = server.rss()
        if any("Traceback" in line for line in server.log):
            fuzzer.findings.append({"what": "log", "how": "a traceback", "log": server.log[-60:]})
    return {
        "requests": requests,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "answers": {kind: dict(counter) for kind, counter in sorted(fuzzer.statuses.items())},
        "probes": len(fuzzer.probe_seconds),
        "slowest_probe_seconds": round(max(fuzzer.probe_seconds, default=0.0), 2),
        "rss_mib": [round(value / 2**20) for value in (fuzzer.rss_before, rss)],
        "found": fuzzer.findings,
    }


@contextlib.contextmanager
def closing(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20000, help="default: 20000")
    parser.add_argument("--seed", type=int, default=1, help="another gives other requests (default: 1)")
    parser.add_argument("--workers", type=int, default=8, help="requests at a time (default: 8)")
    arguments = parser.parse_args()
    result = fuzz(arguments.requests, arguments.seed, arguments.workers)
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["found"] else 0)


if __name__ == "__main__":
    main()
