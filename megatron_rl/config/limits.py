"""Finds numbers of an RL configuration that do not work together: a run would train on nothing, or on less than the
file says. `RlConfig` refuses what is impossible; a start warns of what is hardly meant."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rl.config.schema import RlConfig

# A step whose budget is below this share of one group of longest responses trains little else than parts of groups.
_SMALL_SHARE = 0.5


def with_first_phase(values: Any) -> Any:
    """Return the values of a file with rollout.prompts_per_step filled in where it may be left out: as many as fill the
    budget of a phase with responses of half the longest length. What else is wrong with them is for others to say."""
    if not isinstance(values, dict):
        return values
    rollout, budget, algorithm = (values.get(name) or {} for name in ("rollout", "budget", "algorithm"))
    if not all(isinstance(section, dict) for section in (rollout, budget, algorithm)) or "prompts_per_step" in rollout:
        return values
    numbers = [
        budget.get("tokens"),
        algorithm.get("optimizer_steps_per_rollout", 1),
        rollout.get("samples_per_prompt"),
        rollout.get("max_response_tokens"),
    ]
    sized = algorithm.get("name", "c3po") == "c3po" and budget.get("under_full", "refill") == "refill"
    if not sized or budget.get("scope", "global") != "global" or not all(type(n) is int and n > 0 for n in numbers):
        return values
    tokens, steps, samples, longest = numbers
    count = -(-tokens * steps // (samples * max(1, longest // 2)))
    return values | {"rollout": rollout | {"prompts_per_step": count}}


def impossible(config: "RlConfig") -> Iterator[str]:
    """Tell what no run can do with these numbers."""
    yield from _groups(config)
    yield from _budgets(config)
    yield from _distillation(config)
    rollout = config.rollout
    if config.micro_batch_cap < rollout.max_sequence_tokens:
        shared = f" x parallel.context {config.parallel.context}" if config.parallel.context > 1 else ""
        yield (
            f"train.micro_batch_tokens {config.train.micro_batch_tokens}{shared} is smaller than one sequence can be "
            f"(rollout.max_prompt_tokens + max_response_tokens = {rollout.max_sequence_tokens}); "
            "raise it or shorten the responses"
        )


def doubtful(config: "RlConfig") -> Iterator[str]:
    """Tell what a run can do but is hardly meant to do."""
    rollout, steps = config.rollout, config.train.steps * config.algorithm.optimizer_steps_of_phase
    group = rollout.samples_per_prompt * rollout.max_response_tokens
    if _has_one_budget(config) and config.budget.tokens < _SMALL_SHARE * group:
        yield (
            f"budget.tokens {config.budget.tokens} is far below what one group can be (rollout.samples_per_prompt "
            f"{rollout.samples_per_prompt} x max_response_tokens {rollout.max_response_tokens} = {group}): where "
            "responses get long, a step trains a part of one group, and the rest gets too old; raise the budget"
        )
    warmup = config.optimizer.num_warmup_steps(steps)
    if warmup >= steps:
        yield (
            f"optimizer.warmup_steps {warmup} is not below the run's {steps} optimizer steps, so the learning rate "
            "never gets to optimizer.learning_rate"
            + ("; the only step has 0 and trains nothing" if steps == 1 else "")
            + "; lower it, or raise train.steps"
        )


def _has_one_budget(config: "RlConfig") -> bool:
    """Tell whether budget.tokens is of a step, and not of each of its ranks."""
    return config.has_budget and config.budget.scope == "global"


def _groups(config: "RlConfig") -> Iterator[str]:
    rollout, steps = config.rollout, config.algorithm.optimizer_steps_per_rollout
    size = rollout.samples_per_prompt
    if size < 2 and not (config.distillation and config.distillation.advantage == "alone"):
        yield "rollout.samples_per_prompt must be at least 2: a group of one has no advantage"
    if not config.has_budget and rollout.prompts_per_step * size < steps:
        yield (
            f"algorithm.optimizer_steps_per_rollout {steps} is more than the {rollout.prompts_per_step * size} "
            "responses of a phase (rollout.prompts_per_step x samples_per_prompt), so some would train nothing; lower "
            "it"
        )


def _distillation(config: "RlConfig") -> Iterator[str]:
    section, temperature = config.distillation, config.rollout.temperature
    if section is None:
        return
    if temperature != 1:
        yield (
            f"rollout.temperature {temperature:g} does not go with distillation: the teacher's log-probs are those at "
            "temperature 1, and the policy's those at which it samples; set rollout.temperature = 1"
        )
    twice = {url for url in section.urls if section.urls.count(url) > 1}
    if twice:
        yield f"distillation.urls names {sorted(twice)[0]} more than once; each server once"
    if both := {*section.urls} & {*config.rollout.urls}:
        yield (
            f"{sorted(both)[0]} is in rollout.urls and in distillation.urls, and a server of the policy gets new "
            "weights in every step; give the teacher servers of its own"
        )


def _budgets(config: "RlConfig") -> Iterator[str]:
    budget, rollout = config.budget, config.rollout
    longest, size = rollout.max_response_tokens, rollout.samples_per_prompt
    if config.has_budget and budget.tokens < longest:
        yield (
            f"budget.tokens {budget.tokens} is smaller than one response can be "
            f"(rollout.max_response_tokens {longest}); set budget.tokens to at least {longest}"
        )
    if _has_one_budget(config) and budget.tokens < size:
        yield (
            f"budget.tokens {budget.tokens} is below one group: its {size} responses (rollout.samples_per_prompt) have "
            "a token each at least, so no step could train a whole one; raise the budget or lower samples_per_prompt"
        )
    for domain, share in budget.domains.items() if config.has_budget else ():
        if share * budget.tokens < max(longest, size):
            least = f"response can be (rollout.max_response_tokens {longest})"
            if longest < size:
                least = f"group is at least (rollout.samples_per_prompt {size})"
            yield (
                f"budget.domains gives {domain!r} {share:g} of budget.tokens {budget.tokens}, which is less than one "
                f"{least}; raise its share or the budget"
            )
    if budget.domains and not config.has_budget:
        yield (
            f"budget.domains divides the token budget, and algorithm {config.algorithm.name!r} has none; set "
            "algorithm.name = 'c3po', or take budget.domains out"
        )
    most = rollout.prompts_per_step * size * longest
    needed = budget.tokens * config.algorithm.optimizer_steps_per_rollout
    if config.has_budget and budget.under_full == "short" and most < needed:
        yield (
            f"rollout.prompts_per_step {rollout.prompts_per_step} x samples_per_prompt {size} x max_response_tokens "
            f"{longest} = {most} tokens can never fill the budget of {needed} (budget.tokens x algorithm."
            "optimizer_steps_per_rollout), and budget.under_full 'short' samples no more; raise prompts_per_step, "
            "lower the budget, or set under_full = 'refill'"
        )
