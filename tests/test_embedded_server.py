"""The embedded server as a process of its own, over HTTP."""

import base64
import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import httpx
import numpy as np
import pytest
from reference import routed_by
from tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "megatron_rl.rollout.embedded"]


class Server:
    """A started server process and a client for it."""

    def __init__(self, model_path, *options, program=COMMAND):
        command = [*program, "--model-path", str(model_path), "--port", "0", "--lifeline", *options]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = deque(maxlen=50)
        for line in self.process.stderr:
            self.lines.append(line)
            if match := re.search(r"serving .* on (http://\S+)", line):
                self.url = match[1]
                break
        else:
            raise AssertionError(f"the server did not start: {list(self.lines)}")
        threading.Thread(target=self.lines.extend, args=(self.process.stderr,), daemon=True).start()
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.Client(base_url=self.url, timeout=30, limits=limits, trust_env=False)
        deadline = time.monotonic() + 10
        while True:
            try:
                assert self.http.get("/health").status_code == 200
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def post(self, path, **body):
        return self.http.post(path, json=body)

    def generate(self, input_ids, **sampling):
        outside = ("rid", "return_logprob", "logprob_start_len", "return_routed_experts")
        body = {key: sampling.pop(key) for key in outside if key in sampling}
        answer = self.post("/generate", input_ids=input_ids, sampling_params=sampling, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def background(self, input_ids, **sampling):
        """A generate call in flight; returns once the server runs it."""
        pool = concurrent.futures.ThreadPoolExecutor(1)
        future = pool.submit(self.generate, input_ids, **sampling)
        pool.shutdown(wait=False)
        self.wait_for(lambda load: load["running"] > 0)
        return future

    def wait_for(self, condition):
        deadline = time.monotonic() + 10
        while not condition(self.http.get("/server_info").json()["internal_states"][0]):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def close(self):
        self.http.close()
        self.process.terminate()
        return self.process.wait(10)


LONG = {"max_new_tokens": 800, "ignore_eos": True}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("other"), seed=1, max_position_embeddings=2048)


@pytest.fixture(scope="session")
def _shared_server(model_dir):
    server = Server(model_dir)
    yield server
    server.close()


@pytest.fixture
def server(_shared_server, model_dir):
    """The session's server, running, idle, and with its first weights."""
    server = _shared_server
    yield server
    server.post("/continue_generation")
    server.post("/abort_request", abort_all=True)
    server.wait_for(lambda load: load["running"] + load["waiting"] == 0)
    if server.http.get("/model_info").json()["weight_version"] != "default":
        assert server.post("/update_weights_from_disk", model_path=str(model_dir), weight_version="default").json()[
            "success"
        ]


# Generation ----------------------------------------------------------------------------------------------------------


def test_a_single_prompt_answers_one_object_with_everything_asked_for(server):
    answer = server.generate(
        [5, 6, 7], max_new_tokens=4, ignore_eos=True, return_logprob=True, logprob_start_len=1, rid="mine"
    )
    meta = answer["meta_info"]
    assert answer["text"] == ""
    assert len(answer["output_ids"]) == 4
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 4, 0)
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 4}]
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert all(entry[0] < 0 and entry[2] is None for entry in meta["output_token_logprobs"])
    assert [entry[1] for entry in meta["input_token_logprobs"]] == [6, 7]
    assert meta["e2e_latency"] > 0


def test_log_probs_are_left_out_unless_asked_for(server):
    meta = server.generate([5], max_new_tokens=2)["meta_info"]
    assert "output_token_logprobs" not in meta
    assert "input_token_logprobs" not in meta


def test_input_logprobs_of_a_sequence_equal_the_output_logprobs_it_was_drawn_with(server):
    drawn = server.generate([5, 6], max_new_tokens=40, ignore_eos=True, return_logprob=True)
    whole = server.generate([5, 6, *drawn["output_ids"]], max_new_tokens=0, return_logprob=True, logprob_start_len=0)
    assert whole["output_ids"] == []
    scored = [entry[0] for entry in whole["meta_info"]["input_token_logprobs"]]
    assert scored[0] is None
    assert scored[2:] == pytest.approx([e[0] for e in drawn["meta_info"]["output_token_logprobs"]], abs=2e-5)


