"""This module is for modules whose weight is used without a run of their forward."""

from torch import nn


def run_pre_hooks(module: nn.Module) -> None:
    """Run the hooks that would run before the module's forward. With `train.overlap` megatron's DDP waits in them for
    the weights that come from other data-parallel ranks."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
