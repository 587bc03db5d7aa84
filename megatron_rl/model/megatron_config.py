"""This module writes an `Architecture` and a configuration as megatron-core's TransformerConfig."""

from typing import Any

import torch
import torch.nn.functional as F

from megatron_rl import device
from megatron_rl.config.layout import Layout
from megatron_rl.config.model import ModelSection, MoeSection
from megatron_rl.families import Architecture
from megatron_rl.model.backends import Backends

device.import_megatron()

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

_ROUTER_DTYPES = {"float32": "fp32", "bfloat16": None}  # as megatron names them; None is that of the hidden states
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def transformer_config(
    architecture: Architecture, model: ModelSection, moe: MoeSection, layout: Layout, backends: Backends
) -> TransformerConfig:
    """Write an architecture and a configuration as megatron-core's TransformerConfig."""
    dtype = DTYPES[model.dtype]
    return TransformerConfig(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        # Megatron wants one though every layer has experts.
        ffn_hidden_size=architecture.intermediate_size or architecture.moe_intermediate_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=architecture.initializer_range,
        moe_token_dispatcher_type="alltoall",  # megatron asks for it without experts too
        **(_expert_fields(architecture, model, moe, backends) if architecture.num_experts else {}),
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_model_parallel_layout=_stages(architecture, layout) if layout.pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=layout.pipeline > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not device.on_cuda(),
        perform_initialization=False,
        fp8=None if model.fp8 == "none" else model.fp8,
        fp8_recipe=model.fp8_recipe,
        gradient_accumulation_fusion=backends.weight_gradient == "apex",
        # Without it, megatron's rotary embedding loops over packed sequences in Python and waits for their lengths.
        apply_rope_fusion=backends.transformer_engine,
        # torch.compile fuses it: one pass, and only its input is kept for the backward pass.
        bias_activation_fusion=device.on_cuda(),
        bias_dropout_fusion=False,
        batch_p2p_comm=device.on_cuda(),
        # The loss returned to the schedule is already the sum over tokens divided by the constant budget: the schedule
        # and DDP must only add up (see train/step/trainer.py).
        calculate_per_token_loss=True,
        recompute_granularity=None if model.recompute == "none" else model.recompute,
        recompute_method="uniform" if model.recompute == "full" else None,
        recompute_num_layers=1 if model.recompute == "full" else None,
        recompute_modules=list(model.recompute_modules) if model.recompute == "selective" else None,
    )


def _expert_fields(
    architecture: Architecture, model: ModelSection, moe: MoeSection, backends: Backends
) -> dict[str, Any]:
    """Return the fields of a TransformerConfig that say how experts are chosen and run."""
    router_dtype = "fp64" if model.dtype == "float64" else _ROUTER_DTYPES[model.router_dtype]
    layers = [int(architecture.is_moe_layer(i)) for i in range(architecture.num_hidden_layers)]
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_ffn_hidden_size": architecture.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": architecture.shared_intermediate_size or None,
        "moe_layer_freq": 1 if all(layers) else layers,
        "moe_router_topk": architecture.num_experts_per_tok,
        "moe_router_score_function": architecture.score_function,
        # Softmax over all experts, then top-k, then renormalise equals softmax over the top-k logits. Megatron
        # renormalises sigmoids whenever there are several.
        "moe_router_pre_softmax": architecture.score_function == "softmax" and not architecture.norm_topk_prob,
        "moe_router_enable_expert_bias": architecture.expert_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": architecture.n_group if architecture.n_group > 1 else None,
        "moe_router_group_topk": architecture.topk_group if architecture.n_group > 1 else None,
        "moe_router_topk_scaling_factor": None
        if architecture.routed_scaling_factor == 1
        else architecture.routed_scaling_factor,
        "moe_router_dtype": router_dtype,
        "moe_router_load_balancing_type": "aux_loss" if moe.load_balance_coefficient else "none",
        "moe_aux_loss_coeff": moe.load_balance_coefficient,
        "moe_z_loss_coeff": moe.z_loss_coefficient or None,
        "moe_grouped_gemm": backends.experts == "transformer_engine",
        "moe_permute_fusion": backends.transformer_engine,
    }


def _stages(architecture: Architecture, layout: Layout) -> list[list[str]]:
    """List what each stage holds, in megatron's words."""
    stages = [["decoder"] * num_layers for num_layers in layout.layers_per_stage(architecture.num_hidden_layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
