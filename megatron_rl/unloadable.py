"""This module lets packages that are installed and cannot be loaded count as not installed.

megatron-core uses many compiled packages where they are there, and asks by `except ImportError`. One that is installed
on a machine without a GPU, or beside another torch or driver, fails in other ways: its library does not load (OSError),
or it looks for a device (RuntimeError). Without this a login node could not even check a configuration.
"""

import importlib.machinery
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

log = logging.getLogger(__name__)


class _Finder:
    """Finds packages as Python does, and turns whatever ends their import into an ImportError."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # A module within a package ends the import of the package, too.
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if path is None else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                load(module)
            except ImportError:
                raise
            except Exception as error:
                log.debug("%s is installed, and cannot be loaded here: %s", name, error)
                raise ImportError(f"{name} cannot be loaded: {error}", name=name) from error

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextmanager
def unloadable_counts_as_absent() -> Iterator[None]:
    """Raise ImportError, within this block, for a package whose import ends by any other exception."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
