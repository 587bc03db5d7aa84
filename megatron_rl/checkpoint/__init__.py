"""Ling-lite checkpoints: the one name table, pairs of inverse reshapes, reading and writing Hugging Face directories."""
