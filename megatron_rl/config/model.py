"""Defines the sections `model` and `moe`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from megatron_rl.config.section import Section
from megatron_rl.config.train import Recompute, RecomputeModule
from megatron_rl.hub import local_model


class ServingSection(Section):
    """Says how servers run a model, whichever it is."""

    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of weights and activations; with bfloat16 the optimizer keeps weights in float32 too",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="let SGLang run the Python files of the model directory; configuration_bailing_moe.py, or "
        "configuration_bailing_moe_v2.py, describes a model that transformers does not know",
    )
    shape: Path | None = Field(
        default=None,
        description="for `megatron-rl plan` alone, while the model itself is not there yet: a config.json of the same "
        "shape, or a folder that has one",
    )


def _local(path: Path, info: ValidationInfo) -> Path:
    return local_model(path, with_weights=not (info.context or {}).get("without_weights"))


class ServedModelSection(ServingSection):
    path: Annotated[Path, AfterValidator(_local)] = Field(
        description="Hugging Face directory (config.json, safetensors, tokenizer) of a model of a known family; or "
        "hub:ORG/NAME, a model of the Hugging Face Hub, which is fetched where its cache does not have it"
    )


class ModelSection(ServedModelSection):
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto",
        description="auto takes local ones, and Transformer Engine's, which have not run on a GPU yet, only where fp8 "
        "asks for them",
    )
    attention: Literal["auto", "flash", "fa4", "sdpa"] = Field(
        default="auto",
        description="of local layers. flash: torch's variable-length flash attention, on a GPU in bfloat16; fa4: "
        "FlashAttention 4 of the package flash-attn-4, not run on a GPU yet; sdpa: torch's "
        "scaled_dot_product_attention over sequences of about the same length. auto takes flash where it can",
    )
    experts: Literal["auto", "grouped", "sequential"] = Field(
        default="auto",
        description="of local layers. grouped: all experts of a rank in two grouped matrix products of torch's own, "
        "not in float64; sequential: two products for each. auto takes grouped in bfloat16 on a GPU of compute "
        "capability 9.0 or later. Transformer Engine's layers have their own",
    )
    expert_weight_gradient: Literal["torch", "quack"] = Field(
        default="torch",
        description="of grouped experts. torch: a grouped product in bfloat16, added to the float32 gradients in a "
        "pass of its own; quack: added in the product, by the package quack-kernels, not run on a GPU yet",
    )
    router_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the router's logits and probabilities; servers may have them in bfloat16"
    )
    head_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the logits. Their products add up in float32 either way; bfloat16 rounds the sums, as servers "
        "do that have their logits in it",
    )
    fp8: Literal["none", "e4m3", "hybrid"] = Field(
        default="none",
        description="format of the products in Transformer Engine's linear layers, weights stay bfloat16: e4m3, or "
        "hybrid, which has e5m2 for gradients",
    )
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = Field(
        default="tensorwise",
        description="where fp8's scales come from, as megatron-core names them: tensorwise from the tensor itself; "
        "delayed from earlier steps, which a checkpoint does not keep; blockwise, of 128 values; mxfp8, of 32, on "
        "Blackwell",
    )
    recompute: Recompute = Field(
        default="none",
        description="what the backward pass computes once more, to save memory. full: every layer, of which only the "
        "input is kept; selective: recompute_modules. true and false are full and none",
    )
    recompute_modules: tuple[RecomputeModule, ...] = Field(
        default=("moe",),
        description="with selective, as megatron-core names them: core_attn, attention without its projections, which "
        "saves memory with parallel.context alone; mlp, of dense layers; moe, a layer's router and all its experts; "
        "shared_experts",
    )

    @model_validator(mode="after")
    def _check_recompute(self) -> "ModelSection":
        if self.recompute == "selective" and not self.recompute_modules:
            raise ValueError("recompute 'selective' recomputes nothing; name recompute_modules, or set it to 'none'")
        return self

    @model_validator(mode="after")
    def _check_dtypes(self) -> "ModelSection":
        narrow = {"router_dtype": self.router_dtype == "bfloat16", "head_dtype": self.head_dtype == "bfloat16"}
        narrow["fp8"] = self.fp8 != "none"
        for name in (name for name, asked in narrow.items() if asked and self.dtype != "bfloat16"):
            raise ValueError(
                f"{name} = '{getattr(self, name)}' needs dtype = 'bfloat16', got '{self.dtype}'; change one of them"
            )
        return self


class MoeSection(Section):
    load_balance_coefficient: float = Field(default=1e-5, ge=0, description="a_bal of Eq. 6")
    z_loss_coefficient: float = Field(default=1e-7, ge=0, description="a_z of Eq. 6")
