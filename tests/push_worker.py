"""Runs one rank of a weight push: a trainer's model goes to running servers. tests/parallel.py starts it.

The spec names the model that the trainer has, its layout and the servers' urls. Rank 0 writes what the servers say.
"""

import asyncio
import dataclasses
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
import torch.distributed as dist
from until import wait_until

from megatron_rl import device
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.schema import SftConfig
from megatron_rl.errors import StopRequested
from megatron_rl.keys import bearer, no_key
from megatron_rl.rollout import supervisor as supervisor_module
from megatron_rl.rollout import update_group
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import ServerError
from megatron_rl.rollout.member import Member
from megatron_rl.rollout.pool import WEIGHTS, WORKSPACE, ServerPool
from megatron_rl.rollout.supervisor import ServerSupervisor, start_servers
from megatron_rl.sync.distributed import DistributedTransport
from megatron_rl.sync.folder import WeightFolder
from megatron_rl.sync.ipc import IpcTransport
from megatron_rl.sync.transport import DiskTransport, Receivers, Transport
from megatron_rl.tensor_bytes import checksum
from megatron_rl.train.orchestrator.commands import Probe
from megatron_rl.train.orchestrator.weight_check import mean_differences, told_difference, weight_checksums
from megatron_rl.train.run.context import TrainContext

T = TypeVar("T")
SILENCE_SECONDS = 20.0  # more than a server that goes on is ever silent
READY_SECONDS = 240.0
TOKENS = [5, 6, 7, 8, 30, 31, 90]


def session_of(spec: dict[str, Any], folder: Path) -> TrainContext:
    config = SftConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "threads": 1,
            "model": {"path": spec["model"], "dtype": spec.get("dtype", "float32")},
            "parallel": spec["parallel"],
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": 1, "micro_batch_tokens": 64, "phase_deadline_seconds": 800},
            "data": {"train": "unused", "batch_tokens": 1},
        }
    )
    return TrainContext(config, 1, resume=False)


