"""`megatron-rl evaluate`: benchmarks sampled k times, responses saved as they come, and what they say of the model."""
