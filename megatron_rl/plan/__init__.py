"""`megatron-rl plan`: what a configuration means on so many GPUs, before anything is started."""
