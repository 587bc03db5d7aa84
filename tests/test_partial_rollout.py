"""Tests C3PO++: every response is accounted for once, and a resumed one goes on as if it had never stopped."""

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from samples import make_segment
from tiny_model import write_tiny_model

from megatron_rl.c3po.budget import PromptYield, Shortfall
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.records import Group, Response, Sample, UnfinishedGroup
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.archive import Carry, pack_carry, unpack_carry
from megatron_rl.rollout.client import Completion, SampleRequest, ServerLost
from megatron_rl.rollout.pool import Place, ServerPool
from megatron_rl.rollout.rollout_file import group_rows
from megatron_rl.rollout.sampler import Collected, Question, Sampler, fill_in_waves, sampling_seed
from megatron_rl.rollout.server import EmbeddedServer

LENGTH, SLOTS, SIZE = 200, 8, 2
ROLLOUT = RolloutSection(
    prompts_per_step=4,
    samples_per_prompt=SIZE,
    max_prompt_tokens=12,
    max_response_tokens=LENGTH,
    max_running_requests=SLOTS,
    partial=True,
)


def questions(first: int) -> Callable[[str, int], list[Question]]:
    """Return take(domain, n) for a stream of prompts of one domain that begins at `first`."""
    position = first

    def take(_: str, count: int) -> list[Question]:
        nonlocal position
        position += count
        return [question(i) for i in range(position - count, position)]

    return take


def question(position: int, domain: str = "math") -> Question:
    prompt = Prompt(id=str(position), prompt="", answer="7", domain=domain)
    return Question(prompt_id=position, prompt=prompt, input_ids=(5 + position % 50, 6))


def sampler(servers: object, rollout: RolloutSection) -> Sampler:
    return Sampler(
        servers,  # type: ignore[arg-type]
        Rewards(RewardSection(timeout_seconds=240)),
        lambda ids: "",
        lambda responses, rewards: np.zeros(len(responses)),
        rollout,
        seed=3,
        end_ids=(1,),
    )


async def phase(
    servers: object,
    tokens: float,
    version: int = 0,
    *,
    first: int = 0,
    resumed: Sequence[UnfinishedGroup] = (),
    rollout: RolloutSection = ROLLOUT,
) -> Collected:
    """Run a phase that lacks so many tokens, over prompts from `first` on."""
    shortfall = Shortfall(unit="tokens", missing=tokens)
    return await sampler(servers, rollout).fill_partially(
        [(question(group.prompt_id), group) for group in resumed],
        questions(first),
        version,
        [shortfall],
        lambda group: group.prompt_id % 5 != 4,  # some groups teach nothing
        max_waves=100,
    )


def test_an_unfinished_response_keeps_no_routed_experts_and_one_that_has_ended_does() -> None:
    def aborted(*ids: int) -> Response:
        experts = np.zeros((1 + len(ids), 3, 2), np.uint8)
        segment = replace(
            make_segment(len(ids), num_prompt_tokens=2), output_ids=np.array(ids, np.int32), routed_experts=experts
        )
        return Response(prompt_id=0, sample_index=0, segments=(segment,), finish_reason="")

    ends = sampler(SimpleNamespace(num_slots=SLOTS), ROLLOUT)._ended
    assert ends(aborted(7, 8)).segments[0].routed_experts is None
    stopped, whole = ends(aborted(7, 1)), ends(aborted(*[7] * LENGTH))
    assert (stopped.finish_reason, whole.finish_reason) == ("stop", "length")
    assert stopped.segments[0].routed_experts is not None
    assert whole.segments[0].routed_experts is not None


# With a server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write models whose responses end at random, 1 token in 96, so that the end of a phase interrupts some."""
    folder = tmp_path_factory.mktemp("models")
    shape = {"hidden_size": 32, "num_hidden_layers": 2}
    return write_tiny_model(folder / "first", 0, **shape), write_tiny_model(folder / "second", 1, **shape)


