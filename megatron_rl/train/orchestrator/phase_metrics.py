"""Describes one rollout phase as it ended: every sample of it, what became of each, and the numbers for the log."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rl.c3po.advantage import all_equal
from megatron_rl.c3po.packing import CostModel, barrier_cost
from megatron_rl.c3po.plan import Schedule
from megatron_rl.data.prompts import Prompt
from megatron_rl.errors import Fault
from megatron_rl.gateway.sampler import FAILED
from megatron_rl.gateway.trajectory import SECONDS
from megatron_rl.records import Group, Response, Sample
from megatron_rl.reward.verdict import GAVE_UP
from megatron_rl.rollout.rollout_file import Decode, answer_columns, parts_column, text_of, trajectory_columns
from megatron_rl.rollout.sampler import Collected
from megatron_rl.train.run import learning

PromptOf = Callable[[int], Prompt]  # by its position in the stream
KindOf = Callable[[str], str]  # of reward, by the prompt's domain

# Fewer responses without a verdict are bad luck in a small phase.
_MIN_GAVE_UP = 8
_NUM_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 80
# What to do about a response without a verdict, by whether its agent is to blame, and by its reason.
_REMEDIES = {
    (False, "timeout"): "Raise reward.timeout_seconds, or lower reward.workers on a small machine",
    (False, "error"): (
        "Mend the function or the reference answers; reward_output.log has what a function of your own printed"
    ),
    (True, "timeout"): "Raise rollout.agent_seconds, or let the agent do less; agent_output.log has what it printed",
    (True, "error"): "Mend the agent; agent_output.log has what it printed",
}
_DISAGREES = 1.0  # nats
_FIRST_PLACES = 16  # tokens of the first part of a response that has a reverse KL of its own; the next ends at 4 times


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Holds the result of one rollout phase.

    collected: what the sampler brought. unneeded: kept groups beyond those that were wanted. stale: carried samples
    that waited longer than `budget.max_staleness` allows. schedule: the plan over everything else.
    """

    collected: Collected
    unneeded: Sequence[Group]
    stale: Sequence[Sample]
    schedule: Schedule

    @property
    def generated(self) -> list[Group]:
        """Groups completed in this phase, filtered ones too."""
        return [*self.collected.kept, *self.collected.filtered]

    def outcomes(self) -> Iterator[tuple[Sample, str, int]]:
        """Yield every scored sample once: (sample, outcome, tokens that carry loss). Carried ones come up again in a
        later phase."""
        trained: Counter[int] = Counter()
        for step in self.schedule.first_pass:
            for selected in step.selected:
                trained[selected.index] += selected.num_loss_tokens
        left_over = "carried" if self.schedule.num_dropped == 0 else "dropped: over the budget"
        masked = set(self.schedule.masked)
        for index, sample in enumerate(self.schedule.samples):
            if index in trained:
                yield sample, "trained", trained[index]
            elif index in masked:
                yield sample, "dropped: truncated", 0
            else:
                yield sample, left_over if sample.response.num_policy_tokens else "dropped: no tokens", 0
        for group in self.collected.filtered:
            yield from ((sample, "dropped: equal rewards", 0) for sample in group.samples)
        for group in self.unneeded:
            yield from ((sample, "dropped: not needed", 0) for sample in group.samples)
        yield from ((sample, "dropped: stale", 0) for sample in self.stale)

    def lines(self, prompt_of: PromptOf, kind_of: KindOf, decode: Decode) -> Iterator[str]:
        """Yield one JSON row per sample, each made when it is asked for."""
        for sample, outcome, num_loss_tokens in self.outcomes():
            row = _row(sample.response, prompt_of, kind_of, decode) | {
                "reward": sample.reward,
                "reason": sample.reason,
                "details": sample.details,
                **parts_column(sample),
                "advantage": sample.advantage,
                "num_loss_tokens": num_loss_tokens,
                "outcome": outcome,
            }
            yield json.dumps(row, ensure_ascii=False) + "\n"
        for group in self.collected.purged:
            for response in group.responses:
                row = _row(response, prompt_of, kind_of, decode) | {"outcome": "dropped: kept for too long"}
                yield json.dumps(row, ensure_ascii=False) + "\n"

    @property
    def positions(self) -> set[int]:
        """The places in the order of prompts of all samples that `lines` has."""
        purged = (group.prompt_id for group in self.collected.purged)
        return {*purged, *(sample.response.prompt_id for sample, _, _ in self.outcomes())}

    def examples(self, prompt_of: PromptOf, kind_of: KindOf, decode: Decode) -> list[str]:
        """Describe two responses beside what was expected of them, for whoever reads that nothing is learned."""
        own = [sample for group in self.generated for sample in group.samples] or self.schedule.samples

        def prompt(sample: Sample) -> Prompt:
            return prompt_of(sample.response.prompt_id)

        return learning.examples(
            own,
            lambda sample: (prompt(sample).id, prompt(sample).answer),
            lambda sample: kind_of(prompt(sample).domain),
            lambda sample: text_of(sample.response, decode),
        )

    def check_rewards(self, max_error_share: float, prompt_of: PromptOf, decode: Decode) -> None:
        """Raise Fault when more than this share of the responses of this phase got no verdict: they score 0, and the
        policy would learn from that."""
        own = [sample for group in self.generated for sample in group.samples]
        failed = [sample for sample in own if sample.reason in GAVE_UP]
        if len(failed) < _MIN_GAVE_UP or len(failed) <= max_error_share * len(own):
            return
        counts = Counter(sample.reason for sample in failed)
        examples = "; ".join(
            f"{prompt_of(sample.response.prompt_id).id} ({sample.details or sample.reason}): "
            f"...{text_of(sample.response, decode)[-_EXAMPLE_CHARACTERS:]!r}"
            for sample in _unlike(failed)[:_NUM_EXAMPLES]
        )
        raise Fault(
            f"{len(failed)} of {len(own)} responses could not be judged ({counts['timeout']} timeouts, "
            f"{counts['error']} errors), a share of {len(failed) / len(own):.2f}, more than reward.max_error_share = "
            f"{max_error_share:g}. For example {examples}. {_remedy(failed)}, and go on with --resume"
        )

    def metrics(self, budget_tokens: int | None, cost: CostModel, prompt_of: PromptOf) -> dict[str, Any]:
        """Compute the metrics of the samples generated in this phase, or of those it trains where carried ones filled
        the whole budget.

        budget_tokens: of all optimizer steps of the phase; None for an algorithm without a budget.
        """
        plan, samples = self.schedule.plan, self.schedule.samples
        found = self.collected
        own = [sample for group in self.generated for sample in group.samples]
        seen = own or list(samples)
        lengths = np.array([sample.response.num_policy_tokens for sample in seen])
        selected = [s for step in self.schedule.first_pass for s in step.selected]
        trained = dict.fromkeys(s.index for s in selected)
        advantages = np.array([samples[index].advantage for index in trained])
        uniform = sum(all_equal([sample.reward for sample in group.samples]) for group in self.generated)
        num_loss_tokens = sum(s.num_loss_tokens for s in selected)
        return {
            "reward": float(np.mean([sample.reward for sample in seen])),
            **_by_part(seen),
            **self._by_domain(seen, prompt_of),
            **_of_trajectories(seen),
            **_of_teacher(seen, [samples[index] for index in trained]),
            "num_prompts": len(self.generated),
            "num_samples": len(own),
            "num_generated_tokens": found.num_generated_tokens,
            "response_tokens_mean": float(lengths.mean()),
            "response_tokens_std": float(lengths.std()),
            "response_tokens_p90": float(np.quantile(lengths, 0.9)),
            "response_tokens_max": int(lengths.max()),
            "advantage_mean": float(advantages.mean()) if trained else 0.0,
            "advantage_std": float(advantages.std()) if trained else 0.0,
            "advantage_max": float(np.abs(advantages).max(initial=0.0)),
            "truncated_share": _share(seen, lambda sample: sample.response.finish_reason == "length"),
            "correct_share": _share(seen, lambda sample: sample.reason == "correct"),
            "wrong_share": _share(seen, lambda sample: sample.reason == "wrong"),
            "no_answer_share": _share(seen, lambda sample: sample.reason == "no_answer"),
            "too_slow_share": _share(seen, lambda sample: sample.reason == "too_slow"),
            "reward_error_share": _share(seen, lambda sample: sample.reason in GAVE_UP),
            "uniform_group_share": uniform / max(1, len(self.generated)),
            "num_trained_samples": len(trained),
            "budget_use": num_loss_tokens / budget_tokens if budget_tokens else None,
            "num_cut_tokens": self.schedule.num_cut_tokens,
            "num_carried": len(self.schedule.carried),
            "num_dropped_over_budget": self.schedule.num_dropped,
            "num_unfinished": sum(len(group.responses) for group in found.unfinished),
            "num_unfinished_tokens": sum(group.num_policy_tokens for group in found.unfinished),
            "num_dropped_unfinished": sum(len(group.responses) for group in found.purged),
            "num_dropped_unfinished_tokens": sum(group.num_policy_tokens for group in found.purged),
            "off_policy_token_share": sum(s.num_stale_tokens for s in plan.steps[0].selected)
            / max(1, plan.steps[0].num_loss_tokens),
            "num_dropped_equal_rewards": sum(len(group.samples) for group in found.filtered),
            "num_dropped_not_needed": sum(len(group.samples) for group in self.unneeded),
            "num_dropped_stale": len(self.stale),
            "num_dropped_truncated": len(self.schedule.masked),
            "num_micro_batches": sum(len(step.micro_batches[0]) for step in plan.steps),
            "micro_batch_imbalance": self._imbalance(cost),
        }

    def _by_domain(self, seen: Sequence[Sample], prompt_of: PromptOf) -> dict[str, float]:
        """Compute the metrics of each domain D: reward/D, response_tokens_mean/D and num_samples/D among the samples
        seen, and num_loss_tokens/D of the last optimizer step, as num_loss_tokens is. Return nothing where there is
        only one domain."""
        domain_of = {s.id: prompt_of(s.response.prompt_id).domain for s in (*seen, *self.schedule.samples)}
        domains = sorted(set(domain_of.values()))
        if len(domains) == 1:
            return {}
        found: dict[str, float] = {}
        for domain in domains:
            # With budgets by domain, carried samples may be all that a phase needs of one.
            if members := [sample for sample in seen if domain_of[sample.id] == domain]:
                found[f"reward/{domain}"] = float(np.mean([sample.reward for sample in members]))
                found[f"response_tokens_mean/{domain}"] = float(
                    np.mean([s.response.num_policy_tokens for s in members])
                )
                found[f"num_samples/{domain}"] = len(members)
                if len(gaps := teacher_gaps(members)):
                    found[f"teacher_kl/{domain}"] = float(gaps.mean())
            found[f"num_loss_tokens/{domain}"] = sum(
                selected.num_loss_tokens
                for selected in self.schedule.plan.steps[-1].selected
                if domain_of[self.schedule.samples[selected.index].id] == domain
            )
        return found

    def _imbalance(self, cost: CostModel) -> float:
        """Compute the barrier cost of the phase over what it would be if every rank were always busy; 1 is perfect."""
        barrier = busy = 0.0
        for step in self.schedule.plan.steps:
            lengths = [s.num_tokens for s in step.selected]
            barrier += barrier_cost(step.micro_batches, lengths, cost)
            busy += sum(map(cost, lengths)) / len(step.micro_batches)
        return barrier / busy if busy else 1.0


