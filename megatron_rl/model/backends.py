"""This module chooses what computes each part of the model: once, from the configuration, the device and what is
installed.

It is pure: it imports neither torch nor megatron, and what is installed is an argument (model/build.py looks).
docs/gpu.md says what has run on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from megatron_rl.config.layout import Layout
from megatron_rl.config.lora import LoraSection, lora_problems
from megatron_rl.config.model import ModelSection
from megatron_rl.families import Architecture

# CUDA compute capabilities from which torch has the kernel. Without one, its grouped product is a loop over the groups
# for which the host waits (aten/native/GroupedMMUtils.h).
FLASH_CAPABILITY = (8, 0)
GROUPED_CAPABILITY = (9, 0)
# Torch's flash attention takes such heads without padding them. FlashAttention 4 takes the same on Hopper.
MAX_FLASH_HEAD_DIM = 256
FLASH_HEAD_DIM_MULTIPLE = 8
# Major compute capabilities for which FlashAttention 4 has both passes and torch's own adapter lets it (Hopper and
# Blackwell of data centres), and where the latter takes head dims up to this, or MAX_FLASH_HEAD_DIM.
FA4_CAPABILITIES = (9, 10)
FA4_BLACKWELL_HEAD_DIM = 128
# The rows of the operands of torch's and quack's grouped products must be aligned to so many bytes.
GROUPED_ROW_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """Says what this process can use. The default is a CPU with nothing but torch and megatron-core.

    compute_capability: that of the CUDA device; None on a CPU.
    transformer_engine, flash_attn_4, quack: the packages. weight_gradient: apex's extension, which accumulates a
    weight's gradient inside of the product.
    """

    compute_capability: tuple[int, int] | None = None
    transformer_engine: bool = False
    flash_attn_4: bool = False
    quack: bool = False
    weight_gradient: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """Names what computes each part of the model. A value of `COSTS` says what that costs.

    weight_gradient: of linear layers. expert_weight_gradient: of routed experts.
    """

    layers: str
    attention: str
    norm: str
    experts: str
    permutation: str
    weight_gradient: str
    expert_weight_gradient: str

    @property
    def transformer_engine(self) -> bool:
        return self.layers == "transformer_engine"

    def lines(self) -> Iterator[str]:
        """Return lines for the log, one for each part."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value == _NOT_THERE:
                continue
            cost = COSTS.get((field.name, value))
            yield f"{field.name.replace('_', ' ')}: {value.replace('_', ' ')}" + (f" ({cost})" if cost else "")


_NOT_THERE = "none"  # of experts, in a dense model
_UNPROVEN = "not run on a GPU yet"
COSTS = {
    ("layers", "local"): "norms and products apart; no fp8",
    ("layers", "transformer_engine"): _UNPROVEN,
    ("attention", "fa4"): _UNPROVEN,
    ("attention", "sdpa"): "a kernel for each bucket of sequences of about the same length, padded by up to a quarter",
    ("norm", "fp32"): "a copy in fp32, then the weight's product apart",
    ("experts", "sequential"): "two small products for each expert, and the host waits for the number of its tokens",
    ("permutation", "torch"): "tokens are sorted and copied by torch's index operations",
    ("weight_gradient", "separate"): "added to the fp32 gradient in a pass of its own",
    ("weight_gradient", "transformer_engine"): "in the product; that of the head in a pass of its own",
    ("expert_weight_gradient", "separate"): "added to the fp32 gradient in a pass of its own",
    ("expert_weight_gradient", "quack"): _UNPROVEN,
}


