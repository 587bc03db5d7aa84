"""Collects the groups of a rollout phase on rank 0, and plans the train phase that they fill."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_rl.c3po.advantage import all_equal
from megatron_rl.c3po.algorithms import chosen_algorithm
from megatron_rl.c3po.budget import PromptYield, Shortfall, shortfalls
from megatron_rl.c3po.packing import CostModel
from megatron_rl.c3po.plan import PlanRules, Schedule, schedule
from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import RlConfig
from megatron_rl.records import Group, Sample
from megatron_rl.rollout.archive import Carry, pack_carry, unpack_carry
from megatron_rl.rollout.provenance import model_settings, teacher_settings, told_differences
from megatron_rl.train.orchestrator.advantages import with_phase_advantages, with_teacher
from megatron_rl.train.orchestrator.group_source import GroupSource, domain_of, domain_shares, saved_by_domain
from megatron_rl.train.orchestrator.phase_metrics import Phase
from megatron_rl.train.run.step_files import StepFiles

log = logging.getLogger(__name__)


class Collector:
    """Collects what a phase needs, plans its optimizer steps, and keeps what it leaves to the next one.

    files: writes the responses of each step beside what follows. `close()` ends that.
    """

    def __init__(self, config: RlConfig, layout: Layout, cost: CostModel, source: GroupSource) -> None:
        self._config, self._layout, self._cost, self._source = config, layout, cost, source
        self._algorithm = chosen_algorithm(config.algorithm)
        self._budgets = config.phase_budgets(layout.world_size)
        self._refill = self._algorithm.uses_budget and config.budget.under_full == "refill"
        self._shares = domain_shares(config)
        # The tokens that one prompt of each domain is expected to bring.
        self._per_prompt = dict.fromkeys(self._shares, PromptYield())
        self._carry = Carry()
        self._reference = _reference(config)
        self.files = StepFiles(config)
        self.examples: list[str] = []  # of the last phase: two responses beside what was expected

    def state(self) -> tuple[dict[str, Any], bytes]:
        """Return what a checkpoint keeps: JSON, and carried samples and unfinished groups. `restore` takes both."""
        state = {
            "per_prompt": self._per_prompt,
            "teacher": _teaching(self._config),
            "reference": self._reference,
        }
        return {**self._source.state(), **state}, pack_carry(self._carry)

    def restore(self, state: dict[str, Any], carried: bytes) -> None:
        self._source.restore(state)
        known = saved_by_domain(state["per_prompt"], self._shares)
        self._per_prompt = {domain: PromptYield(*sums) for domain, sums in known.items()}
        self._carry = unpack_carry(carried)
        if state.get("teacher") != _teaching(self._config) and self._carry.samples:
            log.warning(
                "%d responses that the checkpoint carries are dropped: they have the advantages of a run with another "
                "teacher or another distillation.advantage, or one of both runs has no teacher",
                len(self._carry.samples),
            )
            self._carry = Carry(unfinished=self._carry.unfinished)
        before = state.get("reference")
        if before and self._reference and (told := told_differences(before, self._reference)):
            log.warning(
                "the weights of %s changed since this checkpoint was made: %s; algorithm.kl_coefficient measures the "
                "distance to the new ones from now on",
                self._config.model.path,
                told,
            )

    def collect(self, policy_version: int) -> tuple[Schedule, dict[str, Any]]:
        """Run one rollout phase under the token budget, and plan the train phase. Return the plan, and metrics.

        Raises what `GroupSource.groups` does: the phase is abandoned and nothing of it is kept. Raises Fault when too
        many responses could not be judged (`Phase.check_rewards`).
        """
        started = time.perf_counter()
        fresh_enough, stale = self._carried(policy_version)
        needs = self._needs(fresh_enough)
        found = self._source.groups(needs, policy_version, self._carry.unfinished, self._is_wanted)
        rollout_seconds = time.perf_counter() - started
        wanted = len(found.kept) if self._refill else self._config.rollout.prompts_per_step
        plan = self._plan(found.kept[:wanted], fresh_enough, policy_version)
        phase = Phase(collected=found, unneeded=found.kept[wanted:], stale=stale, schedule=plan)
        since = dict(zip((sample.id for sample in self._carry.samples), self._carry.since, strict=True))
        self._carry = Carry(
            samples=plan.carried,
            since=tuple(since.get(sample.id, policy_version) for sample in plan.carried),
            unfinished=tuple(found.unfinished),
        )
        if self._refill:
            self._per_prompt = {need.domain: need.per_prompt for need in needs}
        self._write(phase, policy_version)
        budget = sum(self._budgets) if self._algorithm.uses_budget else None
        metrics = phase.metrics(budget, self._cost, self._source.prompt_of)
        metrics |= {
            "rollout_seconds": rollout_seconds,
            "generated_tokens_per_second": metrics["num_generated_tokens"] / rollout_seconds,
            "plan_seconds": time.perf_counter() - started - rollout_seconds,
        }
        if self._config.distillation is not None:
            metrics["teacher_coefficient"] = self._config.distillation.coefficient_at(policy_version)
        return plan, metrics | self._source.metrics()

    def close(self) -> None:
        self.files.close()

    def _carried(self, policy_version: int) -> tuple[list[Sample], list[Sample]]:
        """Divide the samples that the last phase left into those that may be trained, and those that have waited too
        long."""
        oldest = policy_version - self._config.budget.max_staleness
        pairs = list(zip(self._carry.samples, self._carry.since, strict=True))
        return [sample for sample, since in pairs if since >= oldest], [s for s, since in pairs if since < oldest]

    def _plan(self, groups: Sequence[Group], carried: Sequence[Sample], policy_version: int) -> Schedule:
        # A different permutation every phase, from the run's seed alone.
        seed = self._config.seed * 1_000_003 + policy_version
        groups, carried = with_phase_advantages(self._config, groups, carried)
        groups, carried = with_teacher(self._config, groups, carried, policy_version, self._own_domain_of)
        return schedule(groups, carried, self._plan_rules(), policy_version=policy_version, seed=seed)

    def _plan_rules(self) -> PlanRules:
        config = self._config
        return PlanRules(
            algorithm=self._algorithm,
            budgets=self._budgets,
            cut=config.budget.cut,
            keep_surplus=self._refill,
            max_response_tokens=config.rollout.max_response_tokens,
            num_data_ranks=self._layout.data,
            token_cap=config.micro_batch_cap,
            cost=self._cost,
            micro_batch_multiple=self._layout.micro_batch_multiple,
            shares=self._shares,
            domain_of=self._domain_of,
            mask_truncated=config.algorithm.mask_truncated,
            num_passes=config.algorithm.passes_per_rollout,
        )

    def _write(self, phase: Phase, policy_version: int) -> None:
        """Write the responses of a step: all into its file, and two for a warning. Raise Fault when too many rewards
        could not be given."""
        decode, kind_of = self._source.decode, self._config.reward.kind_of
        # Made here: the source goes on to the next phase while the file is written.
        prompt_of = {position: self._source.prompt_of(position) for position in phase.positions}.__getitem__
        self.examples = phase.examples(prompt_of, kind_of, decode)
        path = self._config.run_dir / "rollouts" / f"step_{policy_version:06d}.jsonl"
        self.files.write(path, phase.lines(prompt_of, kind_of, decode), "the responses of this step are not written")
        phase.check_rewards(self._config.reward.max_error_share, prompt_of, decode)

    def _needs(self, carried: Sequence[Sample]) -> list[Shortfall]:
        """Return what a phase lacks of each domain beside the carried samples."""
        if not self._refill:
            return [Shortfall(unit="groups", missing=self._config.rollout.prompts_per_step)]
        tokens: Counter[str] = Counter()
        longest = self._config.rollout.max_response_tokens
        for sample in carried:
            num_tokens = sample.response.num_policy_tokens
            tokens[self._domain_of(sample.response.prompt_id)] += num_tokens
            longest = max(longest, num_tokens)  # sampled before the limit was lowered
        return shortfalls(self._budgets, self._shares, tokens, self._per_prompt, longest, self._config.budget.margin)

    def _domain_of(self, position: int) -> str:
        return domain_of(self._source.prompt_of(position), self._shares)

    def _own_domain_of(self, position: int) -> str:
        """Give the domain of a prompt, whether or not the budget tells domains apart."""
        return self._source.prompt_of(position).domain

    def _is_wanted(self, group: Group) -> bool:
        """Tell whether a group is kept. Dynamic sampling drops groups that teach nothing: all right, all wrong, or all
        with the same score."""
        return not self._algorithm.dynamic_sampling or not all_equal([s.reward for s in group.samples])


def _teaching(config: RlConfig) -> dict[str, Any] | None:
    """Return what the advantages of a carried response depend on beside its reward; None without a teacher."""
    section = config.distillation
    return None if section is None else {"advantage": section.advantage, "model": teacher_settings(section)}


def _reference(config: RlConfig) -> dict[str, str] | None:
    """Return the files of weights that the KL term compares with; None without that term."""
    if not config.algorithm.kl_coefficient:
        return None
    files = model_settings(config.model.path, config.model.dtype)["files"]
    return {name: state for name, state in files.items() if name.endswith(".safetensors")}
