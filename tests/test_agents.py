"""Tests agents and the process that runs them: a bad agent costs only its own trajectory, and leaves nothing behind."""

import asyncio
import os
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pytest
from agent_chat import END, START, Scripted, chat_tokenizer
from until import until, wait_until

from megatron_rl.c3po.budget import Shortfall
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.gateway.agents import Agents
from megatron_rl.gateway.protocol import Order, Setup
from megatron_rl.gateway.sampler import FAILED, AgentSampler, AgentSettings, check_agent, setup_of
from megatron_rl.gateway.turn_journal import TurnJournal
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.sampler import Question
from megatron_rl.rollout.teacher_scorer import TeacherScorer

HERE = Path(__file__).parent
BAD = f"{HERE}/agents_that_fail.py:run"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


def question(number, kind, answer="yes", **meta):
    prompt = Prompt(id=str(number), domain="math", prompt="say", answer=answer, meta={"kind": kind, **meta})
    return Question(prompt_id=number, prompt=prompt, input_ids=(1,))


def sampler_of(tokenizer, folder, say=lambda _: "yes", servers=None, turns=None, teacher=None, **rollout):
    section = RolloutSection(
        **{
            "agent": BAD,
            "prompts_per_step": 1,
            "samples_per_prompt": 1,
            "max_response_tokens": 64,
            "max_prompt_tokens": 300,
            "agent_seconds": 240.0,
            "agent_memory_bytes": 400 * 2**20,
            **rollout,
        }
    )
    settings = AgentSettings(
        model="tiny", vocab_size=300, end_ids=(tokenizer.eos_token_id,), folder=folder, passing_score=1.0
    )
    rewards = Rewards(RewardSection(kind="exact", workers=1), folder)
    servers = servers or Scripted(tokenizer, say)
    how = (servers, rewards, tokenizer.decode, lambda _, scores: scores, section, 1)
    return AgentSampler(*how, tokenizer, settings, None, turns, teacher=teacher), rewards


def groups_of(tokenizer, folder, questions, **more):
    """Sample the group of each question. Return the groups and the counts."""
    sampler, rewards = sampler_of(tokenizer, folder, **more)

    async def run():
        await sampler.start()
        try:
            return await sampler.sample(questions, 0), sampler.take_counts()
        finally:
            await sampler.stop()

    with rewards:
        return asyncio.run(run())


def left_over() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


# Results of agents ---------------------------------------------------------------------------------------------------


def test_a_score_is_the_reward_and_without_one_the_last_message_is_judged(tokenizer, tmp_path) -> None:
    kinds = ["good", "unscored", "scored", "silent"]
    questions = [question(number, kind, "\\boxed{3}" if number else "") for number, kind in enumerate(kinds)]
    questions[1] = question(1, "unscored", "3")
    groups, counts = groups_of(tokenizer, tmp_path, questions, say=lambda _: "\\boxed{3}")
    samples = [group.samples[0] for group in groups]
    assert [sample.reward for sample in samples] == [0.5, 1.0, 2.0, 1.0]
    assert [sample.reason for sample in samples] == ["wrong", "correct", "correct", "correct"]
    assert (samples[2].details, samples[2].parts) == ("well done", {"speed": 1.5})
    assert [sample.response.num_turns for sample in samples] == [2, 1, 1, 0]
    assert [sample.response.finish_reason for sample in samples] == ["stop"] * 4
    assert samples[0].response.text == "\\boxed{3}"
    (segment,) = samples[0].response.segments
    said = [*ids_of(tokenizer, "\\boxed{3}"), tokenizer.eos_token_id]
    assert segment.prompt_ids.tolist() == ids_of(tokenizer, f"{START}user\nsay{END}\n{START}assistant\n")
    between = ids_of(tokenizer, f"\n{START}user\nand?{END}\n{START}assistant\n")
    assert segment.output_ids.tolist() == said + between + said
    assert segment.turns.tolist() == [[0, len(said)], [len(said) + len(between), len(said) * 2 + len(between)]]
    assert counts["num_failed_agents"] == 0


