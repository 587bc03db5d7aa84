"""Chooses the distilled checkpoint from which reinforcement learning starts: the one whose policy has the right token
entropy."""