def _row(response: Response, prompt_of: PromptOf, kind_of: KindOf, decode: Decode) -> dict[str, Any]:
    prompt, text = prompt_of(response.prompt_id), text_of(response, decode)
    versions, counts = np.unique(response.policy_versions, return_counts=True)
    return {
        "prompt_id": prompt.id,
        "position": response.prompt_id,
        "sample_index": response.sample_index,
        "prompt": decode(response.segments[0].prompt_ids.tolist()) if response.segments else prompt.prompt,
        "response": text,
        **answer_columns(prompt, kind_of(prompt.domain), text),
        # The number of tokens that each version of the weights sampled, in order.
        "policy_versions": dict(zip(map(str, versions.tolist()), counts.tolist(), strict=True)),
        "finish_reason": response.finish_reason,
        "num_tokens": response.num_policy_tokens,
        **_teacher_column(response),
        **trajectory_columns(response, decode),
    }


def _teacher_column(response: Response) -> dict[str, float]:
    """Return the column with a teacher's judgement of a response: the mean over its tokens of the policy's log-prob
    less the teacher's."""
    teacher = response.teacher_logprobs
    if teacher is None or not len(teacher):
        return {}
    return {"teacher_kl": float((response.rollout_logprobs.astype(np.float64) - teacher).mean())}