def routed_experts(answer):
    """int32 [prompt + output - 1, layers, topk], the experts of a token in ascending order."""
    numbers = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), np.int32)
    count = answer["meta_info"]["prompt_tokens"] + answer["meta_info"]["completion_tokens"] - 1
    return np.sort(numbers.reshape(count, 3, 2), axis=2)


def test_routed_experts_come_for_each_prompt_that_asks(server, model_dir):
    body = {"input_ids": [[5, 6, 7], [8, 9]], "sampling_params": {"max_new_tokens": 12, "ignore_eos": True, "n": 2}}
    answers = server.http.post("/generate", json=body | {"return_routed_experts": [True, False]}).json()
    for answer in answers[:2]:
        assert (routed_experts(answer) == routed_by(model_dir, [5, 6, 7, *answer["output_ids"]])[:-1]).all()
    assert not any("routed_experts" in answer["meta_info"] for answer in answers[2:])
    nothing_new = server.generate([5, 6, 7], max_new_tokens=0, return_routed_experts=True)
    assert (routed_experts(nothing_new) == routed_by(model_dir, [5, 6, 7])[:-1]).all()
    body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 9, "ignore_eos": True}, "stream": True}
    with server.http.stream("POST", "/generate", json=body | {"return_routed_experts": True}) as answer:
        parts = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line[:7] == "data: {"]
    assert (routed_experts(parts[-1]) == routed_by(model_dir, [5, *parts[-1]["output_ids"]])[:-1]).all()
    assert not any("routed_experts" in part["meta_info"] for part in parts[:-1])


def test_a_batch_answers_all_samples_of_each_prompt_in_order(server):
    params = {"n": 3, "max_new_tokens": 5, "ignore_eos": True, "sampling_seed": 4}
    answers = server.generate([[5, 6], [7, 8, 9]], **params)
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [2, 2, 2, 3, 3, 3]
    assert len({tuple(a["output_ids"]) for a in answers[:3]}) == 3
    assert server.generate([[5, 6]], **params)[1]["output_ids"] == answers[1]["output_ids"]
    each = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "ignore_eos": True}]
    body = {"input_ids": [[5, 6], [7, 8]], "sampling_params": each, "return_logprob": [True, False], "rid": ["a", "b"]}
    first, second = server.http.post("/generate", json=body).json()
    assert [first["meta_info"]["id"], second["meta_info"]["id"]] == ["a", "b"]
    assert [len(first["output_ids"]), len(second["output_ids"])] == [1, 2]
    assert "output_token_logprobs" in first["meta_info"]
    assert "output_token_logprobs" not in second["meta_info"]


def test_seeds_decide_the_samples_and_no_seed_means_a_random_one(server):
    def ids(**params):
        return server.generate([5, 6, 7], max_new_tokens=20, ignore_eos=True, **params)["output_ids"]

    assert ids(sampling_seed=1) == ids(sampling_seed=1)
    assert ids(sampling_seed=1) != ids(sampling_seed=2)
    assert ids() != ids()
    assert ids(temperature=0) == ids(temperature=0, sampling_seed=3) == ids(top_k=1)


def test_a_request_among_sixty_four_arriving_at_once_gets_its_bits_alone(server):
    def ask(index):
        prompt = [(index * 7 + i) % 96 for i in range(1 + index % 40)]
        return server.generate(
            prompt, max_new_tokens=10 + index % 50, ignore_eos=True, sampling_seed=index, return_logprob=True
        )

    def kept(answer):
        return answer["output_ids"], answer["meta_info"]["output_token_logprobs"]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        crowd = list(pool.map(ask, range(64)))
    for index in (0, 13, 63):
        assert kept(ask(index)) == kept(crowd[index])


