"""Nobody without the key of a run gets a server to do anything, and the key shows nowhere."""

import asyncio
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from starlette.middleware import Middleware
from tiny_model import write_tiny_model

from megatron_rl.config.load import secret_variables
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.families import load_architecture
from megatron_rl.keys import bearer, new_key, without_secrets
from megatron_rl.rollout.client import GenerationClient, RequestRefused, ServerLost
from megatron_rl.rollout.embedded.engine import EngineOptions
from megatron_rl.rollout.embedded.guard import Guard
from megatron_rl.rollout.embedded.server import App
from megatron_rl.rollout.ports import hold_port
from megatron_rl.rollout.server import EmbeddedServer, GenerationServer

KEY = new_key()
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def app_of(model: Path, key: str) -> App:
    options = EngineOptions(
        model_path=str(model), dtype=torch.float32, max_running_requests=2, context_length=64, weight_version="0"
    )
    guard = Middleware(Guard, key=key, host="server.example")
    return App(load_architecture(model), options, on_failure=lambda: None, guard=guard)


def test_no_route_does_anything_for_who_does_not_show_the_key(model: Path) -> None:
    async def run() -> None:
        app = app_of(model, KEY)
        site = app.starlette()
        wrong: list[Any] = [{}, bearer("x"), bearer(KEY[:-1]), bearer(KEY + "0"), {"Authorization": f"Basic {KEY}"}]
        wrong += [{"Authorization": KEY}, {"X-Api-Key": KEY}, {b"Authorization": b"Bearer \xff"}]
        asked = 0
        try:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(site), base_url="http://127.0.0.1:1", timeout=240
            ) as http:
                for route, headers in itertools.product(site.routes, wrong):
                    for method in (*route.methods, "OPTIONS", "TRACE"):  # type: ignore[attr-defined]
                        path = route.path  # type: ignore[attr-defined]
                        answer = await http.request(method, path, json={"mode": "in_place"}, headers=headers)
                        is_open = path in ("/health", "/ready")
                        assert (answer.status_code == 401) != is_open, (method, path)
                        assert KEY not in answer.text
                        asked += 1
                assert asked > 500
                assert (await http.get("/no_such_route")).status_code == 401
                info = (await http.get("/server_info", headers=bearer(KEY))).json()
                assert info["internal_states"] == [{"running": 0, "waiting": 0, "paused": False}]
                body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
                assert (await http.post("/generate", json=body, headers=bearer(KEY))).status_code == 200
        finally:
            app.close()

    asyncio.run(run())


def test_what_only_a_page_in_a_browser_sends_is_refused_without_a_key_too(model: Path) -> None:
    body = b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}'
    refused: list[tuple[int, dict[str, str]]] = [
        (421, {"Host": "evil.example"}),
        (421, {"Host": "127.0.0.1.evil.example:80"}),
        (421, {"Host": "localhost.evil.example"}),
        (421, {"Host": "10.0.0.1"}),
        (421, {"Host": ""}),
        (403, {"Origin": "http://evil.example"}),
        (403, {"Origin": "null"}),
        (403, {"Origin": "http://127.0.0.1:1"}),
        (403, {"Sec-Fetch-Site": "cross-site"}),
        (403, {"Sec-Fetch-Site": "same-site"}),
        (415, {"Content-Type": "text/plain"}),
        (415, {"Content-Type": "text/plain; application/json"}),
        (415, {"Content-Type": "application/x-www-form-urlencoded"}),
        (415, {"Content-Type": ""}),
    ]
    served = [{"Host": "localhost:99"}, {"Host": "[::1]:1"}, {"Host": "SERVER.example:1"}]
    served += [{"Sec-Fetch-Site": "none"}, {"Content-Type": "Application/JSON; charset=utf-8"}]

    async def run() -> None:
        app = app_of(model, "")
        try:
            transport = httpx.ASGITransport(app.starlette())
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1", timeout=240) as http:
                for status, headers in refused:
                    answer = await http.post("/generate", content=body, headers=JSON | headers)
                    assert answer.status_code == status, headers
                    assert answer.json()["error"]["message"]
                for headers in served:
                    answer = await http.post("/generate", content=body, headers=JSON | headers)
                    assert answer.status_code == 200, headers
                assert (await http.post("/flush_cache")).status_code == 200  # no body has no type
        finally:
            app.close()

    asyncio.run(run())


