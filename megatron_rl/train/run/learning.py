"""Looks for signs that a run learns nothing, and reports them within three steps: what was seen, the likeliest causes,
and two responses. It looks for steps that wait for rewards, too."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.reward import OF_BENCHMARKS
from megatron_rl.records import Sample
from megatron_rl.reward.answers import extracted_answer
from megatron_rl.reward.verdict import GAVE_UP

Row = Mapping[str, Any]

STEPS = 3
# A sign that stays is told again after so many steps.
AGAIN_STEPS = 50
_NO_ANSWER_SHARE = 0.5
_ERROR_SHARE = 0.01
_LARGE_RATIO = 5.0  # of new to old probability of a token; clipping keeps most within 0.8 and 1.3
_TRUNCATED_SHARE = 0.25
# In nats per token. Policies that still learn have ten times as much.
_LEAST_ENTROPY = 0.01
_SHOWN_CHARACTERS = 160
_WAIT_SHARE, _LONG_SECONDS = 0.5, 10.0  # of a step in which rewards are all that is waited for


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """Describes one sign that something is wrong with a run. seen: whether the row of a step shows it. said: what a row
    of the last `STEPS` steps that all show it says."""

    seen: Callable[[Row], bool]
    said: Callable[[Row], str]


class Signs:
    """Counts the steps in a row that show each sign. Only rows of reinforcement learning show any."""

    def __init__(self, signs: Sequence[Sign]) -> None:
        self._signs = signs
        self._in_a_row: Counter[int] = Counter()

    def check(self, row: Row) -> list[str]:
        """Count the signs in the row of a new step. Return messages for signs that its last `STEPS` steps show."""
        if row.get("num_prompts") == 0:  # carried responses were all that the step needed
            return []
        found = []
        for index, sign in enumerate(self._signs):
            self._in_a_row[index] = self._in_a_row[index] + 1 if sign.seen(row) else 0
            if self._in_a_row[index] % AGAIN_STEPS == STEPS:
                found.append(sign.said(row))
        return found


def _no_answer(row: Row) -> Iterator[str]:
    """Yield reasons why responses may give no answer, the likeliest first."""
    cut = row.get("truncated_share", 0.0)
    if cut > _TRUNCATED_SHARE:
        yield (
            f"{cut:.0%} are cut off at the limit (raise rollout.max_response_tokens, or start from a model that ends "
            "its answers)"
        )
    yield "the prompts do not ask for an answer in \\boxed{}, or for code in a fenced block (data.suffix adds that)"
    yield "the model is a base model, or its chat template is not the one it was trained with"


def _all_wrong(row: Row) -> Iterator[str]:
    if row.get("no_answer_share", 0.0) > _NO_ANSWER_SHARE:
        yield from _no_answer(row)
        return
    if row.get("reward_error_share", 0.0) > _TRUNCATED_SHARE:
        yield (
            "many agents failed (agent_output.log says how) or were not done in time (rollout.agent_seconds)"
            if row.get("num_failed_agents")
            else "many responses could not be judged (reward.timeout_seconds, reference answers that nothing can read)"
        )
    if row.get("too_slow_share", 0.0) > _TRUNCATED_SHARE:
        yield "many programs ran out of their time (reward.code.cpu_seconds, reward.code.seconds)"
    if row["reward"] != 0:
        yield "all responses to a prompt get the same number, such as the floor or the ceiling (make the reward finer)"
    yield "reward.kind or reward.domains judge by the wrong rules, or the reference answers are no answers"
    yield "the problems are too hard for the model (choose others by their difficulty: tools/prepare_data.py)"


def _uniform(row: Row) -> str:
    causes: Iterator[str] | tuple[str, ...] = ("every prompt is either always or never solved (choose others)",)
    correct = row.get("correct_share", row["reward"])  # rows of before it was written have rewards of 0 and 1
    if correct == 0:
        causes = _all_wrong(row)
    elif correct >= 1:
        causes = ("the problems are too easy for the model (choose others)", "the reward accepts any answer")
    if row.get("ratio_max", 0.0) > _LARGE_RATIO:
        causes = (f"steps are too large, and the policy has collapsed (ratio_max {row['ratio_max']:.3g})", *causes)
    return (
        f"all responses of a prompt have the same reward, for every prompt of the last {STEPS} steps (mean reward "
        f"{row['reward']:.3g}), so nothing is learned. {_listed(causes)}"
    )


def _is_uniform(row: Row) -> bool:
    """Tell whether all groups have equal rewards, and nothing else explains or outweighs it: a policy that has
    collapsed has a sign of its own, and a teacher teaches where rewards do not."""
    return row.get("uniform_group_share", 0.0) >= 1 and not row.get("teacher_coefficient") and not _is_collapsed(row)


def _is_collapsed(row: Row) -> bool:
    return "reward" in row and row.get("entropy") is not None and bool(row["entropy"] < _LEAST_ENTROPY)


def _waits_for_rewards(row: Row) -> bool:
    waited = row.get("reward_wait_seconds", 0.0)
    return bool(waited > _LONG_SECONDS and waited > _WAIT_SHARE * row["step_seconds"])


def _nothing_trained(row: Row) -> Iterator[str]:
    """Yield reasons why no response of a phase carries loss, the likeliest first."""
    if row.get("no_token_share"):
        yield "the agents do not ask the policy, which answers at the address that they are given (docs/agents.md)"
    if row.get("num_dropped_truncated"):
        yield (
            "responses are cut off at the limit, and algorithm.mask_truncated leaves these out (raise "
            "rollout.max_response_tokens, or start from a model that ends its answers)"
        )


# Signs that a run learns nothing.
NO_LEARNING = (
    Sign(
        seen=lambda row: row.get("num_trained_samples") == 0,
        said=lambda row: (
            f"no response of the last {STEPS} steps has a token that carries loss, so the weights stay as they are. "
            f"{_listed(_nothing_trained(row))}"
        ),
    ),
    Sign(seen=_is_uniform, said=_uniform),
    Sign(
        seen=lambda row: row.get("reward_error_share", 0.0) > _ERROR_SHARE,
        said=lambda row: (
            f"{row['reward_error_share']:.0%} of the responses could not be judged, and some in each of the last "
            f"{STEPS} steps. Their details in rollouts/ say why, and "
            + (
                "agent_output.log has what the agents printed"
                if row.get("num_failed_agents")
                else "reward_output.log has what a function of your own printed"
            )
        ),
    ),
    Sign(
        seen=lambda row: row.get("no_answer_share", 0.0) > _NO_ANSWER_SHARE,
        said=lambda row: (
            f"{row['no_answer_share']:.0%} of the responses give no answer, and more than half in each of the last "
            f"{STEPS} steps. {_listed(_no_answer(row))}"
        ),
    ),
    Sign(
        seen=_is_collapsed,
        said=lambda row: (
            f"the entropy is {row['entropy']:.2g} nats per token, below {_LEAST_ENTROPY:g} for {STEPS} steps, so "
            "nothing new is tried. Likely: the policy has collapsed (lower optimizer.learning_rate, raise "
            "algorithm.entropy_coefficient, go back to an earlier checkpoint); or rollout.temperature is far below 1"
        ),
    ),
)
# Signs that it takes longer than it has to.
SLOW = (
    Sign(
        seen=_waits_for_rewards,
        said=lambda row: (
            f"{row['reward_wait_seconds']:.3g} s of {row['step_seconds']:.3g} s went by with nothing to do but to wait "
            f"for rewards, and more than half of each of the last {STEPS} steps. Raise reward.workers, or "
            "reward.service.concurrent of a service; a function that waits for a model or a service waits for all "
            "responses of a prompt at once where it is `async def`"
        ),
    ),
)


def _listed(causes: Iterator[str] | Sequence[str]) -> str:
    return "Likely: " + "; or ".join(causes)


def examples(
    samples: Sequence[Sample],
    expected_of: Callable[[Sample], tuple[str, str]],
    judged_as: Callable[[Sample], str],
    text_of: Callable[[Sample], str],
) -> list[str]:
    """Describe two responses beside what was expected: one of the most frequent failure, and one that failed otherwise,
    or else to another prompt.

    expected_of: the prompt's id and reference answer.
    """
    failed = [sample for sample in samples if sample.reason != "correct"] or list(samples)
    ((reason, _),) = Counter(sample.reason for sample in failed).most_common(1)
    first = next(sample for sample in failed if sample.reason == reason)
    others = sorted(
        (sample for sample in failed if sample.id != first.id),
        key=lambda one: (one.reason == reason, one.response.prompt_id == first.response.prompt_id),
    )
    found = []
    for sample in (first, *others[:1]):
        text, (name, expected) = text_of(sample), expected_of(sample)
        why = f"{sample.reason}: {sample.details}" if sample.reason in GAVE_UP and sample.details else sample.reason
        found.append(
            f"prompt {name}, reward {sample.reward:g} ({why}): expected {_cut(expected)}, "
            f"{_extracted(judged_as(sample), text)}the response ends {_cut(text, tail=True)}"
        )
    return found


def _extracted(kind: str, text: str) -> str:
    """Say which answer the judge found; "" for a function or service, which extracts none."""
    return f"extracted {_cut(extracted_answer(kind, text))}, " if kind in OF_BENCHMARKS else ""


def _cut(text: str | None, tail: bool = False) -> str:
    """Quote a text, so that no terminal obeys it, and cut it where it is long."""
    if text is None:
        return "nothing"
    if len(text) <= _SHOWN_CHARACTERS:
        return repr(text)
    return f"...{text[-_SHOWN_CHARACTERS:]!r}" if tail else f"{text[:_SHOWN_CHARACTERS]!r}..."
