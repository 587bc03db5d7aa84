"""This module holds the checks of `megatron-rl check` alone, for what a run says only when its job has waited and its
model is built."""

import asyncio
import importlib.metadata
import shutil
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from megatron_rl.config.endpoints import EndpointSection
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.reward import BY_ANSWER, RewardSection
from megatron_rl.config.schema import RlConfig, RolloutPhase, RunConfig, SamplingConfig, SftConfig
from megatron_rl.config.selection import SelectConfig
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.fitting import Limit, rendered_prompts
from megatron_rl.data.judged import check_judged
from megatron_rl.data.mixture import load_prompts
from megatron_rl.data.prompts import Prompt, read_prompts
from megatron_rl.errors import Fault
from megatron_rl.families import load_architecture
from megatron_rl.keys import key_in_environment
from megatron_rl.memory import ITEM_BYTES, SAVED_BYTES, num_trained_parameters
from megatron_rl.preflight.registry import THOROUGH, Start, check
from megatron_rl.preflight.rewards import first_verdicts, given_up
from megatron_rl.reward.verdict import GAVE_UP
from megatron_rl.rollout.pool import ServerPool
from megatron_rl.rollout.routing import routed_shape, step_routing
from megatron_rl.selection.candidates import find_candidates

_CONNECT_SECONDS = 5.0
# The bytes of a sampled token: its id, log-prob and version in the journal; its text there and in rollouts/.
_JOURNAL_BYTES, _TEXT_BYTES = 16, 10
# The package whose own requirements are checked; those of its extras are optional.
_OURS = "megatron_rl"


@check("versions", "the installed packages are of versions that work", among=THOROUGH)
def _versions(start: Start) -> Iterator[str]:
    del start
    try:
        required = importlib.metadata.requires(_OURS) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return
    for line in required:
        one = Requirement(line)
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"package {one.name} is not installed; pip install '{one.name}{one.specifier}'"
            continue
        if not one.specifier.contains(found, prereleases=True):
            yield (
                f"package {one.name} is {found}, and this program needs {one.specifier}; pip install "
                f"'{one.name}{one.specifier}'"
            )


@check("weights", "the tensors of the model, by name, shape and type", after="layout", among=THOROUGH)
def _weights(start: Start) -> Iterator[str]:
    from megatron_rl.checkpoint.read import open_checkpoint  # torch

    for path in _models(start):
        with open_checkpoint(path):
            pass
    yield from ()


@check(
    "data",
    "every row through the chat template, and its length",
    after="rows",
    among=THOROUGH,
)
def _data(start: Start) -> Iterator[str]:
    config = start.config
    if isinstance(config, EvaluateConfig):
        _check_benchmarks(config)
    elif isinstance(config, SftConfig):
        from megatron_rl.train.sft.chats import ChatBatches, validation_parts

        tokenizer = load_tokenizer(config.model.path)
        batches = ChatBatches(config, tokenizer)
        config.check_warmup(batches.num_steps)
        validation_parts(config, tokenizer, batches.messages)
    elif isinstance(config, RolloutPhase):
        for path in _models(start):
            stream, _ = load_prompts(config, load_tokenizer(path))
            if isinstance(config, RlConfig) and config.budget.domains:
                stream.check_shares(config.budget.domains)
    yield from ()


def _models(start: Start) -> Sequence[Path]:
    """Return the models whose tokenizers read the prompts; none where an endpoint answers."""
    if isinstance(start.config, SelectConfig):
        return [candidate.path for candidate in find_candidates(start.config.candidates)]
    if start.trains:
        assert isinstance(start.config, RunConfig)
        return [start.config.model.path]
    return [start.model] if start.model is not None else []


def _check_benchmarks(config: EvaluateConfig) -> None:
    """Raise ValueError for rows that cannot be read or judged, or are too long."""
    tokenizer = load_tokenizer(config.model.path)
    limit = Limit(tokens=config.rollout.max_prompt_tokens, key="rollout.max_prompt_tokens")
    for name, section in config.benchmarks.items():
        reward = section.reward_of(config.reward)
        prompts = read_prompts(
            section.path, section.domain, section.suffix, system=section.system, needs_answer=reward.needs_answers
        )[: section.prompts]
        check_judged(prompts, reward, f"benchmarks.{name}.suffix")
        rendered_prompts(prompts, tokenizer, limit, section.special_tokens, arguments=section.template_arguments)


@check("judging", "the reward knows the answer of a row of each domain", after="data", among=THOROUGH)
def _judging(start: Start) -> Iterator[str]:
    config = start.config
    if start.rollouts is not None:
        return
    read = partial(read_prompts, remarks=False)  # the check of the data has made them
    if isinstance(config, EvaluateConfig):
        for section in config.benchmarks.values():
            reward = section.reward_of(config.reward)
            rows = read(
                section.path, section.domain, section.suffix, system=section.system, needs_answer=reward.needs_answers
            )
            yield from _misjudged(reward, rows)
    elif isinstance(config, SamplingConfig | SelectConfig):
        data, reward = config.data, config.reward
        for path in data.train_files:
            rows = read(path, data.domain, data.suffix, system=data.system, needs_answer=reward.needs_answers)
            yield from _misjudged(reward, rows)


