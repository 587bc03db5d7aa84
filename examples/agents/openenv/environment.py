"""Serve the game of examples/agents/guess as an environment of OpenEnv on this machine.

python examples/agents/openenv/environment.py [--port 8000]
"""

import argparse
import random
from typing import Any

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

TURNS = 4
SESSIONS = 512  # games at once


class Guess(Action):
    text: str


class Told(Observation):
    text: str


class Game(Environment[Guess, Told, State]):
    """Hides a number from 0 to 9, which is to be found in four guesses; a win is 1."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state, self._secret = State(), 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Told:
        self._state = State(episode_id=episode_id)
        self._secret = random.Random(seed).randrange(10)
        return Told(text="guess 0-9")

    def step(self, action: Guess, timeout_s: float | None = None, **kwargs: Any) -> Told:
        self._state.step_count += 1
        if not action.text.isdecimal():  # what is no number loses at once
            return Told(text="no number", done=True, reward=0.0)
        guess = int(action.text)
        if guess == self._secret or self._state.step_count == TURNS:
            return Told(text="over", done=True, reward=float(guess == self._secret))
        return Told(text="up" if guess < self._secret else "down")

    @property
    def state(self) -> State:
        return self._state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    app = create_app(Game, Guess, Told, env_name="guess", max_concurrent_envs=SESSIONS)
    uvicorn.run(app, host="127.0.0.1", port=parser.parse_args().port, log_level="warning")


if __name__ == "__main__":
    main()
