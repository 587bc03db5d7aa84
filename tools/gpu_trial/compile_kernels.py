"""Compiles FlashAttention 4's and quack's kernels for an H100 or H200, on a machine without a GPU.

    python tools/gpu_trial/compile_kernels.py

The calls are those that training makes, in the shapes of several models, with torch's fake tensors, which have no
memory. So a call that a package refuses, or a shape that its compiler does not take, is found before a GPU is there. No
kernel is run, so this shows nothing of values or speed. It prints JSON: each kernel with its seconds, or what went
wrong. The exit code is 0 when all of them compiled, and what the packages must refuse was refused.

It needs Python 3.12, torch for CUDA, and the wheels of the question `speed` (README.md).
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

# Before the packages are imported: the device that there is none of here.
os.environ |= {"FLASH_ATTENTION_ARCH": "sm_90", "FLASH_ATTENTION_NUM_SMS": "132", "QUACK_ARCH": "90"}
os.environ["CUTE_DSL_ARCH"] = "sm_90a"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rl.errors import exit_code
from megatron_rl.model.experts import Weights
from megatron_rl.model.kernels import flash_attention_4, quack_add_product
from megatron_rl.model.layers import FlashAttention4

# Query heads, key and value heads, head_dim.
ATTENTION = {
    "Ling-lite": (16, 4, 128),
    "Qwen3-0.6B": (16, 8, 128),
    "Qwen3-30B-A3B": (32, 4, 128),
    "Qwen2.5-1.5B": (12, 2, 128),
    "SmolLM2-135M": (9, 3, 64),
    "tests/gpu": (4, 2, 32),
}
# Experts, output and input width of a weight.
EXPERTS = {
    "Ling-lite, gate and up": (64, 2816, 2048),
    "Ling-lite, down": (64, 2048, 1408),
    "Qwen3-30B-A3B, gate and up": (128, 1536, 2048),
    "Qwen3-30B-A3B, down": (128, 2048, 768),
    "tests/gpu, gate and up": (6, 64, 128),
    "tests/gpu, down": (6, 128, 32),
}
NUM_TOKENS = 8192


class Compiled(Exception):
    """Says that a kernel is compiled and would be launched now."""


def bfloat16(*shape: int, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="cuda", requires_grad=grad)


def compile_attention(heads: int, groups: int, head_dim: int) -> None:
    """Compile both passes of attention, by the module that training uses."""
    kept: list[Tensor] = []
    kernel = flash_attention_4()

    def keeping(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        output, rest = kernel(*args, **kwargs)
        kept.append(output)
        return output, rest

    module = FlashAttention4.__new__(FlashAttention4)
    torch.nn.Module.__init__(module)
    module.kernel, module.softmax_scale = keeping, head_dim**-0.5
    starts = torch.empty(5, dtype=torch.int32, device="cuda")
    packed: Any = SimpleNamespace(cu_seqlens_q=starts, max_seqlen_q=NUM_TOKENS // 2)
    query, key, value = (bfloat16(NUM_TOKENS, n, head_dim, grad=True) for n in (heads, groups, groups))
    module.attend(query, key, value, packed)
    # Autograd would want the device, so its function is called directly.
    node: Any = kept[0].grad_fn
    gradients = node._forward_cls.backward(node, torch.empty_like(kept[0]).detach(), None)
    assert [x.shape for x in gradients[:3]] == [query.shape, key.shape, value.shape]


def compile_product(experts: int, width: int, inputs: int, transposed: bool = True) -> None:
    """Compile the product that is added to weights' gradients, by the class that training uses. transposed: as it is
    in training; else an operand lies in memory as quack does not take it."""
    quack_add_product()
    import quack.gemm
    from quack.gemm_interface import gemm_add_inplace_op

    plan = quack.gemm._build_gemm_plan

    def compiled(*args: Any, **kwargs: Any) -> NoReturn:
        plan(*args, **kwargs)
        raise Compiled

    quack.gemm._build_gemm_plan = compiled
    quack.gemm.get_max_active_clusters = lambda *_, **__: 132
    # With fake tensors torch would not call what is behind the operator.
    body: Callable[..., None] = gemm_add_inplace_op._init_fn
    size = width * inputs
    buffer = torch.empty(experts * size, dtype=torch.float32, device="cuda")
    weights = []
    for number in range(experts):
        weight: Any = bfloat16(width, inputs, grad=True)
        weight.main_grad = buffer[number * size :][:size].view(width, inputs)
        weights.append(weight)
    product = Weights(weights, is_reversed=False, ready=lambda _: None, add_product=body)
    assert product.adds_products
    gradient = bfloat16(NUM_TOKENS, width) if transposed else bfloat16(width, NUM_TOKENS).mT
    ends = torch.empty(experts, dtype=torch.int32, device="cuda")
    try:
        product.add_product(gradient, bfloat16(NUM_TOKENS, inputs), ends)
    except Compiled:
        return
    finally:
        quack.gemm._build_gemm_plan = plan
    raise RuntimeError("quack called no kernel")


def attempt(found: dict[str, Any], name: str, work: Callable[[], None], refused: bool = False) -> None:
    started = time.monotonic()
    row: dict[str, Any] = {}
    try:
        with FakeTensorMode():
            work()
        if refused:
            row["failed"] = "it was not refused"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:500]
        row["refused" if refused else "failed"] = said
    row["seconds"] = round(time.monotonic() - started, 1)
    found[name] = row
    print(f"{name}: {row}", file=sys.stderr, flush=True)


def main() -> int:
    flash_attention_4()
    quack_add_product()
    packages = ("torch", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl")
    kernels: dict[str, Any] = {}
    for model, shape in ATTENTION.items():
        attempt(kernels, f"attention of {model}", partial(compile_attention, *shape))
    for model, widths in EXPERTS.items():
        attempt(kernels, f"experts of {model}", partial(compile_product, *widths))
    # A check that cannot fail would show nothing.
    attempt(kernels, "attention with a head_dim of 12", partial(compile_attention, 4, 2, 12), refused=True)
    attempt(kernels, "experts, not transposed", partial(compile_product, 6, 64, 128, transposed=False), refused=True)
    print(json.dumps({"target": "sm_90a", "versions": {name: version(name) for name in packages}, "kernels": kernels}))
    return 1 if any("failed" in row for row in kernels.values()) else 0


if __name__ == "__main__":
    sys.exit(exit_code(Path(__file__).name, main))
