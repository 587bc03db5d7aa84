"""This module converts Hugging Face directory <-> Megatron distributed checkpoint, tensor by tensor, in memory that a
few tensors need."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.checkpoint.distributed import MEGATRON, write_distributed
from megatron_rl.checkpoint.hf import (
    HfCheckpoint,
    SafetensorsWriter,
    TensorInfo,
    copy_companions,
    divide_into_shards,
    num_bytes,
    shard_file,
    write_index,
)
from megatron_rl.checkpoint.names import hf_names, name_table
from megatron_rl.checkpoint.new_directory import new_directory
from megatron_rl.checkpoint.read import Checkpoint, Progress, no_progress, open_checkpoint, resolve
from megatron_rl.errors import EXIT_INTERRUPTED, STOP_SIGNALS
from megatron_rl.families import Architecture, family_of, load_architecture, tensor_shapes
from megatron_rl.tensor_bytes import checksum

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Describes one conversion: from a checkpoint of one kind to `destination`, of the other.

    dtype: that of the result; None keeps every tensor's. max_shard_bytes: the limit of one file. fold_norm_head: write
    the LM head as it is used, divided by its norm, and norm_head = false, for runtimes that do not know it; Hugging
    Face only.
    verify: read the result back and compare checksums.
    """

    source: Path
    destination: Path
    to_megatron: bool
    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * 10**9
    fold_norm_head: bool = False
    verify: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    num_tensors: int
    num_bytes: int
    seconds: float
    verify_seconds: float
    num_not_finite: int


def convert(job: Job, progress: Progress = no_progress) -> Report:
    """Run a conversion. The destination appears when it is whole. A conversion that fails leaves nothing behind.

    ValueError names what cannot be converted.
    """
    with opened(job) as (source, model), signals_between_tensors() as check:
        infos = result_tensors(job, source, model)
        total = sum(num_bytes(shape, dtype) for _, shape, dtype in infos)
        with (
            new_directory(job.source, job.destination, total) as partial,
            progress(total * (2 if job.verify else 1)) as advance,
        ):
            started = time.perf_counter()
            reading = _Reading(job, source, infos, family_of(model).tensors.head, advance, check)
            try:
                if job.to_megatron:
                    dtypes = {name: dtype for name, _, dtype in infos}
                    write_distributed(partial / MEGATRON, model, dtypes, reading, job.max_shard_bytes)
                else:
                    _write_hf(partial, infos, model, reading, job.max_shard_bytes)
                checksums = reading.finish()
            finally:
                reading.close()
            changes: dict[str, Any] = {"norm_head": False} if job.fold_norm_head else {}
            copy_companions(source.directory, partial, job.dtype, **changes)
            seconds = time.perf_counter() - started
            started = time.perf_counter()
            if job.verify:
                _verify(partial, checksums, advance, check)
            verify_seconds = time.perf_counter() - started
        return Report(
            num_tensors=len(infos),
            num_bytes=total,
            seconds=seconds,
            verify_seconds=verify_seconds,
            num_not_finite=reading.num_not_finite,
        )