def problems(
    model: ModelSection, architecture: Architecture, layout: Layout, lora: LoraSection | None = None
) -> Iterator[str]:
    """Yield the contradictions within the configuration, whatever the machine, each with its remedy."""
    if lora is not None:
        yield from lora_problems(lora, model, architecture, layout)
    local, wanted = _reasons_for_local(model, layout), _asks_for_engine(model)
    if local and wanted:
        yield (
            f"{wanted} and {' and '.join(local)} exclude each other: Transformer Engine's layers bring attention and "
            "experts along, and no context parallelism; leave one of them out"
        )
    if wanted and architecture.rotary.kind != "default":
        yield (
            f"{wanted} cannot scale rotary embeddings, and config.json asks for {architecture.rotary.kind!r}; set "
            "model.layers = 'local' and model.fp8 = 'none'"
        )
    if wanted and (architecture.qk_norm_joins_heads or architecture.norms_outputs):
        yield (
            f"{wanted} has not the norms of this model ({architecture.family}); set model.layers = 'local' and "
            "model.fp8 = 'none'"
        )
    if model.router_dtype == "bfloat16" and architecture.score_function == "sigmoid":
        yield (
            "model.router_dtype = 'bfloat16' is not what this model's servers do, whose routers compute in float32; "
            "set model.router_dtype = 'float32'"
        )
    if model.attention in ("flash", "fa4") and not _flash_fits(model, architecture, layout):
        yield (
            f"model.attention = '{model.attention}' needs bfloat16, parallel.context = 1 and a head_dim that "
            f"is a multiple of {FLASH_HEAD_DIM_MULTIPLE} up to {MAX_FLASH_HEAD_DIM}, got {model.dtype}, "
            f"{layout.context} and {architecture.head_dim}; set model.attention = 'sdpa'"
        )
    if model.experts == "grouped" and not _factors_fit(model, lora):
        assert lora is not None
        yield (
            f"model.experts = 'grouped' needs a lora.rank in multiples of {_row_multiple(model)} in {model.dtype}, got "
            f"{lora.rank}; change it, or set model.experts = 'sequential'"
        )
    if model.experts == "grouped" and not _grouped_fits(model, architecture, layout):
        yield (
            f"model.experts = 'grouped' needs {_GROUPED_NEEDS}, got {_grouped_got(model, architecture, layout)}; set "
            "model.experts = 'sequential'"
        )
    if model.expert_weight_gradient == "quack":
        if model.experts == "sequential":
            yield (
                "model.expert_weight_gradient = 'quack' and model.experts = 'sequential' exclude each other: it is of "
                "grouped experts; leave one of them out"
            )
        elif model.dtype != "bfloat16" or not _grouped_fits(model, architecture, layout):
            yield (
                f"model.expert_weight_gradient = 'quack' needs bfloat16, and {_GROUPED_NEEDS}, got "
                f"{_grouped_got(model, architecture, layout)}; set model.expert_weight_gradient = 'torch'"
            )


def choose(
    model: ModelSection,
    architecture: Architecture,
    layout: Layout,
    installed: Installed,
    lora: LoraSection | None = None,
) -> Backends:
    """Choose the backends. What the configuration leaves open becomes the best that has been measured. ValueError when
    it asks for what cannot be had.

    An installed package alone changes nothing, apart from apex's extension: Transformer Engine, FlashAttention 4 and
    quack are asked for.
    """
    for problem in problems(model, architecture, layout, lora):
        raise ValueError(problem)
    _refuse_what_is_missing(model, architecture, installed)
    found = _best(model, architecture, layout, installed)
    if found.experts == "grouped" and not _factors_fit(model, lora):
        found = replace(found, experts="sequential", expert_weight_gradient="separate")
    if architecture.num_experts:
        return found
    return replace(found, experts=_NOT_THERE, permutation=_NOT_THERE, expert_weight_gradient=_NOT_THERE)


def _best(model: ModelSection, architecture: Architecture, layout: Layout, installed: Installed) -> Backends:
    on_gpu = installed.compute_capability is not None
    has_flash, has_grouped = _has_flash(installed), _has_grouped(model, installed)
    apex = on_gpu and installed.weight_gradient and model.dtype == "bfloat16"
    if _asks_for_engine(model):
        engine = "transformer_engine"
        gradient = "apex" if apex else engine if model.dtype == "bfloat16" else "separate"
        return Backends(
            layers=engine,
            attention=engine,
            norm=engine,
            experts=engine,
            permutation=engine,
            weight_gradient=gradient,
            expert_weight_gradient=gradient,
        )
    grouped = model.experts == "grouped" or (
        model.experts == "auto" and has_grouped and _grouped_fits(model, architecture, layout)
    )
    attention = model.attention
    if attention == "auto":
        attention = "flash" if has_flash and _flash_fits(model, architecture, layout) else "sdpa"
    gradient = of_experts = "apex" if apex else "separate"
    if model.expert_weight_gradient == "quack":
        of_experts = "quack"
    elif grouped:  # products of torch's own, of which apex's extension knows nothing
        of_experts = "separate"
    return Backends(
        layers="local",
        attention=attention,
        norm="fused" if on_gpu else "fp32",
        experts="grouped" if grouped else "sequential",
        permutation="torch",
        weight_gradient=gradient,
        expert_weight_gradient=of_experts,
    )


def _refuse_what_is_missing(model: ModelSection, architecture: Architecture, installed: Installed) -> None:
    """Raise ValueError for what the configuration asks for and this machine does not have."""
    wanted = _asks_for_engine(model)
    on_gpu = installed.compute_capability is not None
    if wanted and not (on_gpu and installed.transformer_engine):
        raise ValueError(
            f"{wanted} needs a CUDA device and the package transformer_engine; install megatron_rl[gpu], or set "
            "model.layers = 'local' and model.fp8 = 'none'"
        )
    if model.attention == "flash" and not _has_flash(installed):
        raise ValueError(
            f"model.attention = 'flash' needs a CUDA device of compute capability "
            f"{'.'.join(map(str, FLASH_CAPABILITY))} or later; set model.attention = 'sdpa'"
        )
    if model.attention == "fa4":
        _check_fa4(architecture, installed)
    if model.expert_weight_gradient == "quack" and not (_has_grouped(model, installed) and installed.quack):
        raise ValueError(
            f"model.expert_weight_gradient = 'quack' needs a CUDA device of compute capability "
            f"{'.'.join(map(str, GROUPED_CAPABILITY))} or later and the package quack-kernels (pip install "
            f"quack-kernels), got {_name(installed.compute_capability, installed.quack)}; set "
            "model.expert_weight_gradient = 'torch'"
        )


