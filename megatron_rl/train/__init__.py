"""Contains training: the driver's loop, the trainer, SFT, metrics, and what keeps a run alive."""
