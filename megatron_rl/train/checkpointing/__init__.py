"""A run's checkpoints: what is saved, when, and which one is whole."""
