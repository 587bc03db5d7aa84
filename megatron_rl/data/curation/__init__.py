"""Curates prompts for reinforcement learning: many layouts in, one record out.

`pipeline.curate` is the way in; docs/data.md says what each rule catches and what it does not.
"""