def test_stop_tokens_and_eos_end_a_response_and_belong_to_it(server):
    free = server.generate([5, 6], max_new_tokens=60, ignore_eos=True, sampling_seed=8)["output_ids"]
    token = free[10]
    end = free.index(token) + 1
    params = {"max_new_tokens": 60, "sampling_seed": 8, "stop_token_ids": [token]}
    stopped = server.generate([5, 6], **params)
    if 1 in free[:end]:
        end, token = free.index(1) + 1, 1
    assert stopped["output_ids"] == free[:end]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert server.generate([5, 6], ignore_eos=True, **params)["output_ids"] == free
    ends = [
        server.generate([5, 6], max_new_tokens=900, sampling_seed=s)["meta_info"]["finish_reason"] for s in range(4)
    ]
    assert {"type": "stop", "matched": 1} in ends  # the eos token of config.json


def test_streams_are_cumulative_and_end_with_done(server):
    body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 30, "ignore_eos": True, "sampling_seed": 1}}
    with server.http.stream("POST", "/generate", json={**body, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    final = server.http.post("/generate", json=body).json()["output_ids"]
    assert all(part["output_ids"] == final[: len(part["output_ids"])] for part in parts)
    assert parts[-1]["output_ids"] == final
    assert parts[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 30}
    assert all(part["meta_info"]["finish_reason"] is None for part in parts[:-1])


BAD_REQUESTS = [
    ({}, "input_ids"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [[5], []]}, "input_ids"),
    ({"input_ids": "text"}, "input_ids.*'text'"),
    ({"input_ids": [5, "6"]}, "input_ids.*'6'"),
    ({"input_ids": [5, 96]}, r"input_ids must be in \[0, 96\), got 96"),
    ({"input_ids": [-1]}, "input_ids.*-1"),
    ({"input_ids": [True]}, "input_ids.*True"),
    ({"input_ids": [5] * 2049}, "input_ids.*2049.*2048"),
    ({"input_ids": [5], "text": "hello"}, "text"),
    ({"input_ids": [5], "return_logprob": "yes"}, "return_logprob.*'yes'"),
    ({"input_ids": [5], "return_logprob": [True, True]}, "return_logprob"),
    ({"input_ids": [5], "return_logprob": True, "logprob_start_len": 1}, "logprob_start_len.*1"),
    ({"input_ids": [5], "rid": ["a", "b"]}, "rid"),
    ({"input_ids": [5], "stream": 1}, "stream.*1"),
    ({"input_ids": [5], "sampling_params": [1]}, "sampling_params"),
    ({"input_ids": [5], "return_routed_experts": "yes"}, "return_routed_experts.*'yes'"),
    ({"input_ids": [5], "return_routed_experts": [True, True]}, "return_routed_experts"),
    ({"input_ids": [5], "return_hidden_states": True}, "return_hidden_states"),
]
BAD_SAMPLING = [
    ({"max_new_tokens": 2048}, r"max_new_tokens \(2048\).*2048"),
    ({"max_new_tokens": -1}, "max_new_tokens.*-1"),
    ({"max_new_tokens": "9"}, "max_new_tokens.*'9'"),
    ({"temperature": -0.5}, "temperature.*-0.5"),
    ({"temperature": "hot"}, "temperature.*'hot'"),
    ({"top_p": 0}, "top_p.*0"),
    ({"top_p": 1.5}, "top_p.*1.5"),
    ({"top_k": 0}, "top_k.*0"),
    ({"top_k": 1.5}, "top_k.*1.5"),
    ({"n": 0}, "n must be.*0"),
    ({"n": True}, "n must be.*True"),
    ({"stop_token_ids": 5}, "stop_token_ids.*5"),
    ({"sampling_seed": 0.5}, "sampling_seed.*0.5"),
    ({"ignore_eos": 1}, "ignore_eos.*1"),
    ({"min_p": 0.1}, "min_p.*0.1"),
    ({"stop": "x"}, "stop.*'x'"),
    ({"max_tokens": 5}, "max_tokens is unknown"),
]


@pytest.mark.parametrize(
    ("body", "message"), BAD_REQUESTS + [({"input_ids": [5], "sampling_params": s}, m) for s, m in BAD_SAMPLING]
)
def test_bad_requests_are_refused_by_field_and_value(server, body, message):
    answer = server.http.post("/generate", json=body)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"]["message"])


def test_a_bad_request_does_not_disturb_one_in_flight(server):
    params = {"max_new_tokens": 300, "ignore_eos": True, "sampling_seed": 3}
    expected = server.generate([5], **params)["output_ids"]
    running = server.background([5], **params)
    for content in (b"{", b"[]", b"\xff", b'{"input_ids": [5], "sampling_params": {"temperature": NaN}}'):
        assert server.http.post("/generate", content=content).status_code == 400
    assert running.result()["output_ids"] == expected


def test_unknown_routes_and_methods_are_told_so(server):
    assert server.post("/begin_weight_update").status_code == 404
    assert server.http.get("/generate").status_code == 405


# Control -------------------------------------------------------------------------------------------------------------


def test_information_routes_describe_the_server(server, model_dir):
    for path in ("/health", "/health_generate", "/ready", "/ping"):
        assert server.http.get(path).status_code == 200
    info = server.http.get("/server_info").json()
    assert info == server.http.get("/get_server_info").json()
    assert (info["context_length"], info["batch_invariant"], info["dtype"]) == (2048, True, "float32")
    model = server.http.get("/model_info").json()
    assert model["model_path"] == str(model_dir)
    assert model == server.http.get("/get_model_info").json()
    assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] == 2048


