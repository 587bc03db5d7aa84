"""Contains the rollout: generation servers, the client that talks to them, and the sampler. Knows nothing of
megatron."""
