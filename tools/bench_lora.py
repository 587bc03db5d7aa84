"""Measure what training takes with adapters and with all weights, and what bfloat16 takes of the adapters' update, as
JSON.

    python tools/bench_lora.py MODEL [--ranks 8 32] [--rates 1e-5 1e-4 1e-3] [--tokens 512] [--length 256] [--layers N]

MODEL: a Hugging Face directory. Where it has config.json alone the weights are made, which memory and speed do not
mind; `--layers` takes that many of them and makes them too. `--text FILE` is what is trained on, else random tokens.

`training` has a row for all weights and one for each rank, of a process of its own: parameters with a gradient, peak
memory (on a GPU what tensors take, on a CPU what the process has resident beyond what it had before the model)
beside what `plan` says, and the median seconds of an optimizer step of one micro-batch, whose model FLOP/s are those of
tools/mfu.py.

`rounding` has a row for each rank, learning rate and step. Servers sample from merged weights, W + s B A rounded once;
the trainer adds s B A x beside W x. `gap_*` is the difference of the two's log-probs of the tokens, `moved_mean` how
far training has moved them since the start, which is the gap where rounding swallows the whole update. Beside them are
the metrics `lora_update_kept` and `lora_rounding_noise` (docs/lora.md).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mfu import model_flops
from timing import seconds_of
from torch import Tensor

from megatron_rl import device
from megatron_rl.checkpoint.hf import has_weights
from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import SftConfig
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.errors import exit_code
from megatron_rl.families import load_architecture
from megatron_rl.memory import rank_bytes
from megatron_rl.model.build import Model, build_model, initialize_adapters, initialize_parallel, load_weights
from megatron_rl.model.lora import adapted_layers, base_only
from megatron_rl.train.step.batch import MicroBatch, TrainSequence
from megatron_rl.train.step.objective import CrossEntropy
from megatron_rl.train.step.trainer import Trainer

ALONE = Layout(world_size=1)
STATUS = Path("/proc/self/status")


class Bench:
    """Holds a model and its trainer, with adapters of a rank or, for 0, without."""

    def __init__(self, arguments: argparse.Namespace, rank: int, learning_rate: float) -> None:
        architecture = load_architecture(arguments.model)
        if arguments.layers:
            architecture = architecture.model_copy(update={"num_hidden_layers": arguments.layers})
        self.architecture, self._arguments = architecture, arguments
        self.config = SftConfig.model_validate(
            {
                "run_dir": "unused",
                "model": {"path": arguments.model, "dtype": arguments.dtype, "recompute": arguments.recompute},
                "optimizer": {"learning_rate": learning_rate, "warmup_steps": 0},
                "train": {"steps": 1000, "micro_batch_tokens": arguments.tokens},
                "data": {"train": "unused", "batch_tokens": 1},
                **({"lora": {"rank": rank, "alpha": rank}} if rank else {}),
            }
        )
        model = build_model(architecture, self.config.model, self.config.moe, ALONE, lora=self.config.lora)
        if has_weights(arguments.model) and not arguments.layers:
            load_weights(model, arguments.model)
        else:
            make_weights(model)
        initialize_adapters(model, seed=1)
        self.trainer = Trainer(model, self.config.optimizer, 1000, dist.new_group(backend="gloo"))
        self.lengths = [arguments.length] * max(1, arguments.tokens // arguments.length)
        self.batch = self._micro_batch()

    def _micro_batch(self) -> MicroBatch:
        if self._arguments.text is None:
            ids = np.random.default_rng(0).integers(self.architecture.vocab_size, size=sum(self.lengths))
        else:
            text = self._arguments.text.read_text(encoding="utf-8")
            ids = np.array(load_tokenizer(self._arguments.model).encode(text, add_special_tokens=False))
            if len(ids) < sum(self.lengths):
                raise ValueError(f"{self._arguments.text} has {len(ids)} tokens; lower --tokens to that")
        return self.trainer.micro_batch(
            [
                TrainSequence(
                    token_ids=ids[n * length : (n + 1) * length].astype(np.int32),
                    loss_positions=np.arange(1, length, dtype=np.int32),
                    weight=1.0,
                    rollout_logprobs=np.full(length - 1, np.nan, np.float32),
                    num_stale_tokens=length - 1,
                )
                for n, length in enumerate(self.lengths)
            ]
        )

    def step(self) -> dict[str, float]:
        result = self.trainer.train_step([self.batch], CrossEntropy(), float(len(self.batch.targets)))
        assert not result.skipped, "a loss or gradient was not finite"
        return result.metrics

    def logprobs(self) -> Tensor:
        return self.trainer.logprobs([self.batch])[0].clone()

    def merged_logprobs(self) -> Tensor:
        """Compute the log-probs with the weights that servers get, by the trainer's kernels."""
        layers = adapted_layers(self.trainer.model.chunks)
        with torch.no_grad(), base_only(self.trainer.model.chunks):
            kept = [layer.weight.detach().clone() for layer in layers]
            for layer in layers:
                layer.weight.copy_(layer.merged())
            found = self.logprobs()
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)
        return found


