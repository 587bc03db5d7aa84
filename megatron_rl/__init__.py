"""megatron_rl does C3PO reinforcement learning for Ling-lite on Megatron-core and SGLang."""

__version__ = "0.1.0"
