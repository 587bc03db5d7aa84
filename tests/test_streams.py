"""Tests streams of the embedded server, in this process."""

import asyncio
import json
from pathlib import Path

import torch
from starlette.middleware import Middleware
from tiny_model import write_tiny_model

from megatron_rl.families import load_architecture
from megatron_rl.rollout.embedded.engine import EngineOptions
from megatron_rl.rollout.embedded.guard import Guard
from megatron_rl.rollout.embedded.protocol import Limits, parse_generate
from megatron_rl.rollout.embedded.server import App


def test_a_stream_that_comes_when_the_engine_has_ended_says_so_and_is_forgotten(tmp_path: Path) -> None:
    config = load_architecture(write_tiny_model(tmp_path, num_hidden_layers=1))
    options = EngineOptions(
        model_path=str(tmp_path), dtype=torch.float32, max_running_requests=2, context_length=64, weight_version="0"
    )
    body = {
        "input_ids": [[5], [6]],
        "rid": ["a", "b"],
        "stream": True,
        "sampling_params": {"max_new_tokens": 2, "ignore_eos": True},
    }
    asked = parse_generate(body, Limits(vocab_size=config.vocab_size, context_length=64))

    async def lines(app: App) -> list[str]:
        found = [line async for line in app._stream(asked, app._sequences(asked), 0.0)]
        return b"".join(found).decode().split("\n\n")[:-1]

    async def run() -> None:
        guard = Middleware(Guard, key="", host="server.example")
        app = App(config, options, on_failure=lambda: None, guard=guard)
        *answers, last = await lines(app)
        assert last == "data: [DONE]"
        parts = [json.loads(answer.removeprefix("data: ")) for answer in answers]
        ends = {part["index"]: part for part in parts if part["meta_info"]["finish_reason"]}
        assert {index: len(part["output_ids"]) for index, part in ends.items()} == {0: 2, 1: 2}
        app.close()
        problem, last = await lines(app)
        assert "the engine is not running: stopped" in problem
        assert last == "data: [DONE]"
        assert "a" not in app._in_flight

    asyncio.run(run())