def test_the_key_and_the_secrets_of_the_environment_show_nowhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a secret")
    monkeypatch.setenv("NAMED_BY_THE_CONFIGURATION", "a secret")
    key = new_key()
    server = EmbeddedServer(
        model, tmp_path / "server.log", context_length=64, key=key, secret_variables={"NAMED_BY_THE_CONFIGURATION"}
    )

    async def refusal() -> str:
        client = GenerationClient(server.url, key_of=lambda url: server.key)
        try:
            with pytest.raises(RequestRefused) as refused:
                await client.control("/update_weights_from_disk", {"model_path": server.key})
            return str(refused.value)
        finally:
            await client.close()

    try:
        with pytest.raises(ServerLost, match="not known to be our server yet"):
            _ = server.key
        server.wait_ready(240)
        assert httpx.get(f"{server.url}/server_info", trust_env=False, timeout=240).status_code == 401
        shown = httpx.get(f"{server.url}/server_info", headers=bearer(key), trust_env=False, timeout=240)
        assert shown.status_code == 200
        assert "got '...'; start the server" in asyncio.run(refusal())
        (pid,) = (int(path.read_text()) for path in tmp_path.glob("*.pid"))
        environment = psutil.Process(pid).environ()
        assert "a secret" not in environment.values()
        assert "PATH" in environment
        assert key not in str(environment)
        assert key not in subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout
        assert not [path for path in tmp_path.iterdir() if key in path.read_text()]
    finally:
        server.stop()


def test_secrets_are_known_by_their_names_and_urls_by_their_passwords() -> None:
    secret = "OPENAI_API_KEY HF_TOKEN AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID wandb_api_key GITHUB_TOKENS PGPASSWORD"
    secret += " GOOGLE_APPLICATION_CREDENTIALS SSH_AUTH_SOCK MYSQL_PWD DB_PASSWD APIKEY SECRET GPG_PASSPHRASE"
    kept = "PATH HOME PWD OLDPWD TOKENIZERS_PARALLELISM OMP_NUM_THREADS CUDA_VISIBLE_DEVICES KEYBOARD GIT_AUTHOR_NAME"
    kept += " LD_LIBRARY_PATH MONKEYS NCCL_DEBUG"
    environment = dict.fromkeys(f"{secret} {kept} TEACHER".split(), "x")
    environment |= {"HTTPS_PROXY": "http://user:word@proxy:1", "PROXY": "http://proxy:1/a@b"}
    assert set(without_secrets(environment, {"TEACHER"})) == {*kept.split(), "PROXY"}
    rollout = RolloutSection(
        prompts_per_step=1, samples_per_prompt=1, api_key_variable="ATTACHED", max_response_tokens=64
    )
    assert secret_variables(rollout) == {"ATTACHED"}
    judged = RewardSection.model_validate({"judge": {"api_key_variable": "JUDGE"}})
    assert secret_variables(judged) == {"JUDGE"}


@pytest.fixture
def impostor() -> Iterator[tuple[int, list[bytes]]]:
    """Listen at a port that this process holds, as anybody can. Yield the port and a list of all that is received."""
    port, received = hold_port("127.0.0.1"), []
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()

        def listen() -> None:
            for _ in range(99):
                try:
                    connection = listening.accept()[0]
                except OSError:
                    return
                connection.settimeout(240)
                received.append(connection.recv(4096))
                connection.close()

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield port, received
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(240)


def test_nothing_is_sent_to_who_listens_in_place_of_a_server(impostor: tuple[int, list[bytes]], tmp_path: Path) -> None:
    port, received = impostor
    server = GenerationServer(["sleep", "1000000"], tmp_path / "server.log", port, "127.0.0.1", KEY)
    try:
        with pytest.raises(ValueError, match=f"another process listens on port {port} of 127.0.0.1.*rollout.port"):
            server.wait_ready(240)
        with pytest.raises(ServerLost, match="not known to be our server yet"):
            _ = server.key
        client = GenerationClient(server.url, key_of=lambda url: server.key)
        assert not asyncio.run(client.is_ready())
    finally:
        server.kill()
    assert received
    assert b"".join(received) == b""


# Started by a shell, as SGLang is by its supervisor.
EVERYTHING_IS_FINE = """
import http.server, sys
class Fine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Fine).serve_forever()
"""


def test_a_server_that_does_not_ask_for_its_key_is_refused(tmp_path: Path) -> None:
    port = hold_port("127.0.0.1")
    command = ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", EVERYTHING_IS_FINE, port]
    server = GenerationServer(command, tmp_path / "server.log", port, "127.0.0.1", KEY)
    try:
        with pytest.raises(ValueError, match="answers without the run's key"):
            server.wait_ready(240)
        assert server.key == KEY  # it is ours nevertheless, a child of our child
    finally:
        server.kill()