def teacher_gaps(samples: Sequence[Sample]) -> np.ndarray:
    """Return, for every token that a teacher has scored, the log-prob of the policy that sampled it less the teacher's,
    float64. Their mean over what the policy samples is the reverse KL divergence."""
    scored = [(s.response.rollout_logprobs, s.response.teacher_logprobs) for s in samples]
    gaps = [own.astype(np.float64) - teacher for own, teacher in scored if teacher is not None]
    return np.concatenate([np.zeros(0), *gaps])


def _of_teacher(seen: Sequence[Sample], trained: Sequence[Sample]) -> dict[str, float]:
    """Compute the metrics of the teacher's log-probs of a phase; nothing without a teacher."""
    gaps = teacher_gaps(seen)
    if not len(gaps):
        return {}
    places = np.concatenate([np.arange(len(teacher_gaps([s]))) for s in seen])
    added = np.concatenate([np.zeros(0), *(-s.teacher_coefficient * teacher_gaps([s]) for s in trained)])
    found = {
        "teacher_kl": float(gaps.mean()),
        "teacher_kl_max": float(gaps.max()),
        "teacher_disagreement_share": float((gaps >= _DISAGREES).mean()),
        "teacher_advantage_std": float(added.std()) if len(added) else 0.0,
    }
    first, end = 0, _FIRST_PLACES
    while (chosen := (places >= first) & (places < end)).any():
        found[f"teacher_kl_from/{first}"] = float(gaps[chosen].mean())
        first, end = end, 4 * end
    return found


