"""Reads rows of files and of Hugging Face datasets, in pieces that a worker process takes at once."""

import csv
import glob
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rl.data.curation.config import Input
from megatron_rl.parsing import MAX_LINE_BYTES, bounded_lines, parse_json, read_json

PIECE_ROWS = 1000
PIECE_BYTES = 8 * 1024**2  # rows of code with their tests can have megabytes
# A .gz may unpack to so many times its size. Real text shrinks 3 to 20 times; gzip can shrink zeros 1000 times.
MAX_RATIO = 200
ALWAYS_UNPACKED_BYTES = 64 * 2**20
MAX_UNPACKED_BYTES = 256 * 2**30
MAX_ROW_GROUP_BYTES = 8 * 2**30
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Holds rows of one file. rows: lines of JSON, as bytes, or objects. lines: where each stands, from 1; of a Parquet
    file or an array the number of the row."""

    file: str
    rows: Sequence[bytes | dict[str, Any]]
    lines: list[int]


def read_pieces(given: Input) -> Iterator[Piece]:
    """Read all rows of a source in its order; blank lines are no rows. Raise ValueError where there is nothing to
    read."""
    if given.hf:
        yield from _dataset(given)
        return
    for path in files_of(given.path):
        yield from pieces_of(path)


def pieces_of(path: Path) -> Iterator[Piece]:
    """Give all rows of one file by its ending; what ends in .json or .jsonl may be one array of rows, too."""
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".csv":
        return _pieces(path, _csv(path))
    if path.suffix != ".gz" and _is_array(path):
        return _pieces(path, _array(path))
    return _lines(path)


def files_of(pattern: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not paths and Path(pattern).is_dir():
        raise ValueError(f"{pattern} is a directory; name the files in it, as {str(Path(pattern) / '*.jsonl')!r}")
    if not paths:
        raise ValueError(f"no file matches {pattern!r}; correct the path")
    for path in paths:
        if not path.name.endswith(ENDINGS):
            raise ValueError(f"{path} is none of {', '.join(ENDINGS)}; convert it, or narrow the glob")
    return paths


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number all lines from 1, and give those that are not blank. Raise ValueError for one that is too long, and for a
    .gz that is damaged or unpacks to more than a real one does."""
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
    """Parse a row. Raise ValueError for bytes that are not JSON."""
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


def _pieces(path: Path, numbered: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[Piece]:
    while piece := list(islice(numbered, PIECE_ROWS)):
        yield Piece(file=str(path), rows=[row for _, row in piece], lines=[number for number, _ in piece])


def _is_array(path: Path) -> bool:
    """Tell an array of rows from lines of rows by the first character; a byte order mark may come before it."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} begins as a JSON array and is none ({error}); write one object per line") from None
    yield from enumerate(rows, start=1)


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read rows by the names in the first one, each under the line where it begins."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            names = next(rows, [])
            if len(set(names)) < len(names):
                raise ValueError(f"{path}:1: two columns have the same name; rename one of {', '.join(names)}")
            if len(names) == 1 and (other := next((mark for mark in ";\t" if mark in names[0]), "")):
                raise ValueError(f"{path}:1: columns stand between {other!r}; write the file again with commas")
            line = rows.line_num + 1
            for row in rows:
                if row and len(row) != len(names):
                    raise ValueError(
                        f"{path}:{line}: {len(row)} columns, and the first line names {len(names)}; put quotes around "
                        "texts with commas"
                    )
                if row:
                    yield line, dict(zip(names, row, strict=True))
                line = rows.line_num + 1
        except UnicodeDecodeError as error:  # of a piece of the file, so its place says nothing
            raise ValueError(
                f"{path} is not in UTF-8 ({error.reason}); write it in UTF-8 (of Latin-1: iconv -f LATIN1 -t UTF-8)"
            ) from None
        except csv.Error as error:
            raise ValueError(f"{path}:{rows.line_num}: not CSV ({error}); write it again as JSONL") from None


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
