"""Tests the example agents with a policy whose words are given."""

import asyncio
import contextlib
import importlib.util
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from agent_chat import Scripted, chat_tokenizer
from ports import free_port
from test_agents import Question, groups_of
from until import wait_until

from megatron_rl.data.prompts import Prompt
from megatron_rl.gateway.model import Reply, ToolCall

EXAMPLES = Path(__file__).parents[1] / "examples/agents"


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_agent", EXAMPLES / name / "agent.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def halving(read: str) -> str:
    """Return the middle of the range that the hints so far leave."""
    low, high = 0, 9
    said = [part.partition("<|end|>")[0] for part in read.split("<|start|>")[1:]]
    guess = None
    for one in said:
        role, _, text = one.partition("\n")
        if role == "assistant" and text:
            guess = int(text)
        elif text == "up":
            low = guess + 1
        elif text == "down":
            high = guess - 1
    return str((low + high) // 2)


@pytest.mark.parametrize(
    ("say", "wins"), [(halving, 10), (lambda read: "7", 1), (lambda read: "x", 0), (lambda read: "<|end|>", 0)]
)
def test_the_game_is_won_by_who_listens(tmp_path, say, wins) -> None:
    tokenizer = chat_tokenizer(tmp_path / "chat")
    game = module("guess")
    questions = [
        Question(
            prompt_id=secret,
            prompt=Prompt(id=str(secret), domain="math", prompt=game.QUESTION, answer=str(secret)),
            input_ids=(1,),
        )
        for secret in range(10)
    ]
    groups, counts = groups_of(
        tokenizer, tmp_path, questions, servers=Scripted(tokenizer, say), agent=f"{EXAMPLES}/guess/agent.py:run"
    )
    assert sum(group.samples[0].reward for group in groups) == wins
    assert all(len(group.samples[0].response.segments) == 1 for group in groups)
    assert all(group.samples[0].response.num_turns <= game.TURNS for group in groups)
    assert counts["num_failed_agents"] == 0


class Halving:
    """Stands in for a policy that guesses the middle of the range that the hints leave."""

    async def chat(self, messages, max_tokens):
        read = "".join(f"<|start|>{one['role']}\n{one['content']}<|end|>" for one in messages)
        text = halving(read)
        message = {"role": "assistant", "content": text}
        return Reply(content=text, reasoning="", tool_calls=(), finish_reason="stop", message=message)


def test_an_environment_of_openenv_is_played_in(monkeypatch, tmp_path) -> None:
    pytest.importorskip("openenv.core", reason="pip install openenv-core")
    port = free_port()
    monkeypatch.setenv("OPENENV_URL", f"http://127.0.0.1:{port}")
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "openenv/environment.py"), "--port", str(port)], stderr=log
        )
    try:

        def is_healthy():
            assert server.poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"http://127.0.0.1:{port}/health", timeout=240).is_success

        wait_until(is_healthy, "the environment is healthy")
        agent = module("openenv")
        scores = [asyncio.run(agent.run(SimpleNamespace(seed=seed), Halving())) for seed in range(5)]
        assert scores == [1.0] * 5
    finally:
        server.kill()
        server.wait()


class Told:
    """Stands in for a policy that calls the tool with each program and then answers."""

    def __init__(self, *programs: str) -> None:
        self._programs, self.results = list(programs), []

    async def chat(self, messages, tools):
        self.results = [message["content"] for message in messages if message["role"] == "tool"]
        calls = [ToolCall("1", "python", {"code": self._programs.pop(0)})] if self._programs else []
        message = {"role": "assistant", "content": "so"}
        return Reply(content="so", reasoning="", tool_calls=tuple(calls), finish_reason="stop", message=message)


def test_the_calculator_runs_programs_in_the_sandbox_and_tells_what_they_print() -> None:
    sandbox = pytest.importorskip("megatron_rl.reward.sandbox")
    try:
        calculator = module("calculator")
    except sandbox.SandboxUnavailable as error:
        pytest.skip(str(error))
    model = Told("print(6 * 7)", "1 / 0", "while True: pass", "open('/etc/hostname')", "pass")
    task = SimpleNamespace(messages=[{"role": "user", "content": "6*7?"}])
    calculator.LIMITS = calculator.Limits(wall_seconds=240.0, cpu_seconds=1, memory_bytes=256 * 2**20)
    assert asyncio.run(calculator.run(task, model)) is None
    first, division, endless, file, nothing = model.results
    assert first == "42\n"
    assert division == "ZeroDivisionError: division by zero"
    assert "ran into its limit of cpu" in endless
    assert file.startswith(("FileNotFoundError", "PermissionError"))
    assert nothing == "(it printed nothing)"
    assert calculator.result(None).startswith("error: the argument `code`")


def test_random_games_hold_the_same_hints_as_the_game(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "guess"))
    monkeypatch.delitem(sys.modules, "agent", raising=False)
    spec = importlib.util.spec_from_file_location("guess_prepare", EXAMPLES / "guess/prepare.py")
    assert spec is not None and spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    for seed in range(200):
        game = prepare.game(random.Random(seed))
        guesses = [int(message["content"]) for message in game if message["role"] == "assistant"]
        hints = [message["content"] for message in game if message["role"] == "user"][1:]
        assert len(hints) == len(guesses) - 1 < 4
        asked = list(zip(guesses, hints, strict=False))
        assert [n for n in range(10) if n not in guesses[:-1] and all(prepare.hint(g, n) == h for g, h in asked)]
