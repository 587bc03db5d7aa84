"""Real SGLang serves every family with transformers' log-probs, and ends responses at every end token of the files."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from family_models import make, transformers_logprobs, transformers_model
from reference import forward, load_reference
from safetensors.torch import load_file, save_file
from served import answers
from test_export import PYTHON, ROOT

from megatron_rl.rollout.server import SglangServer

sys.path.append(str(ROOT / "tools"))

from make_tiny_model import TinyModel, write_tiny_model, write_tokenizer

ENDS = [1, *range(20, 30)]


@pytest.mark.parametrize("case", ["llama, tied, one key-value head, llama3", "qwen2, tied, yarn", "qwen3", "qwen3-moe"])
def test_sglang_has_the_logprobs_and_the_end_tokens_of_the_files(case: str, tmp_path: Path) -> None:
    model = make(case, tmp_path / "model")
    write_tokenizer(model, TinyModel())  # SGLang looks at one, though it is told not to use it
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    rng = random.Random(1)
    ids = [rng.randrange(97) for _ in range(100)]
    server = SglangServer(model, tmp_path / "log", python=PYTHON, max_running_requests=8, context_length=200)
    with torch.no_grad():
        expected = transformers_logprobs(transformers_model(model), ids)
    of_prompt = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}}
    of_prompt |= {"return_logprob": True, "logprob_start_len": 0}
    drawn = [
        {"input_ids": [rng.randrange(40, 97) for _ in range(6)], "sampling_params": {"max_new_tokens": 90}}
        for _ in range(6)
    ]
    prompt, *responses = answers(server, [of_prompt, *drawn], seconds=180)
    found = [logprob for logprob, _, _ in prompt["meta_info"]["input_token_logprobs"][1:]]
    assert (torch.tensor(found) - expected).abs().max() < 2e-5
    for response in responses:
        *before, last = response["output_ids"]
        assert not set(before) & set(ENDS)
        assert last in ENDS
        assert response["meta_info"]["finish_reason"]["type"] == "stop"
    assert {response["output_ids"][-1] for response in responses} != {1}, "only config.json's"


def test_sglang_has_the_logprobs_of_bailing_v2(tmp_path: Path) -> None:
    # 0.5.21 leaves routed_scaling_factor out on a CPU (it multiplies by it on a GPU), so here it is 1.
    sizes = {"experts": 16, "experts_per_token": 4, "expert_groups": 4, "top_expert_groups": 2, "shared_experts": 1}
    sizes |= {"layers": 3, "hidden_size": 64, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    model = tmp_path / "model"
    write_tiny_model(model, TinyModel(family="bailing_moe_v2", init_std=0.15, **sizes))
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):  # they begin as ones, which nobody would miss
            tensors[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ids = random.Random(1).choices(range(97), k=60)
    server = SglangServer(model, tmp_path / "log", python=PYTHON, max_running_requests=2, context_length=100)
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}, "return_logprob": True, "logprob_start_len": 0}
    (answer,) = answers(server, [body], seconds=180)
    config, weights = load_reference(model)
    with torch.no_grad():
        expected = forward(config, weights, ids).log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    found = torch.tensor([logprob for logprob, _, _ in answer["meta_info"]["input_token_logprobs"][1:]])
    assert (found - expected).abs().max() < 2e-5
