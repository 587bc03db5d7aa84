"""This module holds the checks of every command: layout, data, directories, servers, memory, in the order in which they
run."""

import importlib.util
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from megatron_rl.c3po.own_objective import check_advantage, check_correction, check_surrogate
from megatron_rl.checkpoint.epochs import refuse_other_epochs
from megatron_rl.checkpoint.newest import newest
from megatron_rl.config.data import PromptSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.limits import doubtful
from megatron_rl.config.model import ServingSection
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.rollout import GenerationSection, RolloutSection
from megatron_rl.config.schema import RlConfig, RunConfig, SamplingConfig, SftConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.domains import check_named_domains, check_reward_domains
from megatron_rl.data.fitting import Limit, prompt_limit, rendered_prompts
from megatron_rl.data.judged import refuse_misjudged
from megatron_rl.data.mixture import load_stream
from megatron_rl.data.prompts import Prompt, read_chats, read_prompts
from megatron_rl.data.rows import LOOKED_AT, Problems
from megatron_rl.families import Architecture, family_of, load_architecture
from megatron_rl.gpus import chosen_backend, expandable_segments, visible_gpus
from megatron_rl.memory import host_bytes, rank_bytes, serving_host_bytes
from megatron_rl.model import backends as backends
from megatron_rl.own_functions import is_own
from megatron_rl.preflight.agents import agent_problems
from megatron_rl.preflight.process_limits import limit_problems
from megatron_rl.preflight.registry import Start, check, refuse_problems
from megatron_rl.preflight.rewards import reward_problems
from megatron_rl.preflight.teacher import teacher_problems
from megatron_rl.rollout.rollout_file import check_rows, limits_of
from megatron_rl.rollout.routing import routed_shape, step_routing
from megatron_rl.rollout.server import check_same_torch, find_sglang, server_gpus
from megatron_rl.selection.candidates import find_candidates
from megatron_rl.versions import missing_megatron

log = logging.getLogger(__name__)


def check_start(start: Start) -> None:
    """Raise ValueError with the first problem of a command that is about to start. Warn of settings that are hardly
    meant."""
    refuse_problems(start)
    if start.trains and isinstance(start.config, RlConfig):
        for doubt in doubtful(start.config):
            log.warning(doubt)


@check("megatron", "megatron-core is installed", of_machine=True)
def _megatron(start: Start) -> Iterator[str]:
    if start.trains and (missing := missing_megatron()):
        yield missing


@check("layout", "how the model is divided over the training ranks")
def _layout(start: Start) -> Iterator[str]:
    if start.trains:
        assert isinstance(start.config, RunConfig)
        yield from problems(start.config, start.architecture, start.world_size, start.serves)


@check("gpus", "a GPU for each training rank, or none at all", of_machine=True)
def _gpus(start: Start) -> Iterator[str]:
    num_gpus = len(visible_gpus())
    if start.trains and 0 < num_gpus < start.world_size:
        yield (
            f"{start.world_size} training ranks on a machine with {num_gpus} GPUs, and each needs one; start fewer "
            "(--nproc), or name more in CUDA_VISIBLE_DEVICES"
        )


@check("rows", "the first rows of every data file")
def _rows(start: Start) -> Iterator[str]:
    """Report all faults at once. Only the first rows are read here; the command reads the whole files."""
    config, found = start.config, Problems()
    if isinstance(config, SftConfig):
        for path in config.data.files:
            read_chats(path, found, most=LOOKED_AT)
        found.tell()
        return
    prompts: list[Prompt] = []
    if isinstance(config, SamplingConfig | SelectConfig):
        for path in config.data.train_files:
            prompts += _first_rows(path, config.data, config.reward, found)
    rows = {
        name: _first_rows(section.path, section, section.reward_of(config.reward), found)[: section.prompts]
        for name, section in start.benchmarks.items()
        if isinstance(config, EvaluateConfig | RlConfig)
    }
    found.tell()
    if isinstance(config, SamplingConfig | SelectConfig):
        refuse_misjudged(prompts, config.reward)
    if start.trains:
        assert isinstance(config, RlConfig)
        if config.data.too_long == "stop":
            _check_lengths(prompts, config.data, prompt_limit(config), config)
        for name, section in start.benchmarks.items():
            refuse_misjudged(rows[name], section.reward_of(config.reward))
            limit = Limit(tokens=config.rollout.max_prompt_tokens, key="rollout.max_prompt_tokens")
            _check_lengths(rows[name], section, limit, config)
    yield from ()


