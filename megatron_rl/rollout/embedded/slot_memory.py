"""Keeps the memory for the tokens in each slot: keys and values, chosen experts, the logits after the prompt."""

import torch

from megatron_rl.families import Architecture
from megatron_rl.rollout.embedded.cache import KVCache
from megatron_rl.rollout.embedded.routing import RoutingRecord


class SlotMemory:
    """Owns the tensors with one part per slot, and moves the parts between slots together."""

    def __init__(self, config: Architecture, num_slots: int, context_length: int) -> None:
        self.cache = KVCache(**cache_shape(config, num_slots, context_length))
        # Identical prompts copy them along with the cache.
        self.prompt_logits = torch.zeros(num_slots, config.vocab_size)
        self.routing = RoutingRecord(
            num_slots=num_slots,
            context_length=context_length,
            num_layers=config.num_hidden_layers,
            topk=config.num_experts_per_tok,
        )

    def copy(self, sources: list[int], targets: list[int], num_tokens: int, *, routed: bool) -> None:
        """Copy the first `num_tokens` tokens of each source to its target. routed: their experts are wanted too."""
        self.cache.copy_slots(sources, targets, num_tokens)
        if routed:
            self.routing.copy_slots(sources, targets, num_tokens)

    def copy_prompts(self, sources: list[int], targets: list[int], num_tokens: int, *, routed: bool) -> None:
        """Copy as `copy` does, and also the logits from which the next token is drawn."""
        self.copy(sources, targets, num_tokens, routed=routed)
        self.prompt_logits[targets] = self.prompt_logits[sources]


def cache_shape(config: Architecture, num_slots: int, context_length: int) -> dict[str, int]:
    """Return the arguments of a model's KVCache."""
    return {
        "num_layers": config.num_hidden_layers,
        "num_slots": num_slots,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "context_length": context_length,
    }
