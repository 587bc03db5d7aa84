"""Measure the training speed of the Ling-lite geometry on one GPU, as one JSON object.

    python tools/bench_gpu.py [--layers N] [--lengths 2048,4096,8192,16384,24576] [--smoke]

Random weights in bf16, as many layers as memory.py plans to fit the device; no checkpoint is read or written. Micro-
batches hold `--tokens` random tokens in sequences of one length, or one sequence where that is longer.

- `matmul_tflops`: what one product of `--cube`^3 in bf16 reaches here.
- `training`: of each length and each of `--recompute`, seconds of one micro-batch forward and backward, as the
  difference between optimizer steps of few and of many micro-batches, so that the optimizer and the start of a step
  are not in it; `seconds_of_step` is what a step takes besides. MFU = `model_flops` (tools/mfu.py: useful operations,
  active weights, causal attention) / seconds / peak, the nominal one and that of the product above; with the optimizer
  it is `mfu_step`, at `--micro-batches` a step. Peak memory of tensors against what memory.py plans.
- `without_head`: the same at the length of `--tokens` and the first of `--recompute`, the head replaced by a mean: its
  FLOPs are not counted, and it has no gradient.
- `reference`: the same of transformers' own class at the same shape (tools/bench_reference.py), with its head, in a
  process of its own; `ours_over_reference` is the ratio of tokens/s to it, of micro-batches and of whole steps.
- `parts`: seconds of such a step that the device worked for each part (tools/profile_parts.py), and idle: the step's
  seconds without a profiler, less these. On a CPU the time of operations, which knows no idling.
- `head`: the fused head against logits, log_softmax and autograd: seconds, and the most memory beyond the inputs.
- `choices`: seconds of one micro-batch of two layers without head for every way to compute a part (`--choices`).
- `export`: weights under Hugging Face names into one bucket after the other on the device, and on to the host's memory.

Every number is a median of `--rounds` after a round that warms up. `--smoke` runs all of it at a tiny size, on a CPU
too.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench_reference import Reference, ratios  # noqa: E402
from mfu import layers_that_fit, model_flops, nominal_peak  # noqa: E402
from profile_parts import mark_modules, marked, seconds_by_part  # noqa: E402
from timing import median_seconds, pace  # noqa: E402

from megatron_rl import device  # noqa: E402
from megatron_rl.checkpoint.names import name_table  # noqa: E402
from megatron_rl.config.algorithm import AlgorithmSection  # noqa: E402
from megatron_rl.config.layout import Layout  # noqa: E402
from megatron_rl.config.model import ModelSection  # noqa: E402
from megatron_rl.config.schema import SftConfig  # noqa: E402
from megatron_rl.errors import exit_code  # noqa: E402
from megatron_rl.families import Architecture, read_architecture  # noqa: E402
from megatron_rl.memory import rank_bytes  # noqa: E402
from megatron_rl.model.build import build_model, initialize_parallel  # noqa: E402
from megatron_rl.model.head import HeadRequest  # noqa: E402
from megatron_rl.model.logprobs import logprobs_and_entropy  # noqa: E402
from megatron_rl.sync.buckets import divide  # noqa: E402
from megatron_rl.sync.export import fill, gathered  # noqa: E402
from megatron_rl.train.step.batch import MicroBatch, TrainSequence  # noqa: E402
from megatron_rl.train.step.objective import PolicyObjective  # noqa: E402
from megatron_rl.train.step.trainer import Trainer  # noqa: E402

SHAPE = ROOT / "examples/ring_lite/ling_lite_1_5/config.json"
ALONE = Layout(world_size=1)
# The share of the device's memory that plans may use: the rest is for the CUDA context, libraries and the allocator's
# gaps.
SHARE = 0.9
CHILD_SECONDS = 180
CHOICES = ("experts", "attention", "expert_weight_gradient")
PIECES = ("reference", "head", "training", "export")
PACKAGES = ("torch", "megatron-core", "transformers")
SMOKE = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
SMOKE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "num_hidden_layers": 2}


def tell(text: str) -> None:
    sys.stderr.write(text + "\n")


class WithoutHead:
    """Takes the head's place: it returns the mean of each hidden state, which costs next to nothing.

    The head's weight takes no part. Megatron would wait for its gradient only if it reduced gradients beside the
    backward pass, which one rank does not.
    """

    def __call__(self, *, hidden_states: Tensor, context: HeadRequest, **_: Any) -> tuple[Tensor, Tensor]:
        means = hidden_states.squeeze(1).index_select(0, context.index).float().mean(-1)
        return means, torch.zeros_like(means)


class Bench:
    """Holds one model on this device, and measures how fast it trains."""

    def __init__(self, architecture: Architecture, config: SftConfig, control: Any, rounds: int) -> None:
        self.architecture, self._rounds = architecture, rounds
        model = build_model(architecture, config.model, config.moe, ALONE)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, architecture.initializer_range)
        self.trainer = Trainer(model, config.optimizer, 1000, control)
        self._objective = PolicyObjective(AlgorithmSection())

    def micro_batch(self, lengths: list[int]) -> MicroBatch:
        """Make a micro-batch of random tokens. All but the first of each sequence carry loss."""
        rng = np.random.default_rng(0)
        return self.trainer.micro_batch(
            [
                TrainSequence(
                    token_ids=rng.integers(self.architecture.vocab_size, size=n, dtype=np.int32),
                    loss_positions=np.arange(1, n, dtype=np.int32),
                    weight=1.0,
                    advantages=np.full(n - 1, 1.0 if number % 2 else -1.0),
                    rollout_logprobs=np.full(n - 1, -np.log(self.architecture.vocab_size), np.float32),
                    num_stale_tokens=0,
                )
                for number, n in enumerate(lengths)
            ]
        )

    def step(self, batch: MicroBatch, count: int) -> None:
        """Run an optimizer step over the micro-batch `count` times."""
        result = self.trainer.train_step([batch] * count, self._objective, float(count * len(batch.targets)))
        assert not result.skipped, "a loss or gradient was not finite"
        device.synchronize()

    def seconds(self, batch: MicroBatch, many: int) -> tuple[float, float]:
        """Return the seconds of one micro-batch, and those that a step takes besides."""
        return pace(lambda count: self.step(batch, count), many, self._rounds)

    @contextlib.contextmanager
    def recomputing(self, how: str) -> Any:
        """Run the model as if it had been built with `model.recompute` none or full: its layers read that in every
        pass."""
        config = self.trainer.model.config
        names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
        before = [getattr(config, name) for name in names]
        for name, value in zip(names, ("full", "uniform", 1) if how == "full" else (None,) * 3, strict=True):
            setattr(config, name, value)
        yield
        for name, value in zip(names, before, strict=True):
            setattr(config, name, value)

    @contextlib.contextmanager
    def without_head(self) -> Any:
        whole = self.trainer.model
        self.trainer.model = replace(whole, head=cast(Any, WithoutHead()))
        yield
        self.trainer.model = whole

    def parts(self, batch: MicroBatch, count: int) -> dict[str, float]:
        """Return the seconds of a step of `count` micro-batches by part."""
        whole = median_seconds(lambda: self.step(batch, count), self._rounds)
        trainer, model = self.trainer, self.trainer.model
        marks = mark_modules((m, part) for gpt in model.gpts for n, m in gpt.named_modules() if (part := part_of(n, m)))
        optimizer = trainer.optimizer
        own = {name: getattr(optimizer, name) for name in ("zero_grad", "prepare_grads", "get_grad_norm", "step")}
        try:
            for name, method in own.items():
                setattr(optimizer, name, marked("optimizer", method))
            trainer.model = replace(model, head=cast(Any, marked("head", model.head)))
            found: Any = seconds_by_part(lambda: self.step(batch, count), device.on_cuda())
        finally:
            trainer.model = model
            for name in own:
                delattr(optimizer, name)
            for mark in marks:
                mark.remove()
        found["idle"] = max(0.0, whole - sum(found.values()))
        return {"step": whole, **dict(found.most_common())}


def part_of(name: str, module: torch.nn.Module) -> str | None:
    """Return the part that a module of megatron's GPTModel is, by its name; None for what lies inside or around a
    part."""
    last = name.rpartition(".")[2]
    parts = {"self_attention": "attention", "experts": "experts", "shared_experts": "shared_experts"}
    if last == "mlp":
        return "router_and_dispatch" if hasattr(module, "router") else "dense_mlp"
    if last.endswith("layernorm"):
        return "norms"
    return "embedding" if name == "embedding" else parts.get(last)


def run_config(arguments: argparse.Namespace, num_tokens: int, **model: Any) -> SftConfig:
    """Return the configuration of a run with micro-batches of `num_tokens`. model: further keys of its section, before
    those of `--model`."""
    of_all = dict(arguments.model) | model
    return SftConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {"path": SHAPE.parent, "dtype": "bfloat16", "recompute": arguments.recompute[0], **of_all},
            "train": {"steps": 1000, "micro_batch_tokens": num_tokens},
            "data": {"train": "unused", "batch_tokens": 1},
        }
    )


def micro_batch_lengths(length: int, num_tokens: int) -> list[int]:
    return [length] * max(1, num_tokens // length)


def planned_bytes(arguments: argparse.Namespace, architecture: Architecture, length: int, recompute: str) -> int:
    num_tokens = sum(micro_batch_lengths(length, arguments.tokens))
    return rank_bytes(run_config(arguments, num_tokens, recompute=recompute), architecture, ALONE)[0].total


def rates(seconds: float, flops: float, peaks: dict[str, float]) -> dict[str, float]:
    return {f"mfu{suffix}": round(flops / seconds / peak, 4) for suffix, peak in peaks.items()}


def measure_training(
    bench: Bench, arguments: argparse.Namespace, peaks: dict[str, float], found: dict[str, Any]
) -> None:
    found["training"] = []
    many = arguments.micro_batches
    for length, recompute in product(arguments.lengths, arguments.recompute):
        lengths = micro_batch_lengths(length, arguments.tokens)
        row: dict[str, Any] = {"length": length, "tokens": sum(lengths), "recompute": recompute}
        found["training"].append(row)
        flops = model_flops(bench.architecture, lengths, sum(lengths) - len(lengths))
        batch = bench.micro_batch(lengths)
        device.reset_peak_memory()
        try:
            with bench.recomputing(recompute):
                each, besides = bench.seconds(batch, many)
        except torch.OutOfMemoryError:
            row["left_out"] = "out of memory"
            continue
        whole = many * each + besides
        planned = planned_bytes(arguments, bench.architecture, length, recompute)
        row |= {
            "seconds": round(each, 5),
            "seconds_of_step": round(besides, 5),
            "tokens_per_second": round(sum(lengths) / each),
            **rates(each, flops, peaks),
            "mfu_step": round(many * flops / whole / peaks[""], 4),
            "peak_gb": round(device.peak_memory_bytes() / 1e9, 3),
            "planned_gb": round(planned / 1e9, 3),
            "peak_over_planned": round(device.peak_memory_bytes() / planned, 3),
        }
        tell(f"training: {row}")
        if (length, recompute) == (arguments.tokens, arguments.recompute[0]):
            with bench.without_head():
                each, _ = bench.seconds(batch, many)
                flops = model_flops(bench.architecture, lengths, 0)
                found["without_head"] = {"seconds": round(each, 5), **rates(each, flops, peaks)}
            tell(f"without head: {found['without_head']}")
            parts = bench.parts(batch, max(1, many // 4))
            found["parts"] = {name: round(seconds, 5) for name, seconds in parts.items()}
            tell(f"parts: {found['parts']}")


def plain_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the formula with autograd, all logits in one piece, in fp32 from the logarithm on."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def fused_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logprobs_and_entropy(hidden, weight, targets, len(weight))


def measure_heads(architecture: Architecture, num_tokens: int, rounds: int) -> dict[str, Any]:
    on, dtype = device.torch_device(), torch.bfloat16
    hidden = torch.randn(num_tokens, architecture.hidden_size, device=on, dtype=dtype, requires_grad=True)
    weight = torch.randn(architecture.vocab_size, architecture.hidden_size, device=on, dtype=dtype)
    weight.mul_(architecture.hidden_size**-0.5).requires_grad_()
    targets = torch.randint(0, architecture.vocab_size, (num_tokens,), device=on)
    upstream = torch.randn(2, num_tokens, device=on)
    found: dict[str, Any] = {"tokens": num_tokens}
    for name, head in {"fused": fused_head, "plain": plain_head}.items():

        def one_pass(head: Any = head) -> None:
            logprobs, entropy = head(hidden, weight, targets)
            torch.autograd.grad((upstream[0] * logprobs + upstream[1] * entropy).sum(), [hidden, weight])

        try:
            seconds = median_seconds(one_pass, rounds)
            device.reset_peak_memory()
            before = device.peak_memory_bytes()
            one_pass()
            found[name] = {
                "seconds": round(seconds, 5),
                "extra_gb": round((device.peak_memory_bytes() - before) / 1e9, 4),
            }
        except torch.OutOfMemoryError:
            found[name] = {"left_out": "out of memory"}
        tell(f"head, {name}: {found[name]}")
    if all("seconds" in found[name] for name in ("fused", "plain")):
        found["time_ratio"] = round(found["fused"]["seconds"] / found["plain"]["seconds"], 3)
        # On a CPU the peak does not start again, and there is no ratio.
        if found["fused"]["extra_gb"]:
            found["memory_ratio"] = round(found["plain"]["extra_gb"] / found["fused"]["extra_gb"], 2)
    return found


def measured_by_child(*asked: str) -> dict[str, Any]:
    """Return what a process of its own prints: megatron's gradient hooks keep a model in memory as long as a process
    lives. What cannot be measured says why."""
    command = [sys.executable, __file__, *sys.argv[1:], *asked]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=CHILD_SECONDS,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return {"left_out": f"not done after {CHILD_SECONDS} s"}
    if done.returncode:
        return {"left_out": done.stderr.strip().rpartition("\n")[2]}
    return dict(json.loads(done.stdout[done.stdout.rfind("{") :]))  # libraries may have written in front of it


def measure_choices(keys: list[str]) -> dict[str, Any]:
    """Return the seconds of a micro-batch by key and value of the model's section."""
    found: dict[str, Any] = {}
    for key in keys:
        for value in get_args(ModelSection.model_fields[key].annotation):
            if value != "auto":
                found[f"{key} = {value}"] = measured_by_child("--choice", key, value)
                tell(f"{key} = {value}: {found[f'{key} = {value}']}")
    return found