def _first_rows(path: Path, how: PromptSection, reward: RewardSection, found: Problems) -> list[Prompt]:
    """Read the first rows of a file of prompts, and note what is wrong with them."""
    return read_prompts(path, how.domain, how.suffix, found, LOOKED_AT, True, how.system, reward.needs_answers)


def _check_lengths(prompts: Sequence[Prompt], how: PromptSection, limit: Limit, config: RlConfig) -> None:
    """Raise ValueError for prompts that are too long. A token has a byte at least, so the tokenizer is loaded only
    where a prompt has more bytes than it may have tokens. What a template adds is left to the run itself."""
    may_be_long = [p for p in prompts if len(p.text.encode()) > limit.tokens]
    if may_be_long:
        tokenizer = load_tokenizer(config.model.path)
        rendered_prompts(may_be_long, tokenizer, limit, how.special_tokens, arguments=how.template_arguments)


@check("trackers", "the packages of tracking.to are installed")
def _trackers(start: Start) -> Iterator[str]:
    if not isinstance(start.config, RunConfig):
        return
    for name in start.config.tracking.to:
        if importlib.util.find_spec(name) is None:
            yield (
                f"tracking.to names {name}, which is not installed here; pip install 'megatron_rl[{name}]', or take it "
                "out"
            )


@check("validation", "the benchmarks of a run have servers that answer them")
def _validation(start: Start) -> Iterator[str]:
    config = start.config
    if start.rollouts is not None and isinstance(config, RlConfig) and config.validation is not None:
        yield "validation samples from servers, and with --rollouts there are none; take [validation] out of the file"


@check("domains", "tables by domain name domains that rows have")
def _domains(start: Start) -> Iterator[str]:
    """Read all rows, since a domain may come late in a file. Other faults of the rows are left to the run, which reads
    them in another process or after its model."""
    config = start.config
    if not (start.trains and isinstance(config, RlConfig)):
        return
    of_teacher = config.distillation.domains if config.distillation is not None else {}
    if config.reward.domains or config.reward.judge.domains or config.budget.domains or of_teacher:
        stream = load_stream(config.data, config.seed, remarks=False, needs_answer=config.reward.needs_answers)
        check_reward_domains(stream.rows, config.reward, "data.train")
        check_named_domains(stream.rows, "distillation.domains", of_teacher, "data.train")
        if config.budget.domains:
            stream.check_shares(config.budget.domains, warns=False)
    yield from ()


@check("objective", "own parts of the objective work on small tensors")
def _objective(start: Start) -> Iterator[str]:
    config = start.config
    if not (start.trains and isinstance(config, RlConfig)):
        return
    algorithm = config.algorithm
    if algorithm.advantage and is_own(algorithm.advantage):
        check_advantage(algorithm.advantage)
    if algorithm.surrogate and is_own(algorithm.surrogate):
        check_surrogate(algorithm.surrogate)
    if is_own(algorithm.correction):
        check_correction(algorithm.correction)
    yield from ()


@check("rollouts", "the file of --rollouts")
def _rollouts(start: Start) -> Iterator[str]:
    if start.rollouts is None:
        return
    config = start.config
    assert isinstance(config, RlConfig)
    if config.rollout.router_replay:
        yield "--rollouts has no routed experts; set rollout.router_replay = false"
    if not start.rollouts.is_file():
        yield f"data file {start.rollouts} does not exist; megatron-rl rollout writes one"
    else:
        check_rows(start.rollouts, limits_of(config.rollout, start.architecture))


