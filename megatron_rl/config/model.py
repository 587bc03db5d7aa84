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
        description='Data type of weights and activations. In training with "bfloat16" the optimizer keeps float32 '
        "weights too.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Lets SGLang run the Python files of the model directory. Models that transformers does not know "
        "need it: configuration_bailing_moe.py, or configuration_bailing_moe_v2.py, describes them.",
    )
    shape: Path | None = Field(
        default=None,
        description="Path of a config.json with the shape of the model, or of a folder that has one. Only "
        "`megatron-rl plan` reads it, for a model that is not there yet.",
    )


def _local(path: Path, info: ValidationInfo) -> Path:
    return local_model(path, with_weights=not (info.context or {}).get("without_weights"))


class ServedModelSection(ServingSection):
    path: Annotated[Path, AfterValidator(_local)] = Field(
        description="Hugging Face directory (config.json, safetensors, tokenizer) of a model of a supported family. "
        'Or "hub:ORG/NAME": a model of the Hugging Face Hub, which is downloaded where the local cache does not have '
        "it."
    )


class ModelSection(ServedModelSection):
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto",
        description='Implementation of the transformer layers. "local": layers without Transformer Engine. '
        '"transformer_engine": those of Transformer Engine, not run on a GPU yet. "auto": Transformer Engine where '
        "fp8 asks for it, else local.",
    )
    attention: Literal["auto", "flash", "fa4", "sdpa"] = Field(
        default="auto",
        description='Attention kernel of local layers. "flash": torch\'s variable-length flash attention; needs a '
        'GPU and bfloat16. "fa4": FlashAttention 4 of the package flash-attn-4, not run on a GPU yet. "sdpa": '
        'torch\'s scaled_dot_product_attention over sequences of about the same length. "auto": flash where it can '
        "run, else sdpa.",
    )
    experts: Literal["auto", "grouped", "sequential"] = Field(
        default="auto",
        description='How local layers compute their experts. "grouped": all experts of a rank in two of torch\'s '
        'grouped matrix products; not in float64. "sequential": two matrix products for each expert. "auto": grouped '
        "in bfloat16 on a GPU of compute capability 9.0 or later, else sequential. Transformer Engine's layers have "
        "their own.",
    )
    expert_weight_gradient: Literal["torch", "quack"] = Field(
        default="torch",
        description='How the weight gradients of grouped experts are accumulated. "torch": a grouped product in '
        'bfloat16, then added to the float32 gradients. "quack": added within the product, by the package '
        "quack-kernels; not run on a GPU yet.",
    )
    router_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description='Data type of the router\'s logits and probabilities. "bfloat16" is for servers that have them '
        'so; it needs dtype = "bfloat16".',
    )
    head_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description='Data type of the output logits. "bfloat16" rounds them, as some servers do. The matrix product '
        'accumulates in float32 either way. "bfloat16" needs dtype = "bfloat16".',
    )
    fp8: Literal["none", "e4m3", "hybrid"] = Field(
        default="none",
        description="FP8 format of the matrix products in Transformer Engine's linear layers. Weights stay bfloat16. "
        '"e4m3": E4M3 everywhere. "hybrid": E5M2 for gradients, else E4M3. "none": no FP8. FP8 needs dtype = '
        '"bfloat16".',
    )
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = Field(
        default="tensorwise",
        description='FP8 scaling recipe, by megatron-core\'s name. "tensorwise": scales of the present tensor. '
        '"delayed": scales of earlier steps, which a checkpoint does not keep. "blockwise": one scale per block of '
        '128 values. "mxfp8": one per 32 values; needs a Blackwell GPU.',
    )
    recompute: Recompute = Field(
        default="none",
        description='Activations that the backward pass recomputes to save memory. "full": those of every layer; only '
        'its input is kept. "selective": those of recompute_modules. "none": nothing. true and false mean "full" and '
        '"none".',
    )
    recompute_modules: tuple[RecomputeModule, ...] = Field(
        default=("moe",),
        description='Modules to recompute with recompute = "selective", by megatron-core\'s names. "core_attn": '
        'attention without its projections; saves memory only with parallel.context above 1. "mlp": the MLP of dense '
        'layers. "moe": the router and all experts of a layer. "shared_experts": the shared experts.',
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
    load_balance_coefficient: float = Field(
        default=1e-5,
        ge=0,
        description="Coefficient of the router's load-balancing loss: a_bal in Eq. 6 of the C3PO paper.",
    )
    z_loss_coefficient: float = Field(
        default=1e-7, ge=0, description="Coefficient of the router's z-loss: a_z in Eq. 6 of the C3PO paper."
    )
