"""Runs `python -m megatron_rl.rollout.embedded`: the command line, and the life of the process.

Exit codes: 0 ended by a signal or by the lifeline, 1 the engine failed, 2 it could not start (one line on stderr).
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.keys import key_in_environment
from megatron_rl.lifeline import watch_stdin
from megatron_rl.open_files import raise_open_files
from megatron_rl.rollout.embedded.listening import bind, http_server

if TYPE_CHECKING:
    from megatron_rl.rollout.embedded.engine import EngineOptions

log = logging.getLogger("megatron_rl.rollout.embedded")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rl.rollout.embedded", description="A generation server for CPUs and tests."
    )
    parser.add_argument("--model-path", required=True, help="Hugging Face directory")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000, help="0 picks a free one; it is logged on stderr")
    parser.add_argument("--allow-remote", action="store_true", help="permit a host that is not loopback; needs a key")
    parser.add_argument(
        "--api-key-variable", default="", metavar="NAME", help="environment variable with the key that requests show"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max-running-requests", type=int, default=64)
    parser.add_argument("--context-length", type=int, help="default: max_position_embeddings of config.json")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more than 1 pays only on idle cores")
    parser.add_argument("--weight-version", default="default")
    parser.add_argument(
        "--update-timeout",
        type=float,
        default=120.0,
        help="seconds that a rendezvous or a broadcast of weights may take",
    )
    parser.add_argument(
        "--hold-timeout",
        type=float,
        default=600.0,
        help="seconds after which a pause, or a session of weight updates, ends by itself when its client does "
        "nothing, and for which an update waits for requests that run",
    )
    parser.add_argument(
        "--weights-root",
        action="append",
        default=[],
        metavar="DIR",
        help="weights may be loaded from directories below it; may be given several times. Always allowed are "
        "--model-path and, where they belong to this user, its siblings and the folders that training runs on this "
        "machine make for weights",
    )
    parser.add_argument("--key-from-stdin", action="store_true", help="the first line of stdin is the key, or empty")
    parser.add_argument("--lifeline", action="store_true", help="exit when stdin reaches its end")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser.parse_args(argv)


def check_memory(needed: int, context_length: int, max_running_requests: int) -> None:
    import psutil

    available = psutil.virtual_memory().available
    if needed > available:
        raise ValueError(
            f"weights and KV cache need {needed / 2**30:.1f} GiB for --context-length {context_length} and "
            f"--max-running-requests {max_running_requests}, but {available / 2**30:.1f} GiB are available; lower them"
        )


def check_arguments(arguments: argparse.Namespace, context_length: int, longest: int) -> None:
    """Raise ValueError for an option out of its range. longest: sequence that the model can read."""
    for name, value, maximum in (
        ("--context-length", context_length, longest),
        ("--max-running-requests", arguments.max_running_requests, 4096),
        ("--threads", arguments.threads, 1024),
    ):
        if not 1 <= value <= maximum:
            raise ValueError(f"{name} must be in [1, {maximum}], got {value}")
    for name, seconds in (("--update-timeout", arguments.update_timeout), ("--hold-timeout", arguments.hold_timeout)):
        if not 0 < seconds < 1e9:
            raise ValueError(f"{name} must be in (0, 1e9), got {seconds}")
    for root in arguments.weights_root:
        if not Path(root).is_dir():
            raise ValueError(f"--weights-root {root} is not a directory")


def read_key(arguments: argparse.Namespace) -> str:
    """Read the key that requests have to show; "" for none. Neither way shows in `ps`."""
    if not arguments.key_from_stdin:
        return key_in_environment(arguments.api_key_variable, "--api-key-variable")
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # what follows the line is the lifeline's
        return stdin.readline().decode().strip()


async def serve(arguments: argparse.Namespace, bound: socket.socket, key: str) -> int:
    import torch
    from starlette.middleware import Middleware

    from megatron_rl.families import load_architecture
    from megatron_rl.rollout.embedded.cache import KVCache
    from megatron_rl.rollout.embedded.guard import Guard
    from megatron_rl.rollout.embedded.server import App
    from megatron_rl.rollout.embedded.slot_memory import cache_shape

    config = load_architecture(arguments.model_path)
    context_length = arguments.context_length or config.max_position_embeddings
    check_arguments(arguments, context_length, config.max_position_embeddings)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    # The engine thread gives up the GIL in every operation; it gets it back from a busy event loop within this time.
    sys.setswitchinterval(0.0005)
    options = engine_options(arguments, context_length)
    weight_bytes = config.num_parameters() * options.dtype.itemsize
    check_memory(
        KVCache.num_bytes(**cache_shape(config, options.num_slots, context_length)) + 2 * weight_bytes,
        context_length,
        arguments.max_running_requests,
    )

    def stop() -> None:
        server.should_exit = True

    app = App(config, options, on_failure=stop, guard=Middleware(Guard, key=key, host=arguments.host))
    server = http_server(app.starlette(), f"serving {arguments.model_path}", bound)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)

    async def stop_on_signal() -> None:
        await stopping.wait()
        # First the engine, so that open requests get their partial answers while connections still live.
        await asyncio.to_thread(app.close)
        stop()

    watcher = asyncio.create_task(stop_on_signal())
    await server.serve(sockets=[bound])
    watcher.cancel()
    return 1 if app.engine.failure is not None else 0


def engine_options(arguments: argparse.Namespace, context_length: int) -> "EngineOptions":
    """Make the engine's options from the command line's."""
    import torch

    from megatron_rl.rollout.embedded.engine import EngineOptions

    return EngineOptions(
        model_path=str(Path(arguments.model_path)),
        dtype=getattr(torch, arguments.dtype),
        max_running_requests=arguments.max_running_requests,
        context_length=context_length,
        weight_version=arguments.weight_version,
        update_timeout_seconds=arguments.update_timeout,
        hold_timeout_seconds=arguments.hold_timeout,
        weights_roots=tuple(arguments.weights_root),
    )


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    raise_open_files()
    logging.basicConfig(
        level=arguments.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # The number of threads of a product must not vary with the machine's load.
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")
    os.environ.setdefault("OMP_DYNAMIC", "FALSE")
    try:
        key = read_key(arguments)
        if arguments.lifeline:
            watch_stdin(lambda: os._exit(0))
        bound = bind(arguments.host, arguments.port, arguments.allow_remote, key)
        code = asyncio.run(serve(arguments, bound, key))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if code:
        sys.stderr.write("error: the generation engine failed; see the log above\n")
    return code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    # Not sys.exit: torch's thread pools can hang at interpreter exit, and there is nothing left to save.
    sys.stderr.flush()
    os._exit(code)