def test_abort_returns_the_partial_response_with_its_logprobs(server):
    for target in ({"rid": "doomed"}, {"rid": "", "abort_all": True}):
        running = server.background([5], rid="doomed", return_logprob=True, **LONG)
        survivor_ids = {"rid": "other", "max_new_tokens": 5, "ignore_eos": True}
        assert server.generate([5], **survivor_ids)["meta_info"]["finish_reason"]["type"] == "length"
        assert server.post("/abort_request", **target).status_code == 200
        answer = running.result()
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert 0 < len(answer["output_ids"]) < 800
        assert len(answer["meta_info"]["output_token_logprobs"]) == len(answer["output_ids"])
    assert server.post("/abort_request", rid="nobody").status_code == 200
    assert server.post("/abort_request", rid="").status_code == 400


def test_a_rid_in_flight_cannot_be_used_twice(server):
    running = server.background([5], rid="twin", **LONG)
    answer = server.post("/generate", input_ids=[5], rid="twin")
    assert answer.status_code == 400
    assert "twin" in answer.json()["error"]["message"]
    server.post("/abort_request", rid="twin")
    assert running.result()["meta_info"]["finish_reason"]["type"] == "abort"


def test_a_client_that_leaves_frees_its_slot(server):
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/generate", json={"input_ids": [5], "sampling_params": LONG}, timeout=0.2)
    started = time.monotonic()
    server.wait_for(lambda load: load["running"] == 0)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_request_finishes_after_continue_with_the_tokens_it_would_have_had(server, mode):
    params = {"max_new_tokens": 400, "ignore_eos": True, "sampling_seed": 5}
    expected = server.generate([5], **params)["output_ids"]
    running = server.background([5], **params)
    assert server.post("/pause_generation", mode=mode).status_code == 200
    later = server.background([6], max_new_tokens=3) if mode == "in_place" else None
    time.sleep(0.1)
    assert not running.done()
    assert server.post("/flush_cache").status_code == 400
    server.post("/continue_generation")
    assert running.result()["output_ids"] == expected
    if later:
        later.result()
    assert server.http.get("/flush_cache").status_code == 200


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_routed_experts_of_a_paused_request_are_complete_and_so_are_those_of_an_aborted_one(server, model_dir, mode):
    running = server.background([5, 6], max_new_tokens=300, ignore_eos=True, return_routed_experts=True)
    server.post("/pause_generation", mode=mode)
    server.post("/continue_generation")
    answer = running.result()
    assert (routed_experts(answer) == routed_by(model_dir, [5, 6, *answer["output_ids"]])[:-1]).all()
    running = server.background([5, 6], return_routed_experts=True, **LONG)
    server.post("/pause_generation", mode=mode)
    server.post("/abort_request", abort_all=True)
    answer = running.result()
    assert (routed_experts(answer) == routed_by(model_dir, [5, 6, *answer["output_ids"]])[:-1]).all()


