"""Tests the planned memory of a rank against what torch keeps on a CPU and would take on a GPU."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import numpy as np
import pytest
import torch
from alone import ALONE, world
from tiny_model import write_tiny_model

from megatron_rl import device
from megatron_rl.config.model import ModelSection
from megatron_rl.config.schema import SftConfig
from megatron_rl.families import Rotary, load_architecture
from megatron_rl.memory import layer_activation_bytes, rank_bytes
from megatron_rl.model import build, megatron_config
from megatron_rl.model.build import build_model, load_weights
from megatron_rl.model.head import HeadRequest
from megatron_rl.rotary import frequencies
from megatron_rl.train.step.batch import TrainSequence, make_micro_batch

LING_LITE = Path(__file__).parents[1] / "examples/ring_lite/ling_lite_1_5/config.json"
NUM_TOKENS = 512
# No two widths alike: hidden 96, queries 160, keys 80, shared 112, experts 2 of 56, dense 192.
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "intermediate_size": 192,
    "moe_intermediate_size": 56,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    with world():
        yield


def kept_and_planned(folder: Path, num_layers: int, num_dense: int, model: dict) -> tuple[int, int]:
    """Return the bytes that a forward pass keeps besides weights and the micro-batch itself, and the planned bytes."""
    write_tiny_model(folder, **SHAPE, num_hidden_layers=num_layers, first_k_dense_replace=num_dense)
    config = SftConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"path": folder, **model},
            "train": {"steps": 1, "micro_batch_tokens": NUM_TOKENS},
            "data": {"train": "unused", "batch_tokens": 1},
        }
    )
    architecture = load_architecture(folder)
    built = build_model(architecture, config.model, config.moe, ALONE)
    load_weights(built, folder)
    sequence = TrainSequence(
        token_ids=np.arange(NUM_TOKENS, dtype=np.int32) % 97,
        loss_positions=np.arange(1, 2, dtype=np.int32),
        weight=1.0,
        rollout_logprobs=np.zeros(1, np.float32),
        num_stale_tokens=0,
    )
    where = torch.device("cpu")
    batch = make_micro_batch(
        [sequence], multiple_of=1, rotary=frequencies(Rotary(), head_dim=40), dtype=torch.float32, device=where
    )
    ours = [*built.parameters(), batch.packed.cos, batch.packed.sin]
    ours += [index for bucket in batch.packed.buckets for index in (bucket.queries, bucket.keys)]
    known = {tensor.untyped_storage().data_ptr() for tensor in ours}
    kept: dict[int, torch.UntypedStorage] = {}  # which stay, so that no two have one address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built.chunks[0](
            batch.token_ids,
            batch.packed.positions[None],
            None,
            packed_seq_params=batch.packed,
            padding_mask=batch.padding_mask,
            output_processor=built.head,
            output_processor_context=HeadRequest(index=batch.loss_index, targets=batch.targets),
        )
    return sum(storage.nbytes() for storage in kept.values()), rank_bytes(config, architecture, ALONE)[0].activations


@pytest.mark.parametrize(
    ("dense", "model"),
    [
        (False, {}),
        (False, {"recompute": "selective", "recompute_modules": ["shared_experts", "core_attn"]}),
        (True, {}),
    ],
    ids=["experts", "some of it recomputed", "dense"],
)
def test_what_a_layer_keeps_without_flash_attention(
    dense: bool, model: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cuda = SimpleNamespace(**vars(device) | {"on_cuda": lambda: True})  # fused SwiGLU
    for module in (build, megatron_config):
        monkeypatch.setattr(module, "device", on_cuda)
    model |= {"experts": "grouped"}
    one, two = (kept_and_planned(tmp_path / str(n), 2 + n, 1 + n * dense, model) for n in (0, 1))
    kept, planned = (b - a for a, b in zip(one, two, strict=True))
    norms = NUM_TOKENS * 2 * SHAPE["hidden_size"] * 4  # which a CPU takes apart
    assert kept - norms == pytest.approx(planned, rel=0.1)


CASES: list[dict[str, Any]] = [
    {"num_tokens": 2048},
    {"num_tokens": 8192},
    {"num_tokens": 24576},
    {"num_tokens": 8192, "attention": "fa4", "expert_weight_gradient": "quack"},
    {"num_tokens": 8192, "recompute": "full"},
    {"num_tokens": 8192, "recompute": "full", "attention": "fa4", "expert_weight_gradient": "quack"},
    {"num_tokens": 24576, "recompute": "full"},
    {"num_tokens": 8192, "recompute": "selective", "recompute_modules": ["moe"]},
    {"num_tokens": 8192, "recompute": "selective", "recompute_modules": ["shared_experts", "core_attn"]},
    {"num_tokens": 8192, "recompute": "selective", "recompute_modules": ["mlp"]},
]


@pytest.mark.parametrize("num_dense", [0, 4], ids=["experts", "dense"])
def test_the_memory_of_a_gpu_is_planned_within_a_twentieth(num_dense: int) -> None:
    """Compare plan and peak for four of Ling-lite's layers on one GPU.

    meta_worker.py runs the GPU's operations on no device. There an operation between two devices is an error, and so is
    a shape that the host would wait for.
    """
    shape = {"path": str(LING_LITE), "num_hidden_layers": 4, "dense_layers": list(range(num_dense))}
    command = [sys.executable, str(Path(__file__).with_name("meta_worker.py")), json.dumps([shape, *CASES])]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, found in zip(CASES, json.loads(done.stdout), strict=True):
        assert found["state"] == found["planned_state"]
        assert found["passes"] == pytest.approx(found["planned_passes"], rel=0.05), case


def test_the_memory_of_a_gpu_with_adapters_is_planned_within_a_twentieth() -> None:
    shape = {"path": str(LING_LITE), "num_hidden_layers": 4, "dense_layers": [0]}
    lora = {"rank": 32}
    cases = [
        {"num_tokens": 8192, "lora": lora},
        {"num_tokens": 8192, "lora": lora, "recompute": "full"},
        {"num_tokens": 4096, "lora": lora, "recompute": "selective"},
        {"num_tokens": 8192, "lora": lora | {"targets": ["attention"]}},
    ]
    command = [sys.executable, str(Path(__file__).with_name("meta_worker.py")), json.dumps([shape, *cases])]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, found in zip(cases, json.loads(done.stdout), strict=True):
        assert found["state"] == found["planned_state"]
        assert found["passes"] == pytest.approx(found["planned_passes"], rel=0.05), case


def test_attention_without_the_flash_kernel_keeps_its_output_twice(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, **SHAPE)
    architecture = load_architecture(tmp_path)
    flash, sdpa = (
        layer_activation_bytes(
            architecture, ModelSection(path=tmp_path, dtype="bfloat16", attention=attention), ALONE, 10, True
        )
        for attention in ("auto", "sdpa")
    )
    assert sdpa.pop("attention") - flash.pop("attention") == 10 * 2 * 160
    assert sdpa == flash
