"""This module reads where this process stands among the ranks of a run, as a launcher says it in the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

# torchrun, examples/ring_lite/slurm/job.sh and launch.py set these for a rank.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
# launch.py tells rank 0 the number of a socket that is bound to MASTER_PORT, so that nobody else can take the port.
SOCKET_VARIABLE = "MEGATRON_RL_STORE_SOCKET"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Holds the place of a rank among `world_size`. It is the local_rank-th of `local_world_size` on the machine with
    number `node`. The ranks meet at `address`:`port`. Without arguments it is a process that trains alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.local_world_size)


def has_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a launcher has started this process as one of several ranks, or has left variables that say so."""
    return "RANK" in environment or "WORLD_SIZE" in environment


def own_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read this process's place. ValueError, with the remedy, for what no launcher sets."""
    if not has_rank(environment):
        return Place()

    def number(name: str, below: int | None = None, least: int = 0) -> int:
        text = environment.get(name)
        if text is None:
            raise ValueError(f"{_told(environment)}, and {name} is missing; {remedy(environment)}")
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least or (below is not None and int(text) >= below):
            limit = f"below {below}" if below is not None else f"of at least {least}"
            raise ValueError(f"{name}={text!r} in the environment is no number {limit}; {remedy(environment)}")
        return int(text)

    world_size = number("WORLD_SIZE", least=1)
    rank = number("RANK", below=world_size)
    if world_size == 1:
        return Place()
    local_world_size = number("LOCAL_WORLD_SIZE", below=world_size + 1, least=1)
    place = Place(
        rank=rank,
        world_size=world_size,
        local_rank=number("LOCAL_RANK", below=local_world_size),
        local_world_size=local_world_size,
        node=number("GROUP_RANK", below=world_size) if world_size > local_world_size else 0,
        address=environment.get("MASTER_ADDR", ""),
        port=number("MASTER_PORT", below=2**16, least=1),
    )
    if not place.address:
        raise ValueError(f"{_told(environment)}, and MASTER_ADDR is missing; {remedy(environment)}")
    return place


def remedy(environment: Mapping[str, str] = os.environ) -> str:
    """Say what to do about an environment that does not fit."""
    left = " ".join(name for name in _VARIABLES if name in environment)
    return f"when no launcher started this process as a rank, `unset {left}`; else let it set all of these variables"


def _told(environment: Mapping[str, str]) -> str:
    return " ".join(f"{name}={environment[name]}" for name in ("RANK", "WORLD_SIZE") if name in environment) + (
        " in the environment"
    )
