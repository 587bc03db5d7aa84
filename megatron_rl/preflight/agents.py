"""Agents are loaded before anything is built, and what a configuration says of them is held against the model."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.schema import SamplingConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.gateway.parsers import parser_for
from megatron_rl.gateway.sampler import check_agent, setup_of
from megatron_rl.preflight.registry import Start


def agent_problems(start: Start) -> Iterator[str]:
    """What is wrong with the agent of a command that runs one; an agent for a command that runs none."""
    config = start.config
    if not isinstance(config, SamplingConfig | SelectConfig) or not config.rollout.has_agent:
        return
    if isinstance(config, SelectConfig) or start.rollouts is not None or (config.teacher is not None):
        yield (
            "rollout.agent and rollout.agent_command are for `train` and `rollout` with a model that servers run; take "
            "them out"
        )
        return
    path = start.model or (config.model.path if config.model is not None else None)
    assert path is not None
    asyncio.run(check_agent(setup_of(config.rollout, config.run_dir, config.reward.passing_score)))
    parser_for(load_tokenizer(Path(path)), config.rollout.tool_parser)
