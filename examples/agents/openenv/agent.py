"""This agent plays in an environment of OpenEnv: whatever serves reset and step, and takes and returns a text."""

import os
from typing import Any

from openenv.core.generic_client import GenericEnvClient

URL = os.environ.get("OPENENV_URL", "http://127.0.0.1:8000")


async def run(task: Any, model: Any) -> float:
    """Play one episode; the environment's last reward is the score. All samples of a prompt play the same episode."""
    async with GenericEnvClient(base_url=URL) as environment:
        result = await environment.reset(seed=task.seed)
        messages = [{"role": "user", "content": result.observation["text"]}]
        while not result.done:
            reply = await model.chat(messages, max_tokens=1)
            result = await environment.step({"text": reply.content})
            messages += [reply.message, {"role": "user", "content": result.observation["text"]}]
        return float(result.reward or 0.0)
