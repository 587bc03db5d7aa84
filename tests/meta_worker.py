"""Runs the path of a GPU on torch's meta device: shapes and dtypes of every operation, without numbers or memory.

Run by tests/test_memory.py. What a meta tensor refuses is what would be wrong on a GPU: a tensor of the host among
those of the device, or a shape that depends on what a tensor holds. Memory that tensors would take is counted as
operations make them and their last references go, so the most of it is that of a GPU, but for what kernels need
themselves.

Kernels are those that `backends.choose` takes for compute capability 9.0 without further packages. Collectives, of a
world of one, do nothing.
"""

import contextlib
import functools
import json
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rl import device

device.import_megatron()

import numpy as np  # noqa: E402
from megatron.core.distributed import param_and_grad_buffer  # noqa: E402
from megatron.core.fusions import fused_bias_swiglu  # noqa: E402

from megatron_rl.config.algorithm import AlgorithmSection  # noqa: E402
from megatron_rl.config.layout import Layout  # noqa: E402
from megatron_rl.config.schema import SftConfig  # noqa: E402
from megatron_rl.families import read_architecture  # noqa: E402
from megatron_rl.memory import rank_bytes  # noqa: E402
from megatron_rl.model import build, experts, kernels, layers, logprobs, megatron_config  # noqa: E402
from megatron_rl.model.backends import Installed  # noqa: E402
from megatron_rl.train.step.batch import TrainSequence  # noqa: E402
from megatron_rl.train.step.objective import PolicyObjective  # noqa: E402
from megatron_rl.train.step.step_metrics import MetricAccumulator  # noqa: E402
from megatron_rl.train.step.trainer import Trainer  # noqa: E402

META = torch.device("meta")
ALONE = Layout(world_size=1)
_BLOCK = 512  # in whose multiples torch's allocator for CUDA gives memory out
_COLLECTIVES = ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor")


class Memory(TorchDispatchMode):
    """Counts the bytes of the storages that operations make. now: those alive. most: the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._there: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, -(-storage.nbytes() // _BLOCK) * _BLOCK
        if not tensor.is_meta or key in self._there:
            return
        self._there.add(key)
        self.now += num_bytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, num_bytes)

    def _gone(self, key: int, num_bytes: int) -> None:
        self._there.remove(key)
        self.now -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return made


def stand_in() -> None:
    """Make the meta device the GPU of this process."""
    tensor: Any = torch.Tensor
    type_of = tensor.type
    tensor.type = lambda self, *to, **options: (
        type_of(self, *to, **options) if to or options else type_of(self).replace("meta.", "")
    )
    tensor.cuda = lambda self, *_, **__: self.to(META)
    tensor.is_cuda = property(lambda self: self.is_meta)
    torch.cuda.current_device = lambda: META
    device.torch_device = lambda: META
    modules = [module for name, module in sys.modules.items() if name.startswith("megatron.core")]
    for proxy in {module.torch for module in modules if isinstance(getattr(module, "torch", None), device._CpuTorch)}:
        for name in device._FACTORIES:
            setattr(proxy, name, _on_meta(getattr(torch, name)))
    for name in _COLLECTIVES:
        original = getattr(dist, name)
        for module in [dist, dist.distributed_c10d, *modules]:
            if getattr(module, name, None) is original:
                setattr(module, name, _alone(original))
    param_and_grad_buffer._coalescing_manager = _together
    build.installed = lambda: Installed(compute_capability=(9, 0), flash_attn_4=True, quack=True)
    kernels.flash_attention_4 = lambda: _flash_attention_4
    kernels.quack_add_product = lambda: _add_product
    build.device = megatron_config.device = SimpleNamespace(**vars(device) | {"on_cuda": lambda: True})
    logprobs.chunk_sums = lambda z, *_, **__: z.new_empty(len(z), 4)
    logprobs.logit_gradient = lambda z, *_, dtype, **__: z.new_empty(z.shape, dtype=dtype)
    layers._rotate_both = lambda q, k, cos, sin: (_Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin))
    experts._add = lambda total, x: total.add_(x)
    experts._collect = lambda x, of_choice: x.new_empty(len(of_choice), x.shape[1])
    fused_bias_swiglu.swiglu = fused_bias_swiglu.weighted_swiglu = lambda y, *_: y.new_empty(len(y), y.shape[1] // 2)
    fused_bias_swiglu.swiglu_back = lambda g, y: torch.empty_like(y)
    fused_bias_swiglu.weighted_swiglu_back = lambda g, y, weights: (torch.empty_like(y), torch.empty_like(weights))
    layers.F.rms_norm = lambda x, shape, weight, eps: _FusedNorm.apply(x, weight)


class _FusedNorm(torch.autograd.Function):
    """Keeps what torch's CUDA kernel keeps. On other devices torch also keeps the norm's input in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _FlashAttention4(torch.autograd.Function):
    """Keeps what FlashAttention 4 keeps: its inputs, the output, and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[1], len(q), dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **_: Any) -> tuple[Tensor, None]:
    assert causal
    assert q.shape[::2] == k.shape[::2] == v.shape[::2]
    return _FlashAttention4.apply(q, k, v), None


def _add_product(a: Tensor, b: Tensor, out: Tensor, *, cu_seqlens_k: Tensor, tuned: bool) -> None:
    assert not tuned
    assert cu_seqlens_k.is_meta
    assert out.shape == (len(cu_seqlens_k) - 1, a.shape[0], b.shape[1])
    assert a.shape[1] == len(b)
    assert a.stride(0) == b.stride(1) == out.stride(2) == 1
    assert (a.dtype, b.dtype, out.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


class _Rotation(torch.autograd.Function):
    """Keeps what one rotation kernel keeps: its tables alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.empty_like(grads[0]), None, None


