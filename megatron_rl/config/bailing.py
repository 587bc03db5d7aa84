"""The shape of a BailingMoE (Ling-lite, Ring-lite) model, read from its Hugging Face `config.json`.

This is the one reader of `config.json` in the package; it imports neither torch nor megatron, so the
training side, the embedded server and the tools share it.
"""

import functools
import logging
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator

from megatron_rl.files import model_files
from megatron_rl.parsing import read_json, shown

log = logging.getLogger(__name__)

# Ling-lite-base asks for 0.1 after the embedding and after each block, the chat models for none.
_DROPOUTS = ("attention_dropout", "embedding_dropout", "output_dropout")


# Far above every model that there is, and small enough that names of all tensors fit into memory.
_MAX_WIDTH = 2**20
_MAX_TOKENS = 2**24
_MAX_EXPERTS_OF_ALL_LAYERS = 2**18


def _whole(low: int, high: int) -> BeforeValidator:
    """Accepts a whole number within bounds, and none that only converts to one: true, "8", 8.0."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}, got {shown(value)}")
        return value

    return BeforeValidator(check)


def _above_zero(high: float) -> BeforeValidator:
    """Accepts a number above 0, up to a bound. NaN and infinity are none."""

    def check(value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value <= high:
            raise ValueError(f"must be a number above 0 and up to {high:g}, got {shown(value)}")
        return float(value)

    return BeforeValidator(check)


_Width = Annotated[int, _whole(1, _MAX_WIDTH)]
_Flag = Annotated[bool, Strict()]


class BailingConfig(BaseModel):
    """Architecture fields of `BailingMoeForCausalLM`, version 1, under their Hugging Face names.

    Dropout is read and left out. The released modelling code (github.com/inclusionAI/Ring, models/
    modeling_bailing_moe.py) never applies `embedding_dropout` and `output_dropout`, and `attention_dropout` only while
    it trains; servers apply none. Training here has none either, since a policy with dropout is not the one that
    sampled.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    vocab_size: Annotated[int, _whole(1, _MAX_TOKENS)]
    hidden_size: _Width
    intermediate_size: _Width
    moe_intermediate_size: _Width
    num_hidden_layers: Annotated[int, _whole(1, 4096)]
    num_attention_heads: Annotated[int, _whole(1, 4096)]
    num_key_value_heads: Annotated[int, _whole(1, 4096)]
    head_dim: Annotated[int, _whole(0, 2**16)] = Field(
        default=0, description="0 means hidden_size / num_attention_heads"
    )
    num_experts: Annotated[int, _whole(1, 2**16)]
    num_experts_per_tok: Annotated[int, _whole(1, 2**16)]
    num_shared_experts: Annotated[int, _whole(0, 4096)] = 0
    first_k_dense_replace: Annotated[int, _whole(0, 4096)] = Field(
        default=0, description="layers below this index are dense"
    )
    norm_topk_prob: _Flag = True
    norm_head: _Flag = False
    tie_word_embeddings: _Flag = Field(default=False, description="the LM head is the embedding")
    max_position_embeddings: Annotated[int, _whole(1, 2**30)]
    rope_theta: Annotated[float, _above_zero(1e15)] = 10000.0
    rms_norm_eps: Annotated[float, _above_zero(1.0)] = 1e-6
    initializer_range: Annotated[float, _above_zero(1e3)] = 0.006
    eos_token_id: Annotated[int, _whole(0, _MAX_TOKENS)]
    pad_token_id: Annotated[int, _whole(0, _MAX_TOKENS)]
    torch_dtype: str = "bfloat16"

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_implemented(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("model_type") != "bailing_moe":
            raise ValueError(f"model_type must be 'bailing_moe', got {shown(values.get('model_type'))}")
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
                raise ValueError(f"{name} must be {supported!r} (BailingMoE version 1), got {shown(values[name])}")
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
        if self.num_hidden_layers * self.num_experts > _MAX_EXPERTS_OF_ALL_LAYERS:
            raise ValueError(
                f"num_hidden_layers {self.num_hidden_layers} times num_experts {self.num_experts} must be at most "
                f"{_MAX_EXPERTS_OF_ALL_LAYERS}"
            )
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

    def num_active_parameters(self) -> int:
        """Count the parameters that a token passes through, embedding and LM head whole."""
        num_moe = sum(self.is_moe_layer(i) for i in range(self.num_hidden_layers))
        idle = self.num_experts - self.num_experts_per_tok
        return self.num_parameters() - num_moe * idle * 3 * self.hidden_size * self.moe_intermediate_size


def load_bailing_config(model_dir: str | Path) -> BailingConfig:
    """Read `model_dir/config.json`; ValueError names the directory, the field and the value, and any file of the
    directory that leads out of it (files.py): whoever uses a model reads this first."""
    path = Path(model_dir) / "config.json"
    if not Path(model_dir).is_dir():
        raise ValueError(f"model directory {model_dir} does not exist; make one with tools/make_tiny_model.py")
    if path not in model_files(Path(model_dir)):
        raise ValueError(f"{model_dir} holds no config.json; it must be a Hugging Face model directory")
    return read_bailing_config(path)


def read_bailing_config(path: Path) -> BailingConfig:
    """Read one file; ValueError names the file, the field and the value."""
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(values)}")
    try:
        config = BailingConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(map(_told, error.errors()))}") from None
    dropouts = ", ".join(f"{name} {shown(values[name])}" for name in _DROPOUTS if values.get(name))
    if dropouts and os.environ.get("RANK", "0") == "0":
        _tell_of_dropout(dropouts)
    return config


def _told(problem: Any) -> str:
    name, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "bool_type":
        message = f"must be true or false, got {shown(problem['input'])}"
    return f"{name} {message}" if message.startswith("must ") else f"{name}: {message}" if name else message


@functools.cache
def _tell_of_dropout(dropouts: str) -> None:
    """Once in a process: many parts of a run read config.json."""
    log.info("config.json asks for %s; training and servers here run without dropout", dropouts)
