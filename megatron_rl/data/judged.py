"""Checks before a run begins that prompts and their answers suit the reward that will judge the responses."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from megatron_rl.config.reward import OF_BENCHMARKS, RewardSection
from megatron_rl.data.curation.test_layouts import looks_like_tests
from megatron_rl.data.prompts import Prompt
from megatron_rl.reward.code_tests import problem_of_tests

_TESTS_READ = 1000  # the rows of a domain whose tests are read; those of a large file take minutes
BY_FORMULAS = ("math", "stem")

log = logging.getLogger(__name__)


def check_judged(prompts: Sequence[Prompt], reward: RewardSection, suffix_key: str = "data.suffix") -> None:
    """Raise ValueError as `refuse_misjudged` does. Warns where prompts do not ask for the answer as the reward reads
    it.

    suffix_key: what appends an instruction to them.
    """
    refuse_misjudged(prompts, reward)
    for doubt in doubts([p for p in prompts if {*BY_FORMULAS} & {*reward.kinds_of(p.domain)}], suffix_key):
        log.warning(doubt)


def refuse_misjudged(prompts: Iterable[Prompt], reward: RewardSection) -> None:
    """Raise ValueError where a reward could only ever give 0: tests that are read as an answer, and answers that are
    read as tests."""
    by_domain: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_domain[prompt.domain].append(prompt)
    for domain, members in by_domain.items():
        kinds = [kind for kind in reward.kinds_of(domain) if kind in OF_BENCHMARKS]
        if "code" in kinds:
            _check_tests(domain, members, reward.key_of("code"))
        elif kinds:  # others may take an answer for whatever they like
            _check_answers(domain, members, kinds[0])


def _check_tests(domain: str, prompts: Sequence[Prompt], key: str) -> None:
    wrong = [(p, why) for p in prompts[:_TESTS_READ] if (why := problem_of_tests(p.answer))]
    if wrong:
        prompt, why = wrong[0]
        raise ValueError(
            f"{prompt.where}: the answer of this row must be tests of a program, since the reward of domain {domain!r} "
            f"is 'code' ({why}); {_count(wrong, prompts[:_TESTS_READ])}. Drop them with tools/prepare_data.py, or "
            f"change {key}"
        )


def _check_answers(domain: str, prompts: Sequence[Prompt], kind: str) -> None:
    """Raise ValueError where answers are tests. JSON can be an answer for `exact`, so there most rows must look like
    tests."""
    tests = [p for p in prompts if looks_like_tests(p.answer)]
    if tests and (kind in BY_FORMULAS or 2 * len(tests) > len(prompts)):
        raise ValueError(
            f"{tests[0].where}: the answer of this row is tests of a program, and the reward of domain {domain!r} is "
            f"{kind!r}, which would call every response wrong; {_count(tests, prompts)}. Set reward.domains = "
            f"{{{domain} = \"code\"}}, or give these rows the domain 'code'"
        )


def doubts(prompts: Sequence[Prompt], suffix_key: str = "data.suffix") -> Iterator[str]:
    """Say where prompts of mathematics or science do not ask for the answer as their reward reads it."""
    if prompts and not any("boxed" in prompt.text for prompt in prompts):
        yield (
            f"none of the {len(prompts):,} prompts of mathematics or science mentions a box, and only an answer in "
            f"\\boxed{{}} counts; unless the model writes one unasked, set {suffix_key} to an instruction"
        )
    asks = [prompt for prompt in prompts if "####" in prompt.text]
    if asks:
        yield (
            f"{len(asks):,} of {len(prompts):,} prompts of mathematics or science have '####' in them, such as "
            f"{asks[0].where or asks[0].id}, and only an answer in \\boxed{{}} counts; where they ask for the answer "
            f"behind it, cut that out with `remove` of tools/prepare_data.py, and set {suffix_key} to another "
            "instruction"
        )


def _count(some: Sequence[object], of: Sequence[object]) -> str:
    return f"so it is with {len(some):,} of {len(of):,} rows"
