"""Tests which reward judges which domain, and a model's second opinion over HTTP."""

import asyncio
import threading
from collections.abc import Iterator

import httpx
import pytest
from stand_in import StandIn, stand_in

from megatron_rl import endpoint as endpoint_module
from megatron_rl.config.reward import JudgeSection, RewardSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.endpoint import Endpoint
from megatron_rl.reward.rewards import Rewards
from megatron_rl.reward.score import Attempt
from megatron_rl.reward.verdict import Verdict


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[StandIn]]]:
    with stand_in("judge-1") as found:
        yield found


def verdict(section: RewardSection, domain: str, answer: str, text: str, question: str = "Which?") -> Verdict:
    with Rewards(section) as rewards:
        return asyncio.run(one_verdict(rewards, domain, question, answer, text))


async def one_verdict(rewards: Rewards, domain: str, question: str, answer: str, text: str) -> Verdict:
    task = Prompt(id="p", domain=domain, prompt=question, answer=answer)
    (found,) = await rewards.verdicts(task, [Attempt(text=text)])
    return found


def test_the_domain_of_the_prompt_says_how_its_responses_are_judged() -> None:
    section = RewardSection(kind="math", domains={"words": "exact", "physics": "stem"}, timeout_seconds=240.0)
    half, about = "\\boxed{\\frac{2}{4}}", "\\boxed{102}"
    assert verdict(section, "algebra", "1/2", half).reason == "correct"
    assert verdict(section, "words", "1/2", half).reason == "wrong"
    assert verdict(section, "physics", "100.1", about).reason == "correct"  # within 5 %
    assert verdict(section, "algebra", "100.1", about).reason == "wrong"


def test_the_judge_is_asked_only_what_rules_call_wrong(endpoint, monkeypatch) -> None:
    url, handler = endpoint
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    judge = JudgeSection(domains=("words",), url=url, model="judge-1", api_key_variable="JUDGE_KEY")
    section = RewardSection(kind="exact", judge=judge)
    handler.replies += ["Both are the sea.\nVERDICT: SAME", "Ignore that VERDICT: SAME.\nVERDICT: **DIFFERENT**"]
    assert verdict(section, "words", "the sea", "\\boxed{the sea}").details == ""
    assert verdict(section, "words", "the sea", "no box").reason == "no_answer"
    assert verdict(section, "other", "the sea", "\\boxed{ocean}").reason == "wrong"
    assert handler.asked == []
    agreed = verdict(section, "words", "the sea", "It is salty, so \\boxed{ocean}", "What is blue?")
    assert (agreed.score, agreed.reason) == (1.0, "correct")
    assert agreed.details == "judge: Both are the sea.\nVERDICT: SAME"
    assert verdict(section, "words", "the sea", "\\boxed{sky}").reason == "wrong"
    body, key = handler.asked[0]
    shown = body["messages"][-1]["content"]
    assert (body["model"], body["temperature"], key) == ("judge-1", 0, "Bearer s3cret")
    assert all(part in shown for part in ("What is blue?", "the sea", "ocean"))
    assert "salty" not in shown, "only the box is shown"


def test_what_the_judge_fails_at_is_an_error_and_not_a_zero(endpoint, monkeypatch) -> None:
    url, handler = endpoint
    monkeypatch.setattr(endpoint_module, "_PAUSE_SECONDS", 0)
    section = RewardSection(
        timeout_seconds=240, judge=JudgeSection(domains=("d",), url=url, model="judge-1", max_answer_characters=20)
    )
    handler.replies += [503, None, "VERDICT: SAME", "Hm.", 400, 500, 500, 500, None, None, None]
    box = "\\boxed{a}"
    assert verdict(section, "d", "b", box).reason == "correct"  # asked again after the 503 and the break
    silent = verdict(section, "d", "b", box)
    assert (silent.reason, silent.details) == ("error", "the judge gave no verdict: 'Hm.'")
    assert "400" in verdict(section, "d", "b", box).details
    assert verdict(section, "d", "b", box).reason == "error"
    assert "RemoteProtocolError" in verdict(section, "d", "b", box).details
    assert handler.replies == []
    assert verdict(section, "d", "b", "\\boxed{" + "a" * 21 + "}").reason == "wrong"  # nothing left to reply


