"""This module builds a model of megatron-core modules on this rank, with weights from a Hugging Face directory."""

import datetime
import importlib.util
import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl import device
from megatron_rl.checkpoint.names import (
    EMBEDDING,
    EXPERT_BIAS,
    STORED_NORMS,
    TensorMapping,
    adapter_table,
    canonical_name,
    name_table,
)
from megatron_rl.checkpoint.read import open_checkpoint
from megatron_rl.config.layout import Layout
from megatron_rl.config.lora import LoraSection
from megatron_rl.config.model import ModelSection, MoeSection
from megatron_rl.families import Architecture
from megatron_rl.place import Place

device.import_megatron()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.fp8_utils import get_fp8_align_size  # noqa: E402
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_with_transformer_engine_submodules,
    get_mlp_module_spec_for_backend,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import unwrap_model  # noqa: E402

from megatron_rl.model import kernels  # noqa: E402
from megatron_rl.model.backends import Backends, Installed, choose  # noqa: E402
from megatron_rl.model.experts import GroupedExperts, GroupedLayer  # noqa: E402
from megatron_rl.model.head import Head  # noqa: E402
from megatron_rl.model.layers import (  # noqa: E402
    FlashAttention,
    FlashAttention4,
    JoinedHeadsNorm,
    OutputNorm,
    PackedAttention,
    RMSNorm,
)
from megatron_rl.model.lora import AdaptedProvider, add_adapters, initial_factor, is_factor  # noqa: E402
from megatron_rl.model.megatron_config import DTYPES, transformer_config  # noqa: E402
from megatron_rl.model.router import Layer, Router  # noqa: E402

log = logging.getLogger(__name__)

_ALONE = Place()


def initialize_parallel(
    layout: Layout, deadline_seconds: float, seed: int, place: Place = _ALONE, store: dist.Store | None = None
) -> None:
    """Make the training world and megatron's process groups. store: the one at which the ranks of the world have met
    (stores.join); a process alone needs none. Between ranks of one machine gloo's connections stay on loopback."""
    if place.world_size == place.local_world_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device.set_local_device(place.local_rank)
    dist.init_process_group(
        device.backend(),
        store=dist.HashStore() if store is None else store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=deadline_seconds),
    )
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=max(1, round(deadline_seconds / 60)),
        create_gloo_process_groups=True,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def installed() -> Installed:
    """Return what this process can use. Nothing is imported: Transformer Engine without a GPU would make megatron's
    import fail."""
    return Installed(
        compute_capability=device.compute_capability(),
        transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
        flash_attn_4=_is_installed("flash-attn-4"),
        quack=_is_installed("quack-kernels"),
        weight_gradient=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def _is_installed(distribution: str) -> bool:
    """Tell whether a package of this name is installed. A search for its module would import other packages' modules
    (flash_attn) or find another package's (quack)."""
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


_ATTENTION = {"flash": FlashAttention, "fa4": FlashAttention4, "sdpa": PackedAttention}


def _layer_submodules(
    config: TransformerConfig, architecture: Architecture, is_moe: bool, backends: Backends, lora: LoraSection | None
) -> TransformerLayerSubmodules:
    num_experts = config.num_moe_experts if is_moe else None
    if backends.transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=num_experts, moe_grouped_gemm=is_moe, qk_layernorm=config.qk_layernorm
        )
        layer.mlp = _with_router(layer.mlp, backends) if is_moe else layer.mlp
        return layer
    backend = LocalSpecProvider() if lora is None else AdaptedProvider()
    mlp = get_mlp_module_spec_for_backend(backend, num_experts=num_experts)
    layer_norm = OutputNorm if architecture.norms_outputs else RMSNorm
    norms: list[Any] = [RMSNorm if architecture.qk_norm else None] * 2
    if architecture.qk_norm_joins_heads:
        numbers = (architecture.num_attention_heads, architecture.num_key_value_heads)
        norms = [partial(JoinedHeadsNorm, num_heads=number) for number in numbers]
    return TransformerLayerSubmodules(
        input_layernorm=layer_norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=backend.column_parallel_linear(),
                core_attention=_ATTENTION[backends.attention],
                linear_proj=backend.row_parallel_linear(),
                q_layernorm=norms[0],
                k_layernorm=norms[1],
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=layer_norm,
        mlp=_with_router(mlp, backends) if is_moe else mlp,
        mlp_bda=get_bias_dropout_add,
        # A distributed checkpoint has the names of Transformer Engine's layers, whatever layers wrote it.
        sharded_state_dict_keys_map={
            name: stored for name, stored in STORED_NORMS.items() if not (is_moe and name.startswith("pre_mlp"))
        },
    )


