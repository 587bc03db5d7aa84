"""Runs `megatron-rl evaluate`: samples benchmarks k times, saves responses as they come, and says what they show of the
model."""
