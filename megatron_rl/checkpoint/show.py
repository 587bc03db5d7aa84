"""This module is the commands `megatron-rl convert` and `compare`, and what they print."""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_rl.checkpoint.compare import compare
from megatron_rl.checkpoint.convert import Job, convert, opened, result_tensors
from megatron_rl.checkpoint.hf import TensorInfo, num_bytes
from megatron_rl.checkpoint.names import hf_names, name_table
from megatron_rl.checkpoint.peft import write_peft

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS_BETWEEN_LINES = 10.0
# For --dry-run alone. A virtual disk; tools/bench_convert.py measures yours.
_GUESSED_BYTES_PER_SECOND = 5e8


def run_convert(arguments: argparse.Namespace) -> int:
    if arguments.to == "peft":
        return _run_peft(arguments)
    to_megatron = arguments.to == "megatron"
    job = Job(
        source=arguments.source,
        destination=arguments.destination,
        to_megatron=to_megatron,
        dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
        max_shard_bytes=parse_size(arguments.max_shard_size),
        fold_norm_head=arguments.fold_norm_head,
        verify=not to_megatron if arguments.verify is None else arguments.verify,
    )
    if arguments.dry_run:
        with opened(job) as (source, model):
            infos = result_tensors(job, source, model)
        stored = {name: entry.stored for name, (entry, _) in hf_names(name_table(model)).items()}
        sys.stdout.write(describe(job, infos, stored))
        return 0
    report = convert(job, shown_progress)
    checked = f", checked in {report.verify_seconds:.1f} s" if job.verify else ""
    spoiled = f"; {report.num_not_finite} values are NaN or infinite" if report.num_not_finite else ""
    sys.stdout.write(
        f"{job.destination}: {report.num_tensors} tensors, {report.num_bytes / 1e9:.3f} GB in {report.seconds:.1f} s "
        f"({report.num_bytes / 1e9 / report.seconds:.2f} GB/s){checked}{spoiled}\n"
    )
    return 0


def _run_peft(arguments: argparse.Namespace) -> int:
    for option in ("dtype", "dry_run", "fold_norm_head", "verify"):
        if getattr(arguments, option):
            raise ValueError(f"--{option.replace('_', '-')} is not for --to peft, which copies adapters as they are")
    num_tensors = write_peft(arguments.source, arguments.destination)
    sys.stdout.write(f"{arguments.destination}: {num_tensors} tensors of adapters, for peft\n")
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    differences, count = compare(arguments.first, arguments.second, shown_progress)
    beyond = [d for d in differences if not d.largest <= arguments.tolerance]
    if not differences:
        sys.stdout.write(f"all {count} tensors are equal\n")
        return 0
    worst = max(differences, key=lambda d: d.largest)
    sys.stdout.write(
        f"{len(differences)} of {count} tensors differ, {len(beyond)} by more than {arguments.tolerance:g}\n"
        f"first: {differences[0].name}, {differences[0].num_values} values, by up to {differences[0].largest:.3g}\n"
        f"largest: {worst.name}, {worst.num_values} values, by up to {worst.largest:.3g}\n"
    )
    return 1 if beyond else 0


def describe(job: Job, infos: list[TensorInfo], stored: dict[str, str]) -> str:
    """Describe a conversion: the mapping with layers and experts counted, sizes, and what it will need."""
    kinds: Counter[tuple[str, ...]] = Counter()
    for name, shape, dtype in infos:
        columns = (_pattern(name), str(list(shape)), str(dtype).removeprefix("torch."), _pattern(stored[name]))
        kinds[columns] += 1
    lines = [f"{count:6} x {name} {shape} {dtype} | {target}" for (name, shape, dtype, target), count in kinds.items()]
    sizes = [num_bytes(shape, dtype) for _, shape, dtype in infos]
    largest, total = max(sizes), sum(sizes)
    folded = [f"{infos[-1][0]} is divided by its norm; norm_head becomes false"] if job.fold_norm_head else []
    return "\n".join(
        [
            f"{job.source} -> {job.destination} ({'Megatron' if job.to_megatron else 'Hugging Face'})",
            "tensors, Hugging Face name | name in the Megatron checkpoint:",
            *lines,
            *folded,
            f"{len(infos)} tensors, {total / 1e9:.3f} GB, in files of at most {job.max_shard_bytes / 1e9:g} GB",
            f"memory: about {(4 * largest + 3e8) / 1e9:.1f} GB (the largest tensor has {largest / 1e9:.3f} GB)",
            f"time: about {total / _GUESSED_BYTES_PER_SECOND:.0f} s at 0.5 GB/s, a guess; as long again with --verify",
            "nothing was written\n",
        ]
    )


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def parse_size(text: str) -> int:
    """Return the bytes of "5GB", "200MB" or "1000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"--max-shard-size {text!r} is not a size; write it like 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@contextmanager
def shown_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr: as a bar on a terminal, else as a line every ten seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("tensors", total=total)
            yield lambda num_bytes: bar.advance(task, num_bytes)
        return
    done, started, said = 0, time.monotonic(), time.monotonic()

    def advance(num_bytes: int) -> None:
        nonlocal done, said
        done += num_bytes
        now = time.monotonic()
        if now - said > _SECONDS_BETWEEN_LINES:
            said = now
            speed = done / (now - started)
            left = (total - done) / speed
            sys.stderr.write(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {speed / 1e9:.2f} GB/s, {left:.0f} s left\n")

    yield advance
