"""Stands in for a generation server: takes weight updates by SGLang's routes, over gloo or NCCL, and says what came.

    python tests/weight_receiver.py {gloo,nccl}      prints its url

It has no model. `/weights_checker` answers the checksum of every tensor that came since the update began.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_rl.rollout import update_group
from megatron_rl.tensor_bytes import checksum


class Receiver(BaseHTTPRequestHandler):
    """Serves one update group at a time. All requests share one state."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: two would wait 40 ms for an acknowledgement
    disable_nagle_algorithm = True
    backend = "gloo"
    group: Any = None
    version = "0"
    received: ClassVar[dict[str, Tensor]] = {}

    def do_GET(self) -> None:
        self._answer({"version": "embedded-receiver", "weight_version": Receiver.version})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer: dict[str, Any] = {"success": True}
        if self.path == "/init_weights_update_group":
            assert body["backend"] == self.backend, body
            Receiver.group = update_group.join(
                body["master_address"],
                body["master_port"],
                body["rank_offset"],
                body["world_size"],
                body["group_name"],
                self.backend,
                600.0,
                device=self._device(),
            )
        elif self.path == "/destroy_weights_update_group" and Receiver.group is not None:
            update_group.leave(Receiver.group)
            Receiver.group = None
        elif self.path == "/begin_weight_update":
            Receiver.received = {}
        elif self.path == "/update_weights_from_distributed":
            self._receive(body)
        elif self.path == "/weights_checker":
            answer |= {"checksums": {name: checksum(tensor) for name, tensor in Receiver.received.items()}}
        self._answer(answer)

    def _device(self) -> torch.device:
        return torch.device("cuda", 0) if self.backend == "nccl" else torch.device("cpu")

    def _receive(self, body: dict[str, Any]) -> None:
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(body["shapes"], dtypes, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device())
        update_group.broadcast(Receiver.group, flat).wait()
        for name, dtype, shape, part in zip(body["names"], dtypes, body["shapes"], flat.split(sizes), strict=True):
            Receiver.received[name] = part.clone().view(dtype).view(shape)
        Receiver.version = body["weight_version"] or Receiver.version

    def _answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def serve(receiver: type[Receiver]) -> None:
    """Print the url, and serve until this process is ended."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), receiver)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


@contextmanager
def serving(command: Sequence[str], **options: Any) -> Iterator[str]:
    """Run a command that calls `serve`, in a process of its own as a server would be. Yield the URL that it prints.

    options: of Popen.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    Receiver.backend = sys.argv[1]
    serve(Receiver)