def measure_choice(architecture: Architecture, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure, as a child, a model of two layers without head."""
    key, value = arguments.choice
    config = run_config(arguments, arguments.tokens, **{key: value})
    bench = Bench(architecture.model_copy(update={"num_hidden_layers": 2}), config, join(), arguments.rounds)
    with bench.without_head():
        batch = bench.micro_batch(micro_batch_lengths(arguments.tokens, arguments.tokens))
        each, _ = bench.seconds(batch, arguments.micro_batches)
    return {"seconds": round(each, 5)}


def measure_reference(architecture: Architecture, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, as a child, transformers' class of `architecture`'s layers."""
    lengths = micro_batch_lengths(arguments.tokens, arguments.tokens)
    reference = Reference(architecture, lengths, device.torch_device())
    each, besides = pace(reference.step, arguments.micro_batches, arguments.rounds)
    return {
        "class": type(reference.model).__name__,
        "parameters": sum(p.numel() for p in reference.model.parameters()),
        "seconds": round(each, 5),
        "seconds_of_step": round(besides, 5),
        "tokens_per_second": round(sum(lengths) / each),
        "peak_gb": round(device.peak_memory_bytes() / 1e9, 3),
    }


def join() -> Any:
    """Make a world of this process alone, and return its gloo group."""
    initialize_parallel(ALONE, 600.0, seed=1)
    return dist.new_group(backend="gloo")


def measure_export(bench: Bench, max_bytes: int, rounds: int) -> dict[str, Any]:
    model = bench.trainer.model
    parameters, dtype = model.parameters_by_canonical_name(), model.dtype
    buckets = divide(name_table(model.architecture).values(), dtype, max_bytes)
    largest, total = max(b.num_bytes for b in buckets), sum(b.num_bytes for b in buckets)
    flat = torch.empty(largest, dtype=torch.uint8, device=device.torch_device())
    host = torch.empty(largest, dtype=torch.uint8, pin_memory=device.on_cuda())

    def export(to_host: bool) -> None:
        for bucket in buckets:
            fill(flat, bucket, gathered(bucket.entries, parameters))
            if to_host:
                host[: bucket.num_bytes].copy_(flat[: bucket.num_bytes])

    found: dict[str, Any] = {"gb": round(total / 1e9, 3), "bucket_mb": max_bytes >> 20}
    for name, to_host in {"device": False, "host": True}.items():
        seconds = median_seconds(lambda to_host=to_host: export(to_host), rounds)  # type: ignore[misc]
        found[name] = {"seconds": round(seconds, 5), "gb_per_second": round(total / 1e9 / seconds, 2)}
    tell(f"export: {found}")
    return found


def matmul_flops(size: int, rounds: int) -> float:
    """Return the FLOP/s of a product of two random size x size matrices in bf16, ten at a time."""
    a, b = (torch.randn(size, size, device=device.torch_device(), dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def ten() -> None:
        for _ in range(10):
            torch.mm(a, b, out=out)

    return 10 * 2.0 * size**3 / median_seconds(ten, rounds)


def commit() -> str:
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, encoding="utf-8", errors="replace")
    return done.stdout.strip() or "unknown"


def measure(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Measure into `found`, one after the other, so that what was measured before an error is not lost."""
    shape = read_architecture(SHAPE)
    if arguments.smoke:
        shape = shape.model_copy(update=SMOKE)
    if arguments.choice:
        found |= measure_choice(shape, arguments)
        return
    if arguments.reference:
        cut = {"num_hidden_layers": arguments.reference}
        found |= measure_reference(shape.model_copy(update=cut), arguments)
        return
    longest = max(arguments.lengths, key=lambda n: sum(micro_batch_lengths(n, arguments.tokens)))

    def of(layers: int) -> Architecture:
        return shape.model_copy(update={"num_hidden_layers": layers})

    available = SHARE * device.memory_bytes()
    layers = arguments.layers or layers_that_fit(
        lambda n: max(planned_bytes(arguments, of(n), longest, how) for how in arguments.recompute),
        shape.num_hidden_layers,
        available,
    )
    name = device.device_name()
    nominal = arguments.peak or (None if arguments.smoke else nominal_peak(name))
    reached = matmul_flops(arguments.cube, arguments.rounds)
    tell(f"{name}: {layers} layers, {reached / 1e12:.3f} TFLOP/s at {arguments.cube}^3")
    found |= {
        "device": name,
        "memory_gb": round(device.memory_bytes() / 1e9, 1),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": arguments.commit or commit(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "layers": layers,
        "parameters": of(layers).num_parameters(),
        "micro_batches": arguments.micro_batches,
        "model": dict(arguments.model),
        "nominal_tflops": nominal and nominal / 1e12,
        "matmul_tflops": round(reached / 1e12, 3),
    }
    # First, while the device's memory is free.
    found["choices"] = measure_choices(arguments.choices)
    if "reference" not in arguments.skip:
        found["reference"] = measured_by_child("--reference", str(layers))
    if "head" not in arguments.skip:
        found["head"] = measure_heads(shape, arguments.tokens, arguments.rounds)
    if {"training", "export"}.issubset(arguments.skip):
        return
    config = run_config(arguments, sum(micro_batch_lengths(longest, arguments.tokens)))
    bench = Bench(of(layers), config, join(), arguments.rounds)
    peaks = {"": nominal or reached, "_of_matmul": reached}
    if "training" not in arguments.skip:
        measure_training(bench, arguments, peaks, found)
    if "training" in found and "reference" in found:
        ours = next(row for row in found["training"] if row["length"] == arguments.tokens)
        found["reference"] |= ratios(ours, found["reference"], arguments.micro_batches)
        tell(f"reference: {found['reference']}")
    if "export" not in arguments.skip:
        found["export"] = measure_export(bench, arguments.bucket_mb << 20, arguments.rounds)


def names_in(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return split


def key_and_value(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if key not in ModelSection.model_fields or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE of the model's section, such as attention=flash")
    return key, value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as memory.py plans to fit")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--tokens", type=int, help="of a micro-batch; it is one of the lengths too")
    parser.add_argument("--micro-batches", type=int, default=8, help="of an optimizer step, at least 2")
    parser.add_argument("--recompute", type=names_in(("none", "full")), default="none,full", metavar="none,full")
    parser.add_argument(
        "--choices", type=names_in(CHOICES), default=",".join(CHOICES), help="keys of the model's section"
    )
    parser.add_argument(
        "--model", type=key_and_value, action="append", default=[], metavar="KEY=VALUE", help="of the model's section"
    )
    parser.add_argument("--skip", type=names_in(PIECES), default="", metavar=",".join(PIECES))
    parser.add_argument("--peak", type=float, help="nominal FLOP/s of a device that tools/mfu.py does not know")
    parser.add_argument("--cube", type=int)
    parser.add_argument("--bucket-mb", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--choice", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tiny = arguments.smoke
    arguments.tokens = arguments.tokens or (128 if tiny else 8192)
    arguments.cube = arguments.cube or (128 if tiny else 8192)
    lengths = arguments.lengths or ([32, 128, 192] if tiny else [2048, 4096, 8192, 16384, 24576])
    arguments.lengths = sorted({*lengths, arguments.tokens})
    if not arguments.recompute:
        raise ValueError("--recompute names nothing; give none, full, or both")
    if arguments.micro_batches < 2:
        raise ValueError(f"--micro-batches must be at least 2, got {arguments.micro_batches}")
    found: dict[str, Any] = {}
    try:
        measure(arguments, found)
    finally:
        if found:
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
