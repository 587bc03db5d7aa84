"""This package finds what is known to fail before torch is imported and servers start."""
