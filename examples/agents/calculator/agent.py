"""This agent has one tool: the policy writes Python, which runs in the sandbox, and answers in a box."""

import asyncio
from typing import Any

from megatron_rl.reward.sandbox import Sandbox
from megatron_rl.reward.sandbox_run import Limits

TURNS = 6
LIMITS = Limits(wall_seconds=5.0, cpu_seconds=3, memory_bytes=256 * 2**20, output_bytes=4096)
SYSTEM = "Use the tool for every calculation. Put the final answer into \\boxed{}."
TOOL = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Run a Python program and return what it prints.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "the program"}},
            "required": ["code"],
        },
    },
}
# Made once: every agent is a fork of the process that imports this file.
sandbox = Sandbox()


async def run(task: Any, model: Any) -> None:
    """Let the policy calculate until it calls nothing more. The reward judges its last message."""
    messages = [{"role": "system", "content": SYSTEM}, *task.messages]
    for _ in range(TURNS):
        reply = await model.chat(messages, tools=[TOOL])
        messages.append(reply.message)
        if not reply.tool_calls:
            return
        for call in reply.tool_calls:
            messages.append(reply.result_of(call, await asyncio.to_thread(result, call.arguments.get("code"))))


def result(code: object) -> str:
    """Return what a program of the policy's prints, or what is wrong with it."""
    if not isinstance(code, str):
        return "error: the argument `code` must be a program"
    ran = sandbox.run_python(code, b"", LIMITS)
    said = ran.stdout.decode(errors="replace")
    if ran.limit is not None:
        return f"{said}error: the program ran into its limit of {ran.limit}"
    if ran.exit_code:
        return said + (ran.stderr.decode(errors="replace").strip().splitlines() or ["error"])[-1]
    return said or "(it printed nothing)"