def _of_trajectories(seen: Sequence[Sample]) -> dict[str, float]:
    """Compute the metrics of responses of many turns; nothing where no response is a trajectory."""
    responses = [sample.response for sample in seen]
    if all(response.is_plain for response in responses):
        return {}
    masked = sum(response.num_masked_tokens for response in responses)
    sampled = sum(response.num_policy_tokens for response in responses)
    return {
        "turns_mean": float(np.mean([response.num_turns for response in responses])),
        "segments_mean": float(np.mean([len(response.segments) for response in responses])),
        "masked_token_share": masked / max(1, masked + sampled),
        "no_token_share": _share(seen, lambda sample: sample.response.num_policy_tokens == 0),
    }


def _by_part(seen: Sequence[Sample]) -> dict[str, float]:
    """Compute reward_part/P of each part P of the rewards, before its weight, over the responses that have it."""
    names = sorted({name for sample in seen for name in sample.parts})
    return {
        f"reward_part/{name}": float(np.mean([sample.parts[name] for sample in seen if name in sample.parts]))
        for name in names
    }


def _unlike(failed: Sequence[Sample]) -> list[Sample]:
    """Return the samples in an order in which each of the first ones says something else: what most say comes first."""
    total, before = Counter(sample.details for sample in failed), Counter[str]()
    places = []
    for sample in failed:
        places.append((before[sample.details], -total[sample.details]))
        before[sample.details] += 1
    return [failed[at] for at in sorted(range(len(failed)), key=places.__getitem__)]


def _remedy(failed: Sequence[Sample]) -> str:
    """Say what to do about responses that could not be judged, by what most of them suffer from."""
    counts = Counter((sample.response.finish_reason in (FAILED, SECONDS), sample.reason) for sample in failed)
    return _REMEDIES[max(counts, key=counts.__getitem__)]


def _share(samples: Sequence[Sample], chosen: Callable[[Sample], bool]) -> float:
    return sum(map(chosen, samples)) / len(samples)
