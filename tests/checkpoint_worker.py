"""Runs one rank of ranks/test_run_checkpoints.py: saves, loses and finds checkpoints of a tiny model, and reports."""

import json
import logging
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_pickles import COMMON, EMBEDDING, Call, plant, saved
from until import wait_until

from megatron_rl.checkpoint.checksums import checksum_on_disk, write_checksums
from megatron_rl.config.schema import SftConfig
from megatron_rl.errors import Fault, SharedFault
from megatron_rl.model.build import load_weights, sharded_state
from megatron_rl.train.checkpointing import state
from megatron_rl.train.checkpointing.checkpoints import Checkpoints
from megatron_rl.train.checkpointing.state import Part
from megatron_rl.train.run.context import TrainContext
from megatron_rl.train.step.batch import TrainSequence
from megatron_rl.train.step.objective import CrossEntropy

CARRIED = b"surplus responses"


class Rank:
    """Holds this rank, the folder of its scenario, and the log messages so far."""

    def __init__(self, spec: dict, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        config = SftConfig.model_validate(
            {
                "run_dir": str(folder / "run"),
                "threads": 1,
                "model": {"path": spec["model"]},
                "parallel": spec.get("parallel", {}),
                "optimizer": {"learning_rate": 1e-3},
                "train": {"steps": 10, "micro_batch_tokens": 64, "phase_deadline_seconds": 600},
                "data": {"train": "unused", "batch_tokens": 1},
            }
        )
        self.context = TrainContext(config, 10, resume=False)
        self.trainer = self.context.trainer
        self.said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("megatron_rl").addHandler(handler)

    def checkpoints(self, directory: Path, **options: Any) -> Checkpoints:
        section = self.context.config.train.model_copy(update=options)
        return Checkpoints(directory, section, Path(self.spec["model"]), self.context.control)

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        checkpoints.save(step, self.trainer, {"step": step}, CARRIED)

    def train(self) -> None:
        tokens = np.arange(3, 19, dtype=np.int32)
        sequence = TrainSequence(
            token_ids=tokens,
            loss_positions=np.arange(1, 16, dtype=np.int32),
            weight=1.0,
            rollout_logprobs=np.full(15, np.nan, np.float32),
            num_stale_tokens=15,
        )
        self.trainer.train_step([self.trainer.micro_batch([sequence])], CrossEntropy(), 15.0)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.trainer.model.parameters_by_canonical_name().values()]

    def names(self, directory: Path) -> list[str]:
        """Return the names in the directory once every rank is here. All ranks must call it."""
        self.context.any_rank(False)
        found = sorted(path.name for path in directory.iterdir())
        self.context.any_rank(False)
        return found

    def has(self, weights: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.weights(), weights, strict=True))


@contextmanager
def held_writing() -> Iterator[threading.Event]:
    """Hold back the writing of all checkpoint files until the yielded event is set."""
    go, write = threading.Event(), Part.write

    def wait_and_write(part: Part) -> Any:
        assert go.wait(600)
        return write(part)

    Part.write = wait_and_write  # type: ignore[method-assign]
    try:
        yield go
    finally:
        go.set()
        Part.write = write  # type: ignore[method-assign]


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Make the kernel refuse writes beyond this size. Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def latest(directory: Path) -> str:
    return (directory / "latest").read_text()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def raised(kind: type[Exception], work: Callable[[], Any]) -> str:
    try:
        work()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def killed_while_writing(rank: Rank) -> dict:
    """Kill this process by SIGKILL after step 1 is whole and while step 2 is written."""
    rank.train()
    checkpoints = rank.checkpoints(rank.folder / "killed")
    rank.save(checkpoints, 1)
    checkpoints.settle(wait=True)
    with held_writing():
        rank.save(checkpoints, 2)
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def after_the_kill(rank: Rank) -> dict:
    directory = Path(rank.spec["killed"])
    found = {"before": rank.names(directory)}
    driver, carried = rank.checkpoints(directory).restore(rank.trainer) or ({}, b"")
    return found | {"after": rank.names(directory), "driver": driver, "carried": carried == CARRIED}


