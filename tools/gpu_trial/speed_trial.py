"""How fast is training on one GPU, with torch's kernels and with FlashAttention 4 and quack's?

    python tools/gpu_trial/speed_trial.py [--dry]

In order of value: Ling-lite's geometry by torch's kernels with a profile, beside transformers' class trained by torch's
AdamW; whether FlashAttention 4 and quack compute the model; the same geometry by them with a profile; recomputation;
each choice by itself. tools/bench_gpu.py says what its numbers are. `--dry` takes bench_gpu's tiny shape, and choices
that a CPU has.
"""

import sys
from typing import Any

from parts import ROOT, Trial, end, run_json, trial_of

LENGTHS = "8192,24576"
FAST = {"attention": "fa4", "expert_weight_gradient": "quack"}
ON_A_CPU = {"attention": "sdpa", "experts": "grouped"}
# The tolerance is that of tests/gpu; what a CPU has no kernel for is checked on a GPU alone.
CHECKED = {
    "torch": {"layers": "local"},
    "fa4": {"layers": "local", "attention": "fa4"},
    "quack": {"layers": "local", "experts": "grouped", "expert_weight_gradient": "quack"},
}
CHECKED_ON_A_CPU = {"torch": {"layers": "local"}, "grouped": {"layers": "local", "experts": "grouped"}}


def bench(trial: Trial, name: str, seconds: float, *options: object) -> Any:
    command: list[object] = [sys.executable, ROOT / "tools/bench_gpu.py", "--rounds", 3, "--commit", trial.commit]
    command += ["--smoke"] if trial.is_dry else ["--lengths", LENGTHS]
    return run_json(trial, name, [*command, *options], seconds)


def main() -> int:
    trial = trial_of("speed", __doc__ or "")
    from values import check_values

    fast = ON_A_CPU if trial.is_dry else FAST
    chosen = [part for key, value in fast.items() for part in ("--model", f"{key}={value}")]
    few = ["--choices", "", "--recompute", "none", "--skip", "head,export"]
    trial.part("torch", 200, lambda s: bench(trial, "torch", s, *few))
    checked = CHECKED_ON_A_CPU if trial.is_dry else CHECKED
    trial.part("values", 120, lambda _: check_values(checked))
    trial.part("fast", 150, lambda s: bench(trial, "fast", s, *few, "--skip", "head,export,reference", *chosen))
    full = ["--choices", "", "--recompute", "full", "--skip", "head,export,reference"]
    trial.part("recompute", 120, lambda s: bench(trial, "recompute", s, *full, *chosen))
    each = ["--recompute", "none", "--skip", "reference,training"]
    trial.part("choices", 150, lambda s: bench(trial, "choices", s, *each))
    return end(trial)


if __name__ == "__main__":
    sys.exit(main())
