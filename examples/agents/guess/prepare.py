"""Make a tiny model, games of weak players for it to imitate, and the rows of the game, in runs/guess."""

import json
import random
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from agent import QUESTION, TURNS, hint

OUT = Path("runs/guess")
GAMES = 6000
LISTENERS = 0.4  # the share of games whose player heeds the hints; the others guess at random


def game(source: random.Random) -> list[dict[str, str]]:
    """Return the messages of one game."""
    secret, listens = source.randrange(10), source.random() < LISTENERS
    low, high = 0, 9
    messages = [{"role": "user", "content": QUESTION}]
    for turn in range(TURNS):
        guess = source.randint(low, high)
        messages.append({"role": "assistant", "content": str(guess)})
        if guess == secret or turn == TURNS - 1:
            return messages
        messages.append({"role": "user", "content": hint(guess, secret)})
        if listens:
            low, high = (guess + 1, high) if guess < secret else (low, guess - 1)
    return messages


def main() -> None:
    source = random.Random(1)
    tool = Path(__file__).parents[3] / "tools/make_tiny_model.py"
    shape = ["--hidden-size", "64", "--layers", "3", "--experts", "4", "--moe-intermediate-size", "64", "--force"]
    subprocess.run([sys.executable, tool, OUT / "model", *shape], check=True)
    chats = [{"id": str(number), "messages": game(source)} for number in range(GAMES)]
    rows = [{"id": str(secret), "prompt": QUESTION, "answer": str(secret)} for secret in range(10)]
    for name, found in (("games.jsonl", chats), ("numbers.jsonl", rows)):
        (OUT / name).write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    print(f"{OUT}: a model, {GAMES} games, {len(rows)} numbers")


if __name__ == "__main__":
    main()
