"""Rows of files and of Hugging Face datasets, in pieces that a worker process takes at once."""

import glob
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rl.data.curation.config import Input
from megatron_rl.parsing import bounded_lines, parse_json

PIECE_ROWS = 1000
PIECE_BYTES = 8 * 1024**2  # rows of code with their tests can have megabytes
# What a .gz may unpack to: text that says something shrinks 3 to 20 times, and gzip can make zeros 1000 times smaller.
MAX_RATIO = 200
ALWAYS_UNPACKED_BYTES = 64 * 2**20
MAX_UNPACKED_BYTES = 256 * 2**30
MAX_ROW_GROUP_BYTES = 8 * 2**30


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
    """Number all lines from 1, and give those that are not blank. ValueError for one that is too long, and for a .gz
    that is damaged or unpacks to more than a real one does."""
    with path.open("rb") as file:
        lines = bounded_lines(file, path) if path.suffix != ".gz" else _unpacked(path)
        yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _unpacked(path: Path) -> Iterator[bytes]:
    packed, size = path.stat().st_size, 0
    most = min(MAX_UNPACKED_BYTES, max(ALWAYS_UNPACKED_BYTES, MAX_RATIO * packed))
    with gzip.open(path, "rb") as file:
        try:
            for line in bounded_lines(file, path):
                size += len(line)
                if size > most:
                    raise ValueError(
                        f"{path} has {packed:,} bytes and unpacks to more than {most:,}, which looks like a trap; if "
                        "it is right, unpack it with gunzip and name the result"
                    )
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file ({error}); fetch it again") from None


def parsed(row: bytes | dict[str, Any]) -> Any:
    """ValueError for bytes that are not JSON."""
    return parse_json(row) if isinstance(row, bytes) else row


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
            _check_row_groups(path, file.metadata)
            line = 1
            for batch in file.iter_batches(batch_size=PIECE_ROWS):
                yield Piece(file=str(path), rows=batch.to_pylist(), lines=list(range(line, line + len(batch))))
                line += len(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} does not read as Parquet ({error}); fetch it again") from None


def _check_row_groups(path: Path, metadata: Any) -> None:
    """Refuse a row group that would not fit into memory, since it is read as a whole."""
    for number in range(metadata.num_row_groups):
        size = metadata.row_group(number).total_byte_size
        if size > MAX_ROW_GROUP_BYTES:
            raise ValueError(
                f"{path}: row group {number} has {size:,} bytes of data, and at most {MAX_ROW_GROUP_BYTES:,} are read; "
                "write the file again with smaller ones, as pyarrow.parquet.write_table does with row_group_size=10000"
            )


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
