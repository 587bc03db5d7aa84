"""Reads the configuration: one frozen tree from TOML, checked before anything starts."""
