"""Write a Hugging Face directory that holds a small, randomly initialised model, by default a BailingMoE.

    python tools/make_tiny_model.py /tmp/tiny --layers 2 --hidden-size 64
    python tools/make_tiny_model.py /tmp/tiny-qwen --family qwen3
    python tools/make_tiny_model.py /tmp/tiny-ling --family bailing_moe_v2 --expert-groups 4 --top-expert-groups 2

Tests and the CPU examples train and serve these. The same flags give the same bytes: every tensor is drawn
from a generator seeded with (--seed, tensor name), so a tensor does not depend on how many others there are.
The tokenizer has one token per printable ASCII character and newline; anything else becomes `<unk>`.
"""

import argparse
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.errors import exit_code
from megatron_rl.families import FAMILIES, architecture_of, family_of, tensor_shapes

EOS, UNK = "<|endoftext|>", "<unk>"
ROLES = ("<role>SYSTEM</role>", "<role>HUMAN</role>", "<role>ASSISTANT</role>")
CHARACTERS = ("\n", *map(chr, range(32, 127)))
BOXED = "\\boxed{"
# As in Ling-lite, the special tokens follow the ordinary ones.
TOKENS = (*CHARACTERS, BOXED, UNK, *ROLES, EOS)

# Ling-lite's chat template, verbatim: it has no end-of-turn token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set role = message['role'] | lower %}{% if role == 'user' %}"
    "{% set role = 'HUMAN' %}{% endif %}{% set role = role | upper %}"
    "{{ '<role>' + role + '</role>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)

CONFIGURATION_MODULE = '''\
"""Lets AutoConfig and SGLang open this directory: transformers does not know `bailing_moe`."""

from transformers import PretrainedConfig


class BailingMoeConfig(PretrainedConfig):
    model_type = "bailing_moe"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=126464,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=None,
        hidden_act="silu",
        use_qkv_bias=False,
        use_bias=False,
        rms_norm_eps=1e-6,
        norm_head=False,
        norm_softmax=False,
        embedding_dropout=0.0,
        attention_dropout=0.0,
        output_dropout=0.0,
        initializer_range=0.006,
        max_position_embeddings=16384,
        rope_theta=600000.0,
        rope_scaling=None,
        rope_parameters=None,
        use_cache=True,
        num_experts=64,
        num_shared_experts=0,
        num_experts_per_tok=6,
        norm_topk_prob=True,
        moe_intermediate_size=1408,
        first_k_dense_replace=0,
        pretraining_tp=1,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.use_qkv_bias = use_qkv_bias
        self.use_bias = use_bias
        self.rms_norm_eps = rms_norm_eps
        self.norm_head = norm_head
        self.norm_softmax = norm_softmax
        self.embedding_dropout = embedding_dropout
        self.attention_dropout = attention_dropout
        self.output_dropout = output_dropout
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.num_experts = num_experts
        self.num_shared_experts = num_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.moe_intermediate_size = moe_intermediate_size
        self.first_k_dense_replace = first_k_dense_replace
        self.pretraining_tp = pretraining_tp
        # transformers 5 reads rope_parameters, transformers 4 and most engines rope_theta and rope_scaling.
        self.rope_theta = rope_theta
        scaling = rope_scaling or rope_parameters
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta, **(scaling or {})}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
'''