def beside_training(rank: Rank) -> dict:
    """Save the same state before training goes on and while it does."""
    rank.train()
    rank.save(rank.checkpoints(rank.folder / "before", async_save=False), 1)
    checkpoints = rank.checkpoints(rank.folder / "beside")
    with held_writing() as go:
        rank.save(checkpoints, 1)
        saved = rank.weights()
        rank.train()
        checkpoints.settle()
        report = {"trained": not rank.has(saved), "whole too early": (rank.folder / "beside/latest").exists()}
        go.set()
        checkpoints.settle(wait=True)
    files = [json.loads((rank.folder / name / "step_1/checksums.json").read_text()) for name in ("before", "beside")]
    # All but what holds a save's own number.
    before, beside = ({name: file[name] for name in file if name != "megatron/.metadata"} for file in files)
    return report | {"files": sorted(before), "same": before == beside, "latest": latest(rank.folder / "beside")}


def optimizer_state(rank: Rank) -> dict:
    """Compare our state of the optimizer with megatron's own: return the number of tensors, and those that differ."""
    model = sharded_state(rank.trainer.model)
    counts, different = [], []
    for part in rank.trainer.optimizer.chained_optimizers:
        metadata = state._OPTIMIZER_METADATA
        theirs = part.sharded_state_dict(model, is_loading=False, metadata=metadata)["param_state"]
        ours = state._optimizer_state(part, model, rank.trainer.offloader.read)
        counts.append(sum(len(tensors) for tensors in ours.values()))
        for i, tensors in ours.items():
            assert tensors.keys() == theirs[i].keys()
            for name, entry in tensors.items():
                other = theirs[i][name]
                same = entry.key == other.key and torch.equal(entry.data, other.data)
                different += [] if same else [entry.key]
    return {"counts": counts, "different": different}


def go_when_told(rank: Rank, go: threading.Event) -> None:
    """Let the writing go on once a rank has said that it waits for it, or on the others, which say nothing, at once."""
    if rank.context.rank == 0:
        wait_until(lambda: any("waiting until" in line for line in rank.said), "rank 0 says that it waits")
    go.set()


def one_at_a_time(rank: Rank) -> dict:
    directory = rank.folder / "one"
    checkpoints = rank.checkpoints(directory)
    with held_writing() as go:
        rank.save(checkpoints, 1)
        waits = threading.Thread(target=go_when_told, args=(rank, go))
        waits.start()
        rank.save(checkpoints, 2)
        waits.join()
        checkpoints.save(2, rank.trainer, {"step": "another"}, b"")  # as a stop right after it would
        checkpoints.settle(wait=True)
    said = [line for line in rank.said if "waiting until" in line]
    driver = json.loads((directory / "step_2/driver.json").read_text())
    return {"said": said, "driver": driver, "names": rank.names(directory)}


def kept(rank: Rank) -> dict:
    directory = rank.folder / "kept"
    checkpoints = rank.checkpoints(directory, keep_last=2, keep_every=3)
    for step in range(2, 9):
        rank.save(checkpoints, step)
    checkpoints.settle(wait=True)
    return {"names": rank.names(directory)}


def file_that_cannot_grow(rank: Rank) -> dict:
    """Make rank 1's writes fail, and not rank 0's."""
    directory = rank.folder / "limited"
    checkpoints = rank.checkpoints(directory, on_save_error="continue")
    rank.save(checkpoints, 1)
    checkpoints.settle(wait=True)
    with no_file_above(4096 if rank.context.rank == 1 else resource.RLIM_INFINITY):
        rank.save(checkpoints, 2)
        checkpoints.settle(wait=True)
    report: dict[str, Any] = {"names": rank.names(directory), "failed": checkpoints.num_failed_saves}
    report["warned"] = [line for line in rank.said if "step_2 was not written" in line]
    strict = rank.checkpoints(directory)
    with no_file_above(4096 if rank.context.rank == 1 else resource.RLIM_INFINITY):
        rank.save(strict, 3)
        report["raised"] = raised(SharedFault, lambda: strict.settle(wait=True))
    rank.save(strict, 3)  # on a disk that has room again
    strict.settle(wait=True)
    return report | {"at last": latest(directory)}


