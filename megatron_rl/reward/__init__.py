"""Judges responses. `Score` is what reward functions of the user's own may return."""

from megatron_rl.reward.score import Score as Score