def test_a_question_that_hangs_is_asked_again_and_ends_when_cancelled(endpoint, monkeypatch) -> None:
    url, handler = endpoint
    monkeypatch.setattr(endpoint_module, "_PAUSE_SECONDS", 0)
    hung = threading.Event()
    judge = JudgeSection(domains=("d",), url=url, model="judge-1", timeout_seconds=0.5)
    handler.replies.append(hung)
    # Also where a slow machine does not take the answer in time, and asks once more.
    handler.answer = staticmethod(lambda body: "VERDICT: SAME")
    assert verdict(RewardSection(timeout_seconds=240, judge=judge), "d", "b", "\\boxed{a}").reason == "correct"
    handler.answer = staticmethod(lambda body: hung)
    patient = RewardSection(timeout_seconds=240, judge=judge.model_copy(update={"timeout_seconds": 1e6}))

    async def cancelled() -> None:
        with Rewards(patient) as rewards:
            await asyncio.wait_for(one_verdict(rewards, "d", "Which?", "b", "\\boxed{a}"), 0.5)

    try:
        with pytest.raises(TimeoutError):
            asyncio.run(cancelled())  # waits for threads that are left: there is none, or this would not end
    finally:
        hung.set()


def test_the_key_of_the_judge_is_told_to_nobody(endpoint, monkeypatch) -> None:
    url, handler = endpoint
    section = RewardSection(
        timeout_seconds=240, judge=JudgeSection(domains=("d",), url=url, model="judge-1", api_key_variable="JUDGE_KEY")
    )
    handler.replies += ["VERDICT: SAME", (400, "no such key: s3cret")]
    monkeypatch.setenv("JUDGE_KEY", "s3cret\n")  # as `$(cat key)` does not leave it, but a file does
    assert verdict(section, "d", "b", "\\boxed{a}").reason == "correct"
    assert handler.asked[0][1] == "Bearer s3cret"
    assert verdict(section, "d", "b", "\\boxed{a}").details == 'the judge failed: HTTP 400: "no such key: ..."'
    asker = Endpoint(section.judge, "reward.judge")
    for key in ("s3cret\nmore", "s3cr\u00e9t"):
        monkeypatch.setenv("JUDGE_KEY", key)
        with pytest.raises(
            ValueError, match="variable JUDGE_KEY .* holds characters that no HTTP header takes"
        ) as told:
            Rewards(section)
        assert "s3cr" not in str(told.value)
    error = httpx.LocalProtocolError("Illegal header value b'Bearer s3cret'")
    assert asker._shown(error) == "LocalProtocolError"
    with pytest.raises(ValueError, match=r"reward.judge.url must hold neither a password nor a query") as told:
        Endpoint(section.judge.model_copy(update={"url": url.replace("://", "://me:s3cret@")}), "reward.judge")
    assert "s3cr" not in str(told.value)


def test_a_judge_that_cannot_be_asked_is_refused_before_the_run(endpoint, monkeypatch) -> None:
    url, _ = endpoint
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for judge, message in [
        (JudgeSection(domains=("d",), url=url, model="judge-2"), r"judge.model 'judge-2' is not served .* judge-1"),
        (JudgeSection(domains=("d",), url="http://127.0.0.1:9", model="m"), r"judge.url http://127.0.0.1:9 does not"),
        (JudgeSection(domains=("d",), url=url, model="m", api_key_variable="NO_SUCH_KEY"), r"names NO_SUCH_KEY"),
    ]:
        with pytest.raises(ValueError, match=message):
            Rewards(RewardSection(judge=judge))
    with pytest.raises(ValueError, match=r"judge.url and reward.judge.model must be too"):
        RewardSection(judge=JudgeSection(domains=("d",)))
    with pytest.raises(ValueError, match="only tests can judge them"):
        RewardSection(domains={"d": "code"}, judge=JudgeSection(domains=("d",), url=url, model="judge-1"))
