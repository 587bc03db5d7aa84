"""What can be known to fail before torch is imported and servers start."""
