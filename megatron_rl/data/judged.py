"""Do prompts and their answers suit the reward that will judge the responses? Asked before a run begins."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from megatron_rl.config.schema import RewardSection
from megatron_rl.data.curation.code_tests import problem_of_tests
from megatron_rl.data.curation.test_layouts import looks_like_tests
from megatron_rl.data.prompts import Prompt

_TESTS_READ = 1000  # the rows of a domain whose tests are read; those of a large file take minutes
_BY_FORMULAS = ("math", "stem")

log = logging.getLogger(__name__)


def check_judged(prompts: Iterable[Prompt], reward: RewardSection, suffix_key: str = "data.suffix") -> None:
    """ValueError where a reward could only ever give 0: tests that are read as an answer, and answers that are read as
    tests. Warns where prompts do not ask for the answer as the reward reads it.

    suffix_key: what appends an instruction to them.
    """
    by_domain: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_domain[prompt.domain].append(prompt)
    for domain, members in by_domain.items():
        kind = reward.kind_of(domain)
        if kind == "code":
            _check_tests(domain, members)
        else:
            _check_answers(domain, members, kind)
    formulas = [p for domain, members in by_domain.items() if reward.kind_of(domain) in _BY_FORMULAS for p in members]
    _warn_of_instructions(formulas, suffix_key)


def _check_tests(domain: str, prompts: Sequence[Prompt]) -> None:
    wrong = [(p, why) for p in prompts[:_TESTS_READ] if (why := problem_of_tests(p.answer))]
    if wrong:
        prompt, why = wrong[0]
        raise ValueError(
            f"{prompt.where}: the answer of this row must be tests of a program, since the reward of domain {domain!r} "
            f"is 'code' ({why}); {_count(wrong, prompts[:_TESTS_READ])}. Drop them with tools/prepare_data.py, or "
            "change reward.kind and reward.domains"
        )


def _check_answers(domain: str, prompts: Sequence[Prompt], kind: str) -> None:
    """To `exact` JSON can be an answer, so there most rows must look like tests."""
    tests = [p for p in prompts if looks_like_tests(p.answer)]
    if tests and (kind in _BY_FORMULAS or 2 * len(tests) > len(prompts)):
        raise ValueError(
            f"{tests[0].where}: the answer of this row is tests of a program, and the reward of domain {domain!r} is "
            f"{kind!r}, which would call every response wrong; {_count(tests, prompts)}. Set reward.domains = "
            f"{{{domain} = \"code\"}}, or give these rows the domain 'code'"
        )


def _warn_of_instructions(prompts: Sequence[Prompt], suffix_key: str) -> None:
    if not prompts:
        return
    if not any("box" in prompt.prompt for prompt in prompts):
        log.warning(
            "none of the %d prompts of mathematics or science mentions a box, and only an answer in \\boxed{} counts; "
            "unless the model writes one unasked, set %s to an instruction",
            len(prompts),
            suffix_key,
        )
    asks = [prompt for prompt in prompts if "####" in prompt.prompt]
    if asks:
        log.warning(
            '%d of %d prompts of mathematics or science have "####" in them, the first at %s, and only an answer in '
            "\\boxed{} counts; where they ask for the answer there, cut it out with `remove` of tools/prepare_data.py, "
            "and set %s to another instruction",
            len(asks),
            len(prompts),
            asks[0].where,
            suffix_key,
        )


def _count(some: Sequence[object], of: Sequence[object]) -> str:
    return f"so it is with {len(some):,} of {len(of):,} rows"
