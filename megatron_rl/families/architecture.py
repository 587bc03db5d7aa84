"""This module holds the neutral description of a transformer that trainer, servers, converter, planner and simulator
read."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_rl.families.bounds import MAX_MTP_LAYERS, MAX_TOKENS, Flag, MaybeWidth, TokenId, Width, above_zero, whole

_MAX_EXPERTS_OF_ALL_LAYERS = 2**18
# Fields that change neither what weights compute nor their shapes.
_OF_NO_WEIGHTS = {"eos_token_ids", "initializer_range", "max_position_embeddings", "num_mtp_layers"}

RotaryKind = Literal["default", "linear", "yarn", "llama3"]


class Rotary(BaseModel):
    """Describes rotary position embedding with rotate-half (neox) pairing.

    kind and scaling: as transformers' `rope_parameters` name them; the length that the model was trained with is
    always written out, so equal tables have equal records. fraction: the share of head_dim that is rotated, from its
    first element on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: RotaryKind = "default"
    theta: Annotated[float, above_zero(1e15)] = 10000.0
    fraction: Annotated[float, above_zero(1.0)] = 1.0
    scaling: tuple[tuple[str, int | float | bool], ...] = ()


class Architecture(BaseModel):
    """Holds the shape of a model: everything of its config.json that changes what its weights compute.

    Fields have the names that Hugging Face's config classes share. A layer is attention between two RMS norms, and an
    MLP with SwiGLU: one for all tokens (dense), or a mixture of experts, of which a router chooses.

    family: its key in the registry, which knows the names of tensors. intermediate_size: that of the MLP of dense
    layers; 0 where there is none. dense_layers: the layers without experts, of a model that has some. qkv_bias: query,
    key and value projections have one. qk_norm: RMS norm of queries and keys, before rotary: over head_dim, or with
    qk_norm_joins_heads over all heads of the queries of a token, and over all of its keys.
    norms_outputs: the two norms of a layer are of what attention and the MLP give, before that is added to the rest,
    and not of what they read.
    norm_head: logits are those of the head divided by its norm over the vocabulary, column by column.
    score_function: makes scores of the router's logits: softmax over all experts, or sigmoid of each alone.
    expert_bias: experts are chosen by score + a bias, which training leaves as it is and which does not enter their
    weights. n_group, topk_group: experts are chosen from this many of so many equal groups, those whose two best
    scores have the largest sum. norm_topk_prob: the scores of the chosen experts are divided by their sum.
    routed_scaling_factor: the scores are then multiplied by this.
    num_mtp_layers: layers that predict further tokens (MTP). Files may have them behind the last layer; they are left
    out everywhere.
    eos_token_ids: those of config.json and generation_config.json; each of them ends a response.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    family: str
    vocab_size: Annotated[int, whole(1, MAX_TOKENS)]
    hidden_size: Width
    intermediate_size: MaybeWidth
    num_hidden_layers: Annotated[int, whole(1, 4096)]
    num_attention_heads: Annotated[int, whole(1, 4096)]
    num_key_value_heads: Annotated[int, whole(1, 4096)]
    head_dim: Annotated[int, whole(0, 2**16)] = Field(
        default=0, description="0 means hidden_size / num_attention_heads"
    )
    qkv_bias: Flag = False
    qk_norm: Flag = False
    qk_norm_joins_heads: Flag = False
    norms_outputs: Flag = False
    rotary: Rotary = Rotary()
    dense_layers: tuple[int, ...] = ()
    num_experts: Annotated[int, whole(0, 2**16)] = 0
    num_experts_per_tok: Annotated[int, whole(0, 2**16)] = 0
    moe_intermediate_size: MaybeWidth = 0
    shared_intermediate_size: MaybeWidth = Field(default=0, description="0 without shared experts")
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    expert_bias: Flag = False
    n_group: Annotated[int, whole(1, 2**16)] = 1
    topk_group: Annotated[int, whole(1, 2**16)] = 1
    norm_topk_prob: Flag = True
    routed_scaling_factor: Annotated[float, above_zero(1e6)] = 1.0
    num_mtp_layers: Annotated[int, whole(0, MAX_MTP_LAYERS)] = 0
    norm_head: Flag = False
    tie_word_embeddings: Flag = Field(default=False, description="the LM head is the embedding")
    max_position_embeddings: Annotated[int, whole(1, 2**30)]
    rms_norm_eps: Annotated[float, above_zero(1.0)] = 1e-6
    initializer_range: Annotated[float, above_zero(1e3)] = 0.02
    eos_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=16)]

    def differences(self, other: "Architecture") -> dict[str, tuple[Any, Any]]:
        """Return the fields by which the same weights would compute something else, or would not fit, with the values
        of both."""
        mine, others = (one.model_dump(exclude=_OF_NO_WEIGHTS) for one in (self, other))
        return {name: (value, others[name]) for name, value in mine.items() if others[name] != value}

    @model_validator(mode="after")
    def _check_sizes(self) -> "Architecture":
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
        if self.head_dim * self.rotary.fraction % 2:
            raise ValueError(
                f"head_dim {self.head_dim} times the rotated share {self.rotary.fraction:g} must be an even number"
            )
        if self.num_dense_layers and not self.intermediate_size:
            raise ValueError("intermediate_size must be above 0 for layers without experts")
        return self

    @model_validator(mode="after")
    def _check_routing(self) -> "Architecture":
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        if self.score_function == "softmax" and (self.expert_bias or self.n_group > 1):
            raise ValueError("expert_bias and groups of experts need score_function 'sigmoid', got 'softmax'")
        if self.score_function == "sigmoid" and self.norm_topk_prob != (self.num_experts_per_tok > 1):
            raise ValueError(
                "norm_topk_prob must be true for score_function 'sigmoid' with several experts per token, and false "
                f"with one, got {self.norm_topk_prob} with {self.num_experts_per_tok}"
            )
        if self.n_group > 1:
            self._check_groups()
        return self

    def _check_groups(self) -> None:
        size, left_over = divmod(self.num_experts, self.n_group)
        if left_over or size < 2:
            raise ValueError(
                f"n_group {self.n_group} must divide num_experts {self.num_experts} into groups of at least 2"
            )
        if self.topk_group > self.n_group or self.topk_group * size < self.num_experts_per_tok:
            raise ValueError(
                f"topk_group {self.topk_group} must be at most n_group {self.n_group}, and its groups of {size} "
                f"experts must hold num_experts_per_tok {self.num_experts_per_tok}"
            )

    def is_moe_layer(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def num_moe_layers(self) -> int:
        return sum(map(self.is_moe_layer, range(self.num_hidden_layers)))

    @property
    def num_dense_layers(self) -> int:
        return self.num_hidden_layers - self.num_moe_layers

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """The numbers of weights of the norms of a layer's queries and of its keys."""
        if not self.qk_norm:
            return 0, 0
        if not self.qk_norm_joins_heads:
            return self.head_dim, self.head_dim
        return self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim

    def num_parameters(self) -> int:
        """Count all weights, embedding and LM head included (once when they are tied)."""
        h = self.hidden_size
        mlps = self.num_dense_layers * 3 * h * self.intermediate_size
        vocabulary = (1 if self.tie_word_embeddings else 2) * self.vocab_size * h
        return self.num_hidden_layers * self._attention_parameters() + self._moe_parameters() + mlps + vocabulary + h

    def _attention_parameters(self) -> int:
        """Count the parameters of one layer's attention, its two norms included."""
        h, qkv_rows = self.hidden_size, (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        small = (qkv_rows if self.qkv_bias else 0) + sum(self.qk_norm_sizes)
        return h * qkv_rows + self.num_attention_heads * self.head_dim * h + 2 * h + small

    def _moe_parameters(self) -> int:
        """Count the parameters of the mixtures of experts of all layers, routers included."""
        h = self.hidden_size
        experts = self.num_experts * (3 * h * self.moe_intermediate_size + h + self.expert_bias)
        return self.num_moe_layers * (experts + 3 * h * self.shared_intermediate_size)

    def num_active_parameters(self) -> int:
        """Count the parameters that a token passes through, embedding and LM head whole."""
        idle = self.num_experts - self.num_experts_per_tok
        return self.num_parameters() - self.num_moe_layers * idle * 3 * self.hidden_size * self.moe_intermediate_size