@check("run_dir", "the run directory can be written, and holds no other run")
def _run_dir(start: Start) -> Iterator[str]:
    config = start.config
    if not isinstance(config, RunConfig | SelectConfig):
        return
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield f"run_dir {config.run_dir} cannot be made ({error.strerror}); set it to another folder"
    if not os.access(config.run_dir, os.W_OK | os.X_OK):
        yield f"run_dir {config.run_dir} is not writable; set it to another folder"
    if isinstance(config, RunConfig) and config.run_dir.resolve() == config.model.path.resolve():
        yield f"run_dir {config.run_dir} is the folder of the model; set it to another one"
    if start.trains and (config.run_dir / "checkpoints/latest").exists() and not start.resume:
        yield f"{config.run_dir} holds a run; add --resume to continue it, or set run_dir to a new folder"
    if isinstance(config, SftConfig):
        refuse_other_epochs(config.run_dir, config.train.epochs or 0, start.resume)
    if start.trains and start.resume and isinstance(config, RunConfig):
        yield from _other_model(config, start.architecture)


def _other_model(config: RunConfig, architecture: Architecture) -> Iterator[str]:
    """Look whether the newest checkpoint is of the model that a run goes on with."""
    path = newest(config.run_dir / "checkpoints")
    try:
        differ = None if path is None else load_architecture(path).differences(architecture)
    except (OSError, ValueError):
        return  # a damaged one: the run looks for an earlier one
    if differ:
        told = ", ".join(f"{name} is {now!r} and was {before!r}" for name, (before, now) in list(differ.items())[:3])
        yield (
            f"{path} is of another model than {config.model.path} ({told}); set model.path back, or start anew in "
            "another run_dir"
        )


@check("router_replay", "servers can record routed experts", of_machine=True)
def _router_replay(start: Start) -> Iterator[str]:
    config = start.config
    if not (start.serves and isinstance(config, RlConfig) and config.rollout.router_replay):
        return
    if config.rollout.engine == "sglang" and not visible_gpus():
        yield (
            "rollout.router_replay needs a GPU for SGLang, which records routed experts only there; set "
            "rollout.engine = 'embedded' or rollout.router_replay = false"
        )


@check("sharing", "servers and trainer can share this machine's GPUs", of_machine=True)
def _sharing(start: Start) -> Iterator[str]:
    config = start.config
    if start.trains and isinstance(config, RlConfig) and start.rollouts is None:
        check_seats(config, start.world_size, bool(visible_gpus()))
    yield from ()


@check("sequences", "sequences that the model can read, and its server can run")
def _sequences(start: Start) -> Iterator[str]:
    config = start.config
    if isinstance(config, SelectConfig):
        for candidate in find_candidates(config.candidates):
            for problem in serving_problems(config.rollout, config.serving, load_architecture(candidate.path)):
                yield f"candidate {candidate.path}: {problem}"
    elif start.model is not None and isinstance(config, EvaluateConfig | SamplingConfig):
        model = config.model if isinstance(config, EvaluateConfig) else config.serving
        yield from serving_problems(config.rollout, model, start.architecture)
    elif start.trains and isinstance(config, RlConfig) and (teacher := config.distillation) is not None:
        longest = {"max_response_tokens": config.rollout.max_response_tokens}  # SGLang's spare token is no position
        rollout = teacher.as_rollout(config.rollout).model_copy(update=longest)
        for problem in serving_problems(rollout, teacher, load_architecture(teacher.path), not teacher.urls):
            yield f"distillation.path {teacher.path}: {problem}"