def test_a_teacher_scores_what_the_policy_said_in_every_turn_and_nothing_else(tokenizer, tmp_path) -> None:
    class Teachers:
        num_slots = 4

        async def score(self, input_ids, start):
            return np.array(input_ids[start:], np.float32) / -64

    groups, _ = groups_of(tokenizer, tmp_path, [question(0, "good")], teacher=TeacherScorer(Teachers()))
    (segment,) = groups[0].samples[0].response.segments
    assert len(segment.turns) == 2
    assert segment.teacher_logprobs.tolist() == (segment.output_ids[segment.policy_mask] / -64).tolist()


def test_a_program_is_told_by_its_environment_and_writes_its_score(tokenizer, tmp_path) -> None:
    (tmp_path / "agent.py").write_text(
        textwrap.dedent("""
        import json, os, sys, urllib.request
        task = json.load(sys.stdin)
        assert task == json.load(open(os.environ["MEGATRON_RL_TASK"]))
        body = {"model": "any", "messages": task["messages"]}
        request = urllib.request.Request(
            os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
        )
        said = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
        print("noise")
        if task["meta"]["kind"] == "fails":
            sys.exit("nothing to be done")
        if task["meta"]["kind"] == "scores":
            json.dump({"score": len(said), "details": said}, open(os.environ["MEGATRON_RL_RESULT"], "w"))
        if task["meta"]["kind"] == "tells":
            json.dump({"score": said.endswith("{yes}")}, open(os.environ["MEGATRON_RL_RESULT"], "w"))
        """)
    )
    questions = [question(number, kind) for number, kind in enumerate(["scores", "plain", "fails", "tells"])]
    command = (sys.executable, str(tmp_path / "agent.py"))
    groups, counts = groups_of(
        tokenizer, tmp_path, questions, say=lambda _: "\\boxed{yes}", agent="", agent_command=command
    )
    scores, plain, fails, tells = [group.samples[0] for group in groups]
    assert (scores.reward, scores.reason, scores.details) == (11.0, "correct", "\\boxed{yes}")
    assert (plain.reward, plain.reason) == (tells.reward, tells.reason) == (1.0, "correct")
    assert (fails.reason, fails.response.finish_reason) == ("error", FAILED)
    assert "it ended with code 1; the last it printed: nothing to be done" in fails.details
    logged = (tmp_path / "agent_output.log").read_text()
    assert "of the row 2: it ended with code 1; the last it printed: nothing to be done\nnoise\n" in logged
    assert counts["num_failed_agents"] == 1


# Hostile and broken agents -------------------------------------------------------------------------------------------

FAILURES = {
    "raises": "RuntimeError: oh no < agents_that_fail.py line",
    "raises_together": "(1 sub-exception): RuntimeError: oh no < agents_that_fail.py line",
    "exits": "SystemExit: 3",
    "dies": "it ended with code 7",
    "crashes": "it ended with signal 11",
    "floods": "it has printed more than 4 MiB",
    "eats": "more than 419430400 bytes of memory (rollout.agent_memory_bytes)",
    "returns_text": "it returned 'good', a str, and must be a number",
    "returns_nan": "must be a finite number",
    "returns_itself": "and must be a number, a bool or a Score",
    "asks_nonsense": "messages must be a list of messages, not empty, got [] < agents_that_fail.py line",
    "other_key": "no trajectory has this address and this key",
    "forges_its_result": "its result has more than 65536 bytes",
    "forges_a_text": "its result has Expected `float | null`, got `str` - at `$.score`; it must be JSON of a score",
    "forges_a_reason": "the reason of its Score is 'nice'; it must be one of correct",
    "forges_nan": "the value of its Score is nan, and must be a finite number",
    "forges_a_key": "its result has the key 'scores'; it must be JSON of a score",
}
TOO_LONG = ["hangs", "blocks", "ignores_signals"]
ENDED = ["talks_for_ever", "catches_everything"]
ALL_RIGHT = [
    *("closes_at_once", "changes_history", "leaves_a_process", "leaves_a_daemon", "forks_and_returns_twice"),
    *("starts_threads", "reads_the_runs_lines", "needs_its_daemon"),
]


