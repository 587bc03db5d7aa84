"""Ling-lite checkpoints: the one name table, inverse reshapes, reading and writing Hugging Face directories."""
