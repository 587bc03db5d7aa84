"""Memory of a run, from shapes alone: what one training rank holds, and what its servers hold. No torch.

These are estimates of the large parts, not measurements: buffers of collectives, the allocator's fragments, the CUDA
context and whatever a kernel needs for itself come on top. On a GPU nothing of it has been measured yet.
"""

from dataclasses import asdict, dataclass

from megatron_rl.config.bailing import BailingConfig
from megatron_rl.config.schema import GenerationSection, RunConfig
from megatron_rl.layout import Layout

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
# Beside the weights. Gradients are fp32 for either; Adam has two moments, and bf16 weights an fp32 master copy.
_GRADIENT_BYTES = 4
_OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}
# What a checkpoint holds of each parameter.
SAVED_BYTES = {"float32": 16, "bfloat16": 14}
# Of a chunk of tokens, as in model/logprobs.py, which imports torch.
_LOGITS_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """What one training rank holds, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def stage_parameters(bailing: BailingConfig, layout: Layout) -> list[tuple[int, int]]:
    """Of every pipeline rank: parameters on one of its ranks outside of routed experts, and in them.

    Tensor parallelism divides attention, shared and dense MLPs, embedding and head; every rank has norms and routers.
    """
    h, t = bailing.hidden_size, layout.tensor
    q_rows = (bailing.num_attention_heads + 2 * bailing.num_key_value_heads) * bailing.head_dim
    attention = (h * q_rows + bailing.num_attention_heads * bailing.head_dim * h) // t + 2 * h
    experts = bailing.num_experts // layout.expert * 3 * h * bailing.moe_intermediate_size // layout.expert_tensor
    beside_experts = bailing.num_experts * h + 3 * h * bailing.shared_intermediate_size // t
    vocabulary = -(-bailing.vocab_size // t) * h
    sizes = layout.layers_per_stage(bailing.num_hidden_layers)
    found = [[0, 0] for _ in range(layout.pipeline)]
    layer = 0
    for stage, size in enumerate(sizes):
        for _ in range(size):
            moe = bailing.is_moe_layer(layer)
            dense = beside_experts if moe else 3 * h * bailing.intermediate_size // t
            found[stage % layout.pipeline][0] += attention + dense
            found[stage % layout.pipeline][1] += experts if moe else 0
            layer += 1
    found[0][0] += vocabulary
    if layout.pipeline > 1 or not bailing.tie_word_embeddings:
        found[-1][0] += vocabulary
    found[-1][0] += h
    return [(dense, routed) for dense, routed in found]


def layer_activation_bytes(bailing: BailingConfig, layout: Layout, num_tokens: int, item_bytes: int) -> int:
    """What one layer with experts keeps for its backward pass of `num_tokens` tokens of a context-parallel rank.

    Elements per token, with hidden size h, q, k and v the widths of queries, keys and values, s the width of the shared
    experts, K active experts of width m, expert_tensor e:

        2h              the residual stream before attention and before the experts
        2h              both after their norms: what attention and experts get
        3q + 2k + v     q, k, v; q and k after rotary; the output of attention
        3s              gate, up and their product
        K (2h e + 3m)   routed copies going in and coming back, which all e ranks of a group see; gate, up, product

    and two fp32 numbers per expert, the router's logits and probabilities. All is divided by the tensor-parallel size:
    by sequence parallelism, or as the weights are. Attention keeps no matrix of scores (flash attention), and experts
    are equally loaded.
    """
    h, t, e = bailing.hidden_size, layout.tensor, layout.expert_tensor
    q, k = bailing.num_attention_heads * bailing.head_dim, bailing.num_key_value_heads * bailing.head_dim
    routed = bailing.num_experts_per_tok * (2 * h * e + 3 * bailing.moe_intermediate_size)
    elements = 4 * h + 3 * q + 3 * k + 3 * bailing.shared_intermediate_size + routed
    return num_tokens * (elements * item_bytes + 2 * 4 * bailing.num_experts) // t


def rank_bytes(config: RunConfig, bailing: BailingConfig, layout: Layout) -> list[RankBytes]:
    """Of a rank of every pipeline stage.

    The distributed optimizer divides its states over the ranks that hold the same parameters: data x context of them
    for what is outside of experts, world / (expert x expert_tensor x pipeline) for experts. Stage p of a pipeline keeps
    the activations of up to pipeline - p micro-batches; with recomputation only each layer's input, and everything of
    one layer.
    """
    item = ITEM_BYTES[config.model.dtype]
    expert_replicas = layout.world_size // (layout.expert * layout.expert_tensor * layout.pipeline)
    num_tokens = config.train.micro_batch_tokens
    kept = layer_activation_bytes(bailing, layout, num_tokens, item)
    per_stage = layout.layers_per_stage(bailing.num_hidden_layers)
    found = []
    for stage, (dense, routed) in enumerate(stage_parameters(bailing, layout)):
        layers, in_flight = sum(per_stage[stage :: layout.pipeline]), layout.pipeline - stage
        activations = kept * layers * in_flight
        if config.model.recompute:
            activations = num_tokens * bailing.hidden_size * item // layout.tensor * layers * in_flight + kept
        logits = 0
        if stage == layout.pipeline - 1:
            logits = 3 * min(4 * num_tokens * -(-bailing.vocab_size // layout.tensor), _LOGITS_BYTES)
        shards = dense / (layout.data * layout.context) + routed / expert_replicas
        found.append(
            RankBytes(
                weights=(dense + routed) * item,
                gradients=(dense + routed) * _GRADIENT_BYTES,
                optimizer=round(shards * _OPTIMIZER_BYTES[config.model.dtype]),
                activations=activations,
                logits=logits,
            )
        )
    return found


def server_bytes(
    rollout: GenerationSection, dtype: str, bailing: BailingConfig, updates: bool = True
) -> tuple[int, int]:
    """Weights, and keys and values when every slot is full, of one generation server.

    updates: new weights come; the embedded server has both while they do, as the old ones serve until then.
    """
    item = ITEM_BYTES[dtype]
    embedded = rollout.engine == "embedded"
    per_token = 2 * bailing.num_hidden_layers * bailing.num_key_value_heads * bailing.head_dim
    slots = rollout.max_running_requests * rollout.max_sequence_tokens
    return (2 if embedded and updates else 1) * bailing.num_parameters() * item, slots * per_token * (
        4 if embedded else item
    )
