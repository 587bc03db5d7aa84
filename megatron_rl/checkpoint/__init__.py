"""This package reads and writes checkpoints of Ling-lite and the other families: the one name table, inverse reshapes,
and Hugging Face directories."""
