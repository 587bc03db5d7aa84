"""Contains supervised fine-tuning."""
