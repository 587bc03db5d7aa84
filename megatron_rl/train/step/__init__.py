"""Runs one optimizer step: micro-batches, the model's passes, the objective, and what they report."""
