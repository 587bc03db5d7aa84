"""Records the settings that the responses in a file depend on, so that `--resume` never mixes those of two settings."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_rl.config.agents import AGENT_KEYS, AgentKeys
from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.config.distillation import DistillationSection
from megatron_rl.config.reward import RewardSection
from megatron_rl.files import write_whole
from megatron_rl.own_functions import is_own, source_digest
from megatron_rl.parsing import read_json

ANOTHER_OUTPUT = "name another --output"
_NUM_TOLD = 3
# A judge's time limit decides which responses it gives up on, not its verdicts on the others.
_NOT_COMPARED = {"reward.timeout_seconds", "reward.judge.timeout_seconds", "reward.judge.concurrent"}


def model_settings(path: Path, dtype: str) -> dict[str, Any]:
    files = {file.name: _state(file) for file in sorted(path.iterdir()) if file.is_file()}
    return {"path": str(path.resolve()), "dtype": dtype, "files": files}


def teacher_settings(section: DistillationSection | None) -> dict[str, Any] | None:
    """Return what decides a teacher's log-probs; None without one."""
    return None if section is None else model_settings(section.path, section.dtype)


def reward_settings(reward: RewardSection) -> dict[str, Any]:
    """Return the settings that decide a verdict."""
    of_pace = {"workers", "max_error_share", "overlong_buffer_tokens", "overlong_penalty", "memory_bytes", "service"}
    # Named only where they are set, so that a folder of before they were known can be gone on with.
    new = {"parts", "correct_part", "passing_score"}
    settings = reward.model_dump(mode="json", exclude=of_pace | new)
    settings |= reward.model_dump(mode="json", include=new, exclude_defaults=True)
    digests = function_digests(reward)
    return settings | ({"functions": digests} if digests else {})


def function_digests(reward: RewardSection) -> dict[str, str]:
    """Return the digest of each function of the user's own that gives rewards: another text may give others."""
    return {kind: source_digest(kind) for kind in reward.kinds if is_own(kind)}


def objective_digests(algorithm: AlgorithmSection) -> dict[str, str]:
    """Return the digest of each function of the user's own that is a part of the objective."""
    parts = (algorithm.advantage, algorithm.surrogate, algorithm.correction)
    return {name: source_digest(name) for name in parts if name is not None and is_own(name)}


def agent_digests(rollout: AgentKeys) -> dict[str, str]:
    """Return the digest of the agent, or of the files that its command names."""
    named = {rollout.agent: source_digest(rollout.agent)} if rollout.agent else {}
    files = [word for word in rollout.agent_command if Path(word).is_file()]
    return named | {word: hashlib.sha256(Path(word).read_bytes()).hexdigest()[:16] for word in files}


def settings_of_agents(rollout: AgentKeys) -> dict[str, Any]:
    """Return what decides how agents answer; nothing where a prompt is answered once."""
    if not rollout.has_agent:
        return {}
    return rollout.model_dump(mode="json", include=set(AGENT_KEYS)) | {"agent_files": agent_digests(rollout)}


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings, indent=1))


def read_settings(path: Path, keys: Collection[str], remedy: str = ANOTHER_OUTPUT) -> dict[str, Any]:
    """Read a file that `write_settings` wrote, with these keys. Raise ValueError, which ends in `remedy`, for any other
    file."""
    try:
        found: dict[str, Any] = read_json(path)
        if all(isinstance(found[key], dict) for key in keys):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} does not say what its responses were made with; {remedy}")


def refuse_differences(
    what: str, before: Mapping[str, Any], now: Mapping[str, Any], remedy: str = ANOTHER_OUTPUT
) -> None:
    """Raise ValueError, which names them, when settings differ. what: the folder or file, and what it holds."""
    if told := told_differences(before, now):
        raise ValueError(f"{what} with other settings: {told}; set them as they were, or {remedy}")


def told_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which settings that decide responses or verdicts have changed; "" where none has."""
    then, here = dict(_leaves(before)), dict(_leaves(now))
    changed = [key for key in then | here if then.get(key) != here.get(key) and key not in _NOT_COMPARED]
    told = "; ".join(f"{key} was {then.get(key)!r}, now {here.get(key)!r}" for key in changed[:_NUM_TOLD])
    return told + (f"; and {len(changed) - _NUM_TOLD} more" if len(changed) > _NUM_TOLD else "")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _state(file: Path) -> str:
    """Describe a file by its size and time. That is cheap, and another text whenever the file was written again:
    hashing the weights would take minutes."""
    found = file.stat()
    return f"{found.st_size} bytes of {datetime.fromtimestamp(found.st_mtime, UTC).isoformat()}"
