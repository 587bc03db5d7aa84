"""This agent plays a game: the policy guesses a number from 0 to 9 in at most four turns, and is told "up" or "down" in
between."""

from typing import Any

TURNS = 4
QUESTION = "guess 0-9"


async def run(task: Any, model: Any) -> float:
    """Play one game; a win is 1. What is no digit loses at once."""
    secret = int(task.answer)
    messages = list(task.messages)
    for _ in range(TURNS):
        reply = await model.chat(messages, max_tokens=1)
        if not reply.content.isdecimal():
            return 0.0
        if int(reply.content) == secret:
            return 1.0
        messages += [reply.message, {"role": "user", "content": hint(int(reply.content), secret)}]
    return 0.0


def hint(guess: int, secret: int) -> str:
    """Return what the policy is told after a wrong guess."""
    return "up" if guess < secret else "down"
