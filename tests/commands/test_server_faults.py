"""Tests servers that die, hang or lie: the pool finishes its work with the same tokens, or says why it cannot."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from liar import Exchange, liar
from safetensors.torch import save_file
from tiny_model import tensors_of, write_tiny_model
from until import until, wait_until

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.gpus import without_expandable_segments
from megatron_rl.keys import bearer
from megatron_rl.rollout import supervisor as supervisor_module
from megatron_rl.rollout.client import (
    Completion,
    GenerationClient,
    RequestRefused,
    SampleRequest,
    ServerLost,
    gather_all,
)
from megatron_rl.rollout.pool import WEIGHTS, WORKSPACE, Place, ServerPool, WeightsNeeded
from megatron_rl.rollout.ports import close_port, hold_port
from megatron_rl.rollout.server import GenerationServer
from megatron_rl.rollout.supervisor import ServerSupervisor, start_servers
from megatron_rl.tensor_bytes import checksum

LENGTH, SHORT = 300, 60
ROLLOUT = RolloutSection(
    prompts_per_step=1,
    samples_per_prompt=2,
    max_prompt_tokens=12,
    max_response_tokens=LENGTH,
    max_running_requests=8,
    servers=2,
    silence_seconds=60.0,
    ready_deadline_seconds=600,
    max_restarts=99,
)
# For tests of a server that hangs: they take as long.
SOON_SILENT = ROLLOUT.model_copy(update={"silence_seconds": 15.0})
KEY = "known"
# Four groups of two responses each.
REQUESTS = [
    [SampleRequest(input_ids=[5 + i, 6], seed=10 * i + j, max_new_tokens=LENGTH) for j in range(2)] for i in range(4)
]


def make_model(path: Path, seed: int) -> Path:
    """Write a model whose responses rarely end by themselves."""
    write_tiny_model(path, seed, vocab_size=512, hidden_size=32, num_hidden_layers=2, max_position_embeddings=1024)
    tensors = tensors_of(path)
    tensors["lm_head.weight"][1] = 0.0  # the token that ends a response
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(autouse=True, scope="module")
def without_pauses() -> Iterator[None]:
    """Restart servers without a pause, since each test ends one or two. tests/test_restarts.py tests the pauses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor_module, "FIRST_PAUSE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module", autouse=True)