def test_thirty_bad_agents_cost_their_own_trajectories_alone_and_leave_nothing(tokenizer, tmp_path) -> None:
    before = {process.pid for process in left_over()}
    kinds = [*FAILURES, *ENDED, *ALL_RIGHT, *["good"] * 6]
    assert len(kinds) + len(TOO_LONG) + 1 >= 30  # those of the next tests
    notes = {number: tmp_path / f"note{number}" for number in range(len(kinds))}
    questions = [question(number, kind, note=str(notes[number])) for number, kind in enumerate(kinds)]
    groups, counts = groups_of(
        tokenizer, tmp_path, questions, agent_seconds=240.0, max_turns=5, max_response_tokens=200, max_prompt_tokens=600
    )
    found = {kind: group.samples[0] for kind, group in zip(kinds, groups, strict=True)}
    for kind, message in FAILURES.items():
        assert (found[kind].reason, found[kind].response.finish_reason) == ("error", FAILED), kind
        assert message in found[kind].details
    for kind in ENDED:
        assert (found[kind].response.finish_reason, found[kind].response.num_turns) == ("turns", 5)
    for kind in ALL_RIGHT:
        assert (found[kind].reward, found[kind].response.finish_reason) == (1.0, "stop"), kind
    assert [group.samples[0].reward for group in groups[-6:]] == [0.5] * 6
    assert found["changes_history"].response.num_turns == len(found["changes_history"].response.segments) == 3
    assert counts["num_failed_agents"] == len(FAILURES)
    assert counts["num_new_segments"] >= 2
    left = [int(notes[number].read_text()) for number, kind in enumerate(kinds) if kind.startswith("leaves")]
    wait_until(lambda: not any(map(is_running, left)), f"the processes {left} have ended")
    wait_until(lambda: {process.pid for process in left_over()} <= before, "no process is left")


def test_where_the_process_of_all_agents_is_ended_the_others_begin_again_with_the_same_answers(
    tokenizer, tmp_path, monkeypatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)  # which is found anew
    turns = TurnJournal(tmp_path / "journal", "x", lambda error: error)
    turns.open(0, ())
    servers = Scripted(tokenizer, lambda read: "yes")
    questions = [question(0, "ends_its_host"), *(question(number, "good") for number in range(1, 5))]
    groups, _ = groups_of(tokenizer, tmp_path, questions, servers=servers, turns=turns)
    assert [group.samples[0].reward for group in groups[1:]] == [0.5] * 4
    assert "it has ended the process that agents are started from" in groups[0].samples[0].details
    assert len(servers.asked) == 1 + 2 * 4  # nothing was sampled twice
    assert list((tmp_path / "tmp").iterdir()) == []  # no folder of an agent is left


def test_agents_end_with_the_run(tmp_path) -> None:
    setup = Setup(
        agent=BAD, command=(), folder=str(tmp_path), output=str(tmp_path / "out"), memory_bytes=2**30, passing_score=1.0
    )
    task = {"id": "", "prompt": "", "messages": [], "answer": "", "domain": "", "meta": {"kind": "hangs"}, "seed": 1}
    task["meta"] = {"kind": "ignores_signals"}

    async def begin():
        agents = Agents(setup)
        await agents.start()
        running = asyncio.create_task(
            agents.run(Order(id="1", base_url="http://127.0.0.1:1/v1", api_key="k", task=task))
        )

        def started() -> set[int]:
            return {process.pid for process in left_over()} - before

        await until(lambda: len(started()) >= 2, "the process of all agents and that of one have started")
        pids = started()
        agents._process.stdin.close()  # as where this process is killed
        await agents._process.wait()
        running.cancel()
        await until(lambda: not any(map(is_running, pids)), f"the processes {pids} have ended")
        assert (tmp_path / "out").read_text() == ""  # it has done nothing wrong

    before = {process.pid for process in left_over()}
    asyncio.run(begin())


