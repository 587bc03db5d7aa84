"""Writes a tiny random BailingMoE directory for tests: config.json and model.safetensors under Hugging Face names."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeForCausalLM"],
    "model_type": "bailing_moe",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "norm_head": False,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "use_bias": False,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}


# Groups of 2 experts, of which a token sees half; a bias that turns many choices.
TINY_V2: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "head_dim": 24,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "num_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}


def write_tiny_model(directory: Path | str, seed: int = 0, **overrides: Any) -> Path:
    """Write the model and return its directory; `overrides` replace fields of config.json.

    Weights are large enough (about 1 / sqrt(fan_in)) that tokens, positions and experts all change the output.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {**TINY_CONFIG, **overrides}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tiny_tensors(config, seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Return random fp32 tensors of the model of `config`, by name."""
    generator = torch.Generator().manual_seed(seed)
    h, v = config["hidden_size"], config["vocab_size"]
    nq, nkv = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or h // nq
    tensors: dict[str, Tensor] = {}

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        tensors[name] = torch.randn(rows, columns, generator=generator) * (scale * columns**-0.5)

    def norm(name: str, width: int = h) -> None:
        tensors[name] = 1 + 0.1 * torch.randn(width, generator=generator)

    def mlp(prefix: str, width: int) -> None:
        matrix(f"{prefix}.gate_proj.weight", width, h)
        matrix(f"{prefix}.up_proj.weight", width, h)
        matrix(f"{prefix}.down_proj.weight", h, width)

    tensors["model.word_embeddings.weight"] = torch.randn(v, h, generator=generator)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        norm(f"{layer}.input_layernorm.weight")
        matrix(f"{layer}.attention.query_key_value.weight", (nq + 2 * nkv) * d, h)
        if config.get("use_qk_norm"):
            norm(f"{layer}.attention.query_layernorm.weight", d)
            norm(f"{layer}.attention.key_layernorm.weight", d)
        matrix(f"{layer}.attention.dense.weight", h, nq * d)
        norm(f"{layer}.post_attention_layernorm.weight")
        if index < config.get("first_k_dense_replace", 0):
            mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        matrix(f"{layer}.mlp.gate.weight", config["num_experts"], h)
        if config.get("moe_router_enable_expert_bias"):
            tensors[f"{layer}.mlp.gate.expert_bias"] = 0.2 * torch.randn(config["num_experts"], generator=generator)
        for expert in range(config["num_experts"]):
            mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
        if config.get("num_shared_experts"):
            mlp(f"{layer}.mlp.shared_experts", config["num_shared_experts"] * config["moe_intermediate_size"])
    norm("model.norm.weight")
    if not config.get("tie_word_embeddings"):
        matrix("lm_head.weight", v, h, scale=2.0)
    return tensors


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of a directory's safetensors files, by name."""
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found
