"""Runs one rank of a few collectives on this process's device and prints how long each takes.

tests/parallel.py starts it.
"""

import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl import device
from megatron_rl.place import own_place
from megatron_rl.stores import join

REPEATS = 10


def main(folder: Path) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device.set_local_device(int(os.environ["LOCAL_RANK"]))
    timeout = datetime.timedelta(seconds=600)
    dist.init_process_group(device.backend(), store=join(own_place(), 600), rank=rank, world_size=size, timeout=timeout)
    where = device.torch_device()

    def total() -> Tensor:
        found = torch.tensor([float(rank), 10.0 * rank + 1.0], device=where)
        dist.all_reduce(found)
        return found

    def exchanged() -> Tensor:
        """Exchange numbers: rank r sends r + 1 of them to rank 0 and 2 - r to rank 1."""
        sizes = [rank + 1, 2 - rank]
        sent = torch.arange(3, device=where).float() + 10 * rank
        come = [1, 2] if rank == 0 else [2, 1]
        received = torch.empty(3, device=where)
        dist.all_to_all_single(received, sent, come, sizes)
        return received

    def neighbour() -> Tensor:
        other, received = 1 - rank, torch.empty(1, device=where)
        mine = torch.tensor([float(rank)], device=where)
        ops = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, received, other)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return received

    collectives: dict[str, Callable[[], Tensor]] = {"sum": total, "exchanged": exchanged, "neighbour": neighbour}
    out = {}
    for name, collective in collectives.items():
        out[f"{name}/{rank}"] = collective().cpu()
        started = time.perf_counter()
        for _ in range(REPEATS):
            collective()
        device.synchronize()
        print(f"{name}: {(time.perf_counter() - started) / REPEATS * 1e3:.2f} ms", flush=True)
    save_file(out, folder / f"out-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # torch's process groups may take seconds to wind down