# At the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("async def run(task, mode): ...", r"rollout.agent: nothing is called 'mode'. Did you mean 'model'\?"),
        (
            "async def run(task): ...",
            r"run must be `async def run\(task, model\)`, got async def with task; write it so",
        ),
        ("def run(task, model): ...", r"run must be `async def run\(task, model\)`, got def with task, model"),
        ("async def play(task, model): ...", r"agent.py has no function 'run'; it has play"),
        ("import nothing_like_this", r"rollout.agent: importing .*agent.py failed: ModuleNotFoundError"),
        ("import os\nos._exit(3)", r"importing .*agent.py:run ends the process; see .*agent_output.log"),
    ],
)
def test_an_agent_that_cannot_run_is_told_of_at_the_start(tmp_path, source, message) -> None:
    (tmp_path / "agent.py").write_text(source)
    rollout = RolloutSection(
        prompts_per_step=1, samples_per_prompt=1, max_response_tokens=8, agent=f"{tmp_path}/agent.py:run"
    )
    with pytest.raises(ValueError, match=message):
        asyncio.run(check_agent(setup_of(rollout, tmp_path, 1.0)))


def test_a_program_that_is_not_there_is_told_of_and_so_are_two_agents(tmp_path) -> None:
    rollout = RolloutSection(
        prompts_per_step=1, samples_per_prompt=1, max_response_tokens=8, agent_command=("no-such-program", "x")
    )
    with pytest.raises(ValueError, match="names the program 'no-such-program', which is not found; give its path"):
        asyncio.run(check_agent(setup_of(rollout, tmp_path, 1.0)))
    script = rollout.model_copy(update={"agent_command": (sys.executable, "-u", "no_such_agent.py", "x.json")})
    with pytest.raises(
        ValueError, match="names the file 'no_such_agent.py', which is neither beside .* nor in /.*; give"
    ):
        asyncio.run(check_agent(setup_of(script, tmp_path, 1.0)))
    with pytest.raises(ValueError, match="either agent or agent_command"):
        RolloutSection(
            prompts_per_step=1, samples_per_prompt=1, max_response_tokens=8, agent="a.py:run", agent_command=("x",)
        )


# Over phases and kills -----------------------------------------------------------------------------------------------


