"""Tests that no request ends, freezes or starves the embedded server."""

import asyncio
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from clock_loop import ClockLoop
from subject import PROMPT
from test_embedded_server import Server
from tiny_model import write_tiny_model
from until import wait_until

from megatron_rl.rollout.embedded import bodies
from megatron_rl.rollout.embedded.bodies import json_object
from megatron_rl.rollout.embedded.fields import RequestError, cut
from megatron_rl.rollout.embedded.hold import Hold
from megatron_rl.rollout.embedded.protocol import Limits, parse_generate
from megatron_rl.rollout.embedded.sequence import Sequence
from megatron_rl.rollout.embedded.update_lock import UpdateLock
from megatron_rl.rollout.embedded.updates import UpdateError
from megatron_rl.rollout.embedded.waiting import SHARE, WaitingQueue
from megatron_rl.rollout.embedded.weight_requests import BucketLimits, parse_bucket, parse_join
from megatron_rl.rollout.embedded.weight_roots import WEIGHT_FOLDER_PREFIX, WeightRoots

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import fuzz_server

LIMITS = Limits(vocab_size=96, context_length=512)
BUCKET = BucketLimits(tensors=4, values=1000)
HUGE = 10**400


# Requests that are refused when they are read ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "no NaN"),
        (b'{"a": -Infinity}', "no -Infinity"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' must come once in its object, got it 2 times"),
        (b"[" * 100_000, "nested"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b"[" + b"[]," * 200_000 + b"[]]", "at most 131072 lists and objects"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": "\xed\xa0\x80"}', "utf-8"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "4300 digits"),
        (b"1", "JSON object, got int"),
        (b"", "must be JSON"),
    ],
)
def test_bodies_that_mean_nothing_or_too_much_are_refused(content, message):
    for decoder in (bodies._PLAIN, bodies._YIELDING):
        with pytest.raises(RequestError, match=message):
            json_object(content, decoder)


def test_a_large_body_is_parsed_while_other_threads_run():
    content = b'{"input_ids": [' + b"51," * 600_000 + b"7]}"
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(1)

    ticker = threading.Thread(target=tick)
    ticker.start()
    switch = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # as the server does
    try:
        for _ in range(50):  # a busy machine may let the other thread wait through some of them
            before = len(ticks)
            found = json_object(content, bodies._YIELDING)
            between = len(ticks) - before
            if between > 10:
                break
    finally:
        sys.setswitchinterval(switch)
        done.set()
        ticker.join()
    assert found == {"input_ids": [51] * 600_000 + [7]}
    assert between > 10, "where nothing yields, the other thread has its turn before and behind, and never between"


SAMPLING = {
    "n": [0, 16385, HUGE, True, 1.0],
    "max_new_tokens": [HUGE, 2**31, True],
    "temperature": [HUGE, -HUGE, 1e7, float("inf"), float("nan"), 1e-9, True],
    "top_p": [HUGE, 0, 1.1, float("nan")],
    "top_k": [HUGE, 2**31, 0, -2],
    "sampling_seed": [HUGE, 2**64, -(2**63) - 1, True],
    "stop_token_ids": [[2**63], [HUGE], [-1], [True], [1] * 16],
    "x" * 5000: [1],
}


@pytest.mark.parametrize("key", SAMPLING, ids=lambda key: key[:20])
def test_every_number_of_a_sampling_request_is_bounded(key):
    for value in SAMPLING[key]:
        with pytest.raises(RequestError) as refused:
            parse_generate({"input_ids": [5], "sampling_params": {key: value}}, LIMITS)
        assert key[:20] in str(refused.value)
        assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "body",
    [
        {"rid": "x" * 1025},
        {"rid": "\ud800"},
        {"rid": ["x" * 1025]},
        {"logprob_start_len": HUGE, "return_logprob": True},
        {"input_ids": [HUGE]},
        {"input_ids": [[[5]]]},
        {"unknown": "x" * 10_000},
        # 1,025 sequences of full length
        {"input_ids": [[5]] * 1025, "sampling_params": {"max_new_tokens": 511}},
    ],
    ids=lambda body: cut(body)[:40],
)
def test_every_text_and_length_of_a_generate_request_is_bounded(body):
    with pytest.raises(RequestError) as refused:
        parse_generate({"input_ids": [5], **body}, LIMITS)
    assert len(str(refused.value)) < 600