@pytest.fixture(scope="module")
def server(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    server = EmbeddedServer(models[0], log, max_running_requests=SLOTS, context_length=256)
    try:
        server.wait_ready(240)
        yield server
    finally:
        server.stop()


async def connected(server: EmbeddedServer, weights: Path, version: str = "0") -> ServerPool:
    pool = ServerPool([server.url], ROLLOUT)
    await pool.connect()
    await pool.load_from_disk(weights, version)
    return pool


async def phase_that_cuts(pool: ServerPool, tokens: float) -> Collected:
    """Run a first phase whose end cuts some response short.

    In a phase whose client is told late that it can end, the others have come to their ends meanwhile; then another.
    """
    for _ in range(100):
        found = await phase(pool, tokens)
        cut = [response for group in found.unfinished for response in group.responses]
        if any(0 < response.num_policy_tokens < LENGTH and not response.finish_reason for response in cut):
            return found
    raise AssertionError("no end of a hundred phases has cut a response short")


def output_ids(response: Response) -> list[int]:
    (segment,) = response.segments
    return segment.output_ids.tolist()


def by_place(found: Collected) -> dict[tuple[int, int], Response]:
    """Return every response by prompt and sample."""
    done = [sample.response for group in [*found.kept, *found.filtered] for sample in group.samples]
    left = [response for group in [*found.unfinished, *found.purged] for response in group.responses]
    places = {(response.prompt_id, response.sample_index): response for response in [*done, *left]}
    assert len(places) == len(done) + len(left), "a response came back twice"
    return places


def test_a_resumed_response_has_the_tokens_of_one_that_never_stopped(
    server: EmbeddedServer, models: tuple[Path, Path]
) -> None:
    async def run() -> tuple[Collected, list[Collected], list[Completion]]:
        pool = await connected(server, models[0])
        phases = [await phase_that_cuts(pool, 900)]
        first = phases[0]
        for number in (1, 2, 3):  # carried through a checkpoint each time
            carry = unpack_carry(pack_carry(Carry(unfinished=tuple(phases[-1].unfinished))))
            phases.append(await phase(pool, 900, first=100 * number, resumed=carry.unfinished))
        wanted = [
            SampleRequest(
                input_ids=response.segments[0].prompt_ids.tolist(),
                seed=sampling_seed(3, response.prompt_id, response.sample_index),
                max_new_tokens=LENGTH,
            )
            for group in first.unfinished
            for response in group.responses
        ]
        whole = [await pool.generate(one, 1.0) for one in wanted]
        await pool.close()
        return first, phases, whole

    first, phases, whole = asyncio.run(run())
    cut = [response for group in first.unfinished for response in group.responses]
    found: dict[tuple[int, int], Response] = {}
    for one in phases[1:]:
        found |= {place: response for place, response in by_place(one).items() if response.finish_reason}
    num_resumed = 0
    for before, expected in zip(cut, whole, strict=True):
        after = found[before.prompt_id, before.sample_index]
        assert output_ids(after) == expected.output_ids.tolist()
        np.testing.assert_allclose(after.rollout_logprobs, expected.logprobs, atol=2e-5)
        assert after.finish_reason == expected.finish_reason
        num_resumed += 0 < before.num_policy_tokens < after.num_policy_tokens
    assert num_resumed > 0


def test_tokens_of_a_response_that_goes_on_under_new_weights_say_which_drew_them(
    server: EmbeddedServer, models: tuple[Path, Path]
) -> None:
    async def run() -> tuple[Collected, Collected, dict[tuple[int, int], np.ndarray]]:
        pool = await connected(server, models[0])
        before = await phase_that_cuts(pool, 900)
        await pool.load_from_disk(models[1], "1")
        after = await phase(pool, 3000, 1, first=100, resumed=before.unfinished)
        scored = {}
        for place, response in by_place(after).items():
            if response.prompt_id < 100 and response.num_policy_tokens:
                prompt_ids = response.segments[0].prompt_ids.tolist()
                (found,) = (await pool.input_logprobs([*prompt_ids, *output_ids(response)])).values()
                scored[place] = found[len(prompt_ids) - 1 :]
        await pool.close()
        return before, after, scored

    before, after, under_new = asyncio.run(run())
    cut, found = by_place(before), by_place(after)
    num_mixed = 0
    for place, logprobs in under_new.items():
        num_old, response = cut[place].num_policy_tokens, found[place]
        num_new = response.num_policy_tokens - num_old
        assert response.policy_versions.tolist() == [0] * num_old + [1] * num_new
        assert output_ids(response)[:num_old] == output_ids(cut[place])
        assert response.rollout_logprobs[:num_old].tolist() == cut[place].rollout_logprobs.tolist()
        np.testing.assert_allclose(response.rollout_logprobs[num_old:], logprobs[num_old:], atol=2e-5)
        if num_old > 20:
            assert np.abs(response.rollout_logprobs[:num_old] - logprobs[:num_old]).mean() > 0.1
        num_mixed += num_old > 0 and num_new > 0
    assert num_mixed > 0


# Without one --------------------------------------------------------------------------------------------------------


class FakePool:
    """Gives responses of random lengths, one token for each in every round; cuts them short when told to."""

    def __init__(self, seed: int, slots: int = SLOTS, lose_at_the_end: bool = False) -> None:
        self.num_slots, self._seed, self._lose = slots, seed, lose_at_the_end
        self._aborted = asyncio.Event()
        self.num_given = 0

    def length(self, one: SampleRequest) -> int:
        """Return the number of tokens of the whole response, which its seed decides."""
        return random.Random(f"{self._seed}/{one.seed}").randint(1, 30)

    async def generate(
        self, one: SampleRequest, temperature: float, may_abort: Callable[[], bool], place: Place
    ) -> Completion:
        num_before = len(one.input_ids) - 2
        output: list[int] = []
        while num_before + len(output) < self.length(one) and not self._aborted.is_set():
            await asyncio.sleep(0)
            output.append(num_before + len(output))
        if self._aborted.is_set() and self._lose:
            raise ServerLost("gone")
        self.num_given += len(output)
        is_whole = num_before + len(output) == self.length(one)
        return Completion(
            output_ids=np.array(output, np.int32),
            logprobs=np.zeros(len(output), np.float32),
            finish_reason="stop" if is_whole else "abort",
            weight_versions=("0",),
        )

    async def abort_all(self) -> None:
        self._aborted.set()

    def next_phase(self) -> None:
        self._aborted.clear()
        self.num_given = 0


@hypothesis_settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 400),
    num_phases=st.integers(1, 6),
    max_retention=st.integers(0, 3),
    lose_at_the_end=st.booleans(),
)
def test_every_response_that_is_started_ends_in_one_place(
    seed: int, tokens: int, num_phases: int, max_retention: int, lose_at_the_end: bool
) -> None:
    rollout = ROLLOUT.model_copy(update={"max_retention": max_retention})

    async def run() -> None:
        pool = FakePool(seed, lose_at_the_end=lose_at_the_end)
        carried: list[UnfinishedGroup] = []
        ended: Counter[int] = Counter()
        started = 0
        for number in range(num_phases):
            pool.next_phase()
            found = await phase(pool, tokens, number, first=started, resumed=carried, rollout=rollout)
            ids = [group.prompt_id for group in [*found.kept, *found.filtered, *found.unfinished, *found.purged]]
            assert len(set(ids)) == len(ids), "a group is in two places"
            before = {group.prompt_id: group for group in carried}
            # New prompts are taken in order, without a gap; those that were carried are all here.
            new = sorted(set(ids) - before.keys())
            assert before.keys() <= set(ids)
            assert new == list(range(started, started + len(new)))
            started += len(new)
            # The phase ends as soon as completed groups fill the budget, and not before.
            lengths = [sum(s.response.num_policy_tokens for s in group.samples) for group in found.kept]
            assert sum(lengths) >= tokens
            for group in [*found.kept, *found.filtered]:
                for sample in group.samples:
                    assert sample.response.finish_reason == "stop"
                    count = sample.response.num_policy_tokens
                    assert output_ids(sample.response) == list(range(count)), "nothing lost, nothing twice"
                    assert (np.diff(sample.response.policy_versions) >= 0).all()
            for group in [*found.unfinished, *found.purged]:
                kept_before = before[group.prompt_id].retention if group.prompt_id in before else 0
                assert group.retention == kept_before + 1
                assert (group.retention > max_retention) == (group in found.purged)
                assert any(not response.finish_reason for response in group.responses)
                assert len(group.responses) == SIZE
            if not lose_at_the_end:
                old = sum(group.num_policy_tokens for group in carried)
                assert sum(r.num_policy_tokens for r in by_place(found).values()) == old + pool.num_given
                assert found.num_generated_tokens == pool.num_given
            ended.update(group.prompt_id for group in [*found.kept, *found.filtered, *found.purged])
            carried = found.unfinished
            if max_retention == 0:
                assert not carried
        assert set(ended.values()) <= {1}
        assert ended.keys() | {group.prompt_id for group in carried} == set(range(started))

    asyncio.run(run())