def make_weights(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = model.architecture.initializer_range
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, deviation)


def resident_bytes(what: str) -> int:
    """Read a line of this process's status: VmRSS is what it has resident now, VmHWM the most."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[what].split()[0]) * 1024


def training_row(arguments: argparse.Namespace, rank: int) -> dict[str, Any]:
    """Measure one way to train; the process has done nothing else."""
    before = resident_bytes("VmRSS")
    row: dict[str, Any] = {"rank": rank or None}
    try:
        bench = Bench(arguments, rank, arguments.rates[0])
        if device.on_cuda():
            device.reset_peak_memory()
        else:  # files that weights came from count no more
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        seconds = statistics.median([seconds_of(bench.step) for _ in range(arguments.rounds + 1)][1:])
    except torch.OutOfMemoryError:
        return row | {"left_out": "out of memory"}
    peak = device.peak_memory_bytes() if device.on_cuda() else resident_bytes("VmHWM") - before
    planned = rank_bytes(bench.config, bench.architecture, ALONE)[0].total
    num_tokens = sum(bench.lengths)
    flops = model_flops(bench.architecture, bench.lengths, len(bench.batch.targets), bench.config.lora)
    return row | {
        "trained_parameters": sum(p.numel() for p in bench.trainer.model.parameters() if p.requires_grad),
        "peak_gb": round(peak / 1e9, 3),
        "planned_gb": round(planned / 1e9, 3),
        "peak_over_planned": round(peak / planned, 3),
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second": round(num_tokens / seconds, 1),
        "model_tflops": round(flops / seconds / 1e12, 4),
    }


def rounding_rows(arguments: argparse.Namespace, rank: int, learning_rate: float) -> list[dict[str, Any]]:
    """Measure the gap that rounding leaves after some of the first steps."""
    bench, rows = Bench(arguments, rank, learning_rate), []
    begin = bench.logprobs()
    for step in range(1, max(arguments.steps) + 1):
        metrics = bench.step()
        if step not in arguments.steps:
            continue
        own = bench.logprobs()
        gap = (bench.merged_logprobs() - own).abs()
        rows.append(
            {"rank": rank, "learning_rate": learning_rate, "step": step}
            | {"gap_mean": significant(gap.mean()), "gap_max": significant(gap.max())}
            | {"moved_mean": significant((own - begin).abs().mean())}
            | {name: significant(metrics[name]) for name in sorted(metrics) if name.startswith("lora_")}
        )
    return rows


def significant(number: float | Tensor) -> float:
    return float(f"{float(number):.4g}")


def alone(measured: Callable[..., Any], arguments: argparse.Namespace, *case: float) -> Any:
    """Measure a case in a training world of this process alone."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    initialize_parallel(ALONE, deadline_seconds=600, seed=0)
    try:
        return measured(arguments, *case)
    finally:
        dist.destroy_process_group()


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield every row with the name of its table, each from a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for rank in (0, *arguments.ranks):
            yield "training", [pool.submit(alone, training_row, arguments, rank).result()]
        for rank in arguments.ranks:
            for rate in arguments.rates:
                yield "rounding", pool.submit(alone, rounding_rows, arguments, rank, rate).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 16], help="after which the gap is measured")
    parser.add_argument("--tokens", type=int, default=512, help="of the micro-batch")
    parser.add_argument("--length", type=int, default=256, help="of each of its sequences")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--layers", type=int, default=0, help="0: those of the model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch does by itself")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    found: dict[str, Any] = {"settings": settings, "training": [], "rounding": []}
    try:
        for table, rows in measure(arguments):
            found[table] += rows
            sys.stderr.writelines(f"{table}: {json.dumps(row)}\n" for row in rows)
    finally:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    try:
        code = exit_code(Path(__file__).name, main)
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # torch's threads can hang at the interpreter's exit