def _known_key() -> Iterator[None]:
    """Give all servers here one known key, so that tests can ask them too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_rl.rollout.supervisor.new_key", lambda: KEY)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "first", 0), make_model(folder / "second", 1)


@pytest.fixture(scope="module")
def _supervisor(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerSupervisor]:
    supervisor = start_servers(models[0], tmp_path_factory.mktemp("servers"), ROLLOUT, "float32")
    try:
        supervisor.wait_ready()
        yield supervisor
    finally:
        pids = pids_of(supervisor)
        supervisor.close()
    assert not any(map(psutil.pid_exists, pids))


@pytest.fixture
def supervisor(_supervisor: ServerSupervisor) -> ServerSupervisor:
    """Return the supervisor once its two servers are ready."""
    for url in _supervisor.urls:  # on a busy machine a start takes its time
        wait_until(lambda url=url: is_ready(url) and is_proven(_supervisor, url), f"{url} is ready")  # type: ignore[misc]
    return _supervisor


def is_proven(supervisor: ServerSupervisor, url: str) -> bool:
    """Return whether the supervisor has checked that its own server listens at this URL."""
    try:
        return bool(supervisor.key_of(url))
    except ServerLost:
        return False


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", headers=bearer(KEY), timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def pids_of(supervisor: ServerSupervisor) -> list[int]:
    return [int(kept.server.log_path.with_suffix(".pid").read_text()) for kept in supervisor._kept]


async def stopped_at_work(pool: ServerPool, url: str, pid: int) -> "asyncio.Task[list[list[Completion]]]":
    """Ask all requests, and stop the server at this URL (SIGSTOP) while it has some of them. Return the work.

    A server that was faster is let go on, and all is asked again.
    """
    (member,) = (member for member in pool._members if member.client.url == url)
    async with httpx.AsyncClient(base_url=url, headers=bearer(KEY), timeout=60, trust_env=False) as http:
        while True:
            work = asyncio.create_task(all_requests(pool))
            while not work.done() and not (await http.get("/server_info")).json()["internal_states"][0]["running"]:
                await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "the server is stopped")
            await asyncio.sleep(0.2)  # the event loop reads what had been answered
            if member.outstanding_requests:
                return work
            os.kill(pid, signal.SIGCONT)
            await work


def pids_at(urls: list[str], supervisor: ServerSupervisor) -> list[int]:
    by_url = dict(zip(supervisor.urls, pids_of(supervisor), strict=True))
    return [by_url[url] for url in urls]


def version_of(url: str) -> str:
    return str(
        httpx.get(f"{url}/model_info", headers=bearer(KEY), timeout=60, trust_env=False).json()["weight_version"]
    )


def checksums_of(url: str) -> dict[str, str]:
    body = {"action": "checksum"}
    answer = httpx.post(f"{url}/weights_checker", json=body, headers=bearer(KEY), timeout=60, trust_env=False)
    return dict(answer.json()["checksums"])


def expected_checksums(model: Path) -> dict[str, str]:
    return {name: checksum(tensor) for name, tensor in tensors_of(model).items()}


@contextlib.asynccontextmanager
async def connected(
    urls: list[str], weights: Path | None, supervisor: ServerSupervisor | None, rollout: RolloutSection = ROLLOUT
) -> AsyncIterator[ServerPool]:
    """Yield a pool whose servers have the first model as version "0".

    weights: a server that comes back finds them there.
    """

    def key_of(url: str) -> str:
        return supervisor.key_of(url) if supervisor and url in supervisor.urls else KEY

    pool = ServerPool(urls, rollout, supervisor.replace if supervisor else None, key_of=key_of)
    try:
        await pool.connect()
        if weights is not None:
            await pool.load_from_disk(weights, "0")
        pool.assume(weights, "0")
        yield pool
    finally:
        await pool.close()


async def of_group(pool: ServerPool, requests: Sequence[SampleRequest]) -> list[Completion]:
    place = Place()
    return await gather_all(pool.generate(one, 1.0, place=place) for one in requests)


async def all_requests(pool: ServerPool) -> list[list[Completion]]:
    return list(await asyncio.gather(*(of_group(pool, requests) for requests in REQUESTS)))


def ids(answers: list[list[Completion]]) -> list[list[int]]:
    return [one.output_ids.tolist() for answer in answers for one in answer]


@pytest.fixture(scope="module")
def undisturbed(models: tuple[Path, Path], _supervisor: ServerSupervisor) -> list[list[int]]:
    async def run() -> list[list[int]]:
        async with connected(_supervisor.urls, models[0], _supervisor) as pool:
            answers = ids(await all_requests(pool))
            assert pool.counts.num_taken_out == 0
            return answers

    found = asyncio.run(run())
    assert all(len(one) > SHORT for one in found[:2])
    return found


# Memory --------------------------------------------------------------------------------------------------------------


def test_a_server_that_goes_while_its_memory_is_released_is_started_again_once_others_need_it_no_longer(
    models: tuple[Path, Path], supervisor: ServerSupervisor, undisturbed: list[list[int]]
) -> None:
    async def run() -> None:
        async with connected(supervisor.urls, models[0], supervisor) as pool:
            await pool.release_memory()
            await asyncio.to_thread(supervisor.hold)
            (gone, other) = pids_of(supervisor)
            os.kill(gone, signal.SIGKILL)
            await asyncio.sleep(1.0)  # the supervisor looks five times
            assert pids_of(supervisor) == [gone, other]
            supervisor.let_go()
            await pool.resume_memory(WEIGHTS)
            await pool.load_from_disk(models[0], "1")
            await pool.resume_memory(WORKSPACE)
            await until(lambda: len(pool.serving) == 2, "both servers serve")
            assert pids_of(supervisor)[1] == other, "it kept its process"
            assert pool.counts.num_taken_out == 1
            assert ids(await all_requests(pool)) == undisturbed

    asyncio.run(run())


def test_a_server_that_gets_ready_when_memory_is_released_gets_its_weights_and_releases_too(
    models: tuple[Path, Path], supervisor: ServerSupervisor
) -> None:
    not_yet: list[int] = []

    def ready(exchange: Exchange) -> None:
        exchange.say(b"", not_yet.pop() if not_yet else 200)

    async def run(url: str) -> None:
        async with connected([url], models[0], None) as pool:
            (member,) = pool._members
            not_yet.append(503)
            pool.mark_down(member, "by the test")
            await until(lambda: not not_yet, "its recovery asks again")
            await asyncio.wait_for(pool.release_memory(), 300)
            assert (member.out, member.released) == (None, {*WEIGHTS, *WORKSPACE})
            await pool.resume_memory((*WEIGHTS, *WORKSPACE))
            await pool.load_from_disk(models[0], "0")

    with liar(supervisor.urls[0], ready=ready) as url:
        asyncio.run(run(url))


def test_a_server_that_cannot_resume_is_ended_and_comes_back_with_the_weights(
    models: tuple[Path, Path], supervisor: ServerSupervisor, undisturbed: list[list[int]]
) -> None:
    async def run() -> None:
        async with connected(supervisor.urls, models[0], supervisor) as pool:
            await pool.release_memory()
            (before, other) = pids_of(supervisor)
            # The server resumes without the pool's knowledge, so the pool later resumes what is not released.
            url, body = f"{supervisor.urls[0]}/resume_memory_occupation", {"tags": ["weights"]}
            httpx.post(url, json=body, headers=bearer(KEY), timeout=60, trust_env=False).raise_for_status()
            await pool.resume_memory(WEIGHTS)
            assert [member.num_losses for member in pool._members] == [1, 0]
            await pool.load_from_disk(models[0], "1")
            await pool.resume_memory(WORKSPACE)
            await until(lambda: len(pool.serving) == 2, "both servers serve")
            assert pids_of(supervisor)[0] != before
            assert pids_of(supervisor)[1] == other
            assert ids(await all_requests(pool)) == undisturbed

    asyncio.run(run())


def test_what_is_just_starting_when_memory_is_needed_is_ended_and_no_restart_is_counted(
    supervisor: ServerSupervisor,
) -> None:
    (pid, _) = pids_of(supervisor)
    counted = supervisor._kept[0].num_restarts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationServer, "is_ready", lambda _: False)  # however fast it starts
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pids_of(supervisor)[0] != pid, "the server has been started again")
        supervisor.hold()
    starting = pids_of(supervisor)[0]
    time.sleep(0.6)
    assert not psutil.pid_exists(starting)
    assert pids_of(supervisor)[0] == starting
    supervisor.let_go()
    wait_until(lambda: is_ready(supervisor.urls[0]), "the server is ready")
    assert supervisor._kept[0].num_restarts == counted + 1


def test_a_server_that_releases_memory_does_not_get_the_allocators_expandable_segments() -> None:
    given = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True", "PYTORCH_ALLOC_CONF": "a:1"}
    assert without_expandable_segments(given) == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    assert without_expandable_segments({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}) == {"PYTORCH_ALLOC_CONF": ""}


# Death and silence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_server_that_goes_while_it_generates_costs_no_response(
    how: signal.Signals, models: tuple[Path, Path], supervisor: ServerSupervisor, undisturbed: list[list[int]]
) -> None:
    async def run() -> None:
        async with connected(supervisor.urls, models[0], supervisor, SOON_SILENT) as pool:
            (pid, other) = pids_of(supervisor)
            work = await stopped_at_work(pool, supervisor.urls[0], pid)
            if how != signal.SIGSTOP:
                os.kill(pid, how)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            assert ids(await asyncio.wait_for(work, 600)) == undisturbed
            assert pool.counts.num_taken_out == 1
            assert 1 <= pool.counts.num_resent <= 4
            await until(lambda: len(pool.serving) == 2, "both servers serve")
            assert not psutil.pid_exists(pid)
            assert pids_of(supervisor)[1] == other
            assert ids(await all_requests(pool)) == undisturbed

    asyncio.run(run())


def test_the_only_server_is_waited_for_and_gets_its_weights_back(
    models: tuple[Path, Path], supervisor: ServerSupervisor
) -> None:
    async def run() -> None:
        async with connected(supervisor.urls[1:], models[0], supervisor) as pool:
            await pool.load_from_disk(models[1], "1")  # not those that the server is started again with
            expected = ids(await all_requests(pool))
            work = await stopped_at_work(pool, supervisor.urls[1], pids_of(supervisor)[1])
            os.kill(pids_of(supervisor)[1], signal.SIGKILL)
            answers = await asyncio.wait_for(work, 600)
            assert ids(answers) == expected
            assert {one.weight_versions for answer in answers for one in answer} == {("1",)}
            assert pool.counts.num_taken_out == 1

    asyncio.run(run())


def test_the_only_server_with_weights_that_are_nowhere_on_disk_needs_another_push(supervisor: ServerSupervisor) -> None:
    async def run() -> None:
        async with connected(supervisor.urls[:1], None, supervisor) as pool:
            work = await stopped_at_work(pool, supervisor.urls[0], pids_of(supervisor)[0])
            os.kill(pids_of(supervisor)[0], signal.SIGKILL)
            with pytest.raises(WeightsNeeded, match="no generation server has the current weights"):
                await asyncio.wait_for(work, 600)
            (member,) = await pool.recovered()
            assert (member.num_losses, pool.serving) == (1, [])

    asyncio.run(run())


@pytest.mark.parametrize("killed", [True, False])
def test_a_server_that_goes_in_a_weight_update_serves_again_with_the_new_weights(
    killed: bool, models: tuple[Path, Path], supervisor: ServerSupervisor
) -> None:
    async def run() -> None:
        async with connected(supervisor.urls, models[0], supervisor, SOON_SILENT) as pool:
            pid, other = pids_of(supervisor)
            os.kill(pid, signal.SIGSTOP)  # so that the update is under way for as long as we like
            update = asyncio.create_task(pool.load_from_disk(models[1], "1"))
            await asyncio.sleep(0.3)
            if killed:
                os.kill(pid, signal.SIGKILL)
            await asyncio.wait_for(update, 600)
            assert [member.num_losses for member in pool._members] == [1, 0]
            await until(lambda: len(pool.serving) == 2, "both servers serve")
            assert pids_of(supervisor)[1] == other
            for url in supervisor.urls:
                assert version_of(url) == "1"
                assert checksums_of(url) == expected_checksums(models[1])

    asyncio.run(run())


def test_weights_that_came_while_an_older_version_was_loaded_are_loaded_too(
    models: tuple[Path, Path], supervisor: ServerSupervisor
) -> None:
    async def run() -> None:
        async with connected(supervisor.urls, models[0], None) as pool:
            pool.mark_down(pool.serving[0], "the test says so")  # comes back at once, and loads version 0
            pool.assume(models[1], "1")
            await until(lambda: len(pool.serving) == 2, "both servers serve")
            assert version_of(supervisor.urls[0]) == "1"

    asyncio.run(run())


def test_a_folder_that_cannot_be_read_for_a_moment_does_not_cost_a_server(
    models: tuple[Path, Path], supervisor: ServerSupervisor, tmp_path: Path
) -> None:
    async def run() -> None:
        async with connected(supervisor.urls, models[0], None) as pool:
            pool.assume(tmp_path / "weights", "1")  # not there yet
            pool.mark_down(pool.serving[0], "the test says so")
            await asyncio.sleep(0.5)
            assert len(pool.serving) == 1
            (tmp_path / "weights").symlink_to(models[1])
            await until(lambda: len(pool.serving) == 2, "both servers serve")
            assert version_of(supervisor.urls[0]) == "1"

    asyncio.run(run())


def test_a_server_that_was_given_up_gets_another_chance_with_the_next_weights(
    models: tuple[Path, Path], supervisor: ServerSupervisor
) -> None:
    async def run() -> None:
        async with connected(supervisor.urls, models[0], None) as pool:
            pool.assume(Path("/nowhere"), "1")
            member = pool.serving[0]
            pool.rollout = ROLLOUT.model_copy(update={"ready_deadline_seconds": 0.4})
            pool.mark_down(member, "the test says so")
            await until(lambda: "did not come back within 0.4 s" in str(member.out), "the server is given up")
            pool.rollout = ROLLOUT  # a busy machine may load the next weights for longer
            await pool.load_from_disk(models[1], "2")
            await until(lambda: len(pool.serving) == 2, "both servers serve")
            assert [version_of(url) for url in supervisor.urls] == ["2", "2"]

    asyncio.run(run())


def test_a_port_that_is_taken_is_named_at_the_start(models: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        rollout = ROLLOUT.model_copy(update={"port": port, "servers": 1})
        with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 cannot be used \(Address already in use\)"):
            start_servers(models[0], tmp_path, rollout, "float32")


def test_the_port_of_a_server_that_died_cannot_be_taken_and_a_taken_one_ends_the_keeper(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    supervisor = start_servers(models[0], tmp_path, ROLLOUT.model_copy(update={"servers": 1}), "float32")
    try:
        supervisor.wait_ready()
        server = supervisor._kept[0].server
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with supervisor._lock:  # it cannot start another meanwhile
                server.kill()
                with pytest.raises(OSError, match="in use"):
                    taken.bind(("127.0.0.1", server.port))
                hold_port("127.0.0.1", server.port)  # what the next start does, and then somebody else is faster
                taken.bind(("127.0.0.1", server.port))
                taken.listen()
            wait_until(lambda: supervisor.failure is not None, "the supervisor gives up")
            with pytest.raises(ServerLost, match="not known to be our server"):
                supervisor.key_of(server.url)
        with pytest.raises(RuntimeError, match=f"another process listens on port {server.port} of 127.0.0.1"):
            supervisor.check()
    finally:
        supervisor.close()


def test_a_held_port_goes_to_nobody_but_a_server_that_is_started_there() -> None:
    """Check that nobody can take the port meanwhile: SGLang would then neither serve nor end."""
    port = hold_port("127.0.0.1")
    assert hold_port("127.0.0.1", port) == port  # as when a server is started again
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    for host in ("127.0.0.1", "0.0.0.0"):
        with socket.create_server((host, port)) as server, socket.create_connection(("127.0.0.1", port)) as client:
            assert server.accept()[1] == client.getsockname()
            with pytest.raises(OSError, match="in use"), socket.create_server(("127.0.0.1", port)):
                pass
    close_port("127.0.0.1", port)
    with pytest.raises(OSError, match="in use"), socket.create_server(("127.0.0.1", port)):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 cannot be used \(Address already in use\)"):
            hold_port("127.0.0.1", port)


def test_a_server_that_takes_too_short_inputs_is_refused_at_the_start(supervisor: ServerSupervisor) -> None:
    def told(**info: int | None) -> Callable[[Exchange], None]:
        return lambda exchange: exchange.say(json.dumps(info).encode())

    async def connect(url: str) -> None:
        async with connected([url], None, None):  # for sequences of 12 + 300 tokens
            pass

    # As SGLang says it of --context-length 317 and of too small a cache, and the embedded server of 311.
    for info in ({"context_length": 317, "max_req_input_len": 311}, {"max_req_input_len": 99}, {"context_length": 311}):
        with (
            liar(supervisor.urls[0], server_info=told(**info)) as url,
            pytest.raises(ValueError, match=rf"^{url} takes inputs of less than .*some of 311 .*-length 319 or"),
        ):
            asyncio.run(connect(url))
    with liar(supervisor.urls[0], server_info=told(context_length=318, max_req_input_len=312)) as url:
        asyncio.run(connect(url))


# Nonsense ------------------------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Exchange], None]:
    """Return a handler that passes on the real answer, changed. `change` edits it in place or returns another one."""

    def spoil(exchange: Exchange) -> None:
        answer = exchange.forwarded().json()
        other = change(answer)
        exchange.say(json.dumps(answer if other is None else other).encode())

    return spoil


def half(exchange: Exchange) -> None:
    content = exchange.forwarded().content
    exchange.say(content[: len(content) // 2], length=len(content))
    exchange.close_connection = True


def endless(exchange: Exchange) -> None:
    exchange.say(b"{", length=10**9)
    with contextlib.suppress(OSError):
        while True:
            exchange.wfile.write(b" ")
            time.sleep(0.05)


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(answer: dict[str, Any]) -> None:
        place: Any = answer
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


LIES: dict[str, tuple[Callable[[Exchange], None], str]] = {
    "500": (lambda exchange: exchange.say(b"boom", 500), "answered 500: boom"),
    "garbage": (
        lambda exchange: exchange.say(b"<html>{"),
        "answered what is no JSON (JSON is malformed: invalid character (byte 0)): '<html>{'",
    ),
    "half a body": (half, "cannot be reached: peer closed connection"),
    "an answer that never ends": (endless, "did not answer within 2 s"),
    "a list": (changed(lambda answer: [answer]), "what is no reply (Expected `object`, got `array`)"),
    "no meta_info": (changed(lambda answer: {"output_ids": []}), "missing required field `meta_info`"),
    "meta_info of a wrong kind": (changed(put("meta_info", value="x")), "got `str` - at `$.meta_info`"),
    "a log-prob that is NaN": (
        changed(put("meta_info", "output_token_logprobs", 3, 0, value=float("nan"))),
        "answered what is no JSON (JSON is malformed: invalid character",
    ),
    "a log-prob that is null": (
        changed(put("meta_info", "output_token_logprobs", 3, 0, value=None)),
        "log-probs, 1 of them not finite",
    ),
    "a log-prob too large": (
        changed(put("meta_info", "output_token_logprobs", 3, 0, value=1e39)),
        "log-probs, 1 of them not finite",
    ),
    "a log-prob too few": (changed(lambda a: a["meta_info"]["output_token_logprobs"].pop() and None), "came with"),
    "a token that cannot be": (changed(put("output_ids", 0, value=-3)), "tokens came with"),
    "a token that is too large": (changed(put("output_ids", 0, value=2**31)), "answered what is no reply (Python int"),
    "half a token": (
        changed(put("output_ids", 0, value=1.5)),
        "answered what is no reply (Expected `int`, got `float`",
    ),
    "endless lists": (
        lambda exchange: exchange.say(b'{"x": ' + b"[" * 100_000),
        "maximum recursion depth exceeded",
    ),
    "too many tokens": (
        changed(lambda answer: put_tokens(answer, SHORT + 1)),
        f"gave {SHORT + 1} tokens where at most {SHORT} were asked for",
    ),
    "another version": (
        changed(put("meta_info", "weight_versions", value=[{"version": "7", "start": 0, "end": 9}])),
        "answered with weights '7', expected '0'",
    ),
    "an abort that nobody asked for": (
        changed(put("meta_info", "finish_reason", value={"type": "abort", "message": "not finite"})),
        "cut a response short that nobody aborted: not finite",
    ),
    "an end that nobody knows": (
        changed(put("meta_info", "finish_reason", value={"type": "tired"})),
        "unknown finish_reason 'tired'",
    ),
}


SOON = {"timeout_seconds": 2.0}


def put_tokens(answer: dict[str, Any], count: int) -> None:
    answer["output_ids"] = [5] * count
    answer["meta_info"]["output_token_logprobs"] = [[-1.0, 5, None]] * count


@pytest.mark.parametrize("lie", LIES)
def test_nonsense_is_taken_for_a_loss_and_another_server_does_the_work(
    lie: str,
    models: tuple[Path, Path],
    supervisor: ServerSupervisor,
    undisturbed: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fault, message = LIES[lie]
    generate = GenerationClient.generate

    async def generate_soon(client: GenerationClient, wanted: SampleRequest, **more: Any) -> Completion:
        """Give the liar little time. The honest server has all the time that a busy machine needs."""
        return await generate(client, wanted, **more | ({} if client.url in supervisor.urls else SOON))

    # Every lie is found by what it says, or by the time for an answer.
    if "did not answer" in message:
        monkeypatch.setattr(GenerationClient, "generate", generate_soon)

    async def run(url: str) -> None:
        async with connected([url, supervisor.urls[1]], models[0], None) as pool:
            wanted = [dataclasses.replace(one, max_new_tokens=SHORT) for one in REQUESTS[0]]
            answer = await asyncio.wait_for(of_group(pool, wanted), 600)
            assert ids([answer]) == [whole[:SHORT] for whole in undisturbed[:2]]
            assert pool.counts.num_taken_out == 1
            assert pool.counts.num_resent == 2

    with liar(supervisor.urls[0], generate=fault) as url:
        asyncio.run(run(url))
        assert f"a generation server is taken out: {url}" in caplog.text
        assert re.search(re.escape(message), caplog.text), caplog.text


def test_a_request_that_every_server_fails_at_ends_the_work_with_the_last_failure(
    models: tuple[Path, Path], supervisor: ServerSupervisor
) -> None:
    async def run(url: str) -> None:
        async with connected([url], models[0], None) as pool:
            with pytest.raises(ServerLost, match="failed 4 times, the last time so: .*answered 500: boom"):
                await pool.generate(REQUESTS[0][0], 1.0)

    with liar(supervisor.urls[0], generate=LIES["500"][0]) as url:
        asyncio.run(run(url))


def test_a_request_that_is_refused_is_not_sent_again(models: tuple[Path, Path], supervisor: ServerSupervisor) -> None:
    async def run() -> None:
        async with connected(supervisor.urls, models[0], None) as pool:
            too_long = SampleRequest(input_ids=[5] * 900, seed=0, max_new_tokens=LENGTH)
            with pytest.raises(RequestRefused, match="answered 400"):
                await pool.generate(too_long, 1.0)
            assert (pool.counts.num_resent, pool.counts.num_taken_out) == (0, 0)

    asyncio.run(run())


def test_a_server_lost_while_it_scores_tokens_is_left_out(
    models: tuple[Path, Path], supervisor: ServerSupervisor
) -> None:
    async def run(url: str) -> None:
        async with connected([url, supervisor.urls[1]], models[0], None) as pool:
            found = await pool.input_logprobs([5, 6, 7])
            assert list(found) == [supervisor.urls[1]]
            assert torch.isfinite(torch.from_numpy(found[supervisor.urls[1]])).all()

    with liar(supervisor.urls[0], generate=LIES["garbage"][0]) as url:
        asyncio.run(run(url))


def test_a_kept_connection_that_the_server_closes_as_it_is_used_again_is_no_loss(
    models: tuple[Path, Path], supervisor: ServerSupervisor
) -> None:
    asked: list[str] = []

    def hang_up_on_the_second_request_of_a_connection(exchange: Exchange) -> None:
        asked.append(f"{exchange.client_address}")
        if asked.count(asked[-1]) > 1:
            exchange.close_connection = True
        else:
            answer = exchange.forwarded()
            exchange.say(answer.content, answer.status_code)

    async def run(url: str) -> None:
        async with connected([url], models[0], None) as pool:
            wanted = dataclasses.replace(REQUESTS[0][0], max_new_tokens=SHORT)
            first, count = await pool.generate(wanted, 1.0), 1
            while len(asked) == count:  # a question after the server's health may have had the connection meanwhile
                again, count = await pool.generate(wanted, 1.0), count + 1
                assert first.output_ids.tolist() == again.output_ids.tolist()
            assert len(asked) == count + 1  # the last was hung up on and asked again
            assert (pool.counts.num_taken_out, pool.counts.num_resent) == (0, 0)

    with liar(supervisor.urls[0], generate=hang_up_on_the_second_request_of_a_connection) as url:
        asyncio.run(run(url))


# Readers -------------------------------------------------------------------------------------------------------------


def test_a_slow_reader_holds_up_neither_requests_nor_weight_updates(
    models: tuple[Path, Path], supervisor: ServerSupervisor
) -> None:
    url = supervisor.urls[0]
    asyncio.run(restore(url, models[0]))
    host, port = url.removeprefix("http://").split(":")
    body = {
        "input_ids": [[5 + i] for i in range(8)],  # megabytes: more than fits into the buffers of a connection
        "sampling_params": {"max_new_tokens": LENGTH, "ignore_eos": True},
        "return_logprob": True,
        "stream": True,
    }
    content = json.dumps(body).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect((host, int(port)))
        slow.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n" % KEY.encode())
        slow.sendall(b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        assert slow.recv(64).startswith(b"HTTP/1.1 200")
        with httpx.Client(base_url=url, headers=bearer(KEY), timeout=300, trust_env=False) as http:
            wait_until(lambda: http.get("/server_info").json()["internal_states"][0]["running"] == 0, "nothing runs")
            update = {"model_path": str(models[1]), "weight_version": "1"}
            assert http.post("/update_weights_from_disk", json=update).json()["success"]
            answer = http.post("/generate", json={"input_ids": [5], "sampling_params": {"max_new_tokens": 3}}).json()
            assert answer["meta_info"]["weight_version"] == "1"
        # It still gets all of its answer, at its own pace.
        slow.settimeout(300)
        received = b""
        while b"data: [DONE]" not in received[-64:]:
            received += slow.recv(65536)
    ended = []
    for line in received.replace(b"\r", b"").split(b"\n"):
        if line.startswith(b"data: {") and line.endswith(b"}") and b'"finish_reason": {' in line:
            meta = json.loads(line.removeprefix(b"data: "))["meta_info"]
            assert (meta["finish_reason"]["type"], meta["completion_tokens"]) == ("length", LENGTH)
            assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": LENGTH}]
            ended.append(meta["id"])
    assert len(set(ended)) == 8


async def restore(url: str, model: Path) -> None:
    async with connected([url], model, None):
        pass
