"""Tests rewards from a service over HTTP."""

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from megatron_rl.config.reward import RewardSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.score import Attempt
from megatron_rl.reward.verdict import Verdict

TASK = Prompt(id="p1", domain="math", prompt="What is 1 + 1?", answer="2", meta={"level": 3})


def score(section: RewardSection, texts: Sequence[str]) -> list[Verdict]:
    with Rewards(section) as rewards:
        return asyncio.run(rewards.verdicts(TASK, [Attempt(text=text, num_tokens=len(text)) for text in texts]))


class Service(http.server.BaseHTTPRequestHandler):
    """Stands in for a reward service. answers: one for each request: a status, bytes, or what is sent as JSON."""

    answers: list[Any]
    asked: list[tuple[dict[str, Any], str | None]]

    def do_POST(self) -> None:
        self.asked.append(
            (json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.headers["Authorization"])
        )
        answer = self.answers.pop(0)
        status, body = (answer, b"busy") if isinstance(answer, int) else (200, answer)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: Any) -> Iterator[tuple[str, type[Service]]]:
    monkeypatch.setattr("megatron_rl.reward.service._PAUSE_SECONDS", 0)
    handler = type("Scripted", (Service,), {"answers": [], "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/score", handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_service_gets_the_responses_of_a_prompt_together_and_is_asked_again_when_busy(
    service: tuple[str, type[Service]], monkeypatch: Any
) -> None:
    url, handler = service
    monkeypatch.setenv("SCORE_KEY", "s3cret")
    handler.answers += [503, {"scores": [-0.5, {"value": 2, "reason": "wrong", "parts": {"style": 0.1}}]}]
    section = RewardSection(kind=url, service={"api_key_variable": "SCORE_KEY"})
    found = score(section, ["a", "bc"])
    assert [(v.score, v.reason, dict(v.parts)) for v in found] == [(-0.5, "wrong", {}), (2.0, "wrong", {"style": 0.1})]
    body, key = handler.asked[1]
    assert key == "Bearer s3cret"
    assert body == {
        "prompt": TASK.prompt, "messages": TASK.messages, "answer": "2", "meta": {"level": 3}, "domain": "math",
        "id": "p1", "responses": ["a", "bc"], "finish_reasons": ["stop", "stop"], "response_tokens": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([{"scores": [1.0]}], "answered 1 scores for 2 responses; it must give one for each"),
        ([b"<html>"], 'answered no {"scores": [...]}: <html>'),
        ([{"scores": [1.0, "high"]}], "answered 'high': it returned 'high', a str"),
        ([{"scores": [1.0, {"value": 1, "colour": 2}]}], "unexpected keyword argument 'colour'"),
        ([400], "answered HTTP 400: busy"),
        ([500, 500, 500], "answered HTTP 500: busy"),
    ],
)
def test_what_a_service_fails_at_is_an_error(service: tuple[str, type[Service]], answers: list[Any], told: str) -> None:
    url, handler = service
    handler.answers += answers
    found = score(RewardSection(kind=url), ["a", "b"])
    assert found[1].reason == "error"
    assert told in found[1].details
    assert handler.answers == []


def test_a_service_that_is_down_is_an_error(service: Any) -> None:
    found = score(RewardSection(kind="http://127.0.0.1:9/score", service={"tries": 1}), ["a"])
    assert found[0].reason == "error"
    assert "the service http://127.0.0.1:9/score cannot be asked (ConnectError" in found[0].details
