"""Checks which settings and models LoRA adapters can be combined with, without ranks."""

from pathlib import Path

import pytest
import torch
from alone import ALONE
from parallel import SHAPE
from tiny_model import write_tiny_model

from megatron_rl.config.layout import Layout
from megatron_rl.config.lora import LoraSection
from megatron_rl.config.model import ModelSection
from megatron_rl.families import load_architecture
from megatron_rl.model.backends import Installed, choose, problems
from megatron_rl.model.logprobs import logprobs_and_entropy


def test_a_frozen_head_costs_no_gradient_and_changes_none() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(6, 8, requires_grad=True)
    weight, targets = torch.randn(10, 8), torch.randint(0, 10, (6,))
    gradients = []
    for trains in (True, False):
        hidden.grad = None
        head = weight.clone().requires_grad_(trains)
        logprobs, _ = logprobs_and_entropy(hidden, head, targets, 10)
        logprobs.sum().backward()
        gradients.append(hidden.grad)
        assert (head.grad is None) is not trains
    assert torch.equal(*gradients)


def test_what_does_not_go_with_adapters_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", **SHAPE)
    architecture = load_architecture(model)

    def told(lora: dict, layout: Layout = ALONE, **section: object) -> list[str]:
        return list(problems(ModelSection(path=model, **section), architecture, layout, LoraSection(**lora)))

    assert told({}) == []
    assert "local layers only" in told({}, dtype="bfloat16", layers="transformer_engine")[0]
    assert "frozen experts do not have" in told({}, dtype="bfloat16", expert_weight_gradient="quack")[0]
    assert "lora.rank in multiples of 4 in float32, got 6" in told({"rank": 6}, experts="grouped")[0]
    assert told({"rank": 6, "targets": ["attention"]}, experts="grouped") == []
    # The first layer is dense.
    (problem,) = told({"targets": ["experts"]}, Layout(world_size=4, pipeline=4))
    assert "names nothing that layers 0 to 0 (pipeline stage 0) have" in problem
    gpu = Installed(compute_capability=(9, 0))
    for rank, expected in ((8, "grouped"), (6, "sequential")):
        section = ModelSection(path=model, dtype="bfloat16")
        assert choose(section, architecture, ALONE, gpu, LoraSection(rank=rank)).experts == expected
    with pytest.raises(ValueError, match="rank"):
        LoraSection(rank=0)
    assert LoraSection(targets=["experts", "attention"]).targets == ("attention", "experts")
