"""Does real SGLang serve beside the trainer on one GPU, take its weights, and give its memory back?

    python tools/gpu_trial/sglang_trial.py [--dry]

In order of value: SGLang starts, and does what tests/conformance.py says (its core); two steps of a run with weights
through a folder; two over IPC, trainer and server in turns; log-probs of server and trainer in fp32 and bf16, with and
without router replay; seconds of every part of a push of a model of at least 4 GB, beside a copy on the device; memory
that a release makes free; a server killed in a push. `--dry` runs the same against embedded servers and a tiny model.
"""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from parts import ROOT, PartFailed, Trial, end, run, run_json, run_tests, trial_of

# The kernels that are not carried: FlashAttention 3 and flashinfer's cubins. docs/gpu.md has the versions.
ARGUMENTS = (
    "--attention-backend triton --sampling-backend pytorch --grammar-backend none --mem-fraction-static 0.3 "
    "--cuda-graph-max-bs-decode 4 --disable-prefill-cuda-graph"
)
# SGLang 0.5.22 is made for torch 2.14. Under 2.11 its prefix cache, compiled from Rust, ends the server at the first
# request (seen on a CPU).
UNDER_ANOTHER_TORCH = {
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
}
CORE = (
    "log_probs_are_those_of_the_model or output_log_probs or one_prompt or streams or an_abort_returns or "
    "weights_from_disk or weights_arrive_in_buckets or memory_is_released or paused_request or information_routes"
)
READY_SECONDS = 240.0
# 2.3 billion weights: 4.6 GB in bf16, in nine buckets.
LARGE: dict[str, int | str] = {"--hidden-size": 2048, "--layers": 4, "--heads": 16, "--kv-heads": 4, "--experts": 64}
LARGE |= {"--experts-per-token": 6, "--moe-intermediate-size": 1408, "--shared-experts": 2, "--dtype": "bfloat16"}
SMALL = {"--hidden-size": 64, "--layers": 3, "--experts": 6, "--moe-intermediate-size": 32}
# The limit of the mean difference of log-probs of server and trainer in a step; the reason is in
# tests/gpu/test_gpu_run.py.
MEAN_DIFFERENCE = 0.05


def run_config(trial: Trial, folder: Path, transport: str) -> dict[str, Any]:
    """Return the configuration of a run of two steps. ipc: trainer and server take turns, each with all of the memory.
    Embedded servers do not have it, and get the weights by broadcast."""
    turns = transport == "ipc" and not trial.is_dry
    rollout: dict[str, Any] = {
        "engine": "embedded" if trial.is_dry else "sglang",
        "servers": 1,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "max_prompt_tokens": 48,
        "max_response_tokens": 24,
        "max_running_requests": 16,
        "ready_deadline_seconds": READY_SECONDS,
        "release_memory": turns,
    }
    if not trial.is_dry:
        rollout["sglang_arguments"] = ARGUMENTS.split()
    return {
        "run_dir": str(folder / f"run_{transport}"),
        "model": {"path": str(folder / "model"), "dtype": "bfloat16", "trust_remote_code": True},
        "data": {"train": str(folder / "data/train.jsonl")},
        "rollout": rollout,
        "sync": {"transport": "distributed" if trial.is_dry and transport == "ipc" else transport},
        "budget": {"tokens": 300},
        "optimizer": {"learning_rate": 1e-3},
        # A gradient though no answer is right, so that the second step's weights are others.
        "algorithm": {"entropy_coefficient": 0.1},
        "train": {
            "steps": 2,
            "save_every": 2,
            "micro_batch_tokens": 128,
            "phase_deadline_seconds": 300,
            "offload_while_generating": turns,
        },
    }


def loop(trial: Trial, folder: Path, transport: str, seconds: float) -> Any:
    """Run two steps by the command line. Return what its metrics say of each. PartFailed unless the servers
    followed."""
    from megatron_rl.train.run.metrics import read_metrics

    config = folder / f"{transport}.toml"
    settings = run_config(trial, folder, transport)
    config.write_text(tomli_w.dumps(settings), encoding="utf-8")
    name = f"loop_{transport}"
    code, _ = run(trial, name, [sys.executable, "-m", "megatron_rl.cli", "train", config], seconds, UNDER_ANOTHER_TORCH)
    rows = read_metrics(Path(settings["run_dir"]) / "metrics.jsonl")
    names = ("logprob_difference_mean", "logprob_difference_max", "num_lost_servers", "num_skipped_steps", "grad_norm")
    kept = [{key: value for key, value in row.items() if key in names or key.endswith("_seconds")} for row in rows]
    if code or len(rows) != 2:
        log = Path(settings["run_dir"]) / "server_0.log"
        said = log.read_text(errors="replace", encoding="utf-8")[-1500:] if log.exists() else ""
        raise PartFailed(f"ended with code {code} after {len(rows)} steps. {said}", kept)
    if not all(row["grad_norm"] > 0 for row in rows):
        raise PartFailed("no step changed a weight, so nothing shows whether the servers followed", kept)
    late = max(row["logprob_difference_mean"] for row in rows)
    if late > MEAN_DIFFERENCE or any(row["num_lost_servers"] for row in rows):
        raise PartFailed(f"servers were lost, or had other weights: mean difference {late}", kept)
    return kept


