"""Takes weights out of Megatron under their Hugging Face names, to generation servers and to model directories."""
