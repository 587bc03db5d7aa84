"""Writes the folder of a run: all three files or none, report.json last."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rl.files import naming
from megatron_rl.locks import sole_writer

KEPT, DROPPED, REPORT = "kept.jsonl", "dropped.jsonl", "report.json"
_PARTIAL = ".partial"


@contextmanager
def whole_output(folder: Path, force: bool) -> Iterator[Path]:
    """Give a place to write KEPT, DROPPED and REPORT; they are moved to `folder` when the body ends without an error.

    Raise ValueError when another run writes there, or, without `force`, when a result is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder, "set another output"):
        there = [name for name in (KEPT, DROPPED, REPORT) if (folder / name).exists()]
        if there and not force:
            raise ValueError(
                f"{folder} already holds {', '.join(there)}; set another output, or overwrite with --force"
            )
        partial = folder / _PARTIAL
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        try:
            with naming(folder):
                yield partial
            (folder / REPORT).unlink(missing_ok=True)
            for name in (KEPT, DROPPED, REPORT):
                (partial / name).replace(folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
