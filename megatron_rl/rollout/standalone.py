"""A rollout phase without a trainer: servers on a model directory, their pool, rewards and a sampler."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.config.bailing import load_bailing_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.records import Response
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.keeper import start_servers
from megatron_rl.rollout.pool import ServerPool
from megatron_rl.rollout.sampler import Sampler


@asynccontextmanager
async def sampling(config: RlConfig, model: Path, tokenizer: Any, name: str, seed: int) -> AsyncIterator[Sampler]:
    """A sampler over servers that have the weights in `model` as version 0. Nothing of it is left afterwards.

    name: of the servers' logs in the run directory. Samples have advantage 0. ValueError for rollout.urls: the servers
    there have weights of their own.
    """
    rollout = config.rollout
    if rollout.urls:
        raise ValueError(
            "this command starts servers of its own with the model that it samples from; leave rollout.urls empty"
        )
    with start_servers(model, config.run_dir, rollout, config.model.dtype, name=name) as keeper:
        keeper.wait_ready()
        servers = ServerPool(keeper.urls, rollout, keeper.replace)
        try:
            await servers.connect()
            servers.assume(model, "0")
            with Rewards(config.reward) as rewards:
                eos = load_bailing_config(model).eos_token_id
                yield Sampler(servers, rewards, tokenizer.decode, _no_advantages, rollout, seed, eos)
        finally:
            await servers.close()


def _no_advantages(responses: Sequence[Response], rewards: np.ndarray) -> np.ndarray:
    """Nothing is trained here."""
    return np.zeros(len(responses))
