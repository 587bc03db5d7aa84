"""Provides names with nothing behind them, like the package."""

from sgl_kernel import __getattr__ as __getattr__
