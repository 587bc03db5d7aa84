"""This module holds adapters: megatron's linear layers with two small trained factors beside each frozen weight.

    y = W x + s B A x,   s = alpha / sqrt(rank)   (Hu et al. 2021; the root is rsLoRA, Kalajdzievski 2023)

A fused weight has one pair: queries, keys and values share an A [rank, in], gate and up too, and B [out, rank] has the
rows of W. Factors are divided as the weight is, so that each rank adds the product of its own factors to its own part:

    column-parallel  W_r = rows r of W       B_r = rows r of B,     A whole on every rank
    row-parallel     W_r = columns r of W    A_r = columns r of A,  B whole on every rank

**Whose gradients are summed.** With the loss L and t over tokens, g_t = dL/dy_t and u_t = A x_t:

    dL/dB = s sum_t g_t u_t^T         dL/dA = s sum_t B^T g_t x_t^T

The tokens of a step lie on data- and context-parallel ranks (of routed experts: on all that hold the same ones), over
which megatron's DDP sums whatever has a gradient. What is left is the group of n ranks that divides the weight:

1. The divided factor needs nothing. Row r of B meets row r of g alone, and this rank has it for all tokens; column r of
   A meets column r of x alone, and B^T g, of which B and g are whole on every rank.
2. The whole A of a column-parallel weight: B^T g = sum_r B_r^T g_r. Each rank has one addend, so dL/dA is the sum over
   the group. In attention and dense MLPs, under sequence parallelism, a rank takes A x of its own tokens and gathers
   that (rank numbers a token, not hidden_size); the gather's backward pass adds up the addends and hands each rank
   those of its tokens, and the sum over the group is one over tokens. Either way it is the sum over the group.
3. The whole B of a row-parallel weight: u = sum_r A_r x_r, of which each rank has one addend, as it has of W x, and
   both go into the same sum over ranks behind the product. g is whole there, so dL/dB is the sum over the group.
4. So the whole factor of either kind is summed over the group that divides its weight: tensor-parallel, which megatron
   does for parameters marked `sequence_parallel`; of routed experts expert-tensor-parallel, which `finish_gradients`
   does. dL/dx takes the way of the frozen product: both are this rank's addends.

A begins as peft has it, uniform within 1 / sqrt(in), from the run's seed and the name of the weight, whatever the
layout; B begins as zeros.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.checkpoint.adapters import merge
from megatron_rl.checkpoint.names import LORA_A, TensorMapping, canonical_name, lora_target
from megatron_rl.config.lora import LoraSection
from megatron_rl.device import import_megatron

import_megatron()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.tensor_parallel.layers import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer.mlp import MLPSubmodules, apply_swiglu_sharded_factory  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402


class AdaptedLinear(torch.nn.Module):
    """Holds what column- and row-parallel linear layers with an adapter share; without one they are megatron's.

    adapts: the adapter counts. scale: multiplies its product. divided: which factor is cut as the weight is, and along
    which axis.
    """

    divided: tuple[str, int]
    weight: Tensor
    is_expert: bool
    tp_group: Any
    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.adapts, self.scale, self._is_gated = False, 0.0, False

    def add_adapter(self, rank: int, scale: float, is_gated: bool) -> None:
        """Give the layer its factors, whose values are not yet set. is_gated: its rows are those of gate and up."""
        rows, columns = self.weight.shape
        self.lora_a = torch.nn.Parameter(self.weight.new_empty(rank, columns))
        self.lora_b = torch.nn.Parameter(self.weight.new_empty(rows, rank))
        self.adapts, self.scale, self._is_gated = True, scale, is_gated
        name, axis = self.divided
        for factor in (self.lora_a, self.lora_b):
            factor.allreduce = self.weight.allreduce
            if factor is getattr(self, name):
                set_tensor_model_parallel_attributes(factor, is_parallel=True, dim=axis, stride=1)
                continue
            # All ranks have this factor, so the norm of gradients counts that of the first one.
            factor.tensor_model_parallel = self.tp_group.rank() == 0
            factor.sequence_parallel = not self.is_expert
            factor.sum_over_experts_group = self.is_expert and self.tp_group.size() > 1
        self.weight.merged = self.merged

    def _down(self, x: Tensor) -> Tensor:
        """Compute scale * A x. The scale is applied where tensors are narrow: after B its backward pass would copy a
        wide one."""
        return F.linear(x, self.lora_a) * self.scale

    def merged(self) -> Tensor:
        """Compute this rank's part of the weight that servers get, merged in fp32 and rounded once."""
        return merge(self.weight.detach(), self.lora_a.detach(), self.lora_b.detach(), self.scale)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Describe weight and factors for megatron's checkpoints, each with its own division."""
        axes = {"weight": 0 if self.divided[0] == "lora_b" else 1, "bias": 0, self.divided[0]: self.divided[1]}
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, axes, sharded_offsets, **groups
        )
        if self._is_gated:  # each rank has rows of gate and rows of up; the weight itself megatron's MLP cuts so
            state[prefix + "lora_b"] = apply_swiglu_sharded_factory(
                state[prefix + "lora_b"],
                sharded_offsets,
                metadata.get("singleton_local_shards", False),
                tp_group=self.tp_group,
                dp_group=metadata["dp_cp_group"],
            )
        return state


