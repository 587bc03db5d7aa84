"""Runs an optimizer step of a small BailingMoE in many ways, each in a process (tests/parallel_worker.py)."""

import json
import os
import random
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from parallel import LAYOUTS, SHAPE, make_spec, run_ranks
from reference import routed_by
from tiny_model import tensors_of, write_tiny_model
from torch import Tensor

from megatron_rl import device
from megatron_rl.config.model import ModelSection

# Widths that every kernel takes: head_dim 32 (flash attention from 16 up, in multiples of 8), and rows of 16 bytes or
# more for grouped products, which SHAPE alone (head_dim 16) has too, but for the vocabulary of 97.
MODEL = SHAPE | {"hidden_size": 128, "moe_intermediate_size": 64}
# Router choices that the sequences bring along: where rounding decides between two experts, everything behind differs.
GIVEN, CHOSEN = "given", "chosen"
OF_PACKAGES = {"transformer_engine", "fa4", "quack"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Describes one way to run the step.

    on_cpu: on a CPU, not on the device under test. layout: a name of test_parallel.LAYOUTS; one rank without. experts:
    given with the sequences, or chosen by the routers. model: keys of the configuration's section. placed: the
    sequences of each micro-batch; None packs them up to 80 tokens. balance: of the load-balance loss, which depends on
    what shares a micro-batch. watch_host: see tests/host_waits.py.
    """

    dtype: str = "float32"
    on_cpu: bool = False
    experts: str = CHOSEN
    model: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    placed: list[list[int]] | None = None
    balance: float = 0.0
    watch_host: bool = False
    layout: str = ""


def options(name: str) -> list[str]:
    """Return the values that a key of [model] may have, without `auto`. Return none for a key that is not known."""
    known = ModelSection.model_fields.get(name)
    return [] if known is None else [value for value in get_args(known.annotation) if value != "auto"]


def backends() -> dict[str, dict[str, str]]:
    """Return the model's section for every choice of parts, by name."""
    choices = [{"layers": value} for value in options("layers")]
    choices += [{"layers": "local", "expert_weight_gradient": value} for value in options("expert_weight_gradient")]
    parts = [name for name in ("attention", "experts") if options(name)]
    choices += [
        {"layers": "local", **dict(zip(parts, of_parts, strict=True))} for of_parts in product(*map(options, parts))
    ]
    return {", ".join(f"{name}={value}" for name, value in section.items()): section for section in choices}


SHUFFLED = random.Random(5).sample(range(9), 9)
RUNS: dict[str, Run] = {
    "exact": Run(dtype="float64", on_cpu=True),
    "exact, balanced": Run(dtype="float64", on_cpu=True, balance=0.01),
    "exact, given": Run(dtype="float64", on_cpu=True, experts=GIVEN),
    "cpu float32": Run(on_cpu=True, balance=0.01),
    "float32": Run(balance=0.01),
    "cpu bfloat16": Run(dtype="bfloat16", on_cpu=True, experts=GIVEN),
    "bfloat16": Run(dtype="bfloat16", experts=GIVEN),
    "one by one": Run(placed=[[i] for i in range(9)]),
    "all at once": Run(placed=[list(range(9))]),
    "shuffled": Run(placed=[SHUFFLED[:4], SHUFFLED[4:5], SHUFFLED[5:]]),
    "recompute": Run(recompute="full"),
    "watched": Run(dtype="bfloat16", balance=0.01, watch_host=True),
    **{name: Run(dtype="bfloat16", experts=GIVEN, model=section) for name, section in backends().items()},
}


class TrainingRuns:
    """Starts every run at once, a few at a time, and hands out what they found. start: the weights before the step."""

    def __init__(self, folder: Path, of: dict[str, Run] = RUNS) -> None:
        self._folder, self._runs = folder, of
        self._model = write_tiny_model(folder / "model", **MODEL)
        self.start = tensors_of(self._model)
        self._threads = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 4))
        self._found: dict[str, Future[dict[str, Tensor]]] = {}

    def __call__(self, name: str) -> dict[str, Tensor]:
        """Return logprobs/I, grad/c3po/NAME, weight/NAME, grad_norm and loss of a run.

        Skip the test when the parts that it asks for are missing: on a CPU, or without an optional package.
        """
        if not self._found:
            self._found = {key: self._threads.submit(self._run, key) for key in self._runs}
        try:
            return self._found[name].result()
        except AssertionError as error:
            reason, asked = refusal(str(error)), self._runs[name].model
            may_lack = asked and (not device.on_cuda() or not OF_PACKAGES.isdisjoint(asked.values()))
            if reason is None or not may_lack:
                raise
            pytest.skip(reason)

    def host_waits(self) -> list[str]:
        """Return the places where the host waits for the GPU in the watched run."""
        self("watched")
        return list(json.loads((self._folder_of("watched") / "host_waits.json").read_text()))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _folder_of(self, name: str) -> Path:
        return self._folder / f"run{list(self._runs).index(name)}"

    def _run(self, name: str) -> dict[str, Tensor]:
        run, folder = self._runs[name], self._folder_of(name)
        num_ranks, parallel = LAYOUTS.get(run.layout, (1, {}))
        spec = make_spec(self._model, dtype=run.dtype, recompute=run.recompute, parallel=parallel, **run.model)
        # The ranks of a context-parallel group share the cap of one process.
        spec["token_cap"] //= parallel.get("context", 1)
        if num_ranks > 1:  # with buckets that end within layers
            spec["train"] = {"overlap": "on", "overlap_bucket_parameters": 5000}
        spec["moe"] = {"load_balance_coefficient": run.balance, "z_loss_coefficient": 1e-3}
        spec["watch_host"] = run.watch_host and device.on_cuda()
        if run.placed is not None:
            spec |= {"placed": [run.placed], "token_cap": 1000}
        if run.experts == GIVEN:
            for row in spec["sequences"]:
                row["routed_experts"] = routed_by(self._model, row["token_ids"])[:-1].tolist()
        tensors = run_ranks(num_ranks, spec, folder, on_cpu=run.on_cpu)
        loss = json.loads((folder / "result.json").read_text())["metrics"]["loss"]
        return tensors | {"loss": torch.tensor(loss, dtype=torch.float64)}


def refusal(log: str) -> str | None:
    """Return the message of the last ValueError in a log, by which the package says what it cannot do."""
    found = re.findall(r"ValueError: (.*)", log)
    return found[-1] if found else None