def _has_flash(installed: Installed) -> bool:
    return installed.compute_capability is not None and installed.compute_capability >= FLASH_CAPABILITY


def _has_grouped(model: ModelSection, installed: Installed) -> bool:
    capability = installed.compute_capability
    return capability is not None and capability >= GROUPED_CAPABILITY and model.dtype == "bfloat16"


def _check_fa4(architecture: Architecture, installed: Installed) -> None:
    """Raise ValueError where FlashAttention 4 is not there, or does not run."""
    capability = installed.compute_capability
    if capability is None or capability[0] not in FA4_CAPABILITIES or not installed.flash_attn_4:
        raise ValueError(
            f"model.attention = 'fa4' needs a CUDA device of compute capability "
            f"{' or '.join(f'{major}.x' for major in FA4_CAPABILITIES)} and the package flash-attn-4 (pip install "
            f"flash-attn-4), got {_name(capability, installed.flash_attn_4)}; set model.attention = 'auto'"
        )
    if capability[0] > 9 and not (
        architecture.head_dim <= FA4_BLACKWELL_HEAD_DIM or architecture.head_dim == MAX_FLASH_HEAD_DIM
    ):
        raise ValueError(
            f"model.attention = 'fa4' needs a head_dim up to {FA4_BLACKWELL_HEAD_DIM}, or {MAX_FLASH_HEAD_DIM}, on "
            f"{_name(capability)}, got {architecture.head_dim}; set model.attention = 'auto'"
        )


def _name(capability: tuple[int, int] | None, has_package: bool = True) -> str:
    device = "a CPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
    return device if has_package else f"{device} without it"


def _asks_for_engine(model: ModelSection) -> str | None:
    """Return the setting that only Transformer Engine's layers can fulfil; None where there is none."""
    if model.fp8 != "none":
        return f"model.fp8 = '{model.fp8}'"
    return "model.layers = 'transformer_engine'" if model.layers == "transformer_engine" else None


def _reasons_for_local(model: ModelSection, layout: Layout) -> list[str]:
    """List the settings that Transformer Engine's layers cannot fulfil."""
    reasons = [f"model.layers = '{model.layers}'"] if model.layers == "local" else []
    chosen = {"attention": model.attention, "experts": model.experts}
    reasons += [f"model.{name} = '{value}'" for name, value in chosen.items() if value != "auto"]
    if model.expert_weight_gradient != "torch":
        reasons.append(f"model.expert_weight_gradient = '{model.expert_weight_gradient}'")
    return reasons + ([f"parallel.context = {layout.context}"] if layout.context > 1 else [])


def _flash_fits(model: ModelSection, architecture: Architecture, layout: Layout) -> bool:
    fits = architecture.head_dim <= MAX_FLASH_HEAD_DIM and architecture.head_dim % FLASH_HEAD_DIM_MULTIPLE == 0
    return model.dtype == "bfloat16" and layout.context == 1 and fits


_GROUPED_NEEDS = f"several experts on a rank, no float64, and rows in multiples of {GROUPED_ROW_BYTES} bytes"


def _grouped_got(model: ModelSection, architecture: Architecture, layout: Layout) -> str:
    return (
        f"{architecture.num_experts} over parallel.expert = {layout.expert} in {model.dtype}, hidden_size "
        f"{architecture.hidden_size} and moe_intermediate_size {architecture.moe_intermediate_size} over "
        f"{layout.expert_tensor}"
    )


def _row_multiple(model: ModelSection) -> int:
    """Return the number of elements of which the row lengths of a grouped product's operands must be a multiple."""
    return GROUPED_ROW_BYTES // (2 if model.dtype == "bfloat16" else 4)


def _factors_fit(model: ModelSection, lora: LoraSection | None) -> bool:
    """Tell whether the routed experts' adapters, if they have any, can be grouped."""
    return lora is None or "experts" not in lora.targets or lora.rank % _row_multiple(model) == 0


def _grouped_fits(model: ModelSection, architecture: Architecture, layout: Layout) -> bool:
    multiple = _row_multiple(model)
    widths = architecture.hidden_size, architecture.moe_intermediate_size // layout.expert_tensor
    even = all(width % multiple == 0 for width in widths)
    return model.dtype != "float64" and architecture.num_experts > layout.expert and even
