"""This module estimates the memory of a run from shapes alone: what one training rank holds, and what its servers hold.
It needs no torch.

These are estimates of the large parts, not measurements: buffers of collectives, the allocator's fragments, the CUDA
context and whatever a kernel needs for itself come on top. For one GPU with local layers they are within 5 % of what
the same code allocates on torch's meta device (tests/test_memory.py). On an H200 they were within 1 % (docs/gpu.md).
Transformer Engine's layers keep less.
"""

from dataclasses import asdict, dataclass

from megatron_rl.config.layout import Layout
from megatron_rl.config.lora import TARGETS, LoraSection
from megatron_rl.config.model import ModelSection
from megatron_rl.config.rollout import GenerationSection
from megatron_rl.config.schema import RlConfig, RunConfig
from megatron_rl.families import Architecture

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
# Bytes of each parameter beside its weight. Gradients are always fp32. Adam has two moments, and bf16 weights have an
# fp32 master copy.
_GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}
# The bytes that a checkpoint holds of each parameter.
SAVED_BYTES = {"float32": 16, "bfloat16": 14}
# The logits of a chunk of tokens take as much, as in model/logprobs.py, which imports torch.
_LOGITS_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """Holds the bytes that one training rank needs, by part.

    activations: what is kept for backward passes. temporary: the most that is needed beside them, in the head's
    backward pass (logits, its weight's gradient) or in a layer's (what is recomputed of it, gradients).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def stage_parameters(architecture: Architecture, layout: Layout) -> list[tuple[int, int]]:
    """Count the parameters on one rank of every pipeline stage: outside of routed experts, and in them.

    Tensor parallelism divides attention, shared and dense MLPs, embedding and head; every rank has all norms and
    routers.
    """
    h, t = architecture.hidden_size, layout.tensor
    q, k = _attention_widths(architecture)
    small = (q + 2 * k) // t * architecture.qkv_bias + sum(architecture.qk_norm_sizes)
    attention = (h * (q + 2 * k) + q * h) // t + 2 * h + small
    experts = (
        architecture.num_experts // layout.expert * 3 * h * architecture.moe_intermediate_size // layout.expert_tensor
    )
    beside_experts = (
        architecture.num_experts * (h + architecture.expert_bias) + 3 * h * architecture.shared_intermediate_size // t
    )
    vocabulary = -(-architecture.vocab_size // t) * h
    sizes = layout.layers_per_stage(architecture.num_hidden_layers)
    found = [[0, 0] for _ in range(layout.pipeline)]
    layer = 0
    for stage, size in enumerate(sizes):
        for _ in range(size):
            moe = architecture.is_moe_layer(layer)
            dense = beside_experts if moe else 3 * h * architecture.intermediate_size // t
            found[stage % layout.pipeline][0] += attention + dense
            found[stage % layout.pipeline][1] += experts if moe else 0
            layer += 1
    found[0][0] += vocabulary
    if layout.pipeline > 1 or not architecture.tie_word_embeddings:
        found[-1][0] += vocabulary
    found[-1][0] += h
    return [(dense, routed) for dense, routed in found]


def trained_parameters(lora: LoraSection | None, architecture: Architecture, layout: Layout) -> list[tuple[int, int]]:
    """Count the parameters with a gradient on each pipeline rank, as `stage_parameters` does: all of them, or the
    adapters."""
    if lora is None:
        return stage_parameters(architecture, layout)
    found = [[0, 0] for _ in range(layout.pipeline)]
    first = 0
    for stage, size in enumerate(layout.layers_per_stage(architecture.num_hidden_layers)):
        for layer in range(first, first + size):
            for i, number in enumerate(lora.layer_parameters(architecture, layout, layer)):
                found[stage % layout.pipeline][i] += number
        first += size
    return [(dense, routed) for dense, routed in found]


def num_trained_parameters(lora: LoraSection | None, architecture: Architecture) -> int:
    """Count the parameters of a whole model that have a gradient. These have optimizer states and a place in a
    checkpoint."""
    return architecture.num_parameters() if lora is None else lora.num_parameters(architecture)


def _attention_widths(architecture: Architecture) -> tuple[int, int]:
    """Return the widths of queries and of keys; values are as wide as keys."""
    return (
        architecture.num_attention_heads * architecture.head_dim,
        architecture.num_key_value_heads * architecture.head_dim,
    )


def layer_activation_bytes(
    architecture: Architecture,
    model: ModelSection,
    layout: Layout,
    num_tokens: int,
    moe: bool,
    lora: LoraSection | None = None,
) -> dict[str, int]:
    """Return the bytes, by part, that one local layer keeps for its backward pass of a context-parallel rank's
    `num_tokens` tokens.

    Elements per token, with hidden size h, q and k the widths of queries and of keys (as of values), w the width of a
    dense MLP or of the shared experts, K active experts of width m, context c, expert_tensor e:

        norms       4h           the residual stream before attention and before the MLP, and both after their norms
        attention   2q + 2k      q and k after rotary, v, the output. Without flash attention (fp32, c above 1, or
                                 "sdpa" asked for) the output once more, and keys and values of all c ranks. Where
                                 ranks share a key-value head, the queries, keys and values of all of them
        mlp         3w           gate and up, silu(gate) up; likewise shared_experts
        moe         K (he + 3m)  of every choice the input, which all e ranks of a group see, gate and up, and
                                 silu(gate) up times the probability

    With adapters of rank r each of the two products of a part keeps r more. A part without adapters keeps nothing for
    its weights, which are frozen: mlp and shared_experts then keep 2w, moe 2Km.

    The router adds 33 bytes per expert and 32 per choice. All is divided by the tensor-parallel size: by sequence
    parallelism, or as the weights are. Experts are equally loaded. Norms and SwiGLU are fused, as on a GPU.
    """
    h, c, e = architecture.hidden_size, layout.context, layout.expert_tensor
    q, k = _attention_widths(architecture)
    item = ITEM_BYTES[model.dtype]
    flash = model.dtype == "bfloat16" and c == 1 and model.attention != "sdpa"
    elements = {"norms": 4 * h, "attention": 2 * q + 2 * k if flash else 3 * q + 2 * k * c}
    if layout.tensor > architecture.num_key_value_heads:
        elements["attention"] += (q + 2 * k) * layout.tensor
    targets = TARGETS if lora is None else lora.targets
    widths = (
        {"shared_experts": architecture.shared_intermediate_size} if moe else {"mlp": architecture.intermediate_size}
    )
    elements |= {part: (3 if part in targets else 2) * width for part, width in widths.items()}
    if moe:
        width = architecture.moe_intermediate_size
        of_choice = h * e + 3 * width if "experts" in targets else 2 * width
        elements["moe"] = architecture.num_experts_per_tok * of_choice
    if lora is not None:
        choices = {"moe": architecture.num_experts_per_tok if "experts" in targets else 0}
        for part in elements.keys() & {"attention", "mlp", "shared_experts", "moe"}:
            elements[part] += 2 * lora.rank * choices.get(part, int(part in targets)) * layout.tensor
    router = {"moe": 33 * architecture.num_experts + 32 * architecture.num_experts_per_tok}
    return {
        part: num_tokens * (number * item + router.get(part, 0)) // layout.tensor for part, number in elements.items()
    }


def _layer_gradient_bytes(
    architecture: Architecture,
    model: ModelSection,
    layout: Layout,
    num_tokens: int,
    moe: bool,
    lora: LoraSection | None = None,
) -> int:
    """Return the most bytes that come and go in a local layer's backward pass. At its MLP's last product these are the
    gradients of the product, of its input and of its weight. At its first one it is that of a weight twice as large,
    when what the last one kept is gone. Three gradients of the residual stream come on top. quack has none of the
    experts' weights."""
    h, t, e = architecture.hidden_size, layout.tensor, layout.expert_tensor
    if moe:
        width = architecture.moe_intermediate_size
        weight = architecture.num_experts // layout.expert * h * width // e
        weight = 0 if model.expert_weight_gradient == "quack" else weight
        choices, of_adapter = architecture.num_experts_per_tok, lora is not None and "experts" in lora.targets
        last = choices * (h * e + (2 if of_adapter else 1) * width)
        first = choices * ((2 if of_adapter else 1) * h * e - width)
    else:
        width = architecture.intermediate_size
        weight = h * width // t
        last, first = width, 0
    weight = 0 if lora is not None else weight
    elements = max(num_tokens * last // t + weight, num_tokens * first // t + 2 * weight) + 3 * num_tokens * h // t
    return elements * ITEM_BYTES[model.dtype]


def _kept_bytes(
    parts: dict[str, int], architecture: Architecture, model: ModelSection, num_tokens: int
) -> tuple[int, int]:
    """Return the bytes that a layer which keeps `parts` holds until its backward pass, and those that come back during
    it, with the recomputation that `model` asks for. num_tokens: the tokens of a tensor-parallel rank whose input is
    kept."""
    everything = sum(parts.values())
    match model.recompute:
        case "none":
            return everything, 0
        case "full":
            return num_tokens * architecture.hidden_size * ITEM_BYTES[model.dtype], everything
    again = parts.keys() & {*model.recompute_modules, *(["shared_experts"] if "moe" in model.recompute_modules else [])}
    kept = everything - sum(parts[part] for part in again)
    if "core_attn" in model.recompute_modules:  # q, k, v as they come, q once more, and the output
        q, k = _attention_widths(architecture)
        inputs = num_tokens * (3 * q + 2 * k) * ITEM_BYTES[model.dtype]
        return kept - parts["attention"] + inputs, max(parts["attention"], everything - kept)
    return kept, everything - kept


def rank_bytes(config: RunConfig, architecture: Architecture, layout: Layout) -> list[RankBytes]:
    """Return the memory of a rank of every pipeline stage.

    The distributed optimizer divides its states over the ranks that hold the same parameters: data x context of them
    for what is outside of experts, world / (expert x expert_tensor x pipeline) for experts. Those in host memory
    (`optimizer.offload_fraction`) come back in pieces of a GiB, when there are no activations. Stage p of a pipeline
    keeps the activations of up to pipeline - p micro-batches; of what is recomputed, one layer's. The head has a chunk
    of logits and of their gradient, the gradient of its weight in fp32 and as it is added to the others', and two
    hidden states. With [lora] there are gradients and states of the adapters alone.
    """
    model, item = config.model, ITEM_BYTES[config.model.dtype]
    expert_replicas = layout.world_size // (layout.expert * layout.expert_tensor * layout.pipeline)
    num_tokens = config.train.micro_batch_tokens
    kinds = {}
    for moe in (False, True):
        shape = architecture, model, layout, num_tokens, moe, config.lora
        kept, again = _kept_bytes(layer_activation_bytes(*shape), architecture, model, num_tokens // layout.tensor)
        kinds[moe] = kept, again + _layer_gradient_bytes(*shape)
    sizes = layout.layers_per_stage(architecture.num_hidden_layers)
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = []
    trained = trained_parameters(config.lora, architecture, layout)
    for stage, (dense, routed) in enumerate(stage_parameters(architecture, layout)):
        trained_dense, trained_routed = trained[stage]
        frozen = 0 if config.lora is None else dense + routed
        mine = range(stage, len(sizes), layout.pipeline)
        layers = [kinds[architecture.is_moe_layer(firsts[i] + j)] for i in mine for j in range(sizes[i])]
        temporary = max((layer for _, layer in layers), default=0)
        if stage == layout.pipeline - 1:
            rows = -(-architecture.vocab_size // layout.tensor)
            logits = min(4 * num_tokens * rows, _LOGITS_BYTES)
            head = logits + logits * item // 4 + 2 * num_tokens * architecture.hidden_size * item
            of_weight = 0 if frozen else rows * architecture.hidden_size * (4 if item == 4 else 4 + item)
            temporary = max(temporary, head + of_weight)
        shards = trained_dense / (layout.data * layout.context) + trained_routed / expert_replicas
        states = shards * OPTIMIZER_BYTES[model.dtype] * (1.0 - config.optimizer.offload_fraction)
        found.append(
            RankBytes(
                weights=(frozen + trained_dense + trained_routed) * item,
                gradients=(trained_dense + trained_routed) * _GRADIENT_BYTES,
                optimizer=round(states),
                activations=sum(kept for kept, _ in layers) * (layout.pipeline - stage),
                temporary=temporary,
            )
        )
    return found


def host_bytes(config: RunConfig, architecture: Architecture, layout: Layout, num_ranks: int) -> dict[str, int]:
    """Estimate the host memory of a machine with `num_ranks` of the training ranks, by part. What these hold on their
    devices and what servers hold is not counted.

        checkpoint  the copy that becomes one
        optimizer   states that live in host memory, or are there while servers generate
        reference   weights of the KL term, and the present ones while those take their place; with [lora] none
        exports     on one machine: two in the folder that servers read
        buckets     of weights on their way by gloo, two on the first rank and one on each other
    """
    item, share = ITEM_BYTES[config.model.dtype], num_ranks / layout.world_size
    stages = rank_bytes(config, architecture, layout)
    ranks_per_stage = layout.world_size // layout.pipeline
    trained = num_trained_parameters(config.lora, architecture)
    found = {"checkpoint": round(share * trained * SAVED_BYTES[config.model.dtype])}
    offload = config.optimizer.offload_fraction
    if isinstance(config, RlConfig) and config.train.offload_while_generating:
        offload = 1.0
    if offload:
        states = trained * OPTIMIZER_BYTES[config.model.dtype]
        found["optimizer"] = round(share * offload * states)
    if not isinstance(config, RlConfig):
        return found
    if config.algorithm.kl_coefficient and config.lora is None:
        found["reference"] = round(share * 2 * ranks_per_stage * sum(rank.weights for rank in stages))
    if share == 1.0:
        found["exports"] = 2 * architecture.num_parameters() * item
    if config.sync.transport == "distributed":
        found["buckets"] = (num_ranks + 1) * config.sync.bucket_mb * 2**20
    return found


def serving_host_bytes(
    rollout: GenerationSection, dtype: str, architecture: Architecture, num_gpus: int, updates: bool = True
) -> int:
    """Estimate the host memory of all servers of a machine with so many GPUs: embedded ones, and SGLang's on a CPU."""
    if num_gpus and rollout.engine == "sglang":
        return 0
    return rollout.servers_on(num_gpus) * sum(server_bytes(rollout, dtype, architecture, updates))


def server_bytes(
    rollout: GenerationSection, dtype: str, architecture: Architecture, updates: bool = True
) -> tuple[int, int]:
    """Return the bytes of one generation server: weights, and keys and values when every slot is full.

    updates: new weights come. The embedded server then has both for a while, since the old ones serve until the new
    ones are there.
    """
    item = ITEM_BYTES[dtype]
    embedded = rollout.engine == "embedded"
    per_token = 2 * architecture.num_hidden_layers * architecture.num_key_value_heads * architecture.head_dim
    slots = rollout.max_running_requests * rollout.max_sequence_tokens
    return (2 if embedded and updates else 1) * architecture.num_parameters() * item, slots * per_token * (
        4 if embedded else item
    )
