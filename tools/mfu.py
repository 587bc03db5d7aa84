"""This module does the arithmetic of training speed: operations of a model, what a device could do, how many layers fit
it."""

from collections.abc import Callable, Sequence

from megatron_rl.c3po.packing import cost_model
from megatron_rl.config.lora import LoraSection
from megatron_rl.families import Architecture

# Dense bf16 FLOP/s with fp32 accumulation, from the vendor's datasheets; the first part of a name that fits decides.
NOMINAL_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
}


def model_flops(
    architecture: Architecture, lengths: Sequence[int], num_loss_tokens: int, lora: LoraSection | None = None
) -> float:
    """Return the useful FLOPs of forward and backward of sequences of `lengths` tokens, the head at `num_loss_tokens`
    of them.

        3 * ( sum over sequences (2 A n + 2 L W n^2)  +  2 V H M )

    A: weights outside of embedding and head that a token meets (attention, norms, router, shared and chosen experts);
    n: tokens of a sequence; L layers; W = heads * head_dim; V vocabulary; H hidden size; M loss tokens. Causal
    attention is half of its two products of 2 W n^2 each. Backward counts twice forward. What is computed once more
    (activation recomputation, the fused head's logits in backward) is not useful and not counted. M = 0 leaves the
    head out. With adapters of P weights that a token meets frozen products have one product in backward, and attention
    two:

        2 * ( sum over sequences 2 A n  +  2 V H M )  +  3 * sum over sequences (2 L W n^2 + 2 P n)
    """
    cost, head = cost_model(architecture), 2.0 * architecture.vocab_size * architecture.hidden_size
    layers = sum((cost.linear - head) * n + cost.quadratic * n * n for n in lengths)
    if lora is None:
        return 3.0 * (layers + head * num_loss_tokens)
    attention = sum(cost.quadratic * n * n for n in lengths)
    factors = 2.0 * lora.num_active_parameters(architecture) * sum(lengths)
    return 2.0 * (layers - attention + head * num_loss_tokens) + 3.0 * (attention + factors)


def nominal_peak(device_name: str) -> float:
    """Return the nominal FLOP/s. ValueError for a device that the table does not have."""
    for part, peak in NOMINAL_PEAKS.items():
        if part in device_name:
            return peak
    raise ValueError(
        f"no nominal peak is known of {device_name!r} ({', '.join(NOMINAL_PEAKS)} are); give its dense bf16 FLOP/s by "
        "--peak, such as --peak 989e12"
    )


def layers_that_fit(planned_bytes: Callable[[int], int], most: int, available_bytes: float) -> int:
    """Return the largest number of layers, at most `most`, whose planned bytes are available. ValueError when not even
    one is."""
    for layers in range(most, 0, -1):
        if planned_bytes(layers) <= available_bytes:
            return layers
    raise ValueError(
        f"one layer is planned to take {planned_bytes(1) / 2**30:.1f} GiB and {available_bytes / 2**30:.1f} GiB are "
        "there; give shorter sequences by --lengths, or --smoke"
    )
