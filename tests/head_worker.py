"""Runs one tensor-parallel rank of the head: its shard of the vocabulary and part of the sequence (test_head.py)."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_rl.model.head import Head, HeadRequest


def main(folder: Path) -> None:
    spec = json.loads((folder / "spec.json").read_text())
    whole = load_file(spec["tensors"])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight = whole["hidden"], whole["weight"].chunk(size)[rank].contiguous().requires_grad_()
    hidden = (hidden.chunk(size)[rank] if spec["sequence_parallel"] else hidden).clone().requires_grad_()
    logprobs, entropy = Head(vocab_size=spec["vocab_size"], norm_head=True)(
        hidden_states=hidden,
        output_layer=SimpleNamespace(tp_group=dist.group.WORLD, weight=weight, _forward_pre_hooks={}),
        output_weight=None,
        context=HeadRequest(index=whole["index"], targets=whole["targets"], temperature=spec["temperature"]),
        config=SimpleNamespace(sequence_parallel=spec["sequence_parallel"]),
    )
    (whole["upstream"][0] @ logprobs + whole["upstream"][1] @ entropy).backward()
    out = {"logprobs": logprobs, "entropy": entropy, "grad_hidden": hidden.grad, "grad_weight": weight.grad}
    save_file({f"{name}/{rank}": t.detach().clone() for name, t in out.items()}, folder / f"out-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # torch's process groups may take seconds to wind down
