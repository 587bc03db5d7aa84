"""This module says what a family calls its tensors in Hugging Face files, and their shapes."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.families.architecture import Architecture

Shape = tuple[int, ...]

# Old files hold rotary frequencies under names with this ending. Here config.json gives the frequencies.
_ROTARY_BUFFER = ".rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Holds the names of a model's tensors. The defaults are those of Llama, which most families share.

    layer, experts: with the number in place of {}. What follows them is the name within a layer. input_norm, mlp_norm:
    of attention and of the MLP, wherever the model has them. qkv: the projections of queries, keys and values without
    `.weight` or `.bias`: one name where the file has them in one tensor, all queries first. gate_up: those of an MLP's
    gate and of what it gates: one name where they are one tensor, the gate first. qk_norms: of queries and of keys.
    expert_bias: fp32 in every file, whatever the model's type is.
    """

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{}."
    input_norm: str = "input_layernorm.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj.weight"
    qk_norms: tuple[str, str] = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    mlp: str = "mlp."
    router: str = "mlp.gate.weight"
    expert_bias: str = "mlp.gate.expert_bias"
    experts: str = "mlp.experts.{}."
    shared: str = "mlp.shared_experts."
    gate_up: tuple[str, ...] = ("gate_proj.weight", "up_proj.weight")
    down: str = "down_proj.weight"

    def shapes(self, model: Architecture) -> dict[str, Shape]:
        """Return the shape of every tensor of the model by its name."""
        h, v = model.hidden_size, model.vocab_size
        found: dict[str, Shape] = {self.embedding: (v, h)}
        for index in range(model.num_hidden_layers):
            prefix = self.layer.format(index)
            found[prefix + self.input_norm] = (h,)
            found |= {prefix + name: shape for name, shape in self._attention(model)}
            found[prefix + self.mlp_norm] = (h,)
            mlp = self._experts(model) if model.is_moe_layer(index) else self._mlp(self.mlp, h, model.intermediate_size)
            found |= {prefix + name: shape for name, shape in mlp}
        found[self.final_norm] = (h,)
        return found if model.tie_word_embeddings else found | {self.head: (v, h)}

    def is_left_out(self, name: str, model: Architecture) -> bool:
        """Tell whether a tensor may be in a file and is none of the model's: rotary frequencies, and layers that
        predict further tokens (MTP), which have the numbers behind the last layer."""
        behind = range(model.num_hidden_layers, model.num_hidden_layers + model.num_mtp_layers)
        return name.endswith(_ROTARY_BUFFER) or name.startswith(tuple(map(self.layer.format, behind)))

    @property
    def not_tied(self) -> str:
        """Return the message about a file whose head is not the embedding, though config.json says that it is."""
        return f"{self.head} is not {self.embedding}, but tie_word_embeddings is true; set it to false in config.json"

    def qkv_rows(self, model: Architecture) -> Shape:
        """Count the rows of each of the tensors `qkv`."""
        q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        return (q, kv, kv) if len(self.qkv) > 1 else (q + 2 * kv,)

    def _attention(self, model: Architecture) -> Iterator[tuple[str, Shape]]:
        h, rows = model.hidden_size, self.qkv_rows(model)
        yield from ((f"{name}.weight", (number, h)) for name, number in zip(self.qkv, rows, strict=True))
        if model.qkv_bias:
            yield from ((f"{name}.bias", (number,)) for name, number in zip(self.qkv, rows, strict=True))
        if model.qk_norm:
            yield from ((name, (size,)) for name, size in zip(self.qk_norms, model.qk_norm_sizes, strict=True))
        yield self.output, (h, model.num_attention_heads * model.head_dim)

    def _experts(self, model: Architecture) -> Iterator[tuple[str, Shape]]:
        h = model.hidden_size
        yield self.router, (model.num_experts, h)
        if model.expert_bias:
            yield self.expert_bias, (model.num_experts,)
        for expert in range(model.num_experts):
            yield from self._mlp(self.experts.format(expert), h, model.moe_intermediate_size)
        if model.shared_intermediate_size:
            yield from self._mlp(self.shared, h, model.shared_intermediate_size)

    def _mlp(self, prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
        rows = 2 * width // len(self.gate_up)
        yield from ((prefix + name, (rows, hidden)) for name in self.gate_up)
        yield prefix + self.down, (hidden, width)
