"""Who computes each part of the model: chosen once, from the configuration, the device and what is installed.

Pure: neither torch nor megatron, and what is installed is an argument (model/build.py looks). docs/gpu.md says what has
run on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_rl.config.bailing import BailingConfig
from megatron_rl.config.schema import ModelSection
from megatron_rl.layout import Layout

# CUDA compute capabilities from which torch has the kernel. Without one, its grouped product is a loop over the groups
# for which the host waits (aten/native/GroupedMMUtils.h).
FLASH_CAPABILITY = (8, 0)
GROUPED_CAPABILITY = (9, 0)
# What torch's flash attention takes without padding the heads.
MAX_FLASH_HEAD_DIM = 256
FLASH_HEAD_DIM_MULTIPLE = 8
# What torch's grouped product demands of the rows of its operands.
GROUPED_ROW_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What this process can use. The default is a CPU with nothing but torch and megatron-core.

    compute_capability: of the CUDA device; None on a CPU.
    transformer_engine: the package. apex: NVIDIA's, with its kernels; on the package index the name is another's.
    weight_gradient: apex's extension that adds a weight's gradient up inside of the product.
    """

    compute_capability: tuple[int, int] | None = None
    transformer_engine: bool = False
    apex: bool = False
    weight_gradient: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Providers:
    """Of each part who computes it; a value of `COSTS` says what that costs."""

    layers: str
    attention: str
    norm: str
    experts: str
    permutation: str
    weight_gradient: str
    optimizer: str

    @property
    def transformer_engine(self) -> bool:
        return self.layers == "transformer_engine"

    def lines(self) -> Iterator[str]:
        """For the log: a line for each part."""
        for field in fields(self):
            value = getattr(self, field.name)
            cost = COSTS.get((field.name, value))
            yield f"{field.name.replace('_', ' ')}: {value.replace('_', ' ')}" + (f" ({cost})" if cost else "")


COSTS = {
    ("layers", "local"): "norms and products apart; no fp8",
    ("attention", "sdpa"): "a kernel for each bucket of sequences of about the same length, padded by up to a quarter",
    ("norm", "fp32"): "a copy in fp32, then the weight's product apart",
    ("experts", "sequential"): "two small products for each expert, and the host waits for the number of its tokens",
    ("permutation", "torch"): "tokens are sorted and copied by torch's index operations",
    ("weight_gradient", "separate"): "added to the fp32 gradient in a pass of its own",
}


def problems(model: ModelSection, bailing: BailingConfig, layout: Layout) -> Iterator[str]:
    """What the configuration alone contradicts, whatever the machine, each with its remedy."""
    local, wanted = _reasons_for_local(model, layout), _asks_for_engine(model)
    if local and wanted:
        yield (
            f"{wanted} and {' and '.join(local)} exclude each other: Transformer Engine's layers bring attention and "
            "experts along, and no context parallelism; leave one of them out"
        )
    if model.attention == "flash" and not _flash_fits(model, bailing, layout):
        yield (
            f"model.attention = 'flash' needs bfloat16, parallel.context = 1 and a head_dim that is a multiple of "
            f"{FLASH_HEAD_DIM_MULTIPLE} up to {MAX_FLASH_HEAD_DIM}, got {model.dtype}, {layout.context} and "
            f"{bailing.head_dim}; set model.attention = 'sdpa'"
        )
    if model.experts == "grouped" and not _grouped_fits(model, bailing, layout):
        yield (
            f"model.experts = 'grouped' needs several experts on a rank, no float64, and rows in multiples of "
            f"{GROUPED_ROW_BYTES} bytes, got {bailing.num_experts} over parallel.expert = {layout.expert} in "
            f"{model.dtype}, hidden_size {bailing.hidden_size} and moe_intermediate_size "
            f"{bailing.moe_intermediate_size} over {layout.expert_tensor}; set model.experts = 'sequential'"
        )


def choose(model: ModelSection, bailing: BailingConfig, layout: Layout, installed: Installed) -> Providers:
    """The best that there is of what the configuration leaves open. ValueError when it asks for what cannot be had."""
    for problem in problems(model, bailing, layout):
        raise ValueError(problem)
    capability = installed.compute_capability
    on_gpu = capability is not None
    engine = on_gpu and installed.transformer_engine
    wanted = _asks_for_engine(model)
    if wanted and not engine:
        raise ValueError(
            f"{wanted} needs a CUDA device and the package transformer_engine; install megatron_rl[gpu], or set "
            "model.layers = 'local' and model.fp8 = 'none'"
        )
    has_flash = capability is not None and capability >= FLASH_CAPABILITY
    if model.attention == "flash" and not has_flash:
        raise ValueError(
            f"model.attention = 'flash' needs a CUDA device of compute capability "
            f"{'.'.join(map(str, FLASH_CAPABILITY))} or later; set model.attention = 'sdpa'"
        )
    if engine and not _reasons_for_local(model, layout) and model.dtype != "float64":
        layers = attention = norm = experts = "transformer_engine"
    else:
        has_grouped = capability is not None and capability >= GROUPED_CAPABILITY and model.dtype == "bfloat16"
        grouped = model.experts == "grouped" or (
            model.experts == "auto" and has_grouped and _grouped_fits(model, bailing, layout)
        )
        flash = model.attention != "sdpa" and has_flash and _flash_fits(model, bailing, layout)
        layers, norm = "local", "fused" if on_gpu else "fp32"
        attention, experts = "flash" if flash else "sdpa", "grouped" if grouped else "sequential"
    return Providers(
        layers=layers,
        attention=attention,
        norm=norm,
        experts=experts,
        permutation="transformer_engine" if engine and model.dtype != "float64" else "torch",
        weight_gradient="apex" if on_gpu and installed.weight_gradient and model.dtype == "bfloat16" else "separate",
        # The order in which megatron-core 0.19.2 looks for a fused Adam (optimizer/__init__.py).
        optimizer="transformer_engine" if engine else "apex" if on_gpu and installed.apex else "torch",
    )


def _asks_for_engine(model: ModelSection) -> str | None:
    """What the configuration says that Transformer Engine's layers alone can do."""
    if model.fp8 != "none":
        return f"model.fp8 = '{model.fp8}'"
    return "model.layers = 'transformer_engine'" if model.layers == "transformer_engine" else None


def _reasons_for_local(model: ModelSection, layout: Layout) -> list[str]:
    """What the configuration says that Transformer Engine's layers cannot do."""
    reasons = [f"model.layers = '{model.layers}'"] if model.layers == "local" else []
    chosen = {"attention": model.attention, "experts": model.experts}
    reasons += [f"model.{name} = '{value}'" for name, value in chosen.items() if value != "auto"]
    return reasons + ([f"parallel.context = {layout.context}"] if layout.context > 1 else [])


def _flash_fits(model: ModelSection, bailing: BailingConfig, layout: Layout) -> bool:
    fits = bailing.head_dim <= MAX_FLASH_HEAD_DIM and bailing.head_dim % FLASH_HEAD_DIM_MULTIPLE == 0
    return model.dtype == "bfloat16" and layout.context == 1 and fits


def _grouped_fits(model: ModelSection, bailing: BailingConfig, layout: Layout) -> bool:
    multiple = GROUPED_ROW_BYTES // (2 if model.dtype == "bfloat16" else 4)
    widths = bailing.hidden_size, bailing.moe_intermediate_size // layout.expert_tensor
    even = all(width % multiple == 0 for width in widths)
    return model.dtype != "float64" and bailing.num_experts > layout.expert and even