def test_pause_abort_ends_what_runs_and_holds_what_comes(server):
    running = server.background([5], **LONG)
    server.post("/pause_generation", mode="abort")
    assert running.result()["meta_info"]["finish_reason"]["type"] == "abort"
    pool = concurrent.futures.ThreadPoolExecutor(1)
    held = pool.submit(server.generate, [5], max_new_tokens=2)
    server.wait_for(lambda load: load["waiting"] == 1)
    assert not held.done()
    server.post("/continue_generation")
    assert held.result()["meta_info"]["completion_tokens"] > 0
    pool.shutdown()
    assert server.post("/pause_generation", mode="nap").status_code == 400


# Weights -------------------------------------------------------------------------------------------------------------


def update(server, path, **body):
    return server.post("/update_weights_from_disk", model_path=str(path), **body)


def test_new_weights_take_effect_and_old_ones_give_the_old_answers_again(server, model_dir, other_dir):
    params = {"max_new_tokens": 8, "ignore_eos": True, "sampling_seed": 2, "return_logprob": True}
    before = server.generate([5, 6], **params)
    answer = update(server, other_dir, weight_version="v1", flush_cache=True)
    assert answer.json()["success"] is True
    after = server.generate([5, 6], **params)
    assert after["meta_info"]["weight_version"] == "v1"
    assert after["meta_info"]["output_token_logprobs"] != before["meta_info"]["output_token_logprobs"]
    assert server.http.get("/model_info").json()["model_path"] == str(other_dir)
    update(server, model_dir, weight_version="default")
    again = server.generate([5, 6], **params)
    assert again["meta_info"]["output_token_logprobs"] == before["meta_info"]["output_token_logprobs"]