def replay(trial: Trial, dtype: str, seconds: float) -> Any:
    command: list[object] = [sys.executable, ROOT / "tools/bench_replay.py", "--dtype", dtype]
    if trial.is_dry:
        command += ["--prompts", 4, "--samples", 2, "--new-tokens", 16, "--layers", 2]
    else:
        command += ["--sglang", ARGUMENTS]
    return run_json(trial, f"replay_{dtype}", command, seconds, UNDER_ANOTHER_TORCH)


def push(trial: Trial, folder: Path, seconds: float) -> Any:
    """Run the scenario `timed` of tests/push_worker.py."""
    from parallel import run_ranks

    flags = [part for pair in (SMALL if trial.is_dry else LARGE).items() for part in pair]
    code, _ = run(
        trial, "make", [sys.executable, ROOT / "tools/make_tiny_model.py", folder / "large", *flags], seconds / 2
    )
    if code:
        raise PartFailed(f"tools/make_tiny_model.py ended with code {code}")
    rollout: dict[str, Any] = {"servers": 1, "release_memory": True, "ready_deadline_seconds": READY_SECONDS}
    if not trial.is_dry:
        rollout |= {"engine": "sglang", "sglang_arguments": ARGUMENTS.split(), "silence_seconds": 60.0}
    spec = {
        "scenario": "timed",
        "model": str(folder / "large"),
        "other": str(folder / "large"),
        "dtype": "float32" if trial.is_dry else "bfloat16",
        "parallel": {},
        # The embedded server opens nobody's memory.
        "transports": ["distributed", "disk"] if trial.is_dry else ["ipc", "disk", "distributed"],
        "bucket_bytes": 20_000 if trial.is_dry else 2**29,
        "rollout": rollout,
    }
    try:
        run_ranks(1, spec, folder / "push", seconds, "push_worker.py", on_cpu=False)
    except AssertionError as error:
        report = folder / "push/report.json"
        raise PartFailed(
            str(error)[-2000:], json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
        ) from error
    found = json.loads((folder / "push/report.json").read_text(encoding="utf-8"))
    behind = [push["difference"] for pushes in found["pushes"].values() for push in pushes]
    behind += [found[name]["difference"] for name in ("killed", "released")]
    before = [push["difference_before"] for pushes in found["pushes"].values() for push in pushes]
    if max(behind) > MEAN_DIFFERENCE or max(behind) > min(before) / 2:
        raise PartFailed(f"a server has other weights behind a push: {max(behind)} nats, before {min(before)}", found)
    return found


def main() -> int:
    trial = trial_of("sglang", __doc__ or "")
    os.environ |= UNDER_ANOTHER_TORCH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if trial.is_dry:
            files, environment = ["tests/test_conformance.py"], {}
        else:
            files, environment = ["tests/real_sglang/test_conformance.py"], {"MEGATRON_RL_SGLANG_ON_GPU": ARGUMENTS}
        # It starts the server, which compiles: later starts find what the first one made.
        trial.part(
            "conformance",
            300,
            lambda seconds: run_tests(trial, "conformance", files, seconds, only=CORE, environment=environment),
        )

        def inputs(_: float) -> None:
            from inputs import make_inputs

            # Heads of 32: triton's products want 16 at least.
            make_inputs(folder, 1, 100, 1, "--hidden-size", "128", "--moe-intermediate-size", "64")

        trial.part("inputs", 60, inputs)
        trial.part("loop_disk", 150, lambda seconds: loop(trial, folder, "disk", seconds))
        trial.part("loop_ipc", 150, lambda seconds: loop(trial, folder, "ipc", seconds))
        for dtype in ("float32", "bfloat16"):
            trial.part(f"replay_{dtype}", 90, partial(replay, trial, dtype))
        trial.part("push", 240, lambda seconds: push(trial, folder, seconds))
    return end(trial)


if __name__ == "__main__":
    sys.exit(main())
