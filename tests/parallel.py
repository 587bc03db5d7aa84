"""Run a test's work on real ranks, each a process of its own, and bring back what they computed.

They are gloo's on a CPU. With MEGATRON_RL_RANKS_ON_ONE_GPU=1 they are NCCL's, and share the first GPU.
"""

import json
import multiprocessing
import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked
import pytest
from ports import free_port
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.config.layout import Layout

ROOT = Path(__file__).parents[1]
# 97 rows of vocabulary: padded under tensor parallelism. Four layers, the first dense: two pipeline stages of two,
# three of one, two and one.
SHAPE = {"vocab_size": 97, "num_hidden_layers": 4, "norm_head": True}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "DP2": (2, {}),
    "DP4": (4, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2-ETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "TP2-EP2": (2, {"tensor": 2, "expert": 2}),
    "EP2": (2, {"expert": 2}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "CP2-EP2": (2, {"context": 2, "expert": 2}),
    "CP4": (4, {"context": 4}),
    "CP2xTP2": (4, {"context": 2, "tensor": 2}),
    "CP2xPP2": (4, {"context": 2, "pipeline": 2}),
    "CP2xDP2-EP2": (4, {"context": 2, "expert": 2}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2xDP2": (4, {"tensor": 2}),
    "TP2xDP2-EP2": (4, {"tensor": 2, "expert": 2}),
    "PP2xDP2-EP2": (4, {"pipeline": 2, "expert": 2}),
    "PP3": (3, {"pipeline": 3}),
}
TRACED = [0, 3, 4, 8]
COMMON = {"entropy_coefficient": 0.01, "kl_coefficient": 0.1}
# The three kinds of denominator and both levels of the ratio.
ALGORITHMS = [
    {"name": "c3po", "clip_low": 0.2, "clip_high": 0.3, **COMMON},
    {"name": "grpo", "clip_low": 0.2, "clip_high": 0.3, **COMMON},
    {"name": "gspo", "clip_low": 0.01, "clip_high": 0.6, **COMMON},
]
# Rounding in fp64 is about 1e-15. What remains in fp32 (the router's softmax) may round to the other side.
EXACT = 1e-8
# Buckets that end within layers; three quarters of the states in host memory, and all off the device at times.
EVERYTHING = {
    "train": {"overlap": "on", "overlap_bucket_parameters": 5000},
    "optimizer": {"offload_fraction": 0.75},
    "offload_before": [0, 2],  # and the step between runs with weights that come as they are needed
}


def sharing_a_gpu(rank: int) -> dict[str, str]:
    """Return the environment of a rank that shares its GPU with others.

    NCCL refuses two ranks of one machine on one GPU. It tells machines apart by NCCL_HOSTID, so each rank is one, and
    they talk over sockets. That shows what is computed and in which order, and nothing about speed.
    """
    return {
        "LOCAL_RANK": "0",
        "NCCL_HOSTID": f"rank{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        # Every rank compiles; a pool of processes for each would be hundreds.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def _start(worker: Path, folder: Path, log: Path, environment: dict[str, str], on_cpu: bool) -> BaseProcess:
    """Start a process that runs the worker as a program. On a CPU it is a fork; CUDA allows none."""
    arguments = [str(worker), str(folder)], environment, log, log, ROOT
    if on_cpu:
        return forked.start(forked.program, *arguments)
    process = multiprocessing.get_context("spawn").Process(target=forked.program, args=arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # read when torch is loaded
        process.start()
    return process


def run_ranks(
    num_ranks: int,
    spec: dict[str, Any],
    folder: Path,
    timeout_seconds: float = 900,
    worker: str = "parallel_worker.py",
    on_cpu: bool | None = None,
) -> dict[str, Tensor]:
    """Run a worker of tests/ with `spec` on `num_ranks` ranks; returns the tensors that all of them wrote.

    on_cpu: else on the device that a process of this environment takes by itself. None: as the module says.
    """
    on_one_gpu = on_cpu is not True and os.environ.get("MEGATRON_RL_RANKS_ON_ONE_GPU") == "1"
    if on_cpu is None:
        on_cpu = not on_one_gpu
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    environment = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        # Without a visible GPU a CUDA build of torch is what it is on a machine without one.
        **({"MEGATRON_RL_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
    }
    logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
    processes = []
    try:
        for rank, (log, place) in enumerate(zip(logs, places, strict=True)):
            own = os.environ | environment | place | (sharing_a_gpu(rank) if on_one_gpu else {})
            processes.append(_start(ROOT / "tests" / worker, folder, log, own, on_cpu))
        give_up = time.monotonic() + timeout_seconds
        for process in processes:
            process.join(max(0.0, give_up - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    if any(code != 0 for code in codes):  # None: not done in time
        ends = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)
        raise AssertionError(f"ranks ended with {codes}\n{ends}")
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("out-*.safetensors")):
        part = load_file(file)
        assert not tensors.keys() & part.keys(), f"written by two ranks: {tensors.keys() & part.keys()}"
        tensors |= part
    return tensors


def with_trajectories(spec: dict) -> dict:
    """Change the spec: others wrote some tokens of some sequences, and some samples have several sequences."""
    rows = spec["sequences"]
    for i in (1, 3, 6, 8):
        start, ids = rows[i]["num_prompt_tokens"], rows[i]["token_ids"]
        at = [place for place in range(len(ids) - start) if (place + i) % 5 < 3]
        rows[i] |= {
            "loss_positions": [start + place for place in at],
            "rollout_logprobs": [rows[i]["rollout_logprobs"][place] for place in at],
            "num_stale_tokens": (0, len(ids), len(at) // 2)[i % 3],
        }
    for sample, segments in ((3, (4, 5)), (6, (7,))):
        for i in (sample, *segments):
            rows[i] |= {"sample": sample, "advantage": rows[sample]["advantage"]}
    return spec


def with_teacher(spec: dict) -> dict:
    """Add a teacher to the spec, which has scored all tokens of all sequences but the third."""
    for i, row in enumerate(spec["sequences"]):
        if i != 2:
            gaps = [((37 * t + 11 * i) % 257 - 128) / 256 for t in range(len(row["rollout_logprobs"]))]
            row["teacher_logprobs"] = [own + gap for own, gap in zip(row["rollout_logprobs"], gaps, strict=True)]
            row["teacher_coefficient"] = 0.75
    return spec


def make_spec(model: Path, **changes: object) -> dict:
    rng = random.Random(0)
    rows = []
    for _ in range(9):
        length = rng.randint(9, 40)
        num_prompt_tokens = rng.randint(1, 8)
        rows.append(
            {
                "token_ids": [rng.randrange(97) for _ in range(length)],
                "num_prompt_tokens": num_prompt_tokens,
                "advantage": rng.uniform(-2, 2),
                # About what a model that knows nothing gives: some ratios are clipped, others are not.
                "rollout_logprobs": [rng.randint(-1200, -800) / 256 for _ in range(length - num_prompt_tokens)],
                # No tokens, all, or the first half are stale; the last as in a response resumed under new weights.
                "num_stale_tokens": (0, length, (length - num_prompt_tokens) // 2)[len(rows) % 3],
            }
        )
    return {
        "model": str(model),
        "sequences": rows,
        "token_cap": 80,
        "budget": 150,
        "algorithms": ALGORITHMS[:1],
        "traced": TRACED,
        **changes,
    }


def exact_spec(model: Path, **changes: object) -> dict:
    """Return a spec in fp64 with agents' trajectories, a teacher, and a reference policy of other weights."""
    options = {"dtype": "float64", "algorithms": ALGORITHMS, "reference_scale": 1.1}
    return with_teacher(with_trajectories(make_spec(model, **options | changes)))


def moe(layout: Layout) -> dict[str, float]:
    """Choose auxiliary losses that a layout can be compared with. The z-loss is linear in tokens. The balance loss is
    not: it stays the same where micro-batches do."""
    return {"load_balance_coefficient": 0.05 if layout.data == 1 else 0.0, "z_loss_coefficient": 0.02}


def relative(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> tuple[float, str]:
    names = [name for name in expected if name.startswith(prefix)]
    assert names
    assert {name for name in found if name.startswith(prefix)} == set(names)
    return max((relative(found[name], expected[name]), name) for name in names)
