"""This module reads the fields of config.json that families have in common, and refuses what would change numbers
unseen."""

import functools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_rl.families.bounds import MAX_MTP_LAYERS, MAX_WIDTH, whole_number
from megatron_rl.families.rotary_fields import rotary_fields
from megatron_rl.parsing import shown

log = logging.getLogger(__name__)

# No family implements these fields, which change a model's numbers. Each must be absent or have one of these values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "compression_config": (None,),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "clip_qkv": (None,),
    "use_sliding_window": (None, False),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, [], ()),
    "alibi": (None, False),
    "use_cla": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "mlp_bias": (None, False),
    "use_bias": (None, False),
    "norm_softmax": (None, False),
    "use_mla": (None, False),
    "kv_lora_rank": (None, 0),
    "q_lora_rank": (None, 0),
}
# The number of layers that predict further tokens (MTP).
FURTHER_TOKENS = "num_nextn_predict_layers"
_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
)


def common_fields(
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    partial_rotary: bool = False,
    further_tokens: bool = False,
) -> dict[str, Any]:
    """Read the fields of an Architecture that every family has; `defaults` are those of the family's config class.

    partial_rotary: the family may rotate a part of each head. further_tokens: its files may have layers that predict
    further tokens (MTP). ValueError names a field of config.json that is not implemented, its value, and the values
    that are.
    """
    check_neutral(values, _NEUTRAL if further_tokens else {**_NEUTRAL, FURTHER_TOKENS: (None, 0)})
    _check_attention(values)
    given = {**defaults, **{name: value for name, value in values.items() if value is not None}}
    found = {name: given[name] for name in _SAME_NAME if name in given}
    found.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    rotary = rotary_fields(values, given)
    if rotary["fraction"] != 1 and not partial_rotary:
        raise ValueError(f"partial_rotary_factor must be 1, got {shown(rotary['fraction'])}")
    found |= {"rotary": rotary, "eos_token_ids": end_ids(values)}
    return found | {"num_mtp_layers": _further_layers(values)} if further_tokens else found


def _further_layers(values: Mapping[str, Any]) -> int:
    """Read the number of layers that predict further tokens, and tell that they are left out."""
    number = count(values, FURTHER_TOKENS, 0, MAX_MTP_LAYERS)
    if number:
        tell(
            f"config.json has {FURTHER_TOKENS} {number}: layers that predict further tokens (MTP) are left out here, "
            "and in what is written"
        )
    return number


def tell(text: str) -> None:
    """Log what a file asks for and does not get; on one rank, which reads the file many times, once."""
    if os.environ.get("RANK", "0") == "0":
        _log_once(text)


@functools.cache
def _log_once(text: str) -> None:
    log.info(text)


def check_neutral(values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], why: str = "") -> None:
    """Raise ValueError for the first field that is there and has none of the values that are implemented."""
    for name, allowed in neutral.items():
        if name in values and not any(_same(values[name], value) for value in allowed):
            least = next((value for value in allowed if value is not None), None)
            must = f"must be {least!r}" if least is not None else "must be absent or null"
            raise ValueError(f"{name} {must}{why}, got {shown(values[name])}")


def _same(value: Any, allowed: Any) -> bool:
    """Tell whether two values are equal; 0 is not false and 1 is not true."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)


def _check_attention(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless every layer attends to all tokens before it."""
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}):
        raise ValueError(f"layer_types must be 'full_attention' in every layer, got {shown(kinds)}")
    window = values.get("sliding_window")
    # Qwen's files give a window beside `use_sliding_window: false`, which turns it off.
    if window is not None and values.get("use_sliding_window") is not False:
        raise ValueError(f"sliding_window must be absent or null, got {shown(window)}")


def count(values: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """Read a whole number within bounds; the lowest where there is none. ValueError names the field."""
    value = values.get(name)
    try:
        return whole_number(low if value is None else value, low, high)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def flag(values: Mapping[str, Any], name: str, default: bool) -> bool:
    """Read true or false. ValueError names the field."""
    value = values.get(name)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    return default if value is None else value


def check_head_dim(values: Mapping[str, Any], why: str) -> None:
    """Raise ValueError for a `head_dim` that is not the hidden size divided by the heads. For some families SGLang
    divides, whatever config.json says."""
    width = count(values, "hidden_size", 1, MAX_WIDTH) / count(values, "num_attention_heads", 1, 4096)
    check_neutral(values, {"head_dim": (None, int(width) if width.is_integer() else width)}, why)


def first_dense_layers(values: Mapping[str, Any]) -> tuple[int, ...]:
    """List the layers without experts, where `first_k_dense_replace` says how many of the first ones these are."""
    num_layers = count(values, "num_hidden_layers", 1, 4096)
    return tuple(range(min(count(values, "first_k_dense_replace", 0, 4096), num_layers)))


def end_ids(*sources: Mapping[str, Any]) -> tuple[Any, ...]:
    """List every id of `eos_token_id`, which may be one or a list, in the order in which they come."""
    found: dict[Any, None] = {}
    for values in sources:
        ids = values.get("eos_token_id")
        for one in ids if isinstance(ids, list) else () if ids is None else (ids,):
            found.setdefault(one if isinstance(one, int) else str(one), None)
    return tuple(found)


def require(values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError with the fields that a config.json of this family must have and this one lacks."""
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; it is not the whole config.json of this model")
