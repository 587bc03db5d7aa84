"""This package is `megatron-rl plan`: it says what a configuration means on so many GPUs, before anything is
started."""