def full_disk(rank: Rank) -> dict:
    directory = Path(rank.spec["small_disk"])
    checkpoints = rank.checkpoints(directory, keep_last=1)
    rank.save(checkpoints, 1)
    checkpoints.settle(wait=True)
    needed = sum(path.stat().st_size for path in directory.glob("step_1/megatron/*.distcp"))

    def leave_free(num_bytes: int) -> None:
        if rank.context.rank == 0:
            (directory / "hog").unlink(missing_ok=True)
            (directory / "hog").write_bytes(bytes(shutil.disk_usage(directory).free - num_bytes))
        rank.context.any_rank(False)

    leave_free(needed // 2)
    report: dict[str, Any] = {"too little": raised(SharedFault, lambda: rank.save(checkpoints, 2))}
    # The save asks for the tensors' bytes, and there is room for those, but not for what torch.save adds to each.
    leave_free(needed - 20_000)
    rank.save(checkpoints, 3)
    report["filled"] = raised(SharedFault, lambda: checkpoints.settle(wait=True))
    report["names"] = rank.names(directory)
    restored = rank.checkpoints(directory).restore(rank.trainer)
    return report | {"restored": restored[0] if restored else None}


def damaged(rank: Rank) -> dict:
    directory = rank.folder / "damaged"
    checkpoints = rank.checkpoints(directory, keep_last=4)
    for step in (1, 2, 3):
        rank.train()
        rank.save(checkpoints, step)
        if step == 2:
            at_two = rank.weights()
    checkpoints.settle(wait=True)
    rank.train()
    if rank.context.rank == 0:
        flip_a_bit(directory / "step_3/megatron/__1_0.distcp")
    rank.context.any_rank(False)
    again = rank.checkpoints(directory, keep_last=4)
    driver, _ = again.restore(rank.trainer) or ({}, b"")
    report: dict[str, Any] = {"driver": driver, "weights": rank.has(at_two), "names": rank.names(directory)}
    report |= {"latest": latest(directory), "said": [line for line in rank.said if line.startswith("damaged")]}
    rank.save(again, 3)
    again.settle(wait=True)
    report["saved again"] = latest(directory)
    rank.context.any_rank(False)
    if rank.context.rank == 0:
        (directory / "step_1/carried.npz").unlink()
        (directory / "step_2/checksums.json").unlink()
        flip_a_bit(directory / "step_3/driver.json")
    rank.context.any_rank(False)
    nothing = rank.checkpoints(directory)
    return report | {"nothing left": raised(ValueError, lambda: nothing.restore(rank.trainer))}


def hostile(rank: Rank) -> dict:
    """Return this rank's errors when it resumes from, or loads, a checkpoint with a pickle that would run a program."""
    directory, marker = rank.folder / "hostile", rank.folder / "marker"
    checkpoints = rank.checkpoints(directory, async_save=False)
    rank.save(checkpoints, 1)
    folder, call = directory / "step_1/megatron", Call(os.system, f"touch {marker}")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    plants: dict[str, Callable[[], object]] = {
        "index": lambda: (folder / ".metadata").write_bytes(pickle.dumps(call)),
        "objects": lambda: plant(folder, COMMON, saved([call])),
        "common.pt": lambda: (folder / "common.pt").write_bytes(saved(call)),
        "tensor": lambda: plant(folder, EMBEDDING, saved(call)),
    }
    report: dict[str, Any] = {}
    for name, change in plants.items():
        if rank.context.rank == 0:
            change()
            sums = {f"megatron/{path.name}": checksum_on_disk(path) for path in folder.iterdir()}
            write_checksums(directory / "step_1", sums)
        rank.context.any_rank(False)
        report[f"resume, {name}"] = raised(Fault, lambda: checkpoints.restore(rank.trainer))
        if name in ("index", "tensor"):
            report[f"load, {name}"] = raised(Fault, lambda: load_weights(rank.trainer.model, directory / "step_1"))
        rank.context.any_rank(False)
        if rank.context.rank == 0:
            for path in folder.iterdir():
                path.write_bytes(whole[path.name]) if path.name in whole else path.unlink()
        rank.context.any_rank(False)
    return report | {"ran": marker.exists()}


def main(folder: Path) -> None:
    spec = json.loads((folder / "spec.json").read_text())
    rank = Rank(spec, folder)
    report = {}
    for name in spec["scenarios"]:
        rank.said.clear()
        report[name] = globals()[name](rank)
        rank.context.any_rank(False)
    (folder / f"report-{rank.context.rank}.json").write_text(json.dumps(report))
    rank.context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # torch's process groups may take seconds to wind down