def test_the_text_of_a_response_is_decoded_once_off_the_event_loop_and_kept() -> None:
    decoded: list[tuple[list[int], threading.Thread]] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append((list(ids), threading.current_thread()))
        return f"{len(ids)} tokens"

    async def run() -> tuple[Collected, Collected, threading.Thread]:
        pool = FakePool(1)
        sampler_ = sampler(pool, ROLLOUT)
        sampler_.decode = decode
        found = []
        for resumed in ([], None):
            need = Shortfall(unit="tokens", missing=60)
            groups = [(question(g.prompt_id), g) for g in (found[0].unfinished if resumed is None else resumed)]
            take = questions(100 * len(found))
            found.append(await sampler_.fill_partially(groups, take, 0, [need], lambda _: True, 100))
            pool.next_phase()
        return found[0], found[1], threading.current_thread()

    first, second, loop_thread = asyncio.run(run())
    groups = [*first.kept, *second.kept]
    rows = "".join(group_rows(group, question(group.prompt_id).prompt, "math", decode) for group in groups)
    ended = [s.response for group in groups for s in group.samples]
    ended += [r for group in second.unfinished for r in group.responses if r.finish_reason]
    assert Counter(tuple(ids) for ids, _ in decoded) == Counter(tuple(output_ids(r)) for r in ended)
    assert loop_thread not in {thread for _, thread in decoded}
    assert [json.loads(row)["response"] for row in rows.splitlines()] == [
        f"{s.response.num_policy_tokens} tokens" for group in groups for s in group.samples
    ]