CONFIGURATION_MODULE_V2 = '''\
"""Lets AutoConfig and SGLang open this directory: transformers does not know BailingMoeV2."""

from transformers import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
    model_type = "bailing_moe"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, rope_theta=600000.0, rope_scaling=None, rope_parameters=None, **kwargs):
        # transformers 5 reads rope_parameters, transformers 4 and most engines rope_theta and rope_scaling.
        self.rope_theta = rope_theta
        scaling = rope_scaling or rope_parameters
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta, **(scaling or {})}
        super().__init__(**kwargs)
'''
# The families whose routers have a bias for each expert, groups of experts and a factor.
SIGMOID_ROUTERS = ("bailing_moe_v2", "glm4_moe")
EXPERTS_IN_ALL_LAYERS = ("mixtral", "olmoe")
# transformers knows the other families.
CONFIGURATION_MODULES = {
    "bailing_moe": ("BailingMoeConfig", CONFIGURATION_MODULE),
    "bailing_moe_v2": ("BailingMoeV2Config", CONFIGURATION_MODULE_V2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """Holds the sizes of the model; the fields are the command-line flags. Dense families have no use for those of
    experts."""

    family: str = "bailing_moe"
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    experts: int = 8
    experts_per_token: int = 2
    shared_experts: int = 0
    moe_intermediate_size: int = 128
    intermediate_size: int = 0
    first_k_dense_replace: int = 0
    expert_groups: int = 1
    top_expert_groups: int = 1
    routed_scaling_factor: float = 1.0
    vocab_size: int = 0
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    norm_head: bool = False
    dtype: str = "float32"
    seed: int = 0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"--family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.norm_head and self.family != "bailing_moe":
            raise ValueError(f"--norm-head is for --family bailing_moe, got {self.family}")
        own = {"expert_groups": 1, "top_expert_groups": 1, "routed_scaling_factor": 1.0}
        for name, value in own.items():
            if getattr(self, name) != value and self.family not in SIGMOID_ROUTERS:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is for --family {' and '.join(SIGMOID_ROUTERS)}, got {self.family}")
        if self.shared_experts and self.family in ("qwen3_moe", *EXPERTS_IN_ALL_LAYERS):
            raise ValueError(f"--shared-experts must be 0 for --family {self.family}, which has none")
        if self.first_k_dense_replace and self.family in EXPERTS_IN_ALL_LAYERS:
            raise ValueError(
                f"--first-k-dense-replace must be 0 for --family {self.family}, whose layers all have experts"
            )
        if self.kv_heads != self.heads and self.family == "olmoe":
            raise ValueError(f"--kv-heads must be --heads {self.heads} for --family olmoe, got {self.kv_heads}")
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"--hidden-size must be an even multiple of --heads, got {self.hidden_size} and {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"--kv-heads must divide --heads, got {self.kv_heads} and {self.heads}")
        if not 0 < self.experts_per_token <= self.experts:
            raise ValueError(
                f"--experts-per-token must be in 1..--experts, got {self.experts_per_token} of {self.experts}"
            )
        if self.vocab_size and self.vocab_size < len(TOKENS):
            raise ValueError(
                f"--vocab-size must hold the tokenizer's {len(TOKENS)} tokens, got {self.vocab_size}; "
                "leave the flag out for the next multiple of 64"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def padded_vocab_size(self) -> int:
        return self.vocab_size or math.ceil(len(TOKENS) / 64) * 64

    @property
    def dense_intermediate_size(self) -> int:
        return self.intermediate_size or 2 * self.hidden_size


def model_config(model: TinyModel) -> dict[str, Any]:
    """Return config.json with the fields of a published one of the family. What belongs to modeling files is left
    out."""
    family = FAMILIES[model.family]
    common = {
        "architectures": [family.architectures[0]],
        "attention_dropout": 0.0,
        "eos_token_id": TOKENS.index(EOS),
        "pad_token_id": TOKENS.index(EOS),
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.dense_intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "model_type": family.model_types[0],
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": model.dtype,
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vocab_size": model.padded_vocab_size,
    }
    return common | _FAMILY_FIELDS.get(model.family, lambda model: {"head_dim": model.head_dim})(model)


def _expert_fields(model: TinyModel) -> dict[str, Any]:
    return {
        "moe_intermediate_size": model.moe_intermediate_size,
        "num_experts": model.experts,
        "norm_topk_prob": True,
        "num_experts_per_tok": model.experts_per_token,
    }


def _bailing_fields(model: TinyModel) -> dict[str, Any]:
    class_name, _ = CONFIGURATION_MODULES[model.family]
    return _expert_fields(model) | {
        "auto_map": {"AutoConfig": f"configuration_{model.family}.{class_name}"},
        "first_k_dense_replace": model.first_k_dense_replace,
        "num_shared_experts": model.shared_experts,
        "pretraining_tp": 1,
        "use_bias": False,
        "use_qkv_bias": False,
        "embedding_dropout": 0.0,
        "norm_head": model.norm_head,
        "norm_softmax": False,
        "output_dropout": 0.0,
    }


def _bailing_v2_fields(model: TinyModel) -> dict[str, Any]:
    return _bailing_fields(model) | {
        "model_type": "bailing_moe",  # as published
        "head_dim": model.head_dim,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "n_group": model.expert_groups,
        "topk_group": model.top_expert_groups,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "routed_scaling_factor": model.routed_scaling_factor,
        "router_dtype": "fp32",
        "num_nextn_predict_layers": 0,
    }


def _glm4_moe_fields(model: TinyModel) -> dict[str, Any]:
    return {
        "attention_bias": True,
        "first_k_dense_replace": model.first_k_dense_replace,
        "head_dim": model.head_dim,
        "moe_intermediate_size": model.moe_intermediate_size,
        "n_group": model.expert_groups,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.shared_experts,
        "norm_topk_prob": True,
        "num_experts_per_tok": model.experts_per_token,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": model.routed_scaling_factor,
        "topk_group": model.top_expert_groups,
        "use_qk_norm": True,
    }


def _mistral_fields(model: TinyModel) -> dict[str, Any]:
    return {"head_dim": model.head_dim, "sliding_window": None}


def _mixtral_fields(model: TinyModel) -> dict[str, Any]:
    return _mistral_fields(model) | {
        "intermediate_size": model.moe_intermediate_size,
        "num_experts_per_tok": model.experts_per_token,
        "num_local_experts": model.experts,
        "router_jitter_noise": 0.0,
    }


def _olmo2_fields(model: TinyModel) -> dict[str, Any]:
    return {"attention_bias": False}


def _olmoe_fields(model: TinyModel) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "clip_qkv": None,
        "intermediate_size": model.moe_intermediate_size,
        "norm_topk_prob": False,
        "num_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "rms_norm_eps": 1e-05,
    }


def _phi3_fields(model: TinyModel) -> dict[str, Any]:
    return {"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "sliding_window": None}


def _qwen3_moe_fields(model: TinyModel) -> dict[str, Any]:
    return _expert_fields(model) | {
        "head_dim": model.head_dim,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(min(model.first_k_dense_replace, model.layers))),
    }


_FAMILY_FIELDS: dict[str, Callable[[TinyModel], dict[str, Any]]] = {
    "bailing_moe": _bailing_fields,
    "bailing_moe_v2": _bailing_v2_fields,
    "glm4_moe": _glm4_moe_fields,
    "mistral": _mistral_fields,
    "mixtral": _mixtral_fields,
    "olmo2": _olmo2_fields,
    "olmoe": _olmoe_fields,
    "phi3": _phi3_fields,
    "qwen3_moe": _qwen3_moe_fields,
}


def tensor_table(model: TinyModel) -> Iterator[tuple[str, tuple[int, ...], float, str]]:
    """Return (name, shape, standard deviation, type) of every tensor; standard deviation 0 means a norm weight of ones.

    Projections that write into the residual stream are scaled by 1/sqrt(2 * layers), as in GPT-2.
    """
    architecture = architecture_of(model_config(model))
    names = family_of(architecture).tensors
    into_residual = (names.output, names.down)
    for name, shape in tensor_shapes(architecture).items():
        std = model.init_std / (math.sqrt(2 * model.layers) if name.endswith(into_residual) else 1.0)
        is_norm = len(shape) == 1 and not name.endswith("bias")
        yield name, shape, 0.0 if is_norm else std, "float32" if name.endswith(names.expert_bias) else model.dtype


def draw_tensor(seed: int, name: str, shape: tuple[int, ...], std: float) -> np.ndarray:
    if std == 0.0:
        return np.ones(shape, dtype=np.float32)
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    return (rng.standard_normal(shape) * std).astype(np.float32)


def to_bytes(values: np.ndarray, dtype: str) -> bytes:
    """Return little-endian bytes of fp32 values; bfloat16 rounds to nearest even (finite values only)."""
    if dtype == "bfloat16":
        bits = values.astype("<f4").view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return values.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()


def write_safetensors(path: Path, model: TinyModel) -> None:
    """Stream the tensors in table order: 8 bytes of header length, JSON header, data."""
    codes = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _, dtype in tensor_table(model):
        code, width = codes[dtype]
        end = offset + math.prod(shape) * width
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, std, dtype in tensor_table(model):
            file.write(to_bytes(draw_tensor(model.seed, name, shape, std), dtype))


def write_tokenizer(out: Path, model: TinyModel) -> None:
    """Write the tokenizer. A BPE without merges is a character tokenizer; it needs no code of ours to load."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocab = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNK, fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(BOXED, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (UNK, *ROLES, EOS)])
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": UNK,
        "additional_special_tokens": list(ROLES),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tiny_model(out: Path, model: TinyModel, *, force: bool = False) -> None:
    """Write the directory beside `out` and move it into place; `force` replaces a model directory that is there."""
    if out.exists():
        if not force:
            raise ValueError(f"{out} already exists; choose another directory or pass --force to replace it")
        if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
            raise ValueError(f"{out} exists and is not a model directory; --force replaces only those")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_safetensors(partial / "model.safetensors", model)
        write_tokenizer(partial, model)
        eos = TOKENS.index(EOS)
        write_json(partial / "config.json", model_config(model))
        write_json(partial / "generation_config.json", {"eos_token_id": eos, "pad_token_id": eos})
        if model.family in CONFIGURATION_MODULES:
            _, code = CONFIGURATION_MODULES[model.family]
            (partial / f"configuration_{model.family}.py").write_text(code, encoding="utf-8")
        if out.exists():
            replaced = partial.with_suffix(".replaced")
            out.rename(replaced)
            partial.rename(out)
            shutil.rmtree(replaced)
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model directory")
    default = TinyModel()
    for name in TinyModel.__slots__:
        value, flag = getattr(default, name), "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            choices = ("float32", "bfloat16", "float16") if name == "dtype" else None
            what = {"intermediate_size": "twice the hidden size", "vocab_size": "tokens, to a multiple of 64"}.get(name)
            help_text = f"default: {what or value}"
            parser.add_argument(flag, type=type(value), default=value, choices=choices, help=help_text)
    return parser


def main(argv: list[str]) -> int:
    options = vars(_parser().parse_args(argv))
    return exit_code("make_tiny_model", lambda: run(options.pop("out"), options.pop("force"), options))


def run(out: Path, force: bool, shape: dict[str, Any]) -> int:
    model = TinyModel(**shape)
    write_tiny_model(out, model, force=force)
    count = sum(math.prod(shape) for _, shape, *_ in tensor_table(model))
    print(f"{out}: {count:,} parameters, {model.dtype}, vocabulary {model.padded_vocab_size} ({len(TOKENS)} used)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