def test_a_request_in_flight_records_which_version_drew_which_token(server, other_dir):
    running = server.background([5], **LONG)
    server.wait_for(lambda load: load["running"] == 1)
    server.post("/pause_generation", mode="in_place")
    assert update(server, other_dir, weight_version="v1").json()["success"]
    server.post("/continue_generation")
    spans = running.result()["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "v1"]
    assert spans[0]["start"] == 0
    assert 0 < spans[0]["end"] == spans[1]["start"] < spans[1]["end"] == 800


def test_an_update_without_a_pause_goes_between_two_steps(server, other_dir):
    running = server.background([5], **LONG)
    assert update(server, other_dir, weight_version="v1").json()["success"]
    assert [span["version"] for span in running.result()["meta_info"]["weight_versions"]] == ["default", "v1"]


def test_an_update_can_abort_what_runs(server, other_dir):
    running = server.background([5], **LONG)
    update(server, other_dir, weight_version="v1", abort_all_requests=True)
    assert running.result()["meta_info"]["finish_reason"]["type"] == "abort"


def test_a_failed_update_says_why_and_leaves_the_weights_alone(server, tmp_path):
    params = {"max_new_tokens": 8, "ignore_eos": True, "sampling_seed": 2, "return_logprob": True}
    before = server.generate([5, 6], **params)
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    write_tiny_model(tmp_path / "wide", hidden_size=32)
    write_tiny_model(tmp_path / "theta", rope_theta=5.0)
    for path, message in (
        ("absent", "not a directory"),
        ("empty", "no .*safetensors"),
        ("corrupt", "safetensors"),
        ("wide", "hidden_size"),
        ("theta", "rope_theta"),
    ):
        answer = update(server, tmp_path / path, weight_version="bad")
        assert answer.status_code == 400
        assert answer.json()["success"] is False
        assert re.search(message, answer.json()["message"])
    after = server.generate([5, 6], **params)
    assert after["meta_info"]["weight_version"] == "default"
    assert after["meta_info"]["output_token_logprobs"] == before["meta_info"]["output_token_logprobs"]


def test_the_version_alone_can_be_changed(server):
    answer = server.post("/update_weight_version", new_version="renamed")
    assert answer.json()["success"] is True
    assert server.generate([5], max_new_tokens=1)["meta_info"]["weight_version"] == "renamed"


# Process life --------------------------------------------------------------------------------------------------------


def run_to_end(*options):
    return subprocess.run([*COMMAND, *options], cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_starts_that_cannot_work_end_with_one_line_and_code_two(model_dir, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (["--model-path", str(model_dir), "--port", port], "port.*cannot be bound"),
            (["--model-path", str(model_dir), "--port", "0", "--host", "0.0.0.0"], "loopback.*0.0.0.0.*--allow-remote"),
            (["--model-path", str(tmp_path / "none"), "--port", "0"], "does not exist"),
            (["--model-path", str(tmp_path), "--port", "0"], "llama"),
            (["--model-path", str(model_dir), "--port", "0", "--context-length", "9999"], "--context-length.*9999"),
        ]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda case: run_to_end(*case[0]), cases))
    for (_, message), result in zip(cases, results, strict=True):
        assert result.returncode == 2
        assert re.fullmatch(rf"error: .*{message}.*\n", result.stderr)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_allocated(tmp_path):
    directory = write_tiny_model(tmp_path, max_position_embeddings=2**30)
    result = run_to_end("--model-path", str(directory), "--port", "0")
    assert result.returncode == 2
    assert re.search(r"KV cache need .* GiB", result.stderr)


def test_sigterm_answers_what_runs_with_its_partial_and_exits_with_zero(model_dir):
    server = Server(model_dir, "--context-length", "2048", "--max-running-requests", "2")
    running = server.background([5], **LONG)
    server.process.send_signal(signal.SIGTERM)
    assert running.result()["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.process.wait(10) == 0
    server.http.close()


def test_the_server_dies_with_a_parent_that_is_killed(model_dir, tmp_path):
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            "child = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE)\n"
            "open(sys.argv[1], 'w').write(f'{child.pid}\\n')\n"
            "time.sleep(60)",
            str(pid_file),
            *COMMAND,
            *("--model-path", str(model_dir), "--port", "0", "--lifeline"),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("serving" in line for line in parent.stderr)
    pid = int(pid_file.read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 2
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_dead_engine_answers_500_and_ends_the_process_with_a_message(model_dir, tmp_path):
    # A fault of ours cannot be provoked from outside, so it is planted in the model's forward pass.
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "from megatron_rl.rollout.embedded import __main__, model\n"
        "inner = model.BailingModel.hidden\n"
        "def hidden(self, weights, cache, batch):\n"
        "    if (batch.tokens == 77).any() and batch.num_queries > 1 and len(cache.keys[0]) > 3:\n"
        "        raise RuntimeError('planted')\n"
        "    return inner(self, weights, cache, batch)\n"
        "model.BailingModel.hidden = hidden\n"
        "sys.exit(__main__.main(sys.argv[1:]))\n"
    )
    server = Server(model_dir, program=[sys.executable, str(tmp_path / "run.py")])
    running = server.background([5], **LONG)
    answer = server.post("/generate", input_ids=[77])
    assert answer.status_code == 500
    assert "planted" in answer.json()["error"]["message"]
    with pytest.raises(AssertionError, match="500"):
        running.result()
    assert server.process.wait(10) == 1
    server.http.close()
    assert any("planted" in line for line in server.lines)
