"""The generation servers of a run: each node's first rank owns those of its node, rank 0 knows all their urls."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.config.schema import RlConfig
from megatron_rl.rollout.keeper import ServerKeeper, start_servers
from megatron_rl.train.resilience import StopRequested, StopSignals

log = logging.getLogger(__name__)


class NodeServers:
    """urls: of all nodes' servers, on every rank. keeper: of this node's, on its first rank. `close()` ends these."""

    def __init__(self, config: RlConfig, weights: Path, control: Any, signals: StopSignals) -> None:
        """Collective over the gloo group `control`: start the servers on the model directory `weights` and wait until
        they serve, or take those of rollout.urls.

        On every rank ValueError when one did not start, and StopRequested when a signal came first.
        """
        self.keeper: ServerKeeper | None = None
        self.urls = list(config.rollout.urls)
        if self.urls:
            return
        mine: dict[str, Any] = {"urls": [], "error": None, "stopped": False}
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            node = int(os.environ.get("GROUP_RANK", "0"))
            name = "server" if node == 0 else f"node{node}_server"
            try:
                self.keeper = start_servers(
                    weights, config.run_dir, config.rollout, config.model.dtype, name=name, host=node_address()
                )
                self.keeper.wait_ready(signals.check)
                mine["urls"] = self.keeper.urls
            except StopRequested:
                mine["stopped"] = True
            except (ValueError, OSError) as error:
                mine["error"] = f"node {node} ({socket.gethostname()}): {error}" if num_nodes() > 1 else str(error)
        found: list[Any] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(found, mine, group=control)
            if any(one["stopped"] for one in found):
                raise StopRequested("stopped while the servers started")
            for one in found:
                if one["error"] is not None:
                    raise ValueError(one["error"])
        except BaseException:
            self.close()
            raise
        self.urls = [url for one in found for url in one["urls"]]

    def close(self) -> None:
        if self.keeper is not None:
            self.keeper.close()


def num_nodes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def node_address() -> str:
    """This machine as the others of the run see it; loopback when there are no others."""
    if num_nodes() <= 1:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: connecting only tells which of this machine's addresses leads to rank 0's.
        probe.connect((os.environ["MASTER_ADDR"], 9))
        return str(probe.getsockname()[0])
