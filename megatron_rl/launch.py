"""Several training ranks on this machine, through torchrun, with the exit code that the run itself gave.

torchrun turns any exit code of a rank into 1 and a stack trace of its own. So a rank that ends in an orderly way, with
whatever code, tells torchrun 0 and leaves the code in a file.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from megatron_rl.lifeline import PARENT_VARIABLE

_EXIT_FILE_VARIABLE = "MEGATRON_RL_EXIT_FILE"


def run_under_torchrun(arguments: list[str], num_ranks: int) -> int:
    """Run `megatron-rl ARGUMENTS` on `num_ranks` ranks; returns the exit code of rank 0."""
    with tempfile.TemporaryDirectory(prefix="megatron_rl-launch-") as folder:
        exit_file = Path(folder) / "exit_code"
        # Not --standalone, whose stores listen on every interface: torchrun meets itself in a file, the ranks on
        # loopback (stores.py).
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(num_ranks)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{folder}/rendezvous", "--rdzv_id", "run"]
        command += ["--rdzv_conf", "store_type=file", "--local_addr", "127.0.0.1", "-m", "megatron_rl.cli", *arguments]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        environment |= {_EXIT_FILE_VARIABLE: str(exit_file), PARENT_VARIABLE: str(os.getpid())}
        # A session of its own keeps the terminal's Ctrl-C away from torchrun, which would end with a stack trace.
        # Signals go to the ranks, they end in an orderly way, and torchrun sees nothing but that.
        torchrun = subprocess.Popen(command, env=environment, start_new_session=True)

        def pass_on(number: int, _: object) -> None:
            for rank in psutil.Process(torchrun.pid).children():
                rank.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, pass_on)
        code = torchrun.wait()
        return int(exit_file.read_text()) if exit_file.exists() else code or 1


def leave(code: int) -> int:
    """What this process should exit with: `code`, or 0 under `run_under_torchrun`, which has been told the code."""
    exit_file = os.environ.get(_EXIT_FILE_VARIABLE)
    if exit_file is None or "RANK" not in os.environ:
        return code
    if os.environ["RANK"] == "0":
        Path(exit_file).write_text(str(code))
    return 0
