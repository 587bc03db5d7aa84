"""Measure how long a checkpoint keeps training waiting, and how fast it is written and read, as JSON.

    python tools/bench_checkpoint.py [FOLDER] [--layers 7] [--ranks 1 2] [--rounds 3]

A model of about 200 million parameters in fp32 with Adam's state (3.2 GB on disk) is trained by one rank, then by two
expert-parallel ones. Each round saves it before training goes on (sync) and beside training (async), and copies it by
`cp` after each; all of them end with every byte on the disk. `*_blocked` is what the loop waits for: planning, copying
and, when sync, writing. `async_total` ends with the step during which the writing ended; `async_lost` is that without
what its steps take otherwise, so also what training loses to a writer that shares its cores. Reading starts with the
checkpoint out of the page cache. `seconds` are medians of `rounds`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from bench_sync import SHAPE  # noqa: E402
from parallel import run_ranks  # noqa: E402
from tiny_model import write_tiny_model  # noqa: E402

from megatron_rl.checkpoint.checksums import damage, sync  # noqa: E402
from megatron_rl.checkpoint.convert import forget_cached  # noqa: E402
from megatron_rl.config.schema import SftConfig  # noqa: E402
from megatron_rl.train.checkpointing.checkpoints import Checkpoints  # noqa: E402
from megatron_rl.train.run.context import TrainContext  # noqa: E402
from megatron_rl.train.step.batch import TrainSequence  # noqa: E402
from megatron_rl.train.step.objective import CrossEntropy  # noqa: E402

ROOM = 3.2  # checkpoints that have to fit: one that is kept, one that is written, a copy
SEQUENCE = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/bench-checkpoint"))
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True)
    try:
        model = write_tiny_model(folder / "model", **SHAPE | {"num_hidden_layers": arguments.layers})
        spec = {"model": str(model.resolve()), "rounds": arguments.rounds}
        for ranks in arguments.ranks:
            where = folder / f"ranks{ranks}"
            worker = str(Path(__file__).resolve())
            run_ranks(ranks, spec | {"ranks": ranks}, where.resolve(), timeout_seconds=3600, worker=worker)
            print(json.dumps(json.loads((where / "report.json").read_text(encoding="utf-8")), indent=1))
            shutil.rmtree(where)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def measure(folder: Path) -> None:
    """Measure on one rank."""
    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    config = SftConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "threads": 1,
            "model": {"path": spec["model"]},
            "parallel": {"expert": spec["ranks"]},
            "train": {"steps": 1000, "micro_batch_tokens": SEQUENCE, "keep_last": 1},
            "data": {"train": "unused", "batch_tokens": 1},
        }
    )
    bench = Bench(TrainContext(config, 1000, resume=False))
    for _ in range(spec["rounds"]):
        bench.round()
    bench.read()
    if bench.context.is_leader:
        (folder / "report.json").write_text(json.dumps(bench.report(spec["ranks"])), encoding="utf-8")
    bench.context.close()


class Bench:
    """Holds the figures of one rank, by name, one of each round."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.directory = context.config.run_dir / "checkpoints"
        self.figures: dict[str, list[float]] = {}
        self.step = 0
        train, model = context.config.train, context.config.model.path
        self.before, self.beside = (
            Checkpoints(self.directory, train.model_copy(update={"async_save": beside}), model, context.control)
            for beside in (False, True)
        )
        if ROOM * 16 * context.architecture.num_parameters() > shutil.disk_usage(context.config.run_dir).free:
            raise SystemExit(f"{context.config.run_dir} has no room for {ROOM} checkpoints; take fewer --layers")
        self.train()  # makes what is made once

    def round(self) -> None:
        plain = [self.train() for _ in range(3)]
        for seconds in plain:
            self.note("step", seconds)
        self.note("sync_blocked", self.save(self.before))
        self.copy()
        started = time.perf_counter()
        self.note("async_blocked", self.save(self.beside))
        num_steps, over = 0, False
        while not over:
            self.train()
            num_steps, over = num_steps + 1, self.beside.settle()
        total = time.perf_counter() - started
        self.note("async_total", total)
        self.note("async_lost", total - num_steps * statistics.median(plain))
        self.copy()

    def read(self) -> None:
        self.note("verify", self.cold(lambda: damage(self.path, self.context.rank, self.context.layout.world_size)))
        self.note("verify_and_load", self.cold(self.restore))

    def cold(self, work: Callable[[], Any]) -> float:
        for path in self.path.rglob("*"):
            if path.is_file():
                forget_cached(path)
        return self.timed(work)

    def report(self, ranks: int) -> dict[str, Any]:
        num_bytes = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        seconds = {name: statistics.median(found) for name, found in self.figures.items()}
        speeds = {name: num_bytes / 1e9 / seconds[name] for name in ("sync_blocked", "cp", "verify", "verify_and_load")}
        return {
            "ranks": ranks,
            "parameters": self.context.architecture.num_parameters(),
            "gigabytes": round(num_bytes / 1e9, 3),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "rounds": {name: [round(value, 3) for value in found] for name, found in self.figures.items()},
            "gigabytes_per_second": {name: round(value, 3) for name, value in speeds.items()},
            "sync_speed_over_cp": round(seconds["cp"] / seconds["sync_blocked"], 3),
            "async_blocked_over_sync": round(seconds["async_blocked"] / seconds["sync_blocked"], 3),
            "async_lost_over_sync": round(seconds["async_lost"] / seconds["sync_blocked"], 3),
        }

    @property
    def path(self) -> Path:
        return self.directory / (self.directory / "latest").read_text(encoding="utf-8")

    def note(self, name: str, seconds: float) -> None:
        self.figures.setdefault(name, []).append(seconds)

    def timed(self, work: Callable[[], Any]) -> float:
        """Time a function until the last rank is through."""
        self.context.any_rank(False)
        started = time.perf_counter()
        work()
        self.context.any_rank(False)
        return time.perf_counter() - started

    def save(self, checkpoints: Any) -> float:
        self.step += 1
        return self.timed(lambda: checkpoints.save(self.step, self.context.trainer, {"step": self.step}, b""))

    def restore(self) -> None:
        self.before.restore(self.context.trainer)

    def copy(self) -> None:
        copy = self.directory / "copy"

        def to_disk() -> None:
            subprocess.run(["cp", "-r", self.path, copy], check=True)
            for path in copy.rglob("*"):
                if path.is_file():
                    sync(path)

        self.note("cp", self.timed(to_disk if self.context.is_leader else lambda: None))
        shutil.rmtree(copy, ignore_errors=True)

    def train(self) -> float:
        positions = np.arange(1, SEQUENCE, dtype=np.int32)
        sequence = TrainSequence(
            token_ids=np.arange(SEQUENCE, dtype=np.int32),
            loss_positions=positions,
            weight=1.0,
            rollout_logprobs=np.full(len(positions), np.nan, np.float32),
            num_stale_tokens=len(positions),
        )
        trainer = self.context.trainer
        batch = [trainer.micro_batch([sequence])]
        return self.timed(lambda: trainer.train_step(batch, CrossEntropy(), float(len(positions))))


if __name__ == "__main__":
    if "RANK" in os.environ:
        measure(Path(sys.argv[1]))
        sys.stdout.flush()
        os._exit(0)  # torch's process groups may take seconds to wind down
    sys.exit(main())
