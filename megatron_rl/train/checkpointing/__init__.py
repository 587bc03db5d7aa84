"""Saves and restores the checkpoints of a run, and decides which checkpoint is whole."""