def _with_router(mlp: Any, backends: Backends) -> Any:
    """Return Megatron's builder of an expert layer, with our router, and with our experts where they are grouped."""
    parts = replace(mlp.keywords["submodules"], router=Router)
    if backends.experts != "grouped":
        return partial(mlp, submodules=parts)
    add_product = kernels.quack_add_product() if backends.expert_weight_gradient == "quack" else None
    experts = partial(GroupedExperts, *parts.experts.args, **parts.experts.keywords, add_product=add_product)
    return partial(GroupedLayer, submodules=replace(parts, experts=experts))


def _layer_norm(transformer_engine: bool) -> Any:
    if not transformer_engine:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


@dataclass(frozen=True, slots=True)
class Model:
    """Holds this rank's part of the model.

    chunks: what megatron's schedules run, one for each virtual pipeline stage: a GPTModel inside megatron's DDP.
    head: what a chunk gets as `output_processor`, so that the last stage returns log-probs and not logits.
    token_multiple: the number of a micro-batch's tokens on a context-parallel rank must be a multiple of it.
    lora: describes the adapters, which alone are trained; None where all weights are.
    """

    chunks: tuple[DistributedDataParallel, ...]
    head: Head
    config: TransformerConfig
    architecture: Architecture
    layout: Layout
    dtype: torch.dtype
    token_multiple: int
    lora: LoraSection | None = None

    def parameters_by_canonical_name(self) -> dict[str, Tensor]:
        """Find this rank's parameters, frozen ones too, and the biases of its routers, under the names of
        checkpoint/names.py.

        Where the head is tied to the embedding, the last of several pipeline stages has a copy of it,
        `output_layer.weight`, which the table does not know.

        Collective after an optimizer step, with overlap: see `gather_weights`."""
        self.gather_weights()
        experts = mpu.get_expert_model_parallel_rank() * (self.architecture.num_experts // self.layout.expert)
        return {
            canonical_name(name, get_transformer_layer_offset(self.config, gpt.vp_stage), experts): parameter
            for gpt in self.gpts
            for name, parameter in (*gpt.named_parameters(), *gpt.named_buffers())
            if isinstance(parameter, torch.nn.Parameter) or name.endswith(EXPERT_BIAS)
        }

    @property
    def gpts(self) -> list[GPTModel]:
        """The GPTModel of each chunk."""
        return unwrap_model(list(self.chunks))

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return all parameters of this rank, chunk by chunk. It is collective as `parameters_by_canonical_name` is."""
        self.gather_weights()
        return [parameter for gpt in self.gpts for parameter in gpt.parameters()]

    def gather_weights(self) -> None:
        """Wait until all weights are here. Collective. With overlap, data-parallel ranks may still have only their own
        part of the last optimizer step, and the rest comes as the next forward pass needs it. Whoever reads weights
        otherwise calls this first."""
        for chunk in self.chunks:
            groups = chunk.bucket_groups + chunk.expert_parallel_bucket_groups
            for group in groups if chunk.ddp_config.overlap_param_gather else ():
                if group.param_gather_handle is not None or not group.param_gather_dispatched:
                    group.start_param_sync(force_sync=True)

    @property
    def routers(self) -> list[Router]:
        return [module for gpt in self.gpts for module in gpt.modules() if isinstance(module, Router)]


def build_model(
    architecture: Architecture,
    model: ModelSection,
    moe: MoeSection,
    layout: Layout,
    distributed_optimizer: bool = True,
    overlap: bool = False,
    bucket_parameters: int | None = None,
    lora: LoraSection | None = None,
) -> Model:
    """Build this rank's model inside megatron's DDP, weights not yet set (see `load_weights`).

    overlap: gradients are reduced and weights gathered during the passes, `bucket_parameters` at once. lora: its
    adapters are trained, and the weights are frozen.
    """
    backends = choose(model, architecture, layout, installed(), lora)
    config = transformer_config(architecture, model, moe, layout, backends)
    if dist.get_rank() == 0:
        for line in backends.lines():
            log.debug("%s", line)
    dtype = DTYPES[model.dtype]
    shards = distributed_optimizer and dtype != torch.float64
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype != torch.float64,
        use_distributed_optimizer=shards,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and shards,
        bucket_size=bucket_parameters,
    )
    stages = range(layout.virtual_pipeline) if layout.virtual_pipeline > 1 else (None,)
    gpts = [_gpt_model(config, architecture, backends, stage, lora) for stage in stages]
    chunks = tuple(
        DistributedDataParallel(config, ddp_config, Float16Module(config, gpt) if dtype == torch.bfloat16 else gpt)
        for gpt in gpts
    )
    for chunk in chunks:
        _prepare_modules(chunk, is_frozen=lora is not None)
        if backends.weight_gradient == "transformer_engine":
            fuse_weight_gradients(chunk)
    if overlap:  # gradients travel with the last micro-batch alone; one chunk's function, or all chunks' as a list
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    head = Head(
        vocab_size=architecture.vocab_size,
        norm_head=architecture.norm_head,
        logit_dtype=torch.bfloat16 if model.head_dtype == "bfloat16" else None,
    )
    align = 1 if model.fp8 == "none" else get_fp8_align_size(config.fp8_recipe)
    return Model(
        chunks=chunks,
        head=head,
        config=config,
        architecture=architecture,
        layout=layout,
        dtype=dtype,
        token_multiple=layout.tensor * align,
        lora=lora,
    )


def _prepare_modules(chunk: DistributedDataParallel, is_frozen: bool) -> None:
    """Give routers and grouped experts what they can have only once they are inside of megatron's DDP. is_frozen: the
    weights are."""
    for module in chunk.modules():
        if isinstance(module, Router):
            module.keep_bias_in_float32()
        if isinstance(module, GroupedExperts):
            if is_frozen:
                module.lay_frozen_weights_together()
            if any(parameter.requires_grad for parameter in module.parameters()):
                module.ready = partial(_gradient_is_there, chunk)


def fuse_weight_gradients(chunk: torch.nn.Module) -> None:
    """Let Transformer Engine's linear layers, grouped ones too, add a weight's gradient to megatron's fp32 one inside
    of the product. That gradient exists only now.

    Megatron asks for it when it builds them, by a flag that its own layers refuse without apex. They are recognised by
    the attribute, which they read in every forward pass and other modules do not have: norms, attention, router and
    embedding, nor megatron's head. A layer stays as it is while one of its weights has no such gradient.

    In their first micro-batch, with fp8 in that of every step, they write over the sum, so a step has to be one run of
    megatron's schedule, as it is (train/step/trainer.py).
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            weights = [p for p in module.parameters(recurse=False) if p.dim() > 1 and p.requires_grad]
            sums = [getattr(p, "main_grad", None) for p in weights]
            module.fuse_wgrad_accumulation = bool(sums) and all(
                x is not None and x.dtype == torch.float32 for x in sums
            )


def _gradient_is_there(chunk: DistributedDataParallel, parameter: torch.Tensor) -> None:
    """Tell megatron's DDP that a gradient is there, as its own hook does after the addition."""
    if chunk.ddp_config.overlap_grad_reduce:
        chunk.param_to_bucket_group[parameter].register_grad_ready(parameter, chunk.force_all_reduce)


def _gpt_model(
    config: TransformerConfig,
    architecture: Architecture,
    backends: Backends,
    virtual_stage: int | None,
    lora: LoraSection | None,
) -> GPTModel:
    """Build the layers of one stage. virtual_stage: its number on this rank, None where there is one only."""
    offset = get_transformer_layer_offset(config, virtual_stage)
    specs = [
        ModuleSpec(
            module=Layer,
            submodules=_layer_submodules(config, architecture, architecture.is_moe_layer(offset + i), backends, lora),
        )
        for i in range(get_num_layers_to_build(config, virtual_stage))
    ]
    tensor_size = config.tensor_model_parallel_size
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=specs, layer_norm=_layer_norm(backends.transformer_engine)
        ),
        vocab_size=-(-architecture.vocab_size // tensor_size) * tensor_size,
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="rope" if backends.transformer_engine else "none",
        rotary_base=int(architecture.rotary.theta),
        rotary_percent=architecture.rotary.fraction,
        vp_stage=virtual_stage,
    )
    if lora is not None:
        add_adapters(gpt, lora, recomputes=config.recompute_granularity is not None)
    return gpt.to(device.torch_device())