class Servers:
    """Holds rank 0's servers, the one at spec["url"] or two of its own, and their pool. Other ranks have none."""

    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        rollout = RolloutSection(
            prompts_per_step=1,
            samples_per_prompt=1,
            max_prompt_tokens=16,
            max_response_tokens=16,
            max_running_requests=2,
            servers=2,
            silence_seconds=SILENCE_SECONDS,
            ready_deadline_seconds=READY_SECONDS,
            max_restarts=9,
        )
        rollout = rollout.model_copy(update=spec.get("rollout", {}))
        self.supervisor: ServerSupervisor | None = None
        supervisor_module.FIRST_PAUSE_SECONDS = 0.05  # the pauses are tests/test_restarts.py's
        self.urls = [spec["url"]] if "url" in spec else []
        if not self.urls:
            self.supervisor = start_servers(Path(spec["other"]), folder, rollout, spec.get("dtype", "float32"))
            self.supervisor.wait_ready()
            self.urls = self.supervisor.urls
        self.loop = BackgroundLoop()
        self.pool = ServerPool(
            self.urls, rollout, self.supervisor.replace if self.supervisor else None, key_of=self.key_of
        )
        self.loop.run(self.pool.connect())

        self.stop_requested = False

    @property
    def receivers(self) -> Receivers:
        return Receivers(pool=self.pool, run=self._run)

    @property
    def late(self) -> Receivers:
        return dataclasses.replace(self.receivers, late=True)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine, or raise StopRequested if the test asked for a stop, as after a signal."""
        if self.stop_requested:
            work.close()
            raise StopRequested("stopped by the test")
        return self.loop.run(work)

    def pids(self) -> list[int]:
        assert self.supervisor is not None
        return [int(kept.server.log_path.with_suffix(".pid").read_text()) for kept in self.supervisor._kept]

    def key_of(self, url: str) -> str:
        return self.supervisor.key_of(url) if self.supervisor is not None else ""

    def versions(self) -> list[str]:
        asked = [
            httpx.get(f"{url}/model_info", headers=bearer(self.key_of(url)), timeout=240, trust_env=False)
            for url in self.urls
        ]
        return [str(answer.json()["weight_version"]) for answer in asked]

    def survivor(self) -> dict[str, Any]:
        """Return the checksums of each server that the pool still trusts after a push, by the server's number."""
        serving = {member.client.url for member in self.pool.serving}
        return {str(i): self.checksums_at(url) for i, url in enumerate(self.urls) if url in serving}

    def checksums_at(self, url: str) -> dict[str, str]:
        body, headers = {"action": "checksum"}, bearer(self.key_of(url))
        answer = httpx.post(f"{url}/weights_checker", json=body, headers=headers, timeout=240, trust_env=False)
        return dict(answer.json()["checksums"])

    def kill_and_wait(self, number: int) -> None:
        """Kill a server, and wait until it is back before the pool knows that it was gone."""
        assert self.supervisor is not None
        kept = self.supervisor._kept[number]
        gone = kept.server
        os.kill(self.pids()[number], signal.SIGKILL)
        # The supervisor pauses longer each time. A new server's .pid is there before the supervisor has the server.
        wait_until(lambda: kept.server is not gone, f"server {number} has been started again", pause=0.1)
        kept.server.wait_ready(READY_SECONDS)

    def keep_down(self, number: int) -> list[str]:
        """Kill a server and let it stay down until `supervisor.let_go`.

        Return a list that gets the server's version of the weights when the pool gives it work again.
        """
        assert self.supervisor is not None
        self.supervisor.hold()
        pool, url, found = self.pool, self.urls[number], list[str]()
        (member,) = [member for member in pool.serving if member.client.url == url]
        os.kill(self.pids()[number], signal.SIGKILL)
        mark_up = ServerPool.mark_up

        def noted(pool: ServerPool, member: Member) -> None:
            found.append(self.versions()[number])
            ServerPool.mark_up = mark_up  # type: ignore[method-assign]
            pool.mark_up(member)

        async def lose() -> None:
            ServerPool.mark_up = noted  # type: ignore[method-assign]
            pool.mark_down(member, "killed by the test")

        self.loop.run(lose())
        return found

    def at_a_bucket(self, transport: Any, number: int, how: signal.Signals) -> None:
        """Send a signal to a server when a part of the weights has been sent."""
        pid, send, count = self.pids()[number], transport._sender.send, itertools.count()

        def disturbed(*arguments: Any) -> None:
            if next(count) == 5:
                os.kill(pid, how)
                transport._sender.send = send
            send(*arguments)

        transport._sender.send = disturbed

    def checksums(self) -> list[dict[str, str]]:
        return [self.checksums_at(url) for url in self.urls]

    def checksums_and_dtypes(self) -> tuple[dict[str, str], dict[str, str]]:
        return self.loop.run(self.pool.client(self.urls[0]).weight_checksums())

    def scores(self) -> Probe:
        found = self.loop.run(self.pool.input_logprobs(TOKENS))
        return Probe(token_ids=TOKENS, start=1, logprobs=[one.tolist() for one in found.values()])

    def close(self) -> None:
        self.loop.run(self.pool.close())
        self.loop.close()
        if self.supervisor:
            self.supervisor.close()


def shared(value: Any, control: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control)
    return box[0]


def refused_alone(*arguments: Any, **more: Any) -> None:
    raise AssertionError("over NCCL a send that is in no batch makes a communicator of its own for the pair, of 100 MB")


