"""Rows of files and of Hugging Face datasets, in pieces that a worker process takes at once."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rl.data.curation.config import Input

PIECE_ROWS = 1000
PIECE_BYTES = 8 * 1024**2  # rows of code with their tests can have megabytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows of one file. rows: lines of JSON, as bytes, or objects. lines: where each stands, from 1."""

    file: str
    rows: Sequence[bytes | dict[str, Any]]
    lines: list[int]


def read_pieces(given: Input) -> Iterator[Piece]:
    """All rows of a source in its order; blank lines are none. ValueError where there is nothing to read."""
    if given.hf:
        yield from _dataset(given)
        return
    for path in files_of(given.path):
        yield from _parquet(path) if path.suffix == ".parquet" else _lines(path)


def files_of(pattern: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not paths:
        raise ValueError(f"no file matches {pattern!r}; correct the path")
    for path in paths:
        if path.suffix != ".parquet" and not path.name.endswith((".jsonl", ".jsonl.gz", ".json")):
            raise ValueError(f"{path} is none of .jsonl, .jsonl.gz and .parquet; convert it, or narrow the glob")
    return paths


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """From 1, those that are not blank."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file ({error}); fetch it again") from None


def parsed(row: bytes | dict[str, Any]) -> Any:
    """ValueError for bytes that are not JSON."""
    return json.loads(row) if isinstance(row, bytes) else row


def _lines(path: Path) -> Iterator[Piece]:
    numbered = numbered_lines(path)
    while piece := _filled(numbered):
        yield Piece(file=str(path), rows=[row for _, row in piece], lines=[number for number, _ in piece])


def _filled(numbered: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    piece, size = [], 0
    for item in islice(numbered, PIECE_ROWS):
        piece.append(item)
        size += len(item[1])
        if size > PIECE_BYTES:
            break
    return piece


def _parquet(path: Path) -> Iterator[Piece]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            line = 1
            for batch in file.iter_batches(batch_size=PIECE_ROWS):
                yield Piece(file=str(path), rows=batch.to_pylist(), lines=list(range(line, line + len(batch))))
                line += len(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} does not read as Parquet ({error}); fetch it again") from None


def _dataset(given: Input) -> Iterator[Piece]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"hf = {given.hf!r} needs the library datasets, which is not installed; pip install datasets, or download "
            "the files and give their path"
        ) from None
    rows = iter(load_dataset(given.hf, given.hf_config, split=given.split, streaming=True))
    line = 1
    while piece := list(islice(rows, PIECE_ROWS)):
        yield Piece(file=given.name, rows=piece, lines=list(range(line, line + len(piece))))
        line += len(piece)
