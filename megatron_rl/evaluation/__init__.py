"""Runs `megatron-rl evaluate`: samples benchmarks k times, saves responses as they come, and what they say of the
model."""
