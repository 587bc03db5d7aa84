"""This module computes the angles of rotary position embedding, for trainer and embedded server.

Legend: D head_dim, R its rotated part (D times `Rotary.fraction`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.families import Rotary


@dataclass(frozen=True, slots=True)
class Frequencies:
    """Holds the frequencies. inverse: [R / 2], angle per position. factor: what cos and sin are multiplied by."""

    inverse: Tensor
    factor: float

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cos and sin, [n, R] each, of positions [n]. The second half of R repeats the first. Their type is
        that of `inverse`."""
        angles = torch.outer(positions.to(self.inverse.dtype), self.inverse)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.factor, angles.sin() * self.factor


def frequencies(rotary: Rotary, head_dim: int, dtype: torch.dtype = torch.float64) -> Frequencies:
    """Compute the frequencies. Those of a kind other than "default" come from transformers (`ROPE_INIT_FUNCTIONS`), in
    fp32."""
    width = round(head_dim * rotary.fraction)
    if rotary.kind == "default":
        return Frequencies(1.0 / rotary.theta ** (torch.arange(0, width, 2, dtype=dtype) / width), 1.0)
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = dict(rotary.scaling)
    parameters = {"rope_type": rotary.kind, "rope_theta": rotary.theta, "partial_rotary_factor": rotary.fraction}
    config = LlamaConfig(
        head_dim=head_dim,
        # Nothing is computed from it; with this the library has nothing to warn of.
        max_position_embeddings=round(scaling["factor"] * scaling.get("original_max_position_embeddings", 1)),
        rope_parameters=parameters | scaling,
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[rotary.kind](config, torch.device("cpu"))
    return Frequencies(inverse.to(dtype), float(factor))
