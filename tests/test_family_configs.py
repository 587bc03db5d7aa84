"""Checks that config.json is read, or refused in one sentence: real files, both spellings, and missing keys."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.checkpoint.names import hf_names, name_table
from megatron_rl.families import Rotary, architecture_of, load_architecture, tensor_shapes


def config(architecture: str, model_type: str, *sizes: int, **more: Any) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **dict(zip(names, sizes, strict=True)),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "use_cache": True,
        "initializer_range": 0.02,
        "eos_token_id": 2,
        **more,
    }


LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28, "eos_token_id": 151645}
QWEN_MOE = {
    "head_dim": 128,
    "rope_scaling": None,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN_MOE |= (
    {"norm_topk_prob": True, "num_experts_per_tok": 8, "rope_theta": 1000000.0} | QWEN | {"sliding_window": None}
)
LING_2 = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "vocab_size": 157184,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "max_window_layers": 20,
    "rope_theta": 600000,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 64,
    "use_qk_norm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "eos_token_id": 156892,
}
MIXTRAL = config("MixtralForCausalLM", "mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, tie_word_embeddings=False) | {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
GLM = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "eos_token_id": [151329, 151336, 151338],
}
OLMOE = config("OlmoeForCausalLM", "olmoe", 50304, 2048, 1024, 16, 16, 16, 4096, tie_word_embeddings=False) | {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "attention_bias": False,
    "clip_qkv": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "router_aux_loss_coef": 0.01,
    "eos_token_id": 50279,
}
OLMO2 = config("Olmo2ForCausalLM", "olmo2", 100352, 2048, 8192, 16, 16, 16, 4096, tie_word_embeddings=False) | {
    "attention_bias": False,
    "rope_theta": 500000,
    "rope_scaling": None,
    "eos_token_id": 100257,
}
OLMO2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
OLMO2_7B |= {"num_attention_heads": 32, "num_key_value_heads": 32}
OLMO2_32B = {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
OLMO2_32B |= {"num_attention_heads": 40, "num_key_value_heads": 8}
# As published, but for fields that say nothing about numbers; and the parameters of their model cards, in billions.
REAL: dict[str, tuple[dict[str, Any], float]] = {
    "SmolLM2-135M-Instruct": (
        config("LlamaForCausalLM", "llama", 49152, 576, 1536, 30, 9, 3, 8192, tie_word_embeddings=True)
        | {"rope_theta": 100000, "rope_scaling": None, "rope_interleaved": False, "pretraining_tp": 1},
        0.135,
    ),
    "SmolLM2-1.7B": (
        config("LlamaForCausalLM", "llama", 49152, 2048, 8192, 24, 32, 32, 8192, tie_word_embeddings=True)
        | {"rope_theta": 130000, "attention_bias": False, "mlp_bias": False},
        1.71,
    ),
    "Llama-2-7b": (config("LlamaForCausalLM", "llama", 32000, 4096, 11008, 32, 32, 32, 4096, rms_norm_eps=1e-5), 6.74),
    "Llama-3.2-1B-Instruct": (
        config("LlamaForCausalLM", "llama", 128256, 2048, 8192, 16, 32, 8, 131072, tie_word_embeddings=True)
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING | {"factor": 32.0}, "head_dim": 64}
        | {"eos_token_id": [128001, 128008, 128009]},
        1.24,
    ),
    "Llama-3.1-8B": (
        config("LlamaForCausalLM", "llama", 128256, 4096, 14336, 32, 32, 8, 131072, tie_word_embeddings=False)
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING},
        8.03,
    ),
    "Qwen2.5-0.5B-Instruct": (
        config("Qwen2ForCausalLM", "qwen2", 151936, 896, 4864, 24, 14, 2, 32768, tie_word_embeddings=True)
        | QWEN
        | {"rope_theta": 1000000.0},
        0.494,
    ),
    "Qwen2.5-7B": (
        config("Qwen2ForCausalLM", "qwen2", 152064, 3584, 18944, 28, 28, 4, 131072, tie_word_embeddings=False)
        | QWEN
        | {"rope_theta": 1000000.0, "eos_token_id": 151643},
        7.62,
    ),
    "Qwen2.5-Math-7B, yarn": (
        config("Qwen2ForCausalLM", "qwen2", 152064, 3584, 18944, 28, 28, 4, 16384, tie_word_embeddings=False)
        | QWEN
        | {"rope_theta": 10000.0}
        | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}},
        7.62,
    ),
    "Qwen3-0.6B": (
        config("Qwen3ForCausalLM", "qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, tie_word_embeddings=True)
        | {"head_dim": 128, "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False}
        | QWEN
        | {"sliding_window": None},
        0.596,
    ),
    "Qwen3-8B": (
        config("Qwen3ForCausalLM", "qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, tie_word_embeddings=False)
        | {"head_dim": 128, "rope_theta": 1000000, "attention_bias": False},
        8.19,
    ),
    "Mistral-7B-Instruct-v0.3": (
        config("MistralForCausalLM", "mistral", 32768, 4096, 14336, 32, 32, 8, 32768, tie_word_embeddings=False)
        | {"rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "sliding_window": None},
        7.25,
    ),
    "Phi-4": (
        config("Phi3ForCausalLM", "phi3", 100352, 5120, 17920, 40, 40, 10, 16384, tie_word_embeddings=False)
        | {"original_max_position_embeddings": 16384, "partial_rotary_factor": 1.0, "sliding_window": None}
        | {"rope_theta": 250000, "rope_scaling": None, "rms_norm_eps": 1e-5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        14.66,
    ),
    "OLMo-2-0425-1B-Instruct": (OLMO2, 1.48),
    "OLMo-2-1124-7B-Instruct": (OLMO2 | OLMO2_7B, 7.30),
    "OLMo-2-0325-32B-Instruct": (OLMO2 | OLMO2_32B, 32.2),
    "Mistral-Nemo-Instruct-2407": (
        config("MistralForCausalLM", "mistral", 131072, 5120, 14336, 40, 32, 8, 1024000, tie_word_embeddings=False)
        | {"rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "sliding_window": None, "head_dim": 128},
        12.25,
    ),
}
# The same, and the billions of parameters that a token passes through.
WITH_EXPERTS: dict[str, tuple[dict[str, Any], float, float]] = {
    "Qwen3-30B-A3B": (
        config("Qwen3MoeForCausalLM", "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 40960, tie_word_embeddings=False)
        | QWEN_MOE
        | {"moe_intermediate_size": 768, "num_experts": 128},
        30.5,
        3.35,
    ),
    "Qwen3-235B-A22B": (
        config("Qwen3MoeForCausalLM", "qwen3_moe", 151936, 4096, 12288, 94, 64, 4, 40960, tie_word_embeddings=False)
        | QWEN_MOE
        | {"moe_intermediate_size": 1536, "num_experts": 128},
        235.0,
        22.2,
    ),
    "Mixtral-8x7B-Instruct-v0.1": (MIXTRAL, 46.7, 12.9),
    "OLMoE-1B-7B-0924-Instruct": (OLMOE, 6.92, 1.28),
    "GLM-4.5-Air": (
        GLM
        | {"hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46, "moe_intermediate_size": 1408}
        | {"n_routed_experts": 128, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "use_qk_norm": False},
        106.0,
        12.0 + 1.24,  # the card's, which leaves embedding and head out
    ),
    "GLM-4.5": (
        GLM
        | {"hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 92, "moe_intermediate_size": 1536}
        | {"n_routed_experts": 160, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "use_qk_norm": True},
        355.0,
        32.0 + 1.55,
    ),
    "Ling-mini-2.0": (
        LING_2
        | {"hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20, "num_attention_heads": 16}
        | {"moe_intermediate_size": 512, "first_k_dense_replace": 1},
        16.26,
        1.43,
    ),
    "Ling-flash-2.0": (
        LING_2
        | {"hidden_size": 4096, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"moe_intermediate_size": 1024, "first_k_dense_replace": 1},
        103.0,
        6.1,
    ),
}


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_real_files_with_experts_are_read_and_have_the_parameters_that_their_cards_tell(name: str) -> None:
    values, billions, active = WITH_EXPERTS[name]
    found = architecture_of(values)
    assert found.num_parameters() / 1e9 == pytest.approx(billions, rel=1e-2)
    assert found.num_active_parameters() / 1e9 == pytest.approx(active, rel=2e-2)


def test_routing_of_both_families_is_what_their_files_say() -> None:
    ling = architecture_of(LING)
    assert (ling.family, ling.score_function, ling.expert_bias, ling.qk_norm) == (
        "bailing_moe_v2",
        "sigmoid",
        True,
        True,
    )
    assert (ling.n_group, ling.topk_group, ling.routed_scaling_factor) == (8, 4, 2.5)
    assert (ling.rotary.fraction, ling.dense_layers, ling.shared_intermediate_size) == (0.5, (0,), 512)
    qwen = architecture_of(QWEN3_MOE)
    assert (qwen.family, qwen.score_function, qwen.expert_bias, qwen.qk_norm) == ("qwen3_moe", "softmax", False, True)
    assert (qwen.n_group, qwen.norm_topk_prob, qwen.shared_intermediate_size, qwen.dense_layers) == (1, True, 0, ())
    # As transformers' own loop over layers decides.
    some = QWEN3_MOE | {"num_hidden_layers": 7, "decoder_sparse_step": 3, "mlp_only_layers": [5, 6]}
    assert architecture_of(some).dense_layers == (0, 1, 3, 4, 5, 6)
    # transformers 5 writes another name for the number of experts.
    new = {name: value for name, value in QWEN3_MOE.items() if name != "num_experts"} | {"num_local_experts": 128}
    assert architecture_of(new) == qwen
    # The class decides, whatever the type.
    assert architecture_of(LING | {"model_type": "bailing_moe_v2"}) == ling
    assert architecture_of(BAILING | {"architectures": None}).family == "bailing_moe"


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_and_have_the_parameters_that_their_cards_tell(name: str) -> None:
    values, billions = REAL[name]
    found = architecture_of(values)
    assert found.num_parameters() / 1e9 == pytest.approx(billions, rel=5e-3)
    assert found.num_active_parameters() == found.num_parameters()
    ids = values["eos_token_id"]
    assert found.eos_token_ids == tuple(ids if isinstance(ids, list) else [ids])


LLAMA = REAL["Llama-3.1-8B"][0]
MISTRAL, PHI = (REAL[name][0] for name in ("Mistral-7B-Instruct-v0.3", "Phi-4"))
LING, QWEN3_MOE, GLM_AIR = (WITH_EXPERTS[name][0] for name in ("Ling-mini-2.0", "Qwen3-30B-A3B", "GLM-4.5-Air"))
BAILING = json.loads((Path(__file__).parents[1] / "examples/ring_lite/ling_lite_1_5/config.json").read_text())
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Ling 2.5": (
        LING | {"architectures": ["BailingMoeV2_5ForCausalLM"], "model_type": "bailing_hybrid"},
        "architectures ['BailingMoeV2_5ForCausalLM'] with model_type 'bailing_hybrid': Ling and Ring 2.5 and 2.6, "
        "which mix Lightning attention and MLA, are not implemented; it can be BailingMoeForCausalLM, "
        "BailingMoeV2ForCausalLM, Glm4MoeForCausalLM, LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, "
        "Olmo2ForCausalLM, OlmoeForCausalLM, Phi3ForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM or "
        "Qwen3MoeForCausalLM",
    ),
    "Ling 3.0 under the type of 2.5": (
        LING | {"architectures": ["BailingMoeV3ForCausalLM"], "model_type": "bailing_hybrid"},
        "architectures ['BailingMoeV3ForCausalLM'] with model_type 'bailing_hybrid': Ling and Ring 3.0, are not",
    ),
    "Ling 3.0 by its type": (
        {"model_type": "bailing_moe_v3"},
        "architectures None with model_type 'bailing_moe_v3': Ling and Ring 3.0, are not implemented; it can be",
    ),
    "further tokens in a family without them": (
        LLAMA | {"num_nextn_predict_layers": 1},
        "num_nextn_predict_layers must be 0, got 1",
    ),
    "too many that predict further tokens": (
        LING | {"num_nextn_predict_layers": True},
        "num_nextn_predict_layers must be a whole number from 0 to 64, got True",
    ),
    "GLM without groups that hold what is chosen": (GLM_AIR | {"n_group": 64}, "topk_group 1 must be at most n_group"),
    "GLM, not normalised": (GLM_AIR | {"norm_topk_prob": False}, "norm_topk_prob must be True (GLM-4.5)"),
    "GLM with one expert": (GLM_AIR | {"num_experts_per_tok": 1}, "num_experts_per_tok must be a whole number from 2"),
    "Mixtral with wider heads": (MIXTRAL | {"head_dim": 96}, "head_dim must be 128 (Mixtral), got 96"),
    "OLMoE with wider heads": (OLMOE | {"head_dim": 96}, "head_dim must be 128 (OLMoE), got 96"),
    "Phi-3-mini-4k": (PHI | {"sliding_window": 2047}, "sliding_window must be absent or null, got 2047"),
    "Phi-4-mini": (
        PHI | {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "rope_scaling.rope_type must be one of default, linear, llama3, yarn, got 'longrope'",
    ),
    "Phi-3 under longrope's old name": (
        PHI | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "rope_type must be 'default' (Phi-3), got 'yarn'",
    ),
    "OLMoE, normalised": (OLMOE | {"norm_topk_prob": True}, "norm_topk_prob must be False (OLMoE), got True"),
    "OLMoE with fewer keys": (OLMOE | {"num_key_value_heads": 4}, "num_key_value_heads must be 16 (OLMoE), got 4"),
    "OLMoE with another norm": (OLMOE | {"rms_norm_eps": 1e-6}, "rms_norm_eps must be 1e-05 (OLMoE), got 1e-06"),
    "OLMoE with clipped queries": (OLMOE | {"clip_qkv": 8.0}, "clip_qkv must be absent or null, got 8.0"),
    "noise on Mixtral's routers": (MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise must be 0 (Mixtral)"),
    "Mistral 0.1's sliding window": (MISTRAL | {"sliding_window": 4096}, "sliding_window must be absent or null, got"),
    "Mistral's own sliding window": (
        {name: value for name, value in MISTRAL.items() if name != "sliding_window"},
        "sliding_window must be absent or null, got 4096",
    ),
    "softmax in version 2": (LING | {"score_function": "softmax"}, "score_function must be 'sigmoid' (Bail"),
    "sigmoids that are not normalised": (LING | {"norm_topk_prob": False}, "norm_topk_prob must be True (Bail"),
    "two widths of the shared expert": (
        LING | {"moe_shared_expert_intermediate_size": 1024},
        "moe_shared_expert_intermediate_size must be 512, as moe_intermediate_size is, got 1024",
    ),
    "two rotated parts": (LING | {"rotary_dim": 128}, "rotary_dim 128 must be head_dim 128 times partial_rotary"),
    "no groups said": (LING | {"n_group": None}, "n_group missing; it is not the whole"),
    "groups that do not divide": (LING | {"n_group": 6}, "n_group 6 must divide num_experts 256 into groups of"),
    "more groups than there are": (LING | {"topk_group": 9}, "topk_group 9 must be at most n_group 8, and"),
    "groups that hold too few": (LING | {"num_experts_per_tok": 129}, "topk_group 4 must be at most n_group 8, and"),
    "a bias that is neither": (
        LING | {"moe_router_enable_expert_bias": 1},
        "moe_router_enable_expert_bias must be true or false, got 1",
    ),
    "Qwen3-MoE's dense layers": (QWEN3_MOE | {"mlp_only_layers": [48]}, "mlp_only_layers must list layers from 0 to"),
    "Qwen3-MoE's step": (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number from 1"),
    "two numbers of experts": (
        QWEN3_MOE | {"num_local_experts": 64},
        "num_experts or num_local_experts is given twice, as 128 and 64; leave one out",
    ),
    "no experts": ({**QWEN3_MOE, "num_experts": None}, "num_experts missing; it is not the whole config.json"),
    "DeepSeek-V3": (
        config("DeepseekV3ForCausalLM", "deepseek_v3", 129280, 7168, 18432, 61, 128, 128, 163840),
        "architectures ['DeepseekV3ForCausalLM'] is not implemented",
    ),
    "Gemma 2": (
        config("Gemma2ForCausalLM", "gemma2", 256000, 2304, 9216, 26, 8, 4, 8192, final_logit_softcapping=30.0),
        "architectures ['Gemma2ForCausalLM'] is not implemented",
    ),
    "gpt-oss": (
        config("GptOssForCausalLM", "gpt_oss", 201088, 2880, 2880, 24, 64, 8, 131072),
        "architectures ['GptOssForCausalLM'] is not implemented",
    ),
    "Gemma as a type only": (
        {"model_type": "gemma", "vocab_size": 32000},
        "model_type 'gemma' is not implemented; it can be BailingMoeForCausalLM",
    ),
    "a class and another type": (
        LLAMA | {"model_type": "qwen2"},
        "architectures ['LlamaForCausalLM'] and model_type 'qwen2' contradict each other",
    ),
    "Qwen2.5-1M's sliding window": (
        REAL["Qwen2.5-7B"][0] | {"use_sliding_window": True},
        "use_sliding_window must be False, got True",
    ),
    "a window without a switch": (LLAMA | {"sliding_window": 4096}, "sliding_window must be absent or null, got 4096"),
    "layers of two kinds": (
        LLAMA | {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types must be 'full_attention' in every layer",
    ),
    "quantized weights": (
        LLAMA | {"quantization_config": {"quant_method": "fp8"}},
        "quantization_config must be absent or null, got {'quant_method': 'fp8'}",
    ),
    "soft caps": (LLAMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be 0, got 50.0"),
    "another activation": (LLAMA | {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    "a rare bias": (LLAMA | {"attention_bias": True}, "attention_bias must be False (Llama), got True"),
    "longrope": (
        LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        "rope_scaling.rope_type must be one of default, linear, llama3, yarn, got 'longrope'",
    ),
    "dynamic": (
        LLAMA | {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_parameters.rope_type must be one of default, linear, llama3, yarn, got 'dynamic'",
    ),
    "two thetas": (
        LLAMA | {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_theta is given twice, as 10000.0 and 500000.0; leave one out",
    ),
    "two scalings": (
        LLAMA | {"rope_parameters": LLAMA3_SCALING | {"factor": 4.0}},
        "rope_parameters and rope_scaling contradict each other",
    ),
    "a scaling without its factor": (
        LLAMA | {"rope_scaling": {"rope_type": "yarn"}},
        "rope_scaling of rope_type 'yarn' lacks factor",
    ),
    "a parameter of another scaling": (
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}},
        "rope_scaling.beta_fast means nothing for rope_type 'linear', got 32; leave it out",
    ),
    "part of each head rotated": (
        LLAMA | {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor must be 1, got 0.5",
    ),
    "part of each head, in the older spelling": (
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor must be 1, got 0.5",
    ),
    "a factor of nothing": (
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        "rope_scaling.factor must be a number of at least 1, got 0",
    ),
    "a flag for a factor": (
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": True}},
        "rope_scaling.factor must be a number of at least 1, got True",
    ),
    "a list for a kind": (
        LLAMA | {"rope_scaling": {"type": ["yarn"]}},
        "rope_scaling.rope_type must be one of default, linear, llama3, yarn, got ['yarn']",
    ),
    "a theta that yarn divides by": (
        LLAMA | {"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "rope_theta must be above 1 for rope_type 'yarn', got 1",
    ),
    "a scaled router": (BAILING | {"routed_scaling_factor": 2.5}, "routed_scaling_factor must be 1 (BailingMoE"),
    "groups of experts": (BAILING | {"n_group": 8, "topk_group": 4}, "n_group must be 0 (BailingMoE version 1), got 8"),
    "one expert, normalised": (BAILING | {"num_experts_per_tok": 1}, "num_experts_per_tok 1 with norm_topk_prob gives"),
    "no end": (LLAMA | {"eos_token_id": None}, "eos_token_id is in neither config.json nor generation_config.json"),
    "half a file": ({"model_type": "llama", "eos_token_id": 2}, "vocab_size is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_in_one_sentence(name: str) -> None:
    values, message = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        architecture_of(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_both_spellings_of_rotary_embeddings_give_the_same_record() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 4096}
    expected = Rotary(
        kind="yarn",
        theta=2e5,
        scaling=(("factor", 4.0), ("original_max_position_embeddings", 4096)),
    )
    plain = {name: value for name, value in LLAMA.items() if not name.startswith("rope")}
    old = {"rope_theta": 2e5, "rope_scaling": {"type": "yarn", **yarn}}
    new = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 2e5, **yarn}}
    for spelling in (old, new, old | new):
        assert architecture_of(plain | spelling).rotary == expected
    # A length outside of the table wins, as in transformers; without any it is the model's own.
    short = {"rope_theta": 2e5, "rope_scaling": {"type": "yarn", "factor": 4}}
    for length in ("original_max_position_embeddings", "max_position_embeddings"):
        assert architecture_of(plain | short | {length: 4096}).rotary == expected
    # Without the other spelling the theta of the table counts; without both the class's own.
    assert architecture_of(plain | {"rope_parameters": {"rope_theta": 7e5}}).rotary == Rotary(theta=7e5)
    assert architecture_of(plain).rotary == Rotary(theta=1e4)
    assert architecture_of(BAILING | {"rope_theta": None, "rope_parameters": {"rope_theta": 7e5}}).rotary.theta == 7e5


def test_end_tokens_of_both_files_end_a_response(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7, 8]}))
    assert load_architecture(tmp_path).eos_token_ids == (7, 9, 8)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": None}))
    assert load_architecture(tmp_path).eos_token_ids == (9, 7, 8)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [True]}))
    with pytest.raises(ValueError, match="eos_token_id must be a whole number from 0 to 16777216, got True"):
        load_architecture(tmp_path)


@pytest.mark.parametrize(
    "values", [BAILING, LING, QWEN3_MOE, MIXTRAL, OLMOE, GLM_AIR, *(values for values, _ in REAL.values())]
)
def test_shapes_and_the_table_of_parameters_have_the_same_tensors_in_the_same_order(values: dict[str, Any]) -> None:
    """Check that both orders of tensors agree: conversions read ahead in the one and write in the other."""
    few = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 0, "topk_group": 0}
    small = architecture_of(values | few)
    assert [*tensor_shapes(small)] == [*hf_names(name_table(small))]
    assert sum(math.prod(shape) for shape in tensor_shapes(small).values()) == small.num_parameters()
