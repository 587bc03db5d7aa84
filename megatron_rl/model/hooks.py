"""For modules whose weight is used without their forward being run."""

from torch import nn


def run_pre_hooks(module: nn.Module) -> None:
    """What would run before the module's forward: with `train.overlap` megatron's DDP waits there for the weights that
    come from other data-parallel ranks."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
