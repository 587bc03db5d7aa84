"""What can be known to fail before torch is imported and servers start: directories, layout, memory, ports."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from megatron_rl.checkpoint.epochs import refuse_other_epochs
from megatron_rl.config.bailing import BailingConfig, load_bailing_config
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.limits import doubtful
from megatron_rl.config.schema import (
    GenerationSection,
    RlConfig,
    RlData,
    RolloutSection,
    RunConfig,
    SamplingConfig,
    SftConfig,
)
from megatron_rl.config.selection import SelectConfig
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.domains import check_reward_domains
from megatron_rl.data.fitting import prompt_limit, rendered_prompts
from megatron_rl.data.judged import refuse_misjudged
from megatron_rl.data.mixture import load_stream
from megatron_rl.data.prompts import Prompt, read_chats, read_prompts
from megatron_rl.data.rows import LOOKED_AT, Problems
from megatron_rl.gpus import chosen_backend, expandable_segments, visible_gpus
from megatron_rl.memory import host_bytes, rank_bytes, serving_host_bytes
from megatron_rl.model import providers
from megatron_rl.rollout.recorded import check_rows, limits_of
from megatron_rl.rollout.routing import routed_shape
from megatron_rl.rollout.server import check_same_torch, find_sglang, server_gpus
from megatron_rl.selection.candidates import find_candidates

log = logging.getLogger(__name__)


def check_before_start(config: RunConfig, world_size: int, resume: bool, rollouts: Path | None = None) -> None:
    """ValueError for the first thing that would fail later. Meant for a run of one machine.

    rollouts: a file to train from in place of servers.
    """
    bailing = load_bailing_config(config.model.path)
    serves = isinstance(config, RlConfig) and not config.rollout.urls and rollouts is None
    for problem in problems(config, bailing, world_size, serves):
        raise ValueError(problem)
    num_gpus = len(visible_gpus())
    if 0 < num_gpus < world_size:
        raise ValueError(
            f"{world_size} training ranks on a machine with {num_gpus} GPUs, and each needs one; start fewer "
            "(--nproc), or name more in CUDA_VISIBLE_DEVICES"
        )
    _check_rows(config)
    if isinstance(config, RlConfig):
        _check_domains(config)
        for doubt in doubtful(config):
            log.warning(doubt)
    if rollouts is not None:
        assert isinstance(config, RlConfig)
        if not rollouts.is_file():
            raise ValueError(f"data file {rollouts} does not exist")
        check_rows(rollouts, limits_of(config.rollout, bailing))
    _check_run_dir(config.run_dir)
    if (config.run_dir / "checkpoints/latest").exists() and not resume:
        raise ValueError(f"{config.run_dir} holds a run; add --resume to continue it, or set run_dir to a new folder")
    if isinstance(config, SftConfig):
        refuse_other_epochs(config.run_dir, config.train.epochs or 0, resume)
    if isinstance(config, RlConfig):
        rollout = config.rollout
        if rollout.router_replay:
            if rollouts is not None:
                raise ValueError("--rollouts has no routed experts; set rollout.router_replay = false")
            if rollout.engine == "sglang" and serves and not visible_gpus():
                raise ValueError(
                    "rollout.router_replay needs a GPU for SGLang, which records routed experts only there; set "
                    "rollout.engine = 'embedded' or rollout.router_replay = false"
                )
        if rollouts is None:
            check_seats(config, world_size, bool(visible_gpus()))
        if serves:
            _check_servers(rollout)
            if config.sync.transport == "ipc":
                check_same_torch(rollout)
    needed = required_bytes(config, bailing, world_size, serves)
    _check_memory(needed, config.model.dtype, bailing, "train.micro_batch_tokens or rollout.max_running_requests")


def _check_rows(config: RunConfig) -> None:
    """Tell of all faults of the data at once, before a model is built. The run reads the whole files."""
    problems = Problems()
    if isinstance(config, SftConfig):
        for path in config.data.files:
            read_chats(path, problems, most=LOOKED_AT)
    if isinstance(config, RlConfig):
        prompts = [
            prompt
            for path in config.data.train_files
            for prompt in read_prompts(path, config.data.domain, config.data.suffix, problems, LOOKED_AT)
        ]
    problems.tell()
    if isinstance(config, RlConfig):
        refuse_misjudged(prompts, config.reward)
        _check_lengths(prompts, config)


def _check_lengths(prompts: Sequence[Prompt], config: RlConfig) -> None:
    """ValueError for prompts that are too long. A token has a byte at least, so the tokenizer is loaded only where a
    prompt has more bytes than it may have tokens. What a template puts around it is left to the run itself."""
    limit = prompt_limit(config)
    may_be_long = [p for p in prompts if len(p.prompt.encode()) > limit.tokens]
    if may_be_long and config.data.too_long == "stop":
        rendered_prompts(may_be_long, load_tokenizer(config.model.path), limit, config.data.special_tokens)


def check_before_evaluation(config: EvaluateConfig) -> None:
    """ValueError for the first thing that would fail once servers start."""
    problems = Problems()
    for section in config.benchmarks.values():
        read_prompts(section.path, section.domain, problems=problems, most=LOOKED_AT)
    problems.tell()
    bailing = load_bailing_config(config.model.path)
    for problem in serving_problems(config.rollout, bailing):
        raise ValueError(problem)
    _check_servers(config.rollout.as_rollout())
    needed = serving_host_bytes(config.rollout, config.model.dtype, bailing, len(visible_gpus()), updates=False)
    _check_memory(needed, config.model.dtype, bailing, "rollout.max_running_requests or rollout.max_response_tokens")


def check_before_rollout(config: SamplingConfig, model: Path | None) -> None:
    """ValueError for the first thing that would fail once servers start. model: that answers; None is an endpoint."""
    _check_files(config.data)
    if model is not None:
        for problem in serving_problems(config.rollout, load_bailing_config(model)):
            raise ValueError(problem)
        _check_servers(config.rollout)


def check_before_selection(config: SelectConfig) -> None:
    """ValueError for the first thing that would fail once servers start, for any of the candidates."""
    _check_files(config.data)
    _check_run_dir(config.run_dir)
    _check_servers(config.rollout)
    for candidate in find_candidates(config.candidates):
        bailing = load_bailing_config(candidate.path)
        for problem in serving_problems(config.rollout, bailing):
            raise ValueError(f"candidate {candidate.path}: {problem}")
        # Of one candidate after the other.
        needed = serving_host_bytes(config.rollout, config.model.dtype, bailing, len(visible_gpus()), updates=False)
        largest = "rollout.max_running_requests or rollout.max_response_tokens"
        _check_memory(needed, config.model.dtype, bailing, largest)


def _check_files(data: RlData) -> None:
    for path in data.train_files:
        if not path.is_file():
            raise ValueError(f"data file {path} does not exist")


def _check_domains(config: RlConfig) -> None:
    """Tables by domain name domains that there are. All rows are read for it: a domain may come late in a file."""
    if not (config.reward.domains or config.reward.judge.domains or config.budget.domains):
        return
    stream = load_stream(config.data, config.seed)
    check_reward_domains(stream.rows, config.reward, "data.train")
    if config.budget.domains:
        stream.check_shares(config.budget.domains)


# Of a thread of the embedded server: 53e9 were measured (README: 14,795 tokens/s at 64 at a time of 1.8e6 parameters).
_EMBEDDED_FLOPS = 60e9


def serving_problems(rollout: GenerationSection, bailing: BailingConfig, serves: bool = True) -> Iterator[str]:
    """Tell of sequences that are longer than the model can read, and of a model too large for the embedded server.
    serves: servers are started."""
    if rollout.max_sequence_tokens > bailing.max_position_embeddings:
        yield (
            f"rollout.max_prompt_tokens + max_response_tokens = {rollout.max_sequence_tokens} is over the model's "
            f"max_position_embeddings {bailing.max_position_embeddings}; shorten one of them"
        )
    active, slots = bailing.num_active_parameters(), rollout.max_running_requests
    seconds = 2 * active * slots / (_EMBEDDED_FLOPS * rollout.threads)
    if serves and rollout.engine == "embedded" and seconds > rollout.token_deadline_seconds:
        yield (
            f"rollout.engine 'embedded' generates on the CPU, and for {active / 1e9:.2f} B active parameters a token "
            f"of {slots} responses (rollout.max_running_requests) takes about {seconds:.1f} s there, more than "
            f"rollout.token_deadline_seconds {rollout.token_deadline_seconds:g}; set rollout.engine = 'sglang', which "
            "runs on GPUs, or for a small model a lower max_running_requests or more rollout.threads"
        )


def _check_servers(rollout: RolloutSection) -> None:
    """That those of this machine can be started."""
    num_servers = len(server_gpus(rollout))
    if rollout.engine == "sglang":
        find_sglang(rollout)
    if rollout.port:
        for i in range(num_servers):
            _check_port(rollout.port + i)


def check_seats(config: RlConfig, num_ranks: int, trains_on_gpu: bool) -> None:
    """Raise ValueError for servers and ways of weights that cannot share this machine's GPUs with the trainer.
    num_ranks: training ranks of this machine."""
    attached = bool(config.rollout.urls)
    for problem in config.sharing_problems(attached):
        raise ValueError(problem)
    gpus = visible_gpus()
    if config.sync.transport == "distributed":
        chosen_backend(config.sync.backend, config.rollout.engine, trains_on_gpu, beside=not attached)  # it may refuse
    if not attached:
        server_gpus(config.rollout)
    if config.sync.transport != "ipc" or not gpus:
        return
    if not trains_on_gpu:
        raise ValueError(
            "sync.transport 'ipc' is for servers on the GPUs that the trainer is on, and this torch finds none while "
            f"the machine has {len(gpus)}; install a torch for CUDA, or set MEGATRON_RL_DEVICE=cpu"
        )
    if num_ranks != len(gpus):
        raise ValueError(
            f"sync.transport 'ipc' needs a training rank on every GPU, and {num_ranks} ranks share this machine's "
            f"{len(gpus)}; start one for each (--nproc, torchrun --nproc_per_node), or name {num_ranks} in "
            "CUDA_VISIBLE_DEVICES"
        )
    variable = expandable_segments()
    if variable is not None:
        raise ValueError(
            f"{variable} asks for expandable segments, and sync.transport 'ipc' hands this memory to other processes, "
            "which many containers forbid for such (pidfd_getfd: Operation not permitted); take expandable_segments "
            "out of it, or set sync.transport = 'disk'"
        )


def problems(config: RunConfig, bailing: BailingConfig, world_size: int, serves: bool) -> Iterator[str]:
    """Tell what the configuration and the model's shape alone say against a run, whatever machine it is for. serves:
    it starts servers, on whichever nodes."""
    yield from config.parallel.layout(world_size).problems(bailing)
    yield from providers.problems(config.model, bailing, config.parallel.layout(world_size))
    if isinstance(config, RlConfig):
        yield from serving_problems(config.rollout, bailing, serves)
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


def required_bytes(config: RunConfig, bailing: BailingConfig, world_size: int, serves: bool) -> int:
    """Estimate the host memory of a run on this machine. serves: it starts servers."""
    layout, num_gpus = config.parallel.layout(world_size), len(visible_gpus())
    total = sum(host_bytes(config, bailing, layout, world_size).values())
    if not num_gpus:
        ranks_per_stage = world_size // layout.pipeline
        total += ranks_per_stage * sum(rank.total for rank in rank_bytes(config, bailing, layout))
    if serves:
        assert isinstance(config, RlConfig)
        total += serving_host_bytes(config.rollout, config.model.dtype, bailing, num_gpus)
    return total


def _check_memory(needed: int, dtype: str, bailing: BailingConfig, largest: str) -> None:
    """largest: the keys by which it could need less."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"this run needs about {needed / 2**30:.1f} GiB of host memory and {free / 2**30:.1f} GiB are free: "
            f"{bailing.num_parameters() / 1e9:.2f} B parameters in {dtype}; lower {largest}, use a smaller model, or a "
            "larger machine"
        )
