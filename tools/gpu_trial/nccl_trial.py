"""Real NCCL between several ranks that share one GPU: is it right, in order, and does it end?

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
LAYOUTS = ["tests/test_parallel.py"]
# Those that name no kernel of a CPU, for layouts that the first part has too.
NAMES = "(DP2 or TP2-EP2 or EP2 or PP2 or CP2 or TP2xDP2-EP2) and not VPP2 and not x"


def main() -> int:
    trial = trial_of("nccl", __doc__ or "")
    os.environ["MEGATRON_RL_RANKS_ON_ONE_GPU"] = "1"

    def tests(name: str, seconds: float, files: list[str], only: str, decides: bool = False) -> None:
        trial.part(name, seconds, lambda given: run_tests(trial, name, files, given, only=only), decides=decides)

    tests("one_gpu", 90, NCCL, "test_two_ranks_on_one_gpu", decides=True)
    tests("layouts", 300, NCCL, "test_a_step_of_several_ranks")
    tests("checkpoint", 120, LAYOUTS, "checkpoint_continues_in_another_layout and EP2-CP2")
    tests("weights", 90, NCCL, "test_weights_reach_a_receiver")
    tests("killed", 120, NCCL, "test_ranks_end_when_one_is_killed")
    tests("optimizer", 90, LAYOUTS, "test_distributed_optimizer_takes_the_same_step")
    tests("fp64", 240, LAYOUTS, f"test_every_layout_gives_the_gradient and {NAMES}")
    return end(trial)


if __name__ == "__main__":
    sys.exit(main())