class AdaptedColumnLinear(AdaptedLinear, ColumnParallelLinear):
    divided = ("lora_b", 0)

    def _forward_impl(self, **options: Any) -> Tensor:
        """Compute this rank's rows of the product for all tokens.

        options["input"]: this rank's tokens, or those of its whole group where they are gathered already.
        """
        output: Tensor = super()._forward_impl(**options)
        if not self.adapts:
            return output
        down = self._down(options["input"])
        if options["sequence_parallel"]:
            down = gather_from_sequence_parallel_region(down, tensor_parallel_output_grad=True, group=self.tp_group)
        return output + F.linear(down, self.lora_b)


class AdaptedRowLinear(AdaptedLinear, RowParallelLinear):
    divided = ("lora_a", 1)

    def _forward_impl(self, **options: Any) -> Tensor:
        """Compute this rank's addend of the product, which the caller adds up over the ranks."""
        output: Tensor = super()._forward_impl(**options)
        if not self.adapts:
            return output
        down = self._down(options["input"])
        return output + F.linear(down, self.lora_b)


class AdaptedProvider(LocalSpecProvider):
    """Builds megatron's local layers with linear ones that can have adapters."""

    def column_parallel_linear(self) -> type:
        return AdaptedColumnLinear

    def row_parallel_linear(self) -> type[RowParallelLinear]:
        return AdaptedRowLinear

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        builder: Any = super().grouped_mlp_modules(moe_use_grouped_gemm)
        assert builder.func is SequentialMLP
        linears = MLPSubmodules(linear_fc1=AdaptedColumnLinear, linear_fc2=AdaptedRowLinear)
        return type(builder)(builder.func, submodules=linears)


def add_adapters(gpt: torch.nn.Module, lora: LoraSection, recomputes: bool) -> None:
    """Freeze a stage's weights and give its target layers adapters, whose values are not yet set.

    recomputes: parts of the stage are run once more for their backward pass. Such a part has one only where its input
    has a gradient, and frozen embeddings have none. So they get one, which nobody reads.
    """
    gpt.requires_grad_(False)
    for name, module in gpt.named_modules():
        # The target does not depend on global numbers of layers and experts.
        if isinstance(module, AdaptedLinear) and lora_target(canonical_name(f"{name}.weight", 0, 0)) in lora.targets:
            module.add_adapter(lora.rank, lora.scale, is_gated=name.endswith("linear_fc1"))
    if recomputes and hasattr(gpt, "embedding"):
        gpt.embedding.register_forward_hook(_with_gradient)


def _with_gradient(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def is_factor(name: str) -> bool:
    """Tell whether a parameter's name is that of a factor."""
    return name.endswith((".lora_a", ".lora_b"))


def initial_factor(entry: TensorMapping, seed: int) -> Tensor:
    """Make the initial values of a whole factor, in fp32: zeros for B, and for A what peft takes (kaiming_uniform_ with
    a = sqrt(5))."""
    if not entry.megatron.endswith(LORA_A):
        return torch.zeros(entry.shape)
    digest = hashlib.sha256(f"{seed} {entry.megatron}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(entry.shape[1])
    return torch.empty(entry.shape).uniform_(-bound, bound, generator=generator)


def adapted_layers(chunks: Sequence[torch.nn.Module]) -> list[AdaptedLinear]:
    """List the layers that have an adapter."""
    found = (module for chunk in chunks for module in chunk.modules() if isinstance(module, AdaptedLinear))
    return [module for module in found if module.lora_a is not None]


@contextmanager
def base_only(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Use the frozen weights alone, which are what a run of adapters began with."""
    layers = adapted_layers(chunks)
    for layer in layers:
        layer.adapts = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapts = True


def finish_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Sum over expert-tensor-parallel ranks the gradients of which each has an addend. Collective, after megatron's own
    reductions."""
    factors = [p for chunk in chunks for p in chunk.parameters() if getattr(p, "sum_over_experts_group", False)]
    if not factors:
        return
    gradients: list[Tensor] = [p.main_grad for p in factors]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together, group=mpu.get_expert_tensor_parallel_group())
    for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def rounding_of_merged(chunks: Sequence[torch.nn.Module], group: Any) -> dict[str, float]:
    """Measure what rounding does to the update in the merged weights, which are what servers sample from. Collective.

    With D = s B A and R what is left of it in the merged weight, round(W + D) - W, over all adapted weights:
    `lora_update_kept` is sum D R / sum D^2, 1 where nothing is lost in the mean and 0 where all is swallowed;
    `lora_rounding_noise` is sqrt(sum (R - D)^2 / sum D^2). Nothing while B is zero.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for layer in adapted_layers(chunks):
        if (mpu.get_expert_data_parallel_rank() if layer.is_expert else mpu.get_data_parallel_rank(True)) != 0:
            continue
        update = layer.scale * (layer.lora_b.detach().float() @ layer.lora_a.detach().float())
        kept = layer.merged().float() - layer.weight.detach().float()
        parts = (update * kept).sum(), update.square().sum(), (kept - update).square().sum()
        sums += torch.stack(parts).double().cpu()
    dist.all_reduce(sums, group=group)
    along, size, noise = sums.tolist()
    if not size:
        return {}
    return {"lora_update_kept": along / size, "lora_rounding_noise": math.sqrt(noise / size)}
