"""Tests weight gradients of Transformer Engine's layers, which are added up in fp32 inside the product.

Stand-ins treat a flag, and megatron's sums, as Transformer Engine 2.20 does, in megatron's own DDP.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from alone import ALONE, world
from tiny_model import write_tiny_model
from torch import Tensor

from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.schema import SftConfig
from megatron_rl.families import load_architecture
from megatron_rl.model import build
from megatron_rl.model.backends import choose
from megatron_rl.model.build import build_model, fuse_weight_gradients
from megatron_rl.train.step import trainer
from megatron_rl.train.step.trainer import Trainer

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.optimizer import clip_grads  # isort: skip
from megatron.core.tensor_parallel.layers import ColumnParallelLinear  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

WIDTH = 8


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    with world():
        yield


class _Product(torch.autograd.Function):
    """Computes x W^T. Its backward adds to `main_grad` if it is asked to, says so, and returns a gradient not to be
    read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.fused = weight, fused
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if not ctx.fused:
            return grads[0] @ weight, grads[0].T @ x, None
        ctx.weight.main_grad.addmm_(grads[0].float().T, x.float())
        ctx.weight.grad_added_to_main_grad = True
        return grads[0] @ weight, torch.full_like(weight, torch.nan), None


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(WIDTH, WIDTH).bfloat16())


class Linear(torch.nn.Module):
    """Stands in for te.Linear. Without a bias that has an empty tensor, which is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.fuse_wgrad_accumulation = parameter(), torch.Tensor(), False

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.fuse_wgrad_accumulation)


class LayerNormLinear(Linear):
    """Stands in for te.LayerNormLinear, which holds the norm's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(WIDTH, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.layer_norm_weight)


class GroupedLinear(torch.nn.Module):
    """Stands in for te.GroupedLinear, where each expert's weight is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight0, self.weight1, self.fuse_wgrad_accumulation = parameter(), parameter(), False

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(x.chunk(2), (self.weight0, self.weight1), strict=True)
        return torch.cat([_Product.apply(part, weight, self.fuse_wgrad_accumulation) for part, weight in parts])


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.experts = LayerNormLinear(), Linear(), GroupedLinear()
        self.head = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)  # megatron's, without such a flag

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(self.proj(self.qkv(x))))


def ddp(module: torch.nn.Module, in_fp32: bool = True) -> DistributedDataParallel:
    config = TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=1)
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=in_fp32), module)


def test_gradients_of_linear_and_grouped_layers_add_up_in_fp32() -> None:
    sums = {}
    for fused in (False, True):
        torch.manual_seed(0)
        layers = Layers()
        chunk = ddp(layers)
        if fused:
            fuse_weight_gradients(chunk)
        for _ in range(5):
            layers(torch.randn(6, WIDTH).bfloat16()).backward(torch.randn(6, WIDTH).bfloat16())
        sums[fused] = {name: p.main_grad.clone() for name, p in layers.named_parameters()}
        assert [m.fuse_wgrad_accumulation for m in (layers.qkv, layers.proj, layers.experts)] == [fused] * 3
        assert not hasattr(layers.head, "fuse_wgrad_accumulation")

    torch.manual_seed(0)
    exact = Layers()
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in exact.named_parameters()}
    products: list[tuple[str, Tensor]] = []
    names = {id(p): name for name, p in exact.named_parameters()}

    def seen(ctx: Any, x: Tensor, weight: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name = names[id(weight)]
        return x @ weight.T

    def noted(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        products.append((ctx.name, grads[0].double().T @ x.double()))
        return grads[0] @ weight, grads[0].T @ x, None

    with pytest.MonkeyPatch.context() as patch:
        watched = type(
            "Watched", (torch.autograd.Function,), {"forward": staticmethod(seen), "backward": staticmethod(noted)}
        )
        patch.setattr(f"{__name__}._Product", watched)
        for _ in range(5):
            exact(torch.randn(6, WIDTH).bfloat16()).backward(torch.randn(6, WIDTH).bfloat16())
    for name, product in products:
        total[name] += product
    fusable = {"qkv.weight", "proj.weight", "experts.weight0", "experts.weight1"}
    for name in total:
        if name in fusable:
            assert error(sums[True][name], total[name]) < 1e-6
            assert error(sums[False][name], total[name]) > 1e-4
        else:  # of the norm and the head nothing changes
            assert torch.equal(sums[True][name], sums[False][name])
            assert float(sums[True][name].abs().max()) > 0


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_layers_without_an_fp32_sum_stay_as_they_are() -> None:
    half = Layers()
    fuse_weight_gradients(ddp(half, in_fp32=False))
    frozen = Layers()
    frozen.proj.weight.requires_grad_(False)
    frozen.experts.weight1.requires_grad_(False)
    fuse_weight_gradients(ddp(frozen))
    bare = Layers()
    fuse_weight_gradients(bare)
    assert [m.fuse_wgrad_accumulation for x in (half, bare) for m in (x.qkv, x.proj, x.experts)] == [False] * 6
    assert frozen.qkv.fuse_wgrad_accumulation
    assert not frozen.proj.fuse_wgrad_accumulation


def tiny(folder: Path) -> tuple[Any, SftConfig]:
    write_tiny_model(folder)
    config = SftConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"path": folder, "dtype": "bfloat16"},
            "train": {"steps": 1, "micro_batch_tokens": 32},
            "data": {"train": "unused", "batch_tokens": 1},
        }
    )
    return load_architecture(folder), config


@pytest.mark.parametrize("gradient", ["transformer_engine", "separate"])
def test_a_model_is_built_with_what_was_chosen(gradient: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that megatron's own linear layers get the flag, in place of Transformer Engine's."""
    architecture, config = tiny(tmp_path)
    monkeypatch.setattr(ColumnParallelLinear, "fuse_wgrad_accumulation", False, raising=False)
    monkeypatch.setattr(build, "choose", lambda *asked: replace(choose(*asked), weight_gradient=gradient))
    built = build_model(architecture, config.model, config.moe, ALONE)
    found = {
        m.fuse_wgrad_accumulation for gpt in built.gpts for m in gpt.modules() if isinstance(m, ColumnParallelLinear)
    }
    assert found == {gradient == "transformer_engine"}


def test_what_megatron_would_take_of_other_packages_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that torch's Adam, norm and scaling are used. Megatron would take Transformer Engine's or apex's."""
    theirs = object()
    monkeypatch.setattr(trainer.megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(trainer.megatron_optimizer, "Adam", theirs)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", theirs)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", theirs)
    architecture, config = tiny(tmp_path)
    built = build_model(architecture, config.model, config.moe, ALONE)
    made = Trainer(built, OptimizerSection(learning_rate=1e-3), 10, dist.new_group(backend="gloo"))
    adams = [part.optimizer for part in made.optimizer.chained_optimizers]
    assert [type(adam) for adam in adams] == [torch.optim.AdamW] * len(adams)
    assert adams
    assert all(group["fused"] for adam in adams for group in adam.param_groups)
    assert clip_grads.l2_norm_impl is trainer.clipping.l2_norm
    assert clip_grads.multi_tensor_scale_impl is trainer.clipping.scale
