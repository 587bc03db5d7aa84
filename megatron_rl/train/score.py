"""Computes the log-probs of a text under a checkpoint of either kind, by the trainer's own model, in one process."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.checkpoint.read import resolve
from megatron_rl.config.layout import Layout
from megatron_rl.config.model import ModelSection, MoeSection
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.families import load_architecture
from megatron_rl.model.build import build_model, initialize_parallel, load_weights
from megatron_rl.train.step.batch import TrainSequence
from megatron_rl.train.step.trainer import Trainer


def text_logprobs(path: Path, text: str) -> tuple[list[int], torch.Tensor]:
    """Return the token ids [n] of the text, and fp32 log-probs [n - 1] of all but the first. Raise ValueError for a
    text of less than two tokens."""
    directory = resolve(path)
    tokenizer: Any = load_tokenizer(directory)
    ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    if len(ids) < 2:
        raise ValueError(f"--text {text!r} has {len(ids)} token(s); two are needed for a log-prob")
    layout = Layout(world_size=1)
    if not dist.is_initialized():
        initialize_parallel(layout, deadline_seconds=600, seed=0)
    architecture = load_architecture(directory)
    section = ModelSection(path=directory, dtype="float32", layers="local")
    moe = MoeSection(load_balance_coefficient=0.0, z_loss_coefficient=0.0)
    model = build_model(architecture, section, moe, layout, distributed_optimizer=False)
    load_weights(model, directory)
    trainer = Trainer(model, OptimizerSection(), 1, dist.group.WORLD)
    sequence = TrainSequence(
        token_ids=np.array(ids, np.int32),
        loss_positions=np.arange(1, len(ids), dtype=np.int32),
        weight=1.0,
        rollout_logprobs=np.full(len(ids) - 1, np.nan, np.float32),
        num_stale_tokens=len(ids) - 1,
    )
    (logprobs,) = trainer.logprobs([trainer.micro_batch([sequence])])
    return ids, logprobs