@check("servers", "the generation servers of this machine, and their ports", of_machine=True)
def _servers(start: Start) -> Iterator[str]:
    config = start.config
    teacher = config.distillation if isinstance(config, RlConfig) and start.trains else None
    if teacher is not None and not teacher.urls:
        assert isinstance(config, RlConfig)
        yield from _server_problems(teacher.as_rollout(config.rollout))
    if start.trains and not start.serves:
        return
    if isinstance(config, EvaluateConfig):
        yield from _server_problems(config.rollout.as_rollout())
    elif isinstance(config, SelectConfig) or (isinstance(config, SamplingConfig) and (start.serves or start.model)):
        yield from _server_problems(config.rollout)
    if start.serves and isinstance(config, RlConfig) and config.sync.transport == "ipc":
        check_same_torch(config.rollout)


@check("memory", "the host memory of this machine", of_machine=True, after="layout")
def _memory(start: Start) -> Iterator[str]:
    config = start.config
    if start.trains:
        assert isinstance(config, RunConfig)
        needed = required_bytes(config, start.architecture, start.world_size, start.serves)
        yield from _memory_problems(
            needed, config.model.dtype, start.architecture, "train.micro_batch_tokens or rollout.max_running_requests"
        )
        return
    models: list[Architecture] = []
    if isinstance(config, EvaluateConfig):
        models = [start.architecture]
    elif isinstance(config, SelectConfig):  # one candidate after the other
        models = [load_architecture(candidate.path) for candidate in find_candidates(config.candidates)]
    for architecture in models:
        assert isinstance(config, EvaluateConfig | SelectConfig)
        needed = serving_host_bytes(
            config.rollout, config.model.dtype, architecture, len(visible_gpus()), updates=False
        )
        largest = "rollout.max_running_requests or rollout.max_response_tokens"
        yield from _memory_problems(needed, config.model.dtype, architecture, largest)


check("agent", "the agent starts, and the model's answers can be read")(agent_problems)
check("limits", "sockets, files and threads within a process's limits", of_machine=True)(limit_problems)
check("teacher", "the teacher policy reads the policy's tokens as it does")(teacher_problems)
check("rewards", "own rewards and services give the first row a score")(reward_problems)

# FLOP/s of a thread of the embedded server; 53e9 were measured (README: 14,795 tokens/s at 64 at a time of 1.8e6
# parameters).
_EMBEDDED_FLOPS = 60e9
# SGLang 0.5.21, layers/rotary_embedding/factory.py: it has `attn_factor` for the first, and the others are DeepSeek's.
_SGLANG_DOES_NOT_READ = {"attention_factor", "mscale", "mscale_all_dim"}


def serving_problems(
    rollout: GenerationSection, model: ServingSection, architecture: Architecture, serves: bool = True
) -> Iterator[str]:
    """List problems of serving: sequences that are longer than the model can read, responses that could never end, code
    that a server would run without permission, and a model too large for the embedded server. serves: servers are
    started."""
    runs_code = serves and rollout.engine == "sglang" and not rollout.urls and family_of(architecture).remote_code
    if runs_code and not model.trust_remote_code:
        yield (
            "rollout.engine 'sglang' runs a Python file of the model directory "
            f"(configuration_{architecture.family}.py), since transformers does not know this model; read it and set "
            "model.trust_remote_code = true"
        )
    unread = _SGLANG_DOES_NOT_READ & dict(architecture.rotary.scaling).keys()
    if rollout.engine == "sglang" and unread:
        yield (
            f"config.json gives yarn {' and '.join(sorted(unread))}, which SGLang does not read as transformers does, "
            "so that its tokens would be of another model; set rollout.engine = 'embedded', or take it out of "
            "config.json if it is what transformers has without it"
        )
    if rollout.max_sequence_tokens > architecture.max_position_embeddings:
        yield (
            f"rollout.max_prompt_tokens + max_response_tokens = {rollout.max_sequence_tokens} is over the model's "
            f"max_position_embeddings {architecture.max_position_embeddings}; shorten one of them"
        )
    if min(architecture.eos_token_ids) >= architecture.vocab_size:
        yield (
            f"eos_token_id {', '.join(map(str, architecture.eos_token_ids))} of config.json or generation_config.json "
            f"is beyond the vocabulary of {architecture.vocab_size} tokens, so no response could ever end; correct it"
        )
    active, slots = architecture.num_active_parameters(), rollout.max_running_requests
    seconds = 2 * active * slots / (_EMBEDDED_FLOPS * rollout.threads)
    if serves and rollout.engine == "embedded" and seconds > rollout.token_deadline_seconds:
        yield (
            f"rollout.engine 'embedded' generates on the CPU, and for {active / 1e9:.2f} B active parameters a token "
            f"of {slots} responses (rollout.max_running_requests) takes about {seconds:.1f} s there, more than "
            f"rollout.token_deadline_seconds {rollout.token_deadline_seconds:g}; set rollout.engine = 'sglang', which "
            "runs on GPUs, or for a small model a lower max_running_requests or more rollout.threads"
        )


