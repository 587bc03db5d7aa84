"""Measure how fast weights get from a trainer to a server, as JSON.

    python tools/bench_sync.py [--bucket-mb 64] [--repeats 4]

A model of about 700 MB in fp32 in one training rank, and one server beside it. Timed are whole pushes, until the server
has confirmed: `disk` and `distributed` to the embedded server, which checks every value, lays the weights out anew and
installs them, and `distributed_transport` to a receiver that takes the buckets and drops them, so that what is left is
export, requests and broadcast. In the same run over the same bytes: memcpy, and a raw gloo broadcast in buckets of the
same sizes between two processes. `extra_mb` is the most that the trainer's memory grew over what it had before the
transport was made.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from tiny_model import write_tiny_model  # noqa: E402
from weight_receiver import Receiver, serve, serving  # noqa: E402

from megatron_rl.config.layout import Layout  # noqa: E402
from megatron_rl.config.model import ModelSection, MoeSection  # noqa: E402
from megatron_rl.config.rollout import RolloutSection  # noqa: E402
from megatron_rl.families import load_architecture  # noqa: E402
from megatron_rl.keys import KeyOf, no_key  # noqa: E402
from megatron_rl.model.build import build_model, initialize_parallel, load_weights  # noqa: E402
from megatron_rl.rollout import update_group  # noqa: E402
from megatron_rl.rollout.pool import ServerPool  # noqa: E402
from megatron_rl.rollout.supervisor import start_servers  # noqa: E402
from megatron_rl.stores import host_store  # noqa: E402
from megatron_rl.sync.distributed import DistributedTransport  # noqa: E402
from megatron_rl.sync.export import export_directory  # noqa: E402
from megatron_rl.sync.folder import WeightFolder  # noqa: E402
from megatron_rl.sync.transport import DiskTransport, Receivers, Transport  # noqa: E402

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "num_shared_experts": 1,
}


def receive_broadcasts(address: str, port: int, sizes: list[int], repeats: int) -> None:
    """Receive the raw broadcast, as its other end."""
    group = update_group.join(address, port, 1, 2, "raw", "gloo", 120.0)
    buffer = torch.empty(max(sizes), dtype=torch.uint8)
    for _ in range(repeats):
        for size in sizes:
            update_group.broadcast(group, buffer[:size]).wait()
    update_group.leave(group)


def raw_broadcast(sizes: list[int], repeats: int) -> float:
    """Return the seconds of one round."""
    store = host_store("127.0.0.1", 2, 60.0)
    arguments = [str(Path(__file__)), "--receive", json.dumps([store.port, sizes, repeats])]
    process = subprocess.Popen([sys.executable, *arguments])
    group = update_group.join("127.0.0.1", store.port, 0, 2, "raw", "gloo", 120.0, store=store)
    buffer = torch.ones(max(sizes), dtype=torch.uint8)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for size in sizes:
            update_group.broadcast(group, buffer[:size]).wait()
        times.append(time.perf_counter() - started)
    update_group.leave(group)
    process.wait(60)
    return statistics.median(times)


def memcpy(num_bytes: int, repeats: int) -> float:
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class BareReceiver(Receiver):
    """Serves the routes of a weight update, without a model behind them, and with one buffer for all."""

    buffer = torch.empty(0, dtype=torch.uint8)

    def _receive(self, body: dict[str, Any]) -> None:
        num_bytes = sum(4 * math.prod(shape) for shape in body["shapes"])
        if BareReceiver.buffer.numel() < num_bytes:
            BareReceiver.buffer = torch.empty(num_bytes, dtype=torch.uint8)
        update_group.broadcast(Receiver.group, BareReceiver.buffer[:num_bytes]).wait()


class Peak:
    """Measures the most memory that this process had inside the block, above what it had before, in bytes."""

    def __enter__(self) -> "Peak":
        self._process, self._over = psutil.Process(), threading.Event()
        self._before, self.extra = self._process.memory_info().rss, 0
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.extra = max(self.extra, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def timed(make: Callable[[], Transport], receivers: Receivers, first: int, repeats: int) -> dict[str, Any]:
    """Time pushes. make: makes the transport. first: version of the first push, which makes what is kept and is not
    counted."""
    times = []
    with Peak() as peak:
        transport = make()
        for i in range(repeats):
            started = time.perf_counter()
            transport.push(first + i, receivers)
            times.append(time.perf_counter() - started)
        transport.close()
    return {"seconds": round(statistics.median(times[1:]), 3), "extra_mb": round(peak.extra / 2**20)}


@contextlib.contextmanager
def one_rank() -> Iterator[Any]:
    initialize_parallel(Layout(world_size=1), 600.0, seed=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    parser.add_argument("--bare-receiver", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        port, sizes, repeats = json.loads(arguments.receive)
        return receive_broadcasts("127.0.0.1", port, sizes, repeats)
    if arguments.bare_receiver:
        return serve(BareReceiver)

    # The thread count is that of one of two ranks on two cores: threads that share a copy wait for each other while
    # gloo and the server take the cores.
    torch.set_num_threads(1)
    rollout = RolloutSection(
        prompts_per_step=1,
        samples_per_prompt=2,
        max_running_requests=4,
        servers=1,
        ready_deadline_seconds=300,
        max_response_tokens=64,
    )
    with tempfile.TemporaryDirectory() as name, one_rank() as control, asyncio.Runner() as runner:
        folder = Path(name)
        path = write_tiny_model(folder / "model", **SHAPE)
        architecture = load_architecture(path)
        model = build_model(
            architecture,
            ModelSection(path=path, layers="local"),
            MoeSection(),
            Layout(world_size=1),
            distributed_optimizer=False,
        )
        load_weights(model, path)
        num_bytes = architecture.num_parameters() * 4

        def over_disk() -> Transport:
            return DiskTransport(weights, lambda to: export_directory(model, path, to, control))

        def over_group(key_of: KeyOf = no_key) -> DistributedTransport:
            where = (model, control, arguments.bucket_mb * 2**20, "127.0.0.1", 60.0)
            return DistributedTransport(*where, key_of=key_of)

        def receivers_at(urls: Sequence[str], key_of: KeyOf = no_key) -> Receivers:
            pool = ServerPool(urls, rollout, key_of=key_of)
            runner.run(pool.connect())
            return Receivers(pool=pool, run=runner.run)

        weights = WeightFolder(control, num_bytes, shared=None)
        result: dict[str, Any] = {}
        with start_servers(path, folder, rollout, "float32") as supervisor:
            supervisor.wait_ready()
            receivers = receivers_at(supervisor.urls, supervisor.key_of)
            result["distributed"] = timed(partial(over_group, supervisor.key_of), receivers, 1, arguments.repeats)
            result["disk"] = timed(over_disk, receivers, 100, arguments.repeats)
            runner.run(receivers.pool.close())
        weights.close()
        with serving([sys.executable, __file__, "--bare-receiver"]) as url:
            receivers = receivers_at([url])
            result["distributed_transport"] = timed(over_group, receivers, 1, arguments.repeats)
            runner.run(receivers.pool.close())
        buckets = over_group().buckets
        sizes = [bucket.num_bytes for bucket in buckets]
        result["memcpy"] = {"seconds": round(memcpy(num_bytes, arguments.repeats), 3)}
        result["raw_broadcast"] = {"seconds": round(raw_broadcast(sizes, arguments.repeats), 3)}
    raw = result["raw_broadcast"]["seconds"]
    for entry in result.values():
        entry["gb_per_second"] = round(num_bytes / 1e9 / entry["seconds"], 2)
    for kind in ("disk", "distributed", "distributed_transport"):
        result[kind]["share_of_raw_broadcast"] = round(raw / result[kind]["seconds"], 2)
    result["bytes"], result["bucket_mb"] = num_bytes, arguments.bucket_mb
    result["largest_bucket_mb"] = round(max(sizes) / 2**20, 1)
    # One to begin, one to end.
    result["num_requests"] = len(sizes) + 2
    result["num_requests_tensor_by_tensor"] = sum(len(bucket.tensors) for bucket in buckets) + 2
    print(json.dumps(result, indent=1))
    sys.stdout.flush()
    os._exit(0)  # torch's threads can hang at the interpreter's exit


if __name__ == "__main__":
    main()