def layouts(context: TrainContext, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Push in buckets of one parameter, damage a server, push in one bucket; prove each time."""
    dist.send = dist.recv = refused_alone
    servers = Servers(spec, folder) if context.rank == 0 else None
    report: dict[str, Any] = {"pushes": []}
    try:
        for number, max_bytes in enumerate((1, 2**30)):
            where = (context.model, context.control, max_bytes, "127.0.0.1", 240.0)
            transport = DistributedTransport(*where, key_of=servers.key_of if servers else no_key)
            transport.push(number + 1, servers.receivers if servers else None)
            probe = shared(servers.scores() if servers else None, context.control)
            found: dict[str, Any] = {"differences": mean_differences(context.trainer, probe, context.control)}
            if servers:
                found |= {"checksums": servers.checksums(), "sent": len(transport.buckets)}
                report["pushes"].append(found)
                # The server gets other weights under the right version, unknown to the trainer.
                client = servers.pool.serving[0].client
                servers.loop.run(client.update_weights_from_disk(Path(spec["damaged"]), str(number + 1)))
            transport.close()
            probe = shared(servers.scores() if servers else None, context.control)
            damaged = mean_differences(context.trainer, probe, context.control)
            theirs, dtypes = servers.checksums_and_dtypes() if servers else ({}, {})
            ours = weight_checksums(context.trainer, shared(dtypes, context.control), context.control)
            if servers:
                found |= {"damaged": damaged, "told": told_difference(ours, theirs)}
    finally:
        if servers:
            servers.close()
    return report


def gather(context: TrainContext, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill the buckets as if the ranks were on spec["nodes"], and return each rank's span and checksums of tensors."""
    node = spec["nodes"][context.rank]
    transport = IpcTransport(context.model, context.control, 20_000, node, (), 1, 0, 240.0)
    sums = {}
    for bucket in transport.buckets:
        flat = transport._filled(bucket)
        for place in bucket.tensors:
            tensor = flat[place.start : place.end].view(bucket.dtype).view(place.shape)
            sums[place.name] = checksum(tensor)
    transport.close()
    found: list[Any] = [None, None]
    dist.all_gather_object(found, (list(transport._span.ranks), sums), group=context.control)
    return {"spans": [ranks for ranks, _ in found], "checksums": [one for _, one in found]}


def faults(context: TrainContext, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Push while servers are lost, between two pushes and during one. The other rank must never be left waiting."""
    servers = Servers(spec, folder) if context.rank == 0 else None
    key_of = servers.key_of if servers else no_key
    where = (context.model, context.control, 60_000, "127.0.0.1", SILENCE_SECONDS)
    transport = DistributedTransport(*where, key_of=key_of)
    report: dict[str, Any] = {}

    def push(version: int, transport: Transport = transport, late: bool = False) -> str:
        """Push and return rank 0's error, or "", on every rank. The collective that shares it must still match."""
        said = ""
        try:
            transport.push(version, (servers.late if late else servers.receivers) if servers else None)
        except (ServerError, StopRequested) as error:
            said = f"{type(error).__name__}: {error}"
        return str(shared(said, context.control))

    def scenario(name: str, disturb: Callable[[Servers], object]) -> None:
        """Load the other model into all servers, disturb them, and push until a push succeeds."""
        before: list[int] = []
        if servers:
            servers.loop.run(settled(servers.pool))
            servers.loop.run(servers.pool.load_from_disk(Path(spec["other"]), name))
            servers.pool.assume(None, name)
            before = servers.pids()
            disturb(servers)
        started = time.monotonic()
        said = [push(1)]
        seconds = time.monotonic() - started
        between = servers.survivor() if servers else {}
        while said[-1] and len(said) < 3:
            said.append(push(1))
        if servers:
            wait_until(lambda: len(servers.pool.serving) + len(servers.pool.returned) == 2, "both servers are back")
        if shared(bool(servers and servers.pool.returned), context.control):  # it was not waited for
            assert push(1, late=True) == ""
        if servers:
            report[name] = {
                "said": said,
                "seconds": seconds,
                "between": between,
                "checksums": servers.checksums(),
                "versions": servers.versions(),
                "restarted": [a != b for a, b in zip(before, servers.pids(), strict=True)],
            }

    try:
        scenario("nothing", lambda servers: None)
        scenario("killed before", lambda servers: servers.kill_and_wait(1))
        scenario("killed within", lambda servers: servers.at_a_bucket(transport, 0, signal.SIGKILL))
        scenario("stopped within", lambda servers: servers.at_a_bucket(transport, 1, signal.SIGSTOP))
        report["no communicator"] = without_communicator(context, servers, push)
        if servers:
            servers.stop_requested = True
        report["stop"] = push(2)
        if servers:
            servers.stop_requested = False
        report["after the stop"] = push(2)
        urls = servers.urls if servers else ()
        ipc = IpcTransport(context.model, context.control, 60_000, 0, urls, 2, 0, SILENCE_SECONDS, key_of)
        report["handles"] = [push(3, ipc)]
        if servers:
            servers.kill_and_wait(1)
            os.kill(servers.pids()[0], signal.SIGKILL)
            servers.stop_requested = True
        report["handles"] += [push(3, ipc)]
        if servers:
            servers.stop_requested = False
        report["handles"] += [push(3, ipc)]
        num_bytes = context.architecture.num_parameters() * context.model.dtype.itemsize
        folder_of_weights = WeightFolder(context.control, num_bytes, shared=None)
        for name, way in {"distributed": transport, "disk": DiskTransport(folder_of_weights, context.export)}.items():
            report[f"restarting, {name}"] = while_restarting(servers, way, push)
        folder_of_weights.close()
        ipc.close()
    finally:
        transport.close()
        if servers:
            servers.close()
    return report


def while_restarting(servers: Servers | None, transport: Transport, push: Callable[..., str]) -> dict[str, Any]:
    """Push to both servers, and again while one of them is kept from starting again; then it may."""
    found: dict[str, Any] = {"said": [], "seconds": []}
    if servers:
        servers.loop.run(settled(servers.pool))
    for version in (7, 8):
        if servers and version == 8:
            found["first"] = servers.keep_down(1)
        started = time.monotonic()
        found["said"].append(push(version, transport))
        found["seconds"].append(time.monotonic() - started)
    if servers:
        assert servers.supervisor is not None
        found["serving"] = [servers.urls.index(member.client.url) for member in servers.pool.serving]
        servers.supervisor.let_go()
        wait_until(lambda: servers.pool.returned or len(servers.pool.serving) == 2, "the other server is back")
    if not isinstance(transport, DiskTransport):
        found["said"].append(push(8, transport, late=True))
        found["said"].append(push(9, transport))
    if servers:
        wait_until(lambda: len(servers.pool.serving) == 2, "both servers serve")
        found |= {"versions": servers.versions(), "checksums": servers.checksums()}
    return found


def without_communicator(context: TrainContext, servers: Servers | None, push: Callable[..., str]) -> list[str]:
    """Return the errors of two pushes in a group of their own. The first broadcast raises an error of NCCL."""
    key_of = servers.key_of if servers else no_key
    transport = DistributedTransport(
        context.model, context.control, 60_000, "127.0.0.1", SILENCE_SECONDS, key_of=key_of
    )
    broadcast = update_group.broadcast

    def failing(*arguments: Any) -> Any:
        update_group.broadcast = broadcast
        raise dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:1, invalid usage\nncclInvalidUsage: This usually reflects invalid "
            "usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000"
        )

    update_group.broadcast = failing
    said = [push(4, transport), push(5, transport)]
    transport.close()
    return said


async def settled(pool: ServerPool, count: int = 2, seconds: float = READY_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while len(pool.serving) < count:
            await pool.recovered()
            for member in await pool.recovered():
                pool.mark_up(member)
            await asyncio.sleep(0.05)


def received(context: TrainContext, spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Push to the receiver at spec["url"] over spec["backend"], in buckets of one parameter and in one bucket; what it
    has each time."""
    servers = Servers(spec, folder) if context.rank == 0 else None
    found = []
    try:
        for number, max_bytes in enumerate((1, 2**30)):
            where = (context.model, context.control, max_bytes, "127.0.0.1", 240.0, spec["backend"])
            transport = DistributedTransport(*where, key_of=servers.key_of if servers else no_key)
            transport.push(number + 1, servers.receivers if servers else None)
            if servers:
                push = {"checksums": servers.checksums()[0], "version": servers.versions()[0]}
                found.append(push | {"buckets": len(transport.buckets)})
            transport.close()
    finally:
        if servers:
            servers.close()
    return found


def timed(context: TrainContext, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure pushes of one rank to its server, over each of spec["transports"], beside a copy on the device.

    Over the first transport, also test a server that is killed in a push, and memory that is released.

    difference: mean |trainer - server log-prob| of a few tokens, behind a push of weights that the server had not.
    """
    servers = Servers(spec, folder)
    max_bytes, silence = spec["bucket_bytes"], 60.0
    num_bytes = context.architecture.num_parameters() * context.model.dtype.itemsize
    weights = WeightFolder(context.control, num_bytes, shared=None)
    num_gpus = int(device.on_cuda())
    make: dict[str, Callable[[], Transport]] = {
        "disk": lambda: DiskTransport(weights, context.export),
        "ipc": lambda: IpcTransport(
            context.model,
            context.control,
            max_bytes,
            0,
            servers.urls,
            1,
            num_gpus,
            silence,
            key_of=servers.key_of,
        ),
        "distributed": lambda: DistributedTransport(
            context.model, context.control, max_bytes, "127.0.0.1", silence, key_of=servers.key_of
        ),
    }
    report: dict[str, Any] = {"gb": num_bytes / 1e9, "device_copy_seconds": copy_seconds(num_bytes), "pushes": {}}
    version = itertools.count(1)

    def difference() -> float:
        return max(mean_differences(context.trainer, servers.scores(), context.control))

    def change() -> int:
        """Change the weights to and fro, so that the server lacks them, and return their version."""
        number = next(version)
        with torch.no_grad():
            for p in context.model.parameters():
                p.mul_(1.1 if number % 2 else 1 / 1.1)
        return number

    def pushed(transport: Transport) -> dict[str, Any]:
        number = change()
        before = difference()
        started = time.perf_counter()
        parts = transport.push(number, servers.receivers)
        found: dict[str, Any] = {"seconds": time.perf_counter() - started, **dataclasses.asdict(parts)}
        return found | {"difference_before": before, "difference": difference()}

    def killed(transport: Transport) -> dict[str, Any]:
        before = servers.pids()
        servers.at_a_bucket(transport, 0, signal.SIGKILL)
        started, said, number = time.perf_counter(), [], change()
        while len(said) < 3:
            try:
                transport.push(number, servers.receivers)
                break
            except ServerError as error:
                said.append(f"{type(error).__name__}: {error}")
                servers.loop.run(settled(servers.pool, 1, spec["rollout"]["ready_deadline_seconds"]))
        else:
            raise AssertionError(f"no push succeeded: {said}")
        assert servers.pids() != before
        found = {"said": said, "seconds_until_whole": time.perf_counter() - started}
        return found | {"difference": difference()}

    def released() -> dict[str, Any]:
        free = [device.free_bytes()]
        servers.loop.run(servers.pool.release_memory())
        started = time.perf_counter()
        device.wait_until_free(0, 30)
        found = {"seconds_until_free": time.perf_counter() - started}
        free.append(device.free_bytes())
        servers.loop.run(servers.pool.resume_memory(WEIGHTS))
        transport = make[spec["transports"][0]]()
        transport.push(change(), servers.receivers)
        servers.loop.run(servers.pool.resume_memory(WORKSPACE))
        transport.close()
        free.append(device.free_bytes())
        found |= {"free_gb": [None if n is None else n / 1e9 for n in free]}
        return found | {"difference": difference()}

    try:
        for name in spec["transports"]:
            transport = make[name]()
            report["pushes"][name] = [pushed(transport) for _ in range(2)]  # the first makes what is kept
            if name == spec["transports"][0]:
                report["killed"] = killed(transport)
            transport.close()
        if spec["rollout"].get("release_memory"):
            report["released"] = released()
    finally:
        (folder / "report.json").write_text(json.dumps(report))  # also of a scenario that fails
        servers.close()
        weights.close()
    return report


def copy_seconds(num_bytes: int) -> float:
    """Return the median seconds of a copy of so many bytes within the device's memory, 512 MiB at a time."""
    piece = min(num_bytes, 2**29)
    source = torch.ones(piece, dtype=torch.uint8, device=device.torch_device())
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(4):
        device.synchronize()
        started = time.perf_counter()
        for start in range(0, num_bytes, piece):
            target[: num_bytes - start].copy_(source[: num_bytes - start])
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


SCENARIOS = {"layouts": layouts, "gather": gather, "faults": faults, "received": received, "timed": timed}


def main(folder: Path) -> None:
    spec = json.loads((folder / "spec.json").read_text())
    context = session_of(spec, folder)
    report = SCENARIOS[spec["scenario"]](context, spec, folder)
    if context.rank == 0:
        (folder / "report.json").write_text(json.dumps(report))
    context.close()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # torch's process groups may take seconds to wind down