def load_weights(model: Model, model_dir: Path) -> None:
    """Fill every parameter of this rank, but for adapters, from a checkpoint of either kind; ValueError when names or
    shapes differ."""
    table = name_table(model.architecture)
    with open_checkpoint(model_dir, model.architecture) as checkpoint, torch.no_grad():
        for name, parameter in model.parameters_by_canonical_name().items():
            if is_factor(name):
                continue
            entry = table.get(name, table[EMBEDDING])
            shard = local_shard(entry, entry.layout.merge([checkpoint.read(hf) for hf in entry.hf]))
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{name}: {model_dir} gives {tuple(shard.shape)}, the model has {tuple(parameter.shape)}"
                )
            parameter.copy_(shard)


def initialize_adapters(model: Model, seed: int) -> None:
    """Set this rank's adapters to their initial values; without adapters do nothing."""
    if model.lora is None:
        return
    table = adapter_table(model.architecture, model.lora)
    with torch.no_grad():
        for name, parameter in model.parameters_by_canonical_name().items():
            if is_factor(name):
                parameter.copy_(local_shard(table[name], initial_factor(table[name], seed)))


def sharded_state(model: Model) -> dict[str, dict[str, Any]]:
    """Describe this rank's weights by chunk, as megatron's distributed checkpoints save them or as a template to load
    into. For a model with adapters it describes these alone.

    Every layer under its own name, whether all layers are alike or not. Extra states are left out: only fp8 has any.
    """
    model.gather_weights()
    states = [gpt.sharded_state_dict(metadata={"non_homogeneous_layers": True}) for gpt in model.gpts]
    return {
        f"chunk{i}": {name: tensor for name, tensor in state.items() if _is_saved(name, model)}
        for i, state in enumerate(states)
    }