def _misjudged(reward: RewardSection, rows: Sequence[Prompt]) -> Iterator[str]:
    """Yield the answers that get no score from the reward, or that it calls wrong though they are the row's own."""
    for row, text, verdict in first_verdicts(reward, rows, None):
        yield from given_up(reward, row, text, verdict)
        kinds = reward.kinds_of(row.domain)
        by_answer = len(kinds) == 1 and kinds[0] in BY_ANSWER
        if by_answer and text and verdict.reason not in (*GAVE_UP, "correct"):
            yield (
                f"the reward {kinds[0]} calls the reference answer {row.answer!r:.80} of the row {row.where or row.id} "
                f"{verdict.reason}; set {reward.key_of(kinds[0])} to what such answers are, or mend the row"
            )


@check("disk", "room for checkpoints, responses and journals", after="layout", among=THOROUGH)
def _disk(start: Start) -> Iterator[str]:
    config = start.config
    if not (start.trains and isinstance(config, RunConfig)):
        return
    parts = disk_bytes(start)
    needed = sum(parts.values())
    folder = next(path for path in (config.run_dir, *config.run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        told = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in parts.items())
        yield (
            f"run_dir {config.run_dir} has {free / 1e9:,.1f} GB free, and the run writes about {needed / 1e9:,.1f} GB "
            f"({told}); make room, lower train.keep_last, or set run_dir to another disk"
        )


def disk_bytes(start: Start) -> dict[str, int]:
    """Estimate what a run keeps on its disk at most, by part.

    checkpoints  train.keep_last of them, those that train.keep_every keeps, and the one that is being written
    models       the exported one, and where servers of other machines read weights from the disk two more
    responses    of all steps, at the budget or else at half of the longest length, and the traces of some
    journal      the responses of the steps since the last checkpoint, with routed experts
    """
    config, architecture = start.config, start.architecture
    assert isinstance(config, RunConfig)
    dtype, trained = config.model.dtype, num_trained_parameters(config.lora, architecture)
    num_steps = getattr(config.train, "steps", None) or 0
    kept = num_steps // config.train.keep_every if config.train.keep_every else 0
    exported = 1
    found = {"checkpoints": (config.train.keep_last + 1 + kept) * trained * SAVED_BYTES[dtype]}
    if isinstance(config, RlConfig):
        rollout = config.rollout
        exported += 2 * (config.cluster is not None and config.cluster.nodes > 1)
        budgets = sum(config.phase_budgets(start.world_size)) if config.has_budget else 0
        tokens = budgets or rollout.prompts_per_step * rollout.samples_per_prompt * rollout.max_response_tokens // 2
        found["responses"] = num_steps * tokens * _TEXT_BYTES
        unsaved = min(num_steps, config.train.save_every or num_steps)
        found["journal"] = unsaved * tokens * (_JOURNAL_BYTES + _TEXT_BYTES)
        if rollout.router_replay:
            shape = routed_shape(architecture)
            found["journal"] += unsaved * step_routing(config, shape, start.world_size).kept_bytes
    return found | {"models": exported * architecture.num_parameters() * ITEM_BYTES[dtype]}


@check("attached", "servers at rollout.urls answer and can do what is asked", among=THOROUGH)
def _attached(start: Start) -> Iterator[str]:
    config = start.config
    if not isinstance(config, SamplingConfig | EvaluateConfig) or not config.rollout.urls or start.rollouts is not None:
        return
    key = key_in_environment(config.rollout.api_key_variable, "rollout.api_key_variable")
    rollout = config.rollout.as_rollout() if isinstance(config, EvaluateConfig) else config.rollout
    routed = routed_shape(load_architecture(_models(start)[0])) if rollout.router_replay else None

    async def connect() -> None:
        pool = ServerPool(rollout.urls, rollout, None, routed, lambda url: key)
        try:
            await pool.connect()
        finally:
            await pool.close()

    try:
        asyncio.run(connect())
    except Fault as error:
        yield str(error)


@check("endpoints", "the teacher and the judge can be reached, with their keys", among=THOROUGH)
def _endpoints(start: Start) -> Iterator[str]:
    config = start.config
    sections: dict[str, EndpointSection] = {}
    if isinstance(config, SamplingConfig | SelectConfig | EvaluateConfig) and config.reward.judge.domains:
        sections["reward.judge"] = config.reward.judge
    if isinstance(config, SamplingConfig) and config.teacher is not None:
        sections["teacher"] = config.teacher
    for name, section in sections.items():
        key_in_environment(section.api_key_variable, f"{name}.api_key_variable")
        address = urlsplit(section.url)
        try:
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), _CONNECT_SECONDS).close()
        except OSError as error:
            why = error.strerror or error
            yield f"{name}.url {section.url} cannot be reached ({why}); start that server, or correct the url"


@check("gpu_memory", "the memory of the cluster's GPUs, by the plan", after="layout", among=THOROUGH)
def _gpu_memory(start: Start) -> Iterator[str]:
    from megatron_rl.plan.show import problems_of

    if start.config.cluster is not None:
        yield from problems_of(start.config, start.config.cluster)