@hypothesis_settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.fixed_dictionaries({"code": st.integers(0, 300), "science": st.integers(1, 300)}),
    num_phases=st.integers(1, 4),
)
def test_a_phase_goes_on_until_every_domain_has_enough_and_takes_prompts_of_those_that_have_not(
    seed: int, tokens: dict[str, int], num_phases: int
) -> None:
    dice = random.Random(seed)
    order = [question(i, dice.choice(["code", "science", "science"])) for i in range(2000)]
    by_domain = {d: [one for one in order if one.prompt.domain == d] for d in tokens}
    taken = dict.fromkeys(tokens, 0)

    async def run() -> None:
        pool: Any = FakePool(seed)
        carried: list[UnfinishedGroup] = []
        for number in range(num_phases):
            pool.next_phase()
            needs = [Shortfall(unit="tokens", domain=d, missing=n) for d, n in tokens.items()]

            def take(domain: str, count: int) -> list[Question]:
                assert next(need for need in needs if need.domain == domain).missing > 0  # noqa: B023
                taken[domain] += count
                return by_domain[domain][taken[domain] - count : taken[domain]]

            before = dict(taken)
            resumed = [(order[group.prompt_id], group) for group in carried]
            found = await sampler(pool, ROLLOUT).fill_partially(
                resumed, take, number, needs, lambda group: group.prompt_id % 5 != 4, max_waves=100
            )
            ids = [group.prompt_id for group in [*found.kept, *found.filtered, *found.unfinished, *found.purged]]
            started = [one.prompt_id for d in tokens for one in by_domain[d][before[d] : taken[d]]]
            assert Counter(ids) == Counter([*started, *(group.prompt_id for group in carried)])
            brought = dict.fromkeys(tokens, 0)
            for group in found.kept:
                brought[order[group.prompt_id].prompt.domain] += sum(
                    s.response.num_policy_tokens for s in group.samples
                )
            assert all(brought[d] >= tokens[d] for d in tokens)
            carried = found.unfinished

    asyncio.run(run())


def test_a_phase_stops_with_the_group_that_fills_the_budget() -> None:
    async def run() -> Collected:
        alone = ROLLOUT.model_copy(update={"samples_per_prompt": 1})  # one response at a time: nothing ends beside it
        return await phase(FakePool(1, slots=1), 60, rollout=alone)

    found = asyncio.run(run())
    lengths = [sum(sample.response.num_policy_tokens for sample in group.samples) for group in found.kept]
    assert sum(lengths) >= 60 > sum(lengths[:-1])