def _is_saved(name: str, model: Model) -> bool:
    return not name.endswith("_extra_state") and (model.lora is None or is_factor(name))


def load_sharded_state(model: Model, state: dict[str, dict[str, Any]]) -> None:
    """Fill the model from what megatron loaded into such a template."""
    for i, gpt in enumerate(model.gpts):
        problems = gpt.load_state_dict(state[f"chunk{i}"], strict=False)
        missing = [name for name in problems.missing_keys if _is_saved(name, model)]
        if missing or problems.unexpected_keys:
            raise ValueError(f"checkpoint lacks {missing} and has {problems.unexpected_keys} besides")


def local_shard(entry: TensorMapping, full: Tensor) -> Tensor:
    """Return this rank's part of a full Megatron tensor."""
    group = tensor_group(entry)
    return entry.layout.shard(full, group.rank(), group.size())


def tensor_group(entry: TensorMapping) -> Any:
    """Return the group over which a parameter is divided inside one layer."""
    return mpu.get_expert_tensor_parallel_group() if entry.expert else mpu.get_tensor_model_parallel_group()


def owns_export(entry: TensorMapping) -> bool:
    """Tell whether this rank's replica, among those of data- and context-parallel ranks, exports this parameter."""
    if entry.expert:
        return mpu.get_expert_data_parallel_rank() == 0
    return mpu.get_data_parallel_rank(with_context_parallel=True) == 0