@contextmanager
def signals_between_tensors() -> Iterator[Callable[[], None]]:
    """Let a signal that stops a run wait until the function that this yields is called, which then raises
    KeyboardInterrupt. Raised in the middle of a file that torch writes, it would abort the process. A second signal
    ends it at once."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield lambda: None
        return
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        if came:
            os._exit(EXIT_INTERRUPTED)
        came.append(number)

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def opened(job: Job) -> Iterator[tuple[Checkpoint, Architecture]]:
    """Open the source and read its shape, and check both against the job. ValueError names the mistake."""
    directory = resolve(job.source)
    model = load_architecture(directory)
    with open_checkpoint(directory, model) as source:
        is_megatron = not isinstance(source, HfCheckpoint)
        if is_megatron == job.to_megatron:
            kind = "a Megatron checkpoint" if is_megatron else "a Hugging Face directory"
            raise ValueError(f"{job.source} is {kind} already; convert in the other direction")
        if job.fold_norm_head and (job.to_megatron or not model.norm_head or model.tie_word_embeddings):
            why = "a Megatron checkpoint keeps the raw head" if job.to_megatron else "this model has no norm_head"
            why = "its head is tied to the embedding" if model.norm_head and model.tie_word_embeddings else why
            raise ValueError(f"--fold-norm-head cannot be applied to {job.source}: {why}")
        yield source, model


def result_tensors(job: Job, source: Checkpoint, model: Architecture) -> list[TensorInfo]:
    """List name, shape and type of every tensor of the result under its Hugging Face name, in the order of the
    model."""
    asked = result_dtypes(job, model)
    return [(name, shape, asked.get(name, source.dtypes[name])) for name, shape in tensor_shapes(model).items()]


def result_dtypes(job: Job, model: Architecture) -> dict[str, torch.dtype]:
    """Return the type that a job asks for of every tensor, by its Hugging Face name; empty where each keeps its own."""
    if job.dtype is None:
        return {}
    return {name: entry.dtype(job.dtype) for name, (entry, _) in hf_names(name_table(model)).items()}


class _Reading:
    """Reads every tensor of the source once, in the result's type and in the order in which it will be asked for.

    A thread reads, checks and hashes the next one while the last one is written.
    """

    def __init__(
        self,
        job: Job,
        source: Checkpoint,
        infos: Sequence[TensorInfo],
        head: str,
        progress: Callable[[int], None],
        check: Callable[[], None],
    ) -> None:
        """Start to read. infos: those of the result. head: the name of the LM head. check: called before each tensor is
        given out."""
        self._check = check
        self.num_not_finite = 0
        self._job, self._source, self._head, self._progress = job, source, head, progress
        self._checksums: dict[str, str] = {}
        self._dtypes = {name: dtype for name, _, dtype in infos}
        self._waiting = iter(self._dtypes)
        self._reader = ThreadPoolExecutor(1)
        self._next = self._read_ahead()

    def __call__(self, name: str) -> Tensor:
        self._check()
        assert self._next is not None, name
        found, tensor = self._next.result()
        assert found == name, (found, name)
        self._next = self._read_ahead()
        self._progress(tensor.nbytes)
        return tensor

    def finish(self) -> dict[str, str]:
        """Return the checksums of every tensor of the source. ValueError when it held one that nobody asked for."""
        left = set(self._source.dtypes) - set(self._checksums)
        if left or self._next is not None:
            raise ValueError(f"{len(left)} tensors of {self._job.source} were not used: {', '.join(sorted(left)[:3])}")
        return self._checksums

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _read_ahead(self) -> Future[tuple[str, Tensor]] | None:
        name = next(self._waiting, None)
        return None if name is None else self._reader.submit(self._prepare, name)

    def _prepare(self, name: str) -> tuple[str, Tensor]:
        tensor = self._source.read(name)
        # A sum is the cheapest way to notice; it may also overflow, so it decides nothing.
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            self._count_not_finite(name, tensor)
        if self._job.fold_norm_head and name == self._head:
            norm = torch.linalg.vector_norm(tensor, dim=0, keepdim=True, dtype=torch.float32) + 1e-7
            tensor = (tensor.float() / norm).to(tensor.dtype)
        tensor = tensor.to(self._dtypes[name])
        self._checksums[name] = checksum(tensor)
        return name, tensor

    def _count_not_finite(self, name: str, tensor: Tensor) -> None:
        count = int((~torch.isfinite(tensor)).sum())
        if count:
            self.num_not_finite += count
            log.warning(
                "%s: %d of the %d values of %s are NaN or infinite", self._job.source, count, tensor.numel(), name
            )


def _write_hf(
    directory: Path, infos: list[TensorInfo], model: Architecture, read: Callable[[str], Tensor], max_bytes: int
) -> None:
    shards = divide_into_shards(infos, max_bytes)
    for number, shard in enumerate(shards):
        with SafetensorsWriter(directory / shard_file(number), shard) as writer:
            for name, _, _ in shard:
                writer.write(name, read(name))
    write_index(directory, [[name for name, _, _ in shard] for shard in shards], name_table(model))


def _verify(
    directory: Path, checksums: dict[str, str], progress: Callable[[int], None], check: Callable[[], None]
) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            forget_cached(file)
    with open_checkpoint(directory) as written:
        for name, expected in checksums.items():
            check()
            tensor = written.read(name)
            if checksum(tensor) != expected:
                raise ValueError(f"{directory}: {name} reads back otherwise than it was written; the disk may be bad")
            progress(tensor.nbytes)


def forget_cached(file: Path) -> None:
    """Let the next read come from the disk, where the system can be asked to."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
