"""Is real NCCL between several ranks that share one GPU right and in order, and does it end?

    python tools/gpu_trial/nccl_trial.py [--dry]

In order of value: whether NCCL takes several ranks on one GPU at all; one step of every kind of parallelism in fp32 and
bf16 against one process in fp64; a checkpoint written beside training and continued in another layout; weights to a
stand-in receiver; a rank that is killed in a collective; the sharded optimizer; every layout in fp64. It shows nothing
about speed, NVLink or device numbers. `--dry` runs the same over gloo.
"""

import os
import sys

from parts import end, run_tests, trial_of

NCCL = ["tests/gpu/test_gpu_nccl.py"]
LAYOUTS = ["tests/ranks/test_parallel.py"]
IN_FP64 = "test_every_layout_gives_the_gradient_of_one_process_to_rounding"
NAMES = ("DP2", "TP2", "EP2", "PP2", "CP2", "TP2xDP2-EP2", "TP2xPP2", "CP2xDP2-EP2")


def main() -> int:
    trial = trial_of("nccl", __doc__ or "")
    os.environ["MEGATRON_RL_RANKS_ON_ONE_GPU"] = "1"

    def tests(name: str, seconds: float, files: list[str], only: str = "", decides: bool = False) -> None:
        trial.part(name, seconds, lambda given: run_tests(trial, name, files, given, only=only), decides=decides)

    tests("one_gpu", 90, NCCL, "test_two_ranks_on_one_gpu", decides=True)
    tests("layouts", 300, NCCL, "test_a_step_of_several_ranks")
    tests("checkpoint", 120, LAYOUTS, "checkpoint_continues_in_another_layout")
    tests("weights", 90, NCCL, "test_weights_reach_a_receiver")
    tests("killed", 150, NCCL, "test_ranks_end_when_one_is_killed")
    tests("optimizer", 90, LAYOUTS, "test_distributed_optimizer_takes_the_same_step")
    tests("fp64", 240, [f"{LAYOUTS[0]}::{IN_FP64}[{name}]" for name in NAMES])
    return end(trial)


if __name__ == "__main__":
    sys.exit(main())
