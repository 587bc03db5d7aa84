"""This module loads agents before anything is built, and checks what a configuration says of them against the model."""

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.schema import SamplingConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.gateway.parsers import parser_for
from megatron_rl.gateway.sampler import check_agent, setup_of
from megatron_rl.preflight.registry import Start


def agent_problems(start: Start) -> Iterator[str]:
    """Yield what is wrong with the agent of a command that runs one. For a command that runs none an agent is a
    problem."""
    config = start.config
    if not isinstance(config, SamplingConfig | SelectConfig | EvaluateConfig) or not config.rollout.has_agent:
        return
    has_teacher = isinstance(config, SamplingConfig) and config.teacher is not None
    if isinstance(config, SelectConfig) or start.rollouts is not None or has_teacher:
        yield (
            "rollout.agent and rollout.agent_command are for `train`, `rollout` and `evaluate` with a model that "
            "servers run; take them out"
        )
        return
    path = start.model or (config.model.path if config.model is not None else None)
    assert path is not None
    folder = Path(tempfile.mkdtemp(prefix="megatron_rl_agent_"))
    asyncio.run(check_agent(setup_of(config.rollout, folder, config.reward.passing_score)))
    shutil.rmtree(folder)  # else the message names it, and what the agent has printed is there
    parser_for(load_tokenizer(Path(path)), config.rollout.tool_parser)
