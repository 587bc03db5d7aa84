"""What can be known to fail before torch is imported and servers start: directories, layout, memory, ports."""

import os
import socket
from pathlib import Path

import psutil

from megatron_rl.config.bailing import BailingConfig, load_bailing_config
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.schema import GenerationSection, RlConfig, RolloutSection, RunConfig, SftConfig
from megatron_rl.rollout.routing import routed_shape
from megatron_rl.rollout.server import find_sglang, on_gpu

# Weights, main gradients and two Adam moments in fp32; bf16 adds an fp32 master copy.
_BYTES_PER_PARAMETER = {"float32": 16, "bfloat16": 18}
# What a checkpoint holds of each; it is copied before it is written.
_SAVED_BYTES_PER_PARAMETER = {"float32": 16, "bfloat16": 14}
# Of a chunk of tokens, as in model/logprobs.py, which imports torch.
_LOGITS_BYTES = 128 * 2**20


def check_before_start(config: RunConfig, world_size: int, resume: bool, rollouts: Path | None = None) -> None:
    """ValueError for the first thing that would fail later. Meant for a run of one machine.

    rollouts: a file to train from in place of servers.
    """
    bailing = load_bailing_config(config.model.path)
    config.parallel.layout(world_size).check(bailing)
    data = [config.data.train] if isinstance(config, SftConfig) else []
    if isinstance(config, RlConfig):
        data += config.data.train_files
    if rollouts is not None:
        data.append(rollouts)
    for path in data:
        if not Path(path).is_file():
            raise ValueError(f"data file {path} does not exist")
    _check_run_dir(config.run_dir)
    if (config.run_dir / "checkpoints/latest").exists() and not resume:
        raise ValueError(f"{config.run_dir} holds a run; add --resume to continue it, or set run_dir to a new folder")
    if isinstance(config, RlConfig):
        rollout = config.rollout
        _check_lengths(rollout, bailing)
        starts_servers = not rollout.urls and rollouts is None
        if rollout.router_replay:
            routed_shape(bailing)
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
    _check_lengths(config.rollout, bailing)
    _check_servers(config.rollout.as_rollout())
    needed = server_bytes(config.rollout, config.model.dtype, bailing, copies=1)
    _check_memory(needed, config.model.dtype, bailing, "rollout.max_running_requests or rollout.max_response_tokens")


def _check_lengths(rollout: GenerationSection, bailing: BailingConfig) -> None:
    if rollout.max_sequence_tokens > bailing.max_position_embeddings:
        raise ValueError(
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
    """Host memory of a run on this machine: training state of all ranks, the copy of it that becomes a checkpoint,
    logits of a chunk, server and cache."""
    layout = config.parallel.layout(world_size)
    weights = bailing.num_parameters()
    # Weights and gradients on every data- and context-parallel rank, optimizer state once; two exports in the shared
    # folder.
    replicas = layout.data * layout.context
    state = weights * (8 * replicas + _BYTES_PER_PARAMETER[config.model.dtype] - 8 + 8)
    state += weights * _SAVED_BYTES_PER_PARAMETER[config.model.dtype]
    if isinstance(config, RlConfig) and config.algorithm.kl_coefficient:
        state += weights * 8 * replicas
    logits = 3 * min(4 * config.train.micro_batch_tokens * bailing.vocab_size, _LOGITS_BYTES) * replicas
    total = state + logits
    if isinstance(config, RlConfig) and not config.rollout.urls:
        # Twice the weights: while new ones come, the old ones serve.
        total += server_bytes(config.rollout, config.model.dtype, bailing, copies=2)
    return total


def server_bytes(rollout: GenerationSection, dtype: str, bailing: BailingConfig, copies: int) -> int:
    """Host memory of the servers on this machine: so many copies of the weights, and the cache."""
    weights = (4 if dtype == "float32" else 2) * bailing.num_parameters()
    per_token = 2 * bailing.num_hidden_layers * bailing.num_key_value_heads * bailing.head_dim * 4
    slots = rollout.max_running_requests * rollout.max_sequence_tokens
    return (copies * weights + per_token * slots) * rollout.num_servers


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
