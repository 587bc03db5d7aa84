"""Decides from which directories a server may load weights."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir

from megatron_rl.rollout.embedded.fields import cut
from megatron_rl.rollout.embedded.updates import UpdateError

# Begins the names of folders through which training runs hand weights to servers here; see sync/folder.py.
WEIGHT_FOLDER_PREFIX = "megatron_rl-weights-"


class WeightRoots:
    """Knows the model's own directory and those below the roots, which whoever started the server named.

    A server that somebody started by hand was not told any run's folder. So two more are taken if they belong to the
    server's own user: the directories beside the model, and the folders of runs in this machine's memory or temporary
    directory.
    """

    def __init__(self, model_path: str, roots: Sequence[str]) -> None:
        self._model = Path(model_path).resolve()
        self._roots = [self._model, *(Path(root).resolve() for root in roots)]
        self._memory = [Path("/dev/shm"), Path(gettempdir()).resolve()]

    def directory(self, path: str) -> Path:
        """Return the directory behind `path`, links followed. Raise UpdateError for one that is not known, or is
        none."""
        try:
            found = Path(path).resolve()
            is_known = self._is_known(found)
            is_directory = is_known and found.is_dir()
        except (OSError, ValueError) as error:  # too long, a NUL, a loop of links
            raise UpdateError(f"model_path {cut(path)} cannot be looked at: {_reason(error)}") from None
        if not is_known:
            raise UpdateError(
                f"model_path must be the served model's directory or below a --weights-root of this server, got "
                f"{cut(path)}; start the server with --weights-root for a directory above it"
            )
        if not is_directory:
            raise UpdateError(f"model_path {cut(path)} is not a directory")
        return found

    def _is_known(self, path: Path) -> bool:
        if any(path.is_relative_to(root) for root in self._roots):
            return True
        if path.parent == self._model.parent:
            return _is_own(path)
        return any(
            path.is_relative_to(folder) and _is_own(folder)
            for folder in [path, *path.parents]
            if folder.parent in self._memory and folder.name.startswith(WEIGHT_FOLDER_PREFIX)
        )


def _is_own(path: Path) -> bool:
    """Tell whether a path belongs to this user. True for one that does not exist: that it is no directory will be said
    by its name."""
    return not path.exists() or path.stat().st_uid == os.geteuid()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
