"""The shape of a BailingMoE (Ling-lite, Ring-lite) model, read from its Hugging Face `config.json`.

This is the one reader of `config.json` in the package; it imports neither torch nor megatron, so the
training side, the embedded server and the tools share it.
"""

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

log = logging.getLogger(__name__)

# Ling-lite-base asks for 0.1 after the embedding and after each block, the chat models for none.
_DROPOUTS = ("attention_dropout", "embedding_dropout", "output_dropout")


class BailingConfig(BaseModel):
    """Architecture fields of `BailingMoeForCausalLM`, version 1, under their Hugging Face names.

    Dropout is read and left out. The released modelling code (github.com/inclusionAI/Ring, models/
    modeling_bailing_moe.py) never applies `embedding_dropout` and `output_dropout`, and `attention_dropout` only while
    it trains; servers apply none. Training here has none either, since a policy with dropout is not the one that
    sampled.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(default=0, ge=0, description="0 means hidden_size / num_attention_heads")
    num_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    num_shared_experts: int = Field(default=0, ge=0)
    first_k_dense_replace: int = Field(default=0, ge=0, description="layers below this index are dense")
    norm_topk_prob: bool = True
    norm_head: bool = False
    tie_word_embeddings: bool = Field(default=False, description="the LM head is the embedding")
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    initializer_range: float = Field(default=0.006, gt=0)
    eos_token_id: int = Field(ge=0)
    pad_token_id: int = Field(ge=0)
    torch_dtype: str = "bfloat16"

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_implemented(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("model_type") != "bailing_moe":
            raise ValueError(f"model_type must be 'bailing_moe', got {values.get('model_type')!r}")
        plain = {
            "use_bias": False,
            "use_qkv_bias": False,
            "rope_scaling": None,
            "hidden_act": "silu",
            "norm_softmax": False,
            "use_qk_norm": False,
        }
        for name, supported in plain.items():
            if values.get(name, supported) != supported:
                raise ValueError(f"{name} must be {supported!r} (BailingMoE version 1), got {values[name]!r}")
        return {k: v for k, v in values.items() if v is not None}

    @model_validator(mode="after")
    def _check_sizes(self) -> "BailingConfig":
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads {self.num_attention_heads} does not divide "
                    f"hidden_size {self.hidden_size}; set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        return self

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one fused shared-expert MLP; 0 without shared experts."""
        return self.num_shared_experts * self.moe_intermediate_size

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def num_parameters(self) -> int:
        """All weights, embedding and LM head included (once when they are tied)."""
        h, q_rows = self.hidden_size, (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        attention = h * q_rows + self.num_attention_heads * self.head_dim * h + 2 * h
        expert = 3 * h * self.moe_intermediate_size
        moe = self.num_experts * (expert + h) + 3 * h * self.shared_intermediate_size
        dense = min(self.first_k_dense_replace, self.num_hidden_layers)
        layers = self.num_hidden_layers * attention + (self.num_hidden_layers - dense) * moe
        vocabulary = (1 if self.tie_word_embeddings else 2) * self.vocab_size * h
        return layers + dense * 3 * h * self.intermediate_size + vocabulary + h


def load_bailing_config(model_dir: str | Path) -> BailingConfig:
    """Read `model_dir/config.json`; ValueError names the directory, the field and the value."""
    path = Path(model_dir) / "config.json"
    if not Path(model_dir).is_dir():
        raise ValueError(f"model directory {model_dir} does not exist; make one with tools/make_tiny_model.py")
    if not path.is_file():
        raise ValueError(f"{model_dir} holds no config.json; it must be a Hugging Face model directory")
    return read_bailing_config(path)


def read_bailing_config(path: Path) -> BailingConfig:
    """Read one file; ValueError names the file, the field and the value."""
    try:
        values = json.loads(path.read_text())
        config = BailingConfig.model_validate(values)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}" if e["loc"] else e["msg"] for e in error.errors()
        )
        raise ValueError(f"{path}: {problems}") from None
    dropouts = ", ".join(f"{name} {values[name]}" for name in _DROPOUTS if values.get(name))
    if dropouts and os.environ.get("RANK", "0") == "0":
        _tell_of_dropout(dropouts)
    return config


@functools.cache
def _tell_of_dropout(dropouts: str) -> None:
    """Once in a process: many parts of a run read config.json."""
    log.info("config.json asks for %s; training and servers here run without dropout", dropouts)
