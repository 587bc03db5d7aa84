"""This module imports kernels of optional packages, when a model is built that asks for them.

What is installed may still not be importable: it may lack its own requirements, or need another torch or driver.
"""

import importlib
from collections.abc import Callable
from typing import Any


def flash_attention_4() -> Callable[..., Any]:
    """Import `flash_attn_varlen_func` of the package flash-attn-4. ValueError where it cannot be imported."""
    return _import("flash_attn.cute", "flash_attn_varlen_func", "model.attention = 'fa4'", "flash-attn-4", "auto")


def quack_add_product() -> Callable[..., None]:
    """Import `gemm_add_inplace` of the package quack-kernels. ValueError where it cannot be imported."""
    asked = "model.expert_weight_gradient = 'quack'"
    return _import("quack.gemm_interface", "gemm_add_inplace", asked, "quack-kernels", "torch")


def _import(module: str, name: str, asked: str, package: str, instead: str) -> Callable[..., Any]:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        key = asked.partition(" ")[0]
        raise ValueError(
            f"{asked} needs {name} of {module}, which cannot be imported ({error}); reinstall it with its requirements "
            f"(pip install {package}), or set {key} = '{instead}'"
        ) from error