def test_a_phase_without_a_shortfall_keeps_what_it_was_given_as_it_is() -> None:
    async def run() -> tuple[Collected, Collected, int]:
        pool = FakePool(2)
        before = await phase(pool, 60)
        pool.next_phase()
        return before, await phase(pool, 0, 1, first=50, resumed=before.unfinished), pool.num_given

    before, after, num_given = asyncio.run(run())
    assert before.unfinished
    assert (after.kept, after.filtered, num_given) == ([], [], 0)
    assert after.unfinished == before.unfinished  # it had no chance to go on, so it has not been kept any longer


class Ends:
    """Stands in for a pool whose responses have these tokens when they are aborted.

    SGLang then says "abort" even if the tokens end the response.
    """

    num_slots = 4

    def __init__(self, *ends: list[int]) -> None:
        self._ends, self._aborted = ends, asyncio.Event()

    async def generate(self, one: SampleRequest, *_: object) -> Completion:
        if one.input_ids[0] == 5:  # the prompt whose group fills the budget
            tokens, reason = [7] * 4, "stop"
        else:
            await self._aborted.wait()
            tokens, reason = self._ends[one.seed % len(self._ends)], "abort"
        return Completion(
            output_ids=np.array(tokens, np.int32),
            logprobs=np.zeros(len(tokens), np.float32),
            finish_reason=reason,
            weight_versions=("0",),
        )

    async def abort_all(self) -> None:
        self._aborted.set()


@pytest.mark.parametrize(
    ("tokens", "reason"), [([7, 8, 9, 1], "stop"), ([7] * ROLLOUT.max_response_tokens, "length"), ([1, 7, 8], "")]
)
def test_an_aborted_response_that_had_ended_anyway_is_finished(tokens: list[int], reason: str) -> None:
    alone = ROLLOUT.model_copy(update={"samples_per_prompt": 1})
    found = asyncio.run(phase(Ends(tokens), 1, rollout=alone))
    ended = {group.prompt_id: group.samples[0].response.finish_reason for group in [*found.kept, *found.filtered]}
    left = {group.prompt_id: group.responses[0].finish_reason for group in found.unfinished}
    others = {prompt_id: r for prompt_id, r in (ended | left).items() if prompt_id % 50}
    assert others
    assert set(others.values()) == {reason}
    assert (others.keys() <= ended.keys()) == bool(reason)


def test_a_response_that_a_lower_limit_leaves_no_room_is_finished_as_it_is() -> None:
    async def run() -> Collected:
        pool = FakePool(2)
        before = await phase(pool, 60)
        pool.next_phase()
        lower = ROLLOUT.model_copy(update={"max_response_tokens": 1})
        return await phase(pool, 30, 1, first=50, resumed=before.unfinished, rollout=lower)

    found = asyncio.run(run())
    assert all(r.finish_reason or not r.num_policy_tokens for r in by_place(found).values())


def test_a_phase_that_never_fills_says_so() -> None:
    async def run() -> None:
        shortfall = Shortfall(unit="tokens", domain="math", missing=100, per_prompt=PromptYield().add(1, [50]))
        servers: Any = FakePool(2)
        await sampler(servers, ROLLOUT).fill_partially(
            [], questions(0), 0, [shortfall], lambda group: False, max_waves=2
        )

    with pytest.raises(ValueError, match="still lacks 100 tokens of domain 'math' after .* prompts .*equal rewards"):
        asyncio.run(run())


def test_agents_that_ask_the_policy_nothing_are_told_where_a_budget_never_fills() -> None:
    response = Response(prompt_id=0, sample_index=0, segments=(), finish_reason="stop")
    group = Group(prompt_id=0, samples=(Sample(response=response, reward=0.0, reason="wrong", advantage=0.0),))

    async def one(count: int) -> list[Group]:
        return [group] * count

    need = Shortfall(unit="tokens", missing=100)
    with pytest.raises(ValueError, match="no response of 6 groups has a token .*agents do not ask the policy"):
        asyncio.run(fill_in_waves(one, 3, need, lambda group: True, max_waves=2))
