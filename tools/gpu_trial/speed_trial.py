"""Measures how fast one GPU trains, with torch's kernels and with those of FlashAttention 4 and quack.

    python tools/gpu_trial/speed_trial.py [--dry]

In order of value: Ling-lite's geometry by torch's kernels with a profile, beside transformers' class trained by torch's
AdamW; whether FlashAttention 4 and quack compute the model; the same geometry by them with a profile; recomputation;
each choice by itself. tools/bench_gpu.py says what its numbers are. `--dry` takes bench_gpu's tiny shape, and choices
that a CPU has.
"""

import sys

from parts import end, run_bench, trial_of

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


def main() -> int:
    trial = trial_of("speed", __doc__ or "")
    from values import check_values

    def bench(name: str, at_most: float, *options: object) -> None:
        trial.part(name, at_most, lambda seconds: run_bench(trial, name, LENGTHS, seconds, *options))

    fast = ON_A_CPU if trial.is_dry else FAST
    chosen = [part for key, value in fast.items() for part in ("--model", f"{key}={value}")]
    few = ["--choices", "", "--recompute", "none", "--skip", "head,export"]
    bench("torch", 200, *few)
    checked = CHECKED_ON_A_CPU if trial.is_dry else CHECKED
    trial.part("values", 120, lambda _: check_values(checked))
    bench("fast", 150, *few, "--skip", "head,export,reference", *chosen)
    full = ["--choices", "", "--recompute", "full", "--skip", "head,export,reference"]
    bench("recompute", 120, *full, *chosen)
    each = ["--recompute", "none", "--skip", "reference,training"]
    bench("choices", 150, *each)
    return end(trial)


if __name__ == "__main__":
    sys.exit(main())
