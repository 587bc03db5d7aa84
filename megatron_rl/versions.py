"""This module says which versions are installed: of this package with its commit, and of what it depends on. It imports
none of them."""

import importlib.metadata
import importlib.util
import subprocess
from pathlib import Path

from megatron_rl import __version__

# The commit of a wheel, which setup.py writes while it builds one.
COMMIT_FILE = "commit.txt"
_SHOWN = ("torch", "megatron-core", "sglang")


def describe() -> str:
    """Return the lines of `megatron-rl --version`."""
    found = commit()
    first = f"megatron-rl {__version__}" + (f", commit {found}" if found else "")
    return "\n".join([first, *(f"{name} {installed(name) or 'is not installed'}" for name in _SHOWN)])


def commit() -> str:
    """Return the commit of a checkout, with "-dirty" where tracked files have changed, or of a wheel; "" if unknown."""
    package = Path(__file__).parent
    if (package.parent / ".git").exists():
        asked = ["git", "-C", str(package), "describe", "--always", "--dirty", "--exclude", "*"]
        try:
            return subprocess.run(asked, capture_output=True, encoding="utf-8", check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""
    written = package / COMMIT_FILE
    return written.read_text(encoding="utf-8").strip() if written.exists() else ""


def installed(name: str) -> str:
    """Return the version of an installed package, or "" where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def missing_megatron() -> str:
    """Return what to type where megatron-core is not installed, and "" where it is."""
    try:
        found = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        found = None
    if found is not None and found.origin:  # without a file it is a folder that an uninstallation left
        return ""
    return (
        "megatron-core 0.19.2 is not installed; on Python 3.12 or later pip install megatron-core==0.19.2, on 3.11 pip "
        "install --no-deps --ignore-requires-python --no-binary megatron-core megatron-core==0.19.2"
    )
