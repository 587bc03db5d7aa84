"""Tests the embedded server as a process of its own, over HTTP."""

import base64
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path

import httpx
import numpy as np
import pytest
from reference import routed_by
from tiny_model import write_tiny_model
from until import wait_until

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "megatron_rl.rollout.embedded"]
HELD = [sys.executable, str(ROOT / "tests/held_server.py")]


class Server:
    """Holds a started server process and a client for it.

    Its requests stand still while the file `hold` is there (held_server.py).
    """

    def __init__(self, model_path, *options, program=HELD):
        self._folder = tempfile.TemporaryDirectory()
        self.hold = Path(self._folder.name) / "hold"
        command = [*program, str(self.hold), "--model-path", str(model_path), "--port", "0", "--lifeline", *options]
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
        self.http = httpx.Client(base_url=self.url, timeout=240, limits=limits, trust_env=False)

        def is_healthy():
            with contextlib.suppress(httpx.ConnectError):
                return self.http.get("/health").status_code == 200

        wait_until(is_healthy, "the server is healthy")

    def post(self, path, **body):
        return self.http.post(path, json=body)

    def generate(self, input_ids, **sampling):
        outside = ("rid", "return_logprob", "logprob_start_len", "return_routed_experts")
        body = {key: sampling.pop(key) for key in outside if key in sampling}
        answer = self.post("/generate", input_ids=input_ids, sampling_params=sampling, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def background(self, input_ids, **sampling):
        """Start a generate call in a thread. Return its future once the server runs it. It ends after `let_go`."""
        self.hold.touch()
        pool = concurrent.futures.ThreadPoolExecutor(1)
        future = pool.submit(self.generate, input_ids, **sampling)
        pool.shutdown(wait=False)
        self.wait_for(lambda load: load["running"] > 0)
        return future

    def let_go(self):
        self.hold.unlink(missing_ok=True)

    def wait_for(self, condition):
        def holds():
            return condition(self.http.get("/server_info").json()["internal_states"][0])

        wait_until(holds, "the server's load is what the test waits for", pause=0.005)

    def close(self):
        self.http.close()
        self.process.terminate()
        return self.process.wait(240)


LONG = {"max_new_tokens": 800, "ignore_eos": True}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)


@pytest.fixture(scope="session")
def _shared_server(model_dir, tmp_path_factory):
    server = Server(model_dir, "--weights-root", str(tmp_path_factory.getbasetemp()))
    yield server
    server.close()


@pytest.fixture
def server(_shared_server, model_dir):
    """Yield the session's server, and afterwards make it run, idle and with its first weights."""
    server = _shared_server
    yield server
    server.let_go()
    server.post("/continue_generation")
    server.post("/abort_request", abort_all=True)
    server.wait_for(lambda load: load["running"] + load["waiting"] == 0)


# Generation ----------------------------------------------------------------------------------------------------------


def routed_experts(answer):
    """Return int32 [prompt + output - 1, layers, topk], with the experts of a token in ascending order."""
    numbers = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), np.int32)
    return np.sort(numbers.reshape(-1, 3, 2), axis=2)


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


