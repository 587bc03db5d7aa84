"""Holds an agent for runs of a random model: it takes two short turns and scores 1 as often as 0."""

import asyncio
from pathlib import Path


async def run(task, model):
    """Play. Between the turns it waits until there is the file that `until` of the row's meta names."""
    first = await model.chat(task.messages, max_tokens=4)
    while "until" in task.meta and not Path(task.meta["until"]).exists():
        await asyncio.sleep(0.02)
    more = [*task.messages, first.message, {"role": "user", "content": "more"}]
    second = await model.chat(more, max_tokens=4)
    if note := task.meta.get("note"):
        Path(note).touch()
    return float(sum(map(ord, first.content + second.content)) % 2)
