"""Tests that real SGLang serves every family with transformers' log-probs, and ends at every end token of the files."""

import json
import random
import sys
from pathlib import Path

import httpx
import pytest
import torch
from family_models import make, transformers_logprobs, transformers_model
from reference import forward, load_reference
from safetensors.torch import load_file, save_file
from test_export import PYTHON, ROOT

from megatron_rl.checkpoint.names import name_table
from megatron_rl.families import load_architecture
from megatron_rl.rollout.server import SglangServer
from megatron_rl.sync.buckets import divide
from megatron_rl.sync.handles import serialized

sys.path.append(str(ROOT / "tools"))

from make_tiny_model import TinyModel, write_tiny_model, write_tokenizer

ENDS = [1, *range(20, 30)]


# A case for each class of SGLang but two that add nothing: Mistral's is Llama's, and Qwen3's norms are Qwen3-MoE's too.
@pytest.mark.parametrize(
    "case",
    [
        "llama, tied, one key-value head, llama3",
        "qwen2, tied, yarn",
        "qwen3-moe",
        "mixtral-moe",
        "glm4-moe, groups, biases, no norm of queries",
        "olmo2",
        "olmoe-moe",
        "phi3",
    ],
)
def test_sglang_has_the_logprobs_and_the_end_tokens_of_the_files_and_of_a_push(case: str, tmp_path: Path) -> None:
    model, other = (make(case, tmp_path / f"model{seed}", seed) for seed in (0, 1))
    write_tokenizer(model, TinyModel())  # SGLang looks at one, though it is told not to use it
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    rng = random.Random(1)
    ids = [rng.randrange(97) for _ in range(100)]
    of_prompt = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}}
    of_prompt |= {"return_logprob": True, "logprob_start_len": 0}
    server = SglangServer(model, tmp_path / "log", python=PYTHON, max_running_requests=8, context_length=200)
    try:
        server.wait_ready(900)
        with httpx.Client(base_url=server.url, timeout=900) as client:

            def ask(body: dict) -> dict:
                return client.post("/generate", json=body).raise_for_status().json()

            def difference(folder: Path) -> float:
                with torch.no_grad():
                    expected = transformers_logprobs(transformers_model(folder), ids)
                found = [logprob for logprob, _, _ in ask(of_prompt)["meta_info"]["input_token_logprobs"][1:]]
                return float((torch.tensor(found) - expected).abs().max())

            assert difference(model) < 2e-5
            last_tokens = set()
            for _ in range(6):
                drawn = [rng.randrange(40, 97) for _ in range(6)]
                response = ask({"input_ids": drawn, "sampling_params": {"max_new_tokens": 90}})
                *before, last = response["output_ids"]
                assert not set(before) & set(ENDS)
                assert last in ENDS
                assert response["meta_info"]["finish_reason"]["type"] == "stop"
                last_tokens.add(last)
            assert last_tokens != {1}, "only config.json's"
            push(other, client)
            client.post("/flush_cache").raise_for_status()
            assert difference(other) < 2e-5
    finally:
        server.stop()


def make_v2(folder: Path, seed: int) -> Path:
    # 0.5.21 leaves routed_scaling_factor out on a CPU (it multiplies by it on a GPU), so here it is 1.
    sizes = {"experts": 16, "experts_per_token": 4, "expert_groups": 4, "top_expert_groups": 2, "shared_experts": 1}
    sizes |= {"layers": 3, "hidden_size": 64, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    write_tiny_model(folder, TinyModel(family="bailing_moe_v2", init_std=0.15, seed=seed, **sizes))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):  # they begin as ones, which nobody would miss
            tensors[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_sglang_has_the_logprobs_of_bailing_v2_and_of_other_weights_after_a_push(tmp_path: Path) -> None:
    first, second = (make_v2(tmp_path / f"model{seed}", seed) for seed in (1, 2))
    ids = random.Random(1).choices(range(97), k=60)
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}, "return_logprob": True, "logprob_start_len": 0}
    server = SglangServer(first, tmp_path / "log", python=PYTHON, max_running_requests=2, context_length=100)
    try:
        server.wait_ready(900)
        with httpx.Client(base_url=server.url, timeout=900) as client:

            def difference(model: Path) -> float:
                (answer,) = client.post("/generate", json={**body, "input_ids": [ids]}).raise_for_status().json()
                found = torch.tensor([logprob for logprob, _, _ in answer["meta_info"]["input_token_logprobs"][1:]])
                config, weights = load_reference(model)
                with torch.no_grad():
                    expected = forward(config, weights, ids).log_softmax(-1)[range(len(ids) - 1), ids[1:]]
                return float((found - expected).abs().max())

            assert difference(first) < 2e-5
            push(second, client)
            client.post("/flush_cache").raise_for_status()
            assert difference(second) < 2e-5
    finally:
        server.stop()


def push(model: Path, client: httpx.Client) -> None:
    """Push every tensor as training does, in buckets of 60 kB. Some of the buckets hold biases."""
    tensors = load_file(model / "model.safetensors")
    client.post("/begin_weight_update", json={}).raise_for_status()
    for bucket in divide(name_table(load_architecture(model)).values(), torch.float32, 60_000):
        flat = torch.cat([tensors[place.name].flatten().view(torch.uint8) for place in bucket.tensors])
        payload = serialized(flat, bucket.tensors, bucket.dtype)
        parts = {"serialized_named_tensors": [payload], "load_format": "flattened_bucket", "flush_cache": False}
        client.post("/update_weights_from_tensor", json=parts).raise_for_status()
    client.post("/end_weight_update", json={}).raise_for_status()
