"""Tests proxies of the environment: requests to this machine do not use them, and messages of others name them."""

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from stand_in import stand_in

from megatron_rl.config.endpoints import EndpointSection
from megatron_rl.endpoint import Endpoint, EndpointError
from megatron_rl.proxies import proxy_for, shown_proxy, without_proxy
from megatron_rl.reward.sandbox import SandboxUnavailable
from megatron_rl.reward.sandbox_http import SandboxFusion

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
DEAD = "http://user:s3cret@127.0.0.1:9"  # nobody listens there


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextmanager
def answering(reply: object, seen: list[str]) -> Iterator[str]:
    """Run a server, also as a proxy, that always answers `reply`, and yield its URL. seen: gets what it was asked
    for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asked(endpoint: Endpoint) -> str:
    return asyncio.run(endpoint.ask([{"role": "user", "content": "?"}], {})).content


@pytest.mark.parametrize("proxy", [DEAD, "socks5://127.0.0.1:9", "gopher://127.0.0.1:9"])
@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy", "ALL_PROXY"])
def test_endpoints_of_this_machine_are_asked_without_a_proxy(monkeypatch, variable: str, proxy: str) -> None:
    monkeypatch.setenv(variable, proxy)
    with stand_in("judge-1") as (url, handler):
        handler.replies += ["yes", "yes"]
        assert asked(Endpoint(EndpointSection(url=url, model="judge-1"), "teacher")) == "yes"
        by_name = url.replace("127.0.0.1", "localhost")
        assert asked(Endpoint(EndpointSection(url=by_name, model="judge-1"), "teacher")) == "yes"
    run = {"status": "Finished", "return_code": 0, "stdout": "42\n", "stderr": "", "execution_time": 0.1}
    with answering({"status": "Success", "run_result": run}, []) as url:
        SandboxFusion(url)


def test_an_endpoint_elsewhere_is_asked_through_the_proxy_and_errors_name_it(monkeypatch) -> None:
    section = EndpointSection(url="http://judge.invalid/v1", model="judge-1")
    seen: list[str] = []
    with answering({"data": [{"id": "judge-1"}]}, seen) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        endpoint = Endpoint(section, "reward.judge", tries=1)
        assert seen == ["http://judge.invalid/v1/models"]
        with pytest.raises(EndpointError, match="no chat completion"):  # it answers that with the models too
            asked(endpoint)
    with pytest.raises(EndpointError, match=rf"ConnectError.* through the proxy {proxy} of the environment"):
        asked(endpoint)
    monkeypatch.setenv("http_proxy", DEAD)
    with pytest.raises(ValueError, match=r"does not list its models through the proxy http://127.0.0.1:9 of") as told:
        Endpoint(section, "reward.judge")
    with pytest.raises(SandboxUnavailable, match=r"failed through the proxy http://127.0.0.1:9 of the env") as other:
        SandboxFusion("http://sandbox.invalid")
    assert "s3cret" not in f"{told.value} {other.value}"


def test_a_proxy_that_cannot_be_used_is_named_with_the_way_out(monkeypatch) -> None:
    section = EndpointSection(url="http://judge.invalid/v1", model="judge-1")
    monkeypatch.setenv("all_proxy", "socks5://me:s3cret@127.0.0.1:9")
    monkeypatch.setattr("megatron_rl.proxies.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"socks5://127.0.0.1:9 for teacher.url .*socksio.*no_proxy=judge.invalid"):
        Endpoint(section, "teacher")
    monkeypatch.setenv("all_proxy", "gopher://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"gopher://127.0.0.1:9 for reward.code.endpoint .* of http, https, socks5"):
        SandboxFusion("http://judge.invalid/v1")
    monkeypatch.setenv("no_proxy", "judge.invalid")
    assert proxy_for(section.url, "teacher.url") is None


def test_which_proxy_stands_before_an_address(monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "a:1")
    monkeypatch.setenv("https_proxy", "http://b:2")
    monkeypatch.setenv("no_proxy", "near.invalid")
    assert proxy_for("http://far.invalid/v1", "u") == "http://a:1"
    assert proxy_for("https://far.invalid/v1", "u") == "http://b:2"
    for url in ("http://near.invalid", "http://[::1]:8000", "http://127.8.9.1", "http://0.0.0.0:1", "http://localhost"):
        assert proxy_for(url, "u") is None
    assert shown_proxy("http://me:pass@b:2") == "http://b:2"
    named = without_proxy({"NO_PROXY": "near.invalid,localhost"}, "10.0.0.7")
    assert named == dict.fromkeys(("no_proxy", "NO_PROXY"), "near.invalid,localhost,127.0.0.1,10.0.0.7")
