"""Generates without a trainer: servers on a model directory, their pool, rewards and a sampler."""

import gc
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.config.load import secret_variables
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.schema import RolloutPhase
from megatron_rl.data.chat import response_decoder
from megatron_rl.families import load_architecture
from megatron_rl.records import Response
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.pool import ServerPool
from megatron_rl.rollout.sampler import Sampler
from megatron_rl.rollout.supervisor import start_servers


@asynccontextmanager
async def serving(
    model: Path,
    dtype: str,
    rollout: RolloutSection,
    folder: Path,
    name: str,
    secret_variables: Collection[str] = (),
) -> AsyncIterator[ServerPool]:
    """Start servers that have the weights in `model` as version 0, and yield their pool. Nothing of them is left
    afterwards but their logs, which are `folder/NAME_I.log`.

    secret_variables: of the environment, what they must not inherit beside what is called a secret. Raises ValueError
    for rollout.urls: the servers there have weights of their own.
    """
    if rollout.urls:
        raise ValueError(
            "this command starts servers of its own with the model that it samples from; leave rollout.urls empty"
        )
    with start_servers(model, folder, rollout, dtype, name=name, secret_variables=secret_variables) as supervisor:
        supervisor.wait_ready()
        servers = ServerPool(supervisor.urls, rollout, supervisor.replace, key_of=supervisor.key_of)
        try:
            await servers.connect()
            servers.assume(model, "0")
            gc.collect()
            gc.freeze()  # as the training's: prompts and libraries stay, and need not be walked through again and again
            yield servers
        finally:
            await servers.close()


@asynccontextmanager
async def sampling(config: RolloutPhase, model: Path, tokenizer: Any, name: str, seed: int) -> AsyncIterator[Sampler]:
    """Yield a sampler over servers of its own. Samples have advantage 0."""
    assert config.model is not None  # with a teacher there is nothing to serve
    end_ids = load_architecture(model).eos_token_ids
    with Rewards(
        config.reward, config.run_dir
    ) as rewards:  # first: what judges may be missing, and servers take a while to start
        variables = secret_variables(config)
        async with serving(model, config.model.dtype, config.rollout, config.run_dir, name, variables) as servers:
            yield Sampler(
                servers, rewards, response_decoder(tokenizer, end_ids), no_advantages, config.rollout, seed, end_ids
            )


def no_advantages(responses: Sequence[Response], rewards: np.ndarray) -> np.ndarray:
    """Return zeros: nothing is trained here."""
    return np.zeros(len(responses))