class _Done:
    def wait(self) -> None: ...


@contextlib.contextmanager
def _together(*_: Any, **__: Any) -> Iterator[_Done]:
    yield _Done()


def _on_meta(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = META
        return factory(*args, **kwargs)

    return make


def _alone(collective: Any) -> Any:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        where = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if META.type not in where:
            return collective(*args, **kwargs)
        assert where == {META.type}, f"{collective.__name__} of tensors on {where}"
        return _Done() if kwargs.get("async_op") else None

    return call


def peak(shape: dict[str, Any], case: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of a rank, found and planned.

    They are those between steps (`state`), and the most beyond that in the passes of two micro-batches of one sequence
    each (`passes`).

    shape: `path`, of a config.json, and what is other than in it. case: `num_tokens` of a micro-batch, and keys of the
    configuration's model section, and `lora`, that section.
    """
    num_tokens, lora = case.pop("num_tokens"), case.pop("lora", None)
    config = SftConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"path": "unused", "dtype": "bfloat16", **case},
            "train": {"steps": 1, "micro_batch_tokens": num_tokens},
            "data": {"train": "unused", "batch_tokens": 1},
            "lora": lora,
        }
    )
    architecture = read_architecture(Path(shape.pop("path"))).model_copy(update=shape)
    model = build.build_model(architecture, config.model, config.moe, ALONE, lora=config.lora)
    trainer = Trainer(model, config.optimizer, 10, dist.new_group(backend="gloo"))
    sequence = TrainSequence(
        token_ids=np.arange(num_tokens, dtype=np.int32) % architecture.vocab_size,
        loss_positions=np.arange(1, num_tokens, dtype=np.int32),
        weight=1.0,
        advantages=np.ones(num_tokens - 1),
        rollout_logprobs=np.zeros(num_tokens - 1, np.float32),
        num_stale_tokens=0,
    )
    batch = trainer.micro_batch([sequence])
    memory = Memory()
    adams = [part.optimizer for part in trainer.optimizer.chained_optimizers]
    adam_of = {p: adam for adam in adams for group in adam.param_groups for p in group["params"]}
    for p in model.parameters():
        memory.add(p)
        if p.requires_grad:
            memory.add(p.main_grad)
    for p in adam_of:
        memory.add(p)
    weights = memory.now
    with memory:
        for p, adam in adam_of.items():
            adam.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
    found = {"state": memory.now}
    objective = PolicyObjective(AlgorithmSection(entropy_coefficient=0.01))
    for router in trainer._routers:
        router.load_balance_loss = router.z_loss = 0.0
        router.num_replayed = router.num_replaced = 0
    tally = MetricAccumulator(objective.reports, META)
    memory.most = memory.now
    with memory:
        trainer._run([batch] * 2, 1.0, functools.partial(trainer._loss, objective, 100.0, tally))
    found["passes"] = memory.most - found["state"]
    planned = rank_bytes(config, architecture, ALONE)[0]
    assert weights == found["state"] - 8 * sum(p.numel() for p in adam_of)
    return found | {
        "planned_state": planned.weights + planned.gradients + planned.optimizer,
        "planned_passes": planned.activations + planned.temporary,
    }


def main() -> None:
    build.initialize_parallel(ALONE, 60.0, seed=0)
    stand_in()
    shape, *cases = json.loads(sys.argv[1])
    print(json.dumps([peak(dict(shape), case) for case in cases]))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
