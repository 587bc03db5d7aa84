"""Reading a Hugging Face BailingMoE directory into the packed weights that `model.py` multiplies with.

Shapes: H hidden, V vocabulary, d head_dim, E experts, I expert width, W width of an MLP that sees every token (the
shared expert of a mixture-of-experts layer, or the MLP of a dense one).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.config.bailing import BailingConfig, load_bailing_config

READABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Fields of config.json that do not change what the weights compute.
_NOT_ARCHITECTURE = {"eos_token_id", "pad_token_id", "torch_dtype", "initializer_range", "max_position_embeddings"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer layer; matrices are stored [in, out], ready for `x @ w`."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [H, (nq + 2 nkv) d]
    dense: Tensor  # [nq d, H]
    mlp_norm: Tensor  # [H]
    mlp: "Mlp | None"  # over every token; None in a mixture-of-experts layer without shared experts
    router: Tensor | None  # [H, at least E] fp32, zero columns behind E; None in a dense layer
    experts: tuple["Mlp", ...]  # E of width I; none in a dense layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    gate_up: Tensor  # [H, 2 W]: the gate columns, then the up columns
    down: Tensor  # [W, H]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    embedding: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [H]
    head: Tensor  # [H, V] fp32, already normalised when norm_head is set


def expected_tensors(config: BailingConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor name of the model under its Hugging Face name, with its shape."""
    h, d = config.hidden_size, config.head_dim
    nq, nkv = config.num_attention_heads, config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (config.vocab_size, h),
        "model.norm.weight": (h,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, h)

    def add_mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (width, h)
        shapes[f"{prefix}.up_proj.weight"] = (width, h)
        shapes[f"{prefix}.down_proj.weight"] = (h, width)

    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (h,)
        shapes[f"{layer}.attention.query_key_value.weight"] = ((nq + 2 * nkv) * d, h)
        shapes[f"{layer}.attention.dense.weight"] = (h, nq * d)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (h,)
        if not config.is_moe_layer(index):
            add_mlp(f"{layer}.mlp", config.intermediate_size)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (config.num_experts, h)
        for expert in range(config.num_experts):
            add_mlp(f"{layer}.mlp.experts.{expert}", config.moe_intermediate_size)
        if config.num_shared_experts:
            add_mlp(f"{layer}.mlp.shared_experts", config.shared_intermediate_size)
    return shapes


def output_weight(config: BailingConfig) -> str:
    """Name of the tensor that makes logits."""
    return "model.word_embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"


def read_tensors(model_dir: str | Path, config: BailingConfig) -> dict[str, Tensor]:
    """All tensors of the directory, each exactly once, names, shapes and values checked against `config`.

    ValueError names what is wrong. Nothing is unpickled: only `*.safetensors` files are opened.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ValueError(f"model_path {str(model_dir)!r} is not a directory")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"model_path {str(model_dir)!r} holds no *.safetensors file")
    expected = expected_tensors(config)
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            _read_file(path, expected, tensors)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing in {directory}: {_some(missing)}")
    return tensors


def _read_file(path: Path, expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    with safe_open(str(path), framework="pt") as file:
        names = list(file.keys())
        unknown = sorted(set(names) - expected.keys())
        if unknown:
            raise ValueError(f"{len(unknown)} tensors of {path} are unknown to this model: {_some(unknown)}")
        for name in names:
            if name in tensors:
                raise ValueError(f"tensor {name} is in more than one file; the second is {path}")
            tensor = file.get_tensor(name)
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(f"tensor {name} must have shape {expected[name]}, got {tuple(tensor.shape)} in {path}")
            if tensor.dtype not in READABLE_DTYPES:
                raise ValueError(f"tensor {name} must be float32, bfloat16 or float16, got {tensor.dtype} in {path}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"tensor {name} in {path} holds values that are not finite")
            tensors[name] = tensor


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def pack(tensors: dict[str, Tensor], config: BailingConfig, dtype: torch.dtype) -> ModelWeights:
    """Copy the tensors into matrices laid out for `model.py`; nothing of the result aliases a mapped file."""

    def matrix(*names: str) -> Tensor:
        # [out_0 + out_1 + ..., in] -> contiguous [in, out]
        return torch.cat([tensors[n].to(dtype) for n in names]).t().contiguous()

    def vector(name: str) -> Tensor:
        return tensors[name].to(dtype, copy=True)

    def mlp(prefix: str) -> Mlp:
        return Mlp(
            gate_up=matrix(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"),
            down=matrix(f"{prefix}.down_proj.weight"),
        )

    layers = []
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        is_moe = config.is_moe_layer(index)
        everyones = f"{layer}.mlp.shared_experts" if is_moe else f"{layer}.mlp"
        num_experts = config.num_experts if is_moe else 0
        router = tensors.get(f"{layer}.mlp.gate.weight")
        layers.append(
            LayerWeights(
                input_norm=vector(f"{layer}.input_layernorm.weight"),
                qkv=matrix(f"{layer}.attention.query_key_value.weight"),
                dense=matrix(f"{layer}.attention.dense.weight"),
                mlp_norm=vector(f"{layer}.post_attention_layernorm.weight"),
                mlp=None if is_moe and not config.num_shared_experts else mlp(everyones),
                router=None if router is None else _router(router),
                experts=tuple(mlp(f"{layer}.mlp.experts.{expert}") for expert in range(num_experts)),
            )
        )
    return ModelWeights(
        embedding=vector("model.word_embeddings.weight"),
        layers=tuple(layers),
        final_norm=vector("model.norm.weight"),
        head=_head(tensors[output_weight(config)], config.norm_head),
    )


def _router(raw: Tensor) -> Tensor:
    """[E, H] -> fp32 [H, E filled up to a multiple of 16]: in a product of 5 to 11 columns some processors' kernels
    give a row bits that depend on its place."""
    num_experts, hidden = raw.shape
    router = torch.zeros(hidden, -(-num_experts // 16) * 16)
    router[:, :num_experts] = raw.float().t()
    return router


def _head(raw: Tensor, norm_head: bool) -> Tensor:
    """Raw output weight [V, H] -> [H, V] in fp32; norm_head divides each hidden column by its norm over V."""
    weight = raw.to(torch.float32, copy=True)
    if norm_head:
        weight /= torch.linalg.vector_norm(weight, dim=0, keepdim=True) + 1e-7
    return weight.t().contiguous()


def load_weights(model_dir: str | Path, config: BailingConfig, dtype: torch.dtype) -> ModelWeights:
    """Read, check and pack a directory for a model of shape `config`.

    A config.json in the directory must describe the same architecture; a directory of tensors alone is fine.
    """
    if (Path(model_dir) / "config.json").is_file():
        _require_same_architecture(config, load_bailing_config(model_dir), model_dir)
    return pack(read_tensors(model_dir, config), config, dtype)


def _require_same_architecture(ours: BailingConfig, theirs: BailingConfig, model_dir: str | Path) -> None:
    for name, value in ours.model_dump(exclude=_NOT_ARCHITECTURE).items():
        other = getattr(theirs, name)
        if other != value:
            raise ValueError(
                f"{name} of {model_dir}/config.json must be {value!r} as in the served model, got {other!r}"
            )
