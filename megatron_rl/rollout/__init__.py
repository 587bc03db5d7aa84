"""Rollout: generation servers, the client that talks to them, the sampler. Knows nothing of megatron."""