def test_seeds_decide_the_samples_and_no_seed_means_a_random_one(server):
    def ids(**params):
        return server.generate([5, 6, 7], max_new_tokens=20, ignore_eos=True, **params)["output_ids"]

    assert ids(sampling_seed=1) == ids(sampling_seed=1)
    assert ids(sampling_seed=1) != ids(sampling_seed=2)
    assert ids() != ids()
    assert ids(temperature=0) == ids(temperature=0, sampling_seed=3) == ids(top_k=1)
    both = [server.generate(prompts, n=3, max_new_tokens=5, sampling_seed=4) for prompts in ([[5, 6], [7]], [[5, 6]])]
    assert [a["output_ids"] for a in both[0][:3]] == [a["output_ids"] for a in both[1]]


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
    ({"stop": 5}, "stop must be a string or a list of strings, got 5"),
    ({"stop": ["a", ""]}, "a string in stop must be a string, not empty"),
    ({"stop": ["a"] * 33}, "at most 32 strings, got 33"),
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
        answer = server.http.post("/generate", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
    server.let_go()
    assert running.result()["output_ids"] == expected


# Control -------------------------------------------------------------------------------------------------------------


def test_server_info_says_what_only_this_server_knows(server):
    info = server.http.get("/server_info").json()
    assert info == server.http.get("/get_server_info").json()
    assert (info["server"], info["batch_invariant"]) == ("megatron_rl.rollout.embedded", True)
    assert info["internal_states"] == [{"running": 0, "waiting": 0, "paused": False}]


def test_an_abort_without_a_target_is_refused(server):
    assert server.post("/abort_request", rid="").status_code == 400


def test_a_client_that_leaves_frees_its_slot(server):
    server.hold.touch()  # it does not end by itself
    content = json.dumps({"input_ids": [5], "sampling_params": LONG}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as leaving:
        head = f"POST /generate HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        leaving.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        server.wait_for(lambda load: load["running"] == 1)
    server.wait_for(lambda load: load["running"] == 0)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_request_finishes_after_continue_with_the_tokens_it_would_have_had(server, mode):
    params = {"max_new_tokens": 400, "ignore_eos": True, "sampling_seed": 5}
    expected = server.generate([5], **params)["output_ids"]
    running = server.background([5], **params)
    assert server.post("/pause_generation", mode=mode).status_code == 200
    server.let_go()
    with pytest.raises(TimeoutError):
        running.result(0.1)
    server.post("/continue_generation")
    assert running.result()["output_ids"] == expected


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_routed_experts_of_a_paused_request_are_complete_and_so_are_those_of_an_aborted_one(server, model_dir, mode):
    running = server.background([5, 6], max_new_tokens=300, ignore_eos=True, return_routed_experts=True)
    server.post("/pause_generation", mode=mode)
    server.let_go()
    server.post("/continue_generation")
    answer = running.result()
    assert (routed_experts(answer) == routed_by(model_dir, [5, 6, *answer["output_ids"]])[:-1]).all()
    running = server.background([5, 6], return_routed_experts=True, **LONG)
    server.post("/pause_generation", mode=mode)
    server.post("/abort_request", abort_all=True)
    server.post("/continue_generation")  # an abort during a pause in place waits for it
    answer = running.result()
    assert (routed_experts(answer) == routed_by(model_dir, [5, 6, *answer["output_ids"]])[:-1]).all()


# Weights -------------------------------------------------------------------------------------------------------------


def update(server, path, **body):
    return server.post("/update_weights_from_disk", model_path=str(path), **body)


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
        ("theta", "rotary"),
    ):
        answer = update(server, tmp_path / path, weight_version="bad")
        assert answer.status_code == 400
        assert answer.json()["success"] is False
        assert re.search(message, answer.json()["message"])
    after = server.generate([5, 6], **params)
    assert after["meta_info"]["weight_version"] == "default"
    assert after["meta_info"]["output_token_logprobs"] == before["meta_info"]["output_token_logprobs"]


# Process life --------------------------------------------------------------------------------------------------------


def run_to_end(*options):
    return subprocess.run([*COMMAND, *options], cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_starts_that_cannot_work_end_with_one_line_and_code_two(model_dir, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (["--model-path", str(model_dir), "--port", port], "port.*cannot be bound"),
            (["--model-path", str(model_dir), "--port", "0", "--host", "0.0.0.0"], "loopback.*0.0.0.0.*--allow-remote"),
            (
                ["--model-path", str(model_dir), "--port", "0", "--allow-remote"],
                "--allow-remote needs a key.*-variable",
            ),
            (
                ["--model-path", str(model_dir), "--api-key-variable", "NO_SUCH"],
                "names NO_SUCH.*not in the environment",
            ),
            (["--model-path", str(tmp_path / "none"), "--port", "0"], "does not exist"),
            (["--model-path", str(tmp_path), "--port", "0"], "gemma.* is not implemented"),
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
    assert server.process.wait(240) == 0
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
            "time.sleep(10**6)",
            str(pid_file),
            *COMMAND,
            "--model-path",
            str(model_dir),
            "--port",
            "0",
            "--lifeline",
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("serving" in line for line in parent.stderr)
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), "the parent has written the pid")
    pid = int(pid_file.read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(pid), "the server has ended")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_dead_engine_answers_500_and_ends_the_process_with_a_message(model_dir, tmp_path):
    # A fault of ours cannot be provoked from outside, so it is planted in the model's forward pass.
    (tmp_path / "run.py").write_text(
        "import pathlib, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import held_server\n"
        "from megatron_rl.rollout.embedded import __main__, model\n"
        "held_server.install(pathlib.Path(sys.argv[1]))\n"
        "inner = model.EmbeddedModel.hidden\n"
        "def hidden(self, weights, cache, batch):\n"
        "    if (batch.tokens == 77).any() and batch.num_queries > 1 and len(cache.keys[0]) > 3:\n"
        "        raise RuntimeError('planted')\n"
        "    return inner(self, weights, cache, batch)\n"
        "model.EmbeddedModel.hidden = hidden\n"
        "sys.exit(__main__.main(sys.argv[2:]))\n"
    )
    server = Server(model_dir, program=[sys.executable, str(tmp_path / "run.py")])
    running = server.background([5], **LONG)
    answer = server.post("/generate", input_ids=[77])
    assert answer.status_code == 500
    assert "planted" in answer.json()["error"]["message"]
    with pytest.raises(AssertionError, match="500"):
        running.result()
    assert server.process.wait(240) == 1
    server.http.close()
    wait_until(lambda: any("planted" in line for line in server.lines), "the server has told of its end")