def test_a_request_may_hold_a_thousand_sequences_of_full_length():
    full = {"input_ids": [[5] * 100] * 1024, "sampling_params": {"max_new_tokens": 412}}
    assert len(parse_generate(full, LIMITS).prompts) == 1024
    assert len(json.dumps(full)) < LIMITS.body_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["a"] * 5, "dtypes": ["float32"] * 5, "shapes": [[1]] * 5},
        {"names": ["x" * 1025]},
        {"dtypes": ["x" * 65]},
        {"shapes": [[1001]]},
        {"shapes": [[1000, 1000]]},
        {"shapes": [[HUGE]]},
        {"shapes": [[1] * 9]},
        {"shapes": [[True]]},
        {"shapes": [[-1]]},
        {"names": ["\ud800"]},
        {"group_name": "x" * 257},
    ],
    ids=lambda change: cut(change)[:40],
)
def test_every_number_of_a_bucket_is_bounded(change):
    good = {"names": ["a"], "dtypes": ["float32"], "shapes": [[10, 100]]}
    assert parse_bucket(good, BUCKET).heads[0].size == 1000
    with pytest.raises(RequestError):
        parse_bucket(good | change, BUCKET)


@pytest.mark.parametrize(
    "change", [{"world_size": 2**31}, {"rank_offset": HUGE}, {"master_port": 65536}, {"master_address": "a" * 254}]
)
def test_every_number_of_a_rendezvous_is_bounded(change):
    good = {"master_address": "h", "master_port": 1, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    assert parse_join(good).world_size == 2
    with pytest.raises(RequestError, match=next(iter(change))):
        parse_join(good | change)


def test_weights_come_from_directories_that_were_named_and_from_no_other(tmp_path, monkeypatch):
    for name in ("models/mine", "models/beside/deeper", "given/below", "stranger", "shm"):
        (tmp_path / name).mkdir(parents=True)
    run = tmp_path / "shm" / f"{WEIGHT_FOLDER_PREFIX}abc" / "weights"
    run.mkdir(parents=True)
    (tmp_path / "given/out").symlink_to(tmp_path / "stranger")
    monkeypatch.setattr("megatron_rl.rollout.embedded.weight_roots.gettempdir", lambda: str(tmp_path / "shm"))
    roots = WeightRoots(str(tmp_path / "models/mine"), [str(tmp_path / "given")])
    for good in ("models/mine", "models/beside", "given", "given/below", "given/below/../below"):
        assert roots.directory(str(tmp_path / good)) == (tmp_path / good).resolve()
    assert roots.directory(str(run)) == run
    strangers = ["models", "models/beside/deeper", "stranger", "given/out", "given/../stranger", "shm"]
    for bad in [*(str(tmp_path / name) for name in strangers), "/", "/proc/self/fd", "a" * 5000, "/" + "é" * 3000]:
        with pytest.raises(UpdateError, match=r"--weights-root|cannot be looked at"):
            roots.directory(bad)
    for bad in (f"{tmp_path}/given/a\0b", f"{tmp_path}/given/" + "a" * 300, f"{tmp_path}/given/absent"):
        with pytest.raises(UpdateError, match="cannot be looked at|is not a directory"):
            roots.directory(bad)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # another user's
    for other in (tmp_path / "models/beside", run):
        with pytest.raises(UpdateError, match="--weights-root"):
            roots.directory(str(other))


# Turns of requests, and requests that end by themselves --------------------------------------------------------------


def waiting(number, turn):
    return Sequence(rid="", prompt=[], params=None, seed=0, stop_ids=(), order=number, turn=turn)


def test_a_request_of_thousands_keeps_nobody_waiting_for_all_of_it():
    queue = WaitingQueue()
    giant = [waiting(number, number // SHARE) for number in range(10 * SHARE)]
    small = [waiting(10 * SHARE + number, 0) for number in range(3)]
    queue.add(giant)
    queue.add(small)
    taken = [queue.take() for _ in range(SHARE + 3)]
    assert taken == giant[:SHARE] + small
    queue.add(taken[:2])  # taken back from their slots
    assert queue.remove_where(lambda sequence: sequence.order % 2 == 0)[:2] == [giant[0], giant[SHARE]]
    assert (len(queue), queue.take()) == (1 + 9 * SHARE // 2, giant[1])


def test_a_state_that_its_client_left_ends_and_one_that_is_used_does_not():
    async def run():
        held, ended = True, asyncio.Event()

        async def let_go():
            nonlocal held
            held = False
            ended.set()

        hold = Hold(0.1, lambda: held, let_go)
        with hold.touched():
            await asyncio.sleep(0.3)
        assert held
        for _ in range(5):
            with hold.touched():
                pass
            await asyncio.sleep(0.02)
        assert held
        for _ in range(500):  # who is refused does not keep it alive
            with suppress(UpdateError), hold.touched():
                raise UpdateError("it is open already")
            await asyncio.sleep(0.01)
            if ended.is_set():
                break
        assert not held
        with hold.touched():  # nothing is held
            ended.clear()
        await asyncio.sleep(0.2)
        assert not ended.is_set()

    with contextlib.closing(ClockLoop()) as loop:
        loop.run_until_complete(run())


def test_the_gate_lets_in_by_order_and_an_update_that_waits_too_long_gives_way():
    async def run():
        lock = UpdateLock(0.2, None)
        order = []

        async def go(name, entry, seconds=0.0):
            async with entry:
                order.append(name)
                await asyncio.sleep(seconds)

        slow = asyncio.create_task(go("slow", lock.generating(), 2.0))
        await asyncio.sleep(0)
        update = asyncio.create_task(go("update", lock.updating()))
        await asyncio.sleep(0)
        leaves = asyncio.create_task(go("leaves", lock.generating()))
        behind = asyncio.create_task(go("behind", lock.generating()))
        await asyncio.sleep(0.05)
        leaves.cancel()
        assert order == ["slow"]
        with pytest.raises(UpdateError, match=r"0.2 s \(--hold-timeout\)"):
            await update
        await behind
        assert order == ["slow", "behind"]
        slow.cancel()
        await asyncio.gather(slow, leaves, return_exceptions=True)
        both = [go("a", lock.updating(), 0.02), go("b", lock.generating(), 0.02), go("c", lock.updating())]
        await asyncio.gather(*both)
        assert order[2:] == ["a", "b", "c"]

    with contextlib.closing(ClockLoop()) as loop:
        loop.run_until_complete(run())


# A server ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=1024)
    server = Server(model, "--hold-timeout", "0.5", "--weights-root", str(tmp_path_factory.getbasetemp()))
    yield server
    assert server.close() == 0


def test_a_stop_token_beyond_all_integers_does_not_end_the_engine(server):
    for token in (2**63, HUGE):
        answer = server.post("/generate", input_ids=[5], sampling_params={"stop_token_ids": [token]})
        assert answer.status_code == 400
    assert server.generate(PROMPT, max_new_tokens=2, ignore_eos=True)["output_ids"]


def test_a_fifo_among_the_weights_is_refused_and_holds_nobody_up(server, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("fifo", "link"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "fifo/a.safetensors")
    (tmp_path / "link/a.safetensors").symlink_to(tmp_path / "pipe")
    for name in ("fifo", "link"):
        answer = server.http.post("/update_weights_from_disk", json={"model_path": str(tmp_path / name)})
        assert answer.status_code == 400
        assert "a.safetensors: it must be a regular file" in answer.json()["message"]
    assert server.http.get("/ready").status_code == 200


def test_a_client_that_leaves_sixteen_thousand_sequences_holds_nobody_up(server):
    content = json.dumps({"input_ids": [5], "sampling_params": {"n": 16384, "max_new_tokens": 60}}).encode()
    host, port = server.url.removeprefix("http://").split(":")

    def processor_seconds():
        times = psutil.Process(server.process.pid).cpu_times()
        return times.user + times.system

    before = processor_seconds()
    with socket.create_connection((host, int(port))) as leaving:
        head = f"POST /generate HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        leaving.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        server.wait_for(lambda load: load["waiting"] > 10_000)
        came = processor_seconds() - before
    server.wait_for(lambda load: load["running"] + load["waiting"] == 0)
    left = processor_seconds() - before - came
    assert left < 3 * came  # as its answers were made for nobody, it was thirty times that


def test_a_body_longer_than_any_request_is_refused_unread_and_other_than_that_answered(server):
    limits = Limits(vocab_size=96, context_length=1024)
    for headers in ({}, {"Transfer-Encoding": "chunked"}):
        chunks = iter([b" " * 2**20] * (limits.body_bytes // 2**20 + 1))
        content = chunks if headers else b" " * (limits.body_bytes + 1)
        answer = server.http.post("/generate", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert f"at most {limits.body_bytes} bytes" in answer.json()["error"]["message"]
    assert server.post("/pause_generation", mode="x" * 3_000_000).status_code == 413
    large = json.dumps({"input_ids": [[5] * 500] * 600, "sampling_params": {"max_new_tokens": 0}})
    assert len(large) > bodies.LARGE_BYTES
    answer = server.http.post("/generate", content=large, headers={"Content-Type": "application/json"})
    assert len(answer.json()) == 600


def test_a_pause_and_a_session_whose_client_vanished_end_by_themselves(server):
    expected = server.generate([5], max_new_tokens=4, temperature=0)["output_ids"]
    assert server.post("/pause_generation", mode="in_place").status_code == 200
    assert server.generate([5], max_new_tokens=4, temperature=0)["output_ids"] == expected
    assert server.post("/begin_weight_update").json()["success"]
    # Twice within the half second: a machine that is too slow for that tries again.
    wait_until(
        lambda: "is open already" in server.post("/begin_weight_update").json()["message"],
        "a session that is opened twice is refused",
        pause=0.0,
    )
    deadline = time.monotonic() + 240
    while "no weight-update session" not in (last := server.post("/end_weight_update").json()["message"]):
        assert "missing" in last  # too early: that end was ours, so begin again
        assert server.post("/begin_weight_update").json()["success"]
        assert time.monotonic() < deadline
        time.sleep(1.5)
    for told in (r"paused for 0.5 s .*--hold-timeout.*\n", r"no weights came for 0.5 s \(--hold-timeout\)"):
        wait_until(lambda told=told: re.search(told, "".join(list(server.lines))), f"the log tells {told}")


def test_a_path_with_a_slash_too_many_is_not_sent_elsewhere(server):
    assert server.http.post("/generate/", json={}, headers={"Host": "elsewhere.example"}).status_code == 421
    assert server.http.post("/generate/", json={}).status_code == 404


def test_requests_of_every_kind_are_answered_and_leave_the_server_as_it_was(monkeypatch):
    for name in ("ANSWER_SECONDS", "PROBE_SECONDS"):
        monkeypatch.setattr(fuzz_server, name, 240.0)
    report = fuzz_server.fuzz(requests=250, seed=7, workers=8)
    assert report["found"] == []
    assert sum(sum(counter.values()) for counter in report["answers"].values()) == 250
    assert {"200", "400"} <= report["answers"]["mutated"].keys()


def test_a_client_that_leaves_while_it_sends_a_body_leaves_no_traceback(server):
    host, port = server.url.removeprefix("http://").split(":")
    for length in (100, 10**6):
        with socket.create_connection((host, int(port))) as leaving:
            head = f"POST /generate HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            leaving.sendall(head.encode() + b"Content-Length: %d\r\n\r\n{" % length)
    with httpx.Client(base_url=server.url, trust_env=False, timeout=240) as http:
        assert http.get("/ready").status_code == 200
    assert not any("Traceback" in line for line in server.lines)
