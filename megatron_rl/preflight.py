"""What can be known to fail before torch is imported and servers start: directories, layout, memory, ports."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_rl.checkpoint.epochs import refuse_other_epochs
from megatron_rl.config.bailing import BailingConfig, load_bailing_config
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.schema import GenerationSection, RlConfig, RolloutSection, RunConfig, SftConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.memory import ITEM_BYTES, SAVED_BYTES, rank_bytes, server_bytes
from megatron_rl.model import providers
from megatron_rl.rollout.recorded import check_first_row
from megatron_rl.rollout.routing import routed_shape
from megatron_rl.rollout.server import find_sglang, on_gpu
from megatron_rl.selection.candidates import find_candidates


def check_before_start(config: RunConfig, world_size: int, resume: bool, rollouts: Path | None = None) -> None:
    """ValueError for the first thing that would fail later. Meant for a run of one machine.

    rollouts: a file to train from in place of servers.
    """
    bailing = load_bailing_config(config.model.path)
    for problem in problems(config, bailing, world_size):
        raise ValueError(problem)
    data = config.data.files if isinstance(config, SftConfig) else []
    if isinstance(config, RlConfig):
        data += config.data.train_files
    if rollouts is not None:
        data.append(rollouts)
    for path in data:
        if not Path(path).is_file():
            raise ValueError(f"data file {path} does not exist")
    if rollouts is not None:
        check_first_row(rollouts)
    _check_run_dir(config.run_dir)
    if (config.run_dir / "checkpoints/latest").exists() and not resume:
        raise ValueError(f"{config.run_dir} holds a run; add --resume to continue it, or set run_dir to a new folder")
    if isinstance(config, SftConfig):
        refuse_other_epochs(config.run_dir, config.train.epochs or 0, resume)
    if isinstance(config, RlConfig):
        rollout = config.rollout
        starts_servers = not rollout.urls and rollouts is None
        if rollout.router_replay:
            if rollouts is not None:
                raise ValueError("--rollouts has no routed experts; set rollout.router_replay = false")
            if rollout.engine == "sglang" and starts_servers and not on_gpu():
                raise ValueError(
                    "rollout.router_replay needs a GPU for SGLang, which records routed experts only there; set "
                    "rollout.engine = 'embedded' or rollout.router_replay = false"
                )
        if starts_servers:
            _check_servers(rollout)
    needed = required_bytes(config, bailing, world_size)
    _check_memory(needed, config.model.dtype, bailing, "train.micro_batch_tokens or rollout.max_running_requests")


def check_before_evaluation(config: EvaluateConfig) -> None:
    """ValueError for the first thing that would fail once servers start."""
    bailing = load_bailing_config(config.model.path)
    for problem in length_problems(config.rollout, bailing):
        raise ValueError(problem)
    _check_servers(config.rollout.as_rollout())
    one = server_bytes(config.rollout, config.model.dtype, bailing, updates=False)
    needed = config.rollout.num_servers * sum(one)
    _check_memory(needed, config.model.dtype, bailing, "rollout.max_running_requests or rollout.max_response_tokens")


def check_before_selection(config: SelectConfig) -> None:
    """ValueError for the first thing that would fail once servers start, for any of the candidates."""
    for path in config.data.train_files:
        if not path.is_file():
            raise ValueError(f"data file {path} does not exist")
    _check_run_dir(config.run_dir)
    _check_servers(config.rollout)
    for candidate in find_candidates(config.candidates):
        bailing = load_bailing_config(candidate.path)
        for problem in length_problems(config.rollout, bailing):
            raise ValueError(f"candidate {candidate.path}: {problem}")
        one = server_bytes(config.rollout, config.model.dtype, bailing, updates=False)
        needed = config.rollout.num_servers * sum(one)  # of one candidate after the other
        largest = "rollout.max_running_requests or rollout.max_response_tokens"
        _check_memory(needed, config.model.dtype, bailing, largest)


def length_problems(rollout: GenerationSection, bailing: BailingConfig) -> Iterator[str]:
    """Sequences that are longer than the model can read."""
    if rollout.max_sequence_tokens > bailing.max_position_embeddings:
        yield (
            f"rollout.max_prompt_tokens + max_response_tokens = {rollout.max_sequence_tokens} is over the model's "
            f"max_position_embeddings {bailing.max_position_embeddings}; shorten one of them"
        )


def _check_servers(rollout: RolloutSection) -> None:
    """That those of this machine can be started."""
    if rollout.engine == "sglang":
        find_sglang(rollout)
    if rollout.port:
        for i in range(rollout.num_servers):
            _check_port(rollout.port + i)


def problems(config: RunConfig, bailing: BailingConfig, world_size: int) -> Iterator[str]:
    """What the configuration and the model's shape alone say against a run, whatever machine it is for."""
    yield from config.parallel.layout(world_size).problems(bailing)
    yield from providers.problems(config.model, bailing, config.parallel.layout(world_size))
    if isinstance(config, RlConfig):
        yield from length_problems(config.rollout, bailing)
        if config.rollout.router_replay:
            try:
                routed_shape(bailing)
            except ValueError as error:
                yield str(error)


def _check_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir {run_dir} cannot be made ({error.strerror}); set it to another folder") from None
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise ValueError(f"run_dir {run_dir} is not writable; set it to another folder")


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"rollout.port {port} cannot be used ({error.strerror}); set another or 0") from None


def required_bytes(config: RunConfig, bailing: BailingConfig, world_size: int) -> int:
    """Host memory of a run on this machine: all ranks, the copy that becomes a checkpoint, two exports in the shared
    folder, the reference, servers."""
    layout = config.parallel.layout(world_size)
    stages = rank_bytes(config, bailing, layout)
    ranks_per_stage = world_size // layout.pipeline
    total = ranks_per_stage * sum(rank.total for rank in stages)
    total += bailing.num_parameters() * (SAVED_BYTES[config.model.dtype] + 2 * ITEM_BYTES[config.model.dtype])
    if isinstance(config, RlConfig):
        if config.algorithm.kl_coefficient:
            total += ranks_per_stage * sum(rank.weights for rank in stages)
        if not config.rollout.urls:
            total += config.rollout.num_servers * sum(server_bytes(config.rollout, config.model.dtype, bailing))
    return total


def _check_memory(needed: int, dtype: str, bailing: BailingConfig, largest: str) -> None:
    """largest: the keys by which it could need less."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or Path("/dev/nvidia0").exists():
        return  # host memory is not where a GPU run keeps its state
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"this run needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free: "
            f"{bailing.num_parameters() / 1e9:.2f} B parameters in {dtype}; lower {largest}, use a smaller model, or a "
            "larger machine"
        )