def _server_problems(rollout: RolloutSection) -> Iterator[str]:
    num_servers = len(server_gpus(rollout))
    if rollout.engine == "sglang":
        find_sglang(rollout)
    for port in range(rollout.port, rollout.port + num_servers) if rollout.port else ():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                yield f"rollout.port {port} cannot be used ({error.strerror}); set another or 0"


def check_seats(config: RlConfig, num_ranks: int, trains_on_gpu: bool) -> None:
    """Raise ValueError for servers, and for ways to push weights, that cannot share this machine's GPUs with the
    trainer. num_ranks: training ranks of this machine."""
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


def problems(config: RunConfig, architecture: Architecture, world_size: int, serves: bool) -> Iterator[str]:
    """List what the configuration and the model's shape alone say against a run, whatever machine it is for. serves: it
    starts servers, on whichever nodes."""
    yield from config.parallel.layout(world_size).problems(architecture)
    yield from backends.problems(config.model, architecture, config.parallel.layout(world_size), config.lora)
    if isinstance(config, RlConfig):
        yield from serving_problems(config.rollout, config.model, architecture, serves)
        if config.rollout.router_replay:
            try:
                shape = routed_shape(architecture)
            except ValueError as error:
                yield str(error)
            else:
                yield from step_routing(config, shape, world_size).problems(shape)


def required_bytes(config: RunConfig, architecture: Architecture, world_size: int, serves: bool) -> int:
    """Estimate the host memory of a run on this machine. serves: it starts servers."""
    layout, num_gpus = config.parallel.layout(world_size), len(visible_gpus())
    total = sum(host_bytes(config, architecture, layout, world_size).values())
    if not num_gpus:
        ranks_per_stage = world_size // layout.pipeline
        total += ranks_per_stage * sum(rank.total for rank in rank_bytes(config, architecture, layout))
    if serves:
        assert isinstance(config, RlConfig)
        total += serving_host_bytes(config.rollout, config.model.dtype, architecture, num_gpus)
    if isinstance(config, RlConfig) and (teacher := config.distillation) is not None and not teacher.urls:
        rollout = teacher.as_rollout(config.rollout)
        total += serving_host_bytes(rollout, teacher.dtype, load_architecture(teacher.path), num_gpus, updates=False)
    return total


def _memory_problems(needed: int, dtype: str, architecture: Architecture, largest: str) -> Iterator[str]:
    """Yield a problem where the free host memory is too small. largest: the keys with which the run would need less."""
    free = psutil.virtual_memory().available
    if needed > free:
        yield (
            f"this run needs about {needed / 2**30:.1f} GiB of host memory and {free / 2**30:.1f} GiB are free: "
            f"{architecture.num_parameters() / 1e9:.2f} B parameters in {dtype}; lower {largest}, use a smaller model, "
            "or a larger machine"
        )