def test_after_a_kill_recorded_turns_answer_again_and_what_differs_is_sampled_anew(tokenizer, tmp_path) -> None:
    def journal():
        found = TurnJournal(tmp_path / "journal", "x", lambda error: error)
        found.open(0, ())
        return found

    questions = [question(number, "good") for number in range(3)]
    first, _ = groups_of(tokenizer, tmp_path, questions, say=lambda read: f"yes{len(read)}", turns=journal())
    silent = Scripted(tokenizer, lambda read: 1 / 0)
    again, _ = groups_of(tokenizer, tmp_path, questions, servers=silent, turns=journal())
    assert silent.asked == []
    for one, other in zip(first, again, strict=True):
        same(one.samples[0].response, other.samples[0].response)
    # Cut short on the disk, the last turn is sampled again.
    path = tmp_path / "journal/step_000000.turns"
    os.truncate(path, path.stat().st_size // 2)
    some = Scripted(tokenizer, lambda read: f"yes{len(read)}")
    cut, _ = groups_of(tokenizer, tmp_path, questions, servers=some, turns=journal())
    assert 0 < len(some.asked) < 6
    for one, other in zip(first, cut, strict=True):
        same(one.samples[0].response, other.samples[0].response)
    # Another identity is another run.
    other = TurnJournal(tmp_path / "journal", "y", lambda error: error)
    other.open(0, ())
    assert other.turn((0, 0), "x") is None


def same(one, other):
    assert (one.finish_reason, one.text) == (other.finish_reason, other.text)
    for mine, theirs in zip(one.segments, other.segments, strict=True):
        for name in ("prompt_ids", "output_ids", "rollout_logprobs", "policy_versions", "turns"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name


def test_at_the_end_of_a_phase_agents_wait_and_their_turns_go_on_under_the_next_weights(tokenizer, tmp_path) -> None:
    servers = Scripted(tokenizer, lambda read: "yes yes yes".removeprefix(read.rpartition("assistant\n")[2]))
    turns = TurnJournal(tmp_path / "journal", "x", lambda error: error)
    sampler, rewards = sampler_of(
        tokenizer, tmp_path, servers=servers, turns=turns, samples_per_prompt=2, partial=True, max_response_tokens=100
    )
    questions = iter([question(number, kind) for number, kind in enumerate(["silent", *["good"] * 10])])

    def take(domain, count):
        return [next(questions) for _ in range(count)]

    async def phase(version, resumed, groups):
        turns.open(version, {group.prompt_id for _, group in resumed})
        need = Shortfall(unit="groups", missing=groups)
        return await sampler.fill_partially(resumed, take, version, [need], lambda group: True, 10)

    async def run():
        await sampler.start()
        try:
            # The group of agents that ask nothing fills the phase; of the others' first turns two tokens are there.
            servers.held = 2
            first = await phase(0, [], 1)
            assert [group.prompt_id for group in first.kept] == [0]
            assert first.unfinished
            parts = [response for group in first.unfinished for response in group.responses]
            assert {response.finish_reason for response in parts} == {""}
            assert first.num_generated_tokens == sum(response.num_policy_tokens for response in parts)
            servers.held, servers.aborted = None, False
            resumed = [(question(group.prompt_id, "good"), group) for group in first.unfinished]
            count = len(servers.asked)
            second = await phase(1, resumed, len(resumed))
            assert len(servers.asked) > count
            return first, second
        finally:
            await sampler.stop()

    with rewards:
        first, second = asyncio.run(run())
    kept = {group.prompt_id: group for group in second.kept}
    for group in first.unfinished:
        if group.prompt_id not in kept:
            continue
        for before, sample in zip(group.responses, kept[group.prompt_id].samples, strict=True):
            assert sample.reward == 0.5
            (segment,) = sample.response.segments
            if before.num_policy_tokens:
                assert segment.policy_versions[:3].tolist() == [0, 0, 1]
            assert tokenizer.decode(segment.output_ids[: segment.turns[0, 1]].tolist()) == f"yes yes yes{END}"


def test_one_that_hangs_blocks_or_ignores_signals_ends_with_its_time_and_is_told_of(
    tokenizer, tmp_path, caplog
) -> None:
    before = {process.pid for process in left_over()}
    kinds = [*TOO_LONG, "talks_and_hangs"]
    questions = [question(number, kind) for number, kind in enumerate(kinds)]
    groups, counts = groups_of(tokenizer, tmp_path, questions, agent_seconds=2.0)
    why = "not done after 2 s (rollout.agent_seconds)"
    logged = (tmp_path / "agent_output.log").read_text()
    assert {line.partition(" of ")[2] for line in logged.splitlines() if line.startswith("---")} == {
        f"the row {number}: {why}" for number in range(len(kinds))
    }
    assert "I wait for the weather" in logged  # what it printed last says where it hangs
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 3  # the others are counted
    assert all(f"failed: {why}; {tmp_path / 'agent_output.log'} has more" in message for message in told)
    assert told[2].endswith("; further ones are only counted")
    for group in groups:
        assert (group.samples[0].reason, group.samples[0].response.finish_reason) == ("timeout", "seconds")
    assert counts["num_failed_agents"] == len(kinds)
    wait_until(lambda: {process.pid for process in left_over()} <= before, "no process is left")
