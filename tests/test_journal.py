"""Tests scored groups on disk: all that were written whole come back, wherever the file is cut, and nothing else
does."""

import asyncio
import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_zero import config_of
from samples import make_sample, make_segment, make_trajectory

from megatron_rl.config.layout import Layout
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.prompts import Prompt
from megatron_rl.records import Group
from megatron_rl.reward.rewards import Rewards
from megatron_rl.rollout.journal import Journal
from megatron_rl.rollout.sampler import Question, Sampler
from megatron_rl.train.orchestrator.group_source import journal_identity


def group(prompt_id: int) -> Group:
    """Make a group of two responses. Every third prompt also has a trajectory of an agent."""
    samples = [make_sample(prompt_id, i, 3 + prompt_id % 4 + i, reward=float(i == 0)) for i in range(2)]
    if prompt_id % 3 == 2:
        samples.append(make_trajectory(prompt_id, 2, [make_segment(9, turns=[(1, 3), (5, 8)]), make_segment(2)]))
    return Group(prompt_id=prompt_id, samples=tuple(replace(s, details=f"é {prompt_id}") for s in samples))


def refuse(error: OSError) -> OSError:
    return error


def write(folder: Path, groups: list[Group], step: int = 4, identity: str = "a") -> Path:
    async def append(journal: Journal) -> None:
        await asyncio.gather(*(journal.append(one) for one in groups))

    journal = Journal(folder, identity, refuse)
    assert journal.open(step) == 0
    asyncio.run(append(journal))
    journal.close()
    return folder / f"step_{step:06d}.journal"


def found(folder: Path, prompt_ids: range, step: int = 4, identity: str = "a") -> dict[int, Group]:
    journal = Journal(folder, identity, refuse)
    count = journal.open(step)
    groups = {i: one for i in prompt_ids if (one := journal.find(i)) is not None}
    journal.close()
    assert len(groups) == count
    return groups


def same(one: Group, other: Group) -> bool:
    pairs = zip(one.samples, other.samples, strict=True)
    return one.prompt_id == other.prompt_id and all(
        (a.id, a.reward, a.reason, a.details, a.response.finish_reason)
        == (b.id, b.reward, b.reason, b.details, b.response.finish_reason)
        and len(a.response.segments) == len(b.response.segments)
        and all(
            np.array_equal(getattr(x, name), getattr(y, name))
            for x, y in zip(a.response.segments, b.response.segments, strict=True)
            for name in ("prompt_ids", "output_ids", "rollout_logprobs", "policy_versions", "policy_mask")
        )
        for a, b in pairs
    )


@pytest.fixture(scope="module")
def journals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write journals of the first 1 to 5 groups and return their paths."""
    return [write(tmp_path_factory.mktemp("journal"), [group(j) for j in range(i)]) for i in range(1, 6)]


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1), damage=st.one_of(st.none(), st.floats(0, 0.999)))
def test_the_groups_before_the_first_broken_byte_come_back(
    journals: list[Path], tmp_path_factory: pytest.TempPathFactory, cut: float, damage: float | None
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    ends = [path.stat().st_size for path in journals]
    data = bytearray(journals[-1].read_bytes())
    path, whole = folder / journals[-1].name, len(data)
    good = int(cut * whole)
    if damage is not None:
        place = int(damage * whole)
        data[place] ^= 1
        good = min(good, place)
    path.write_bytes(data[: int(cut * whole)])
    expected = sum(end <= good for end in ends)
    back = found(folder, range(5))
    assert sorted(back) == list(range(expected))
    assert all(same(back[i], group(i)) for i in back)


def test_a_resumed_phase_goes_on_in_the_same_file(tmp_path: Path) -> None:
    path = write(tmp_path, [group(0), group(1)])
    path.write_bytes(path.read_bytes()[:-7])

    async def go_on() -> None:
        journal = Journal(tmp_path, "a", refuse)
        assert journal.open(4) == 1
        await journal.append(group(1))
        await journal.append(group(2))
        journal.close()

    asyncio.run(go_on())
    assert sorted(found(tmp_path, range(5))) == [0, 1, 2]


def test_groups_sampled_under_other_settings_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [group(0)])
    assert found(tmp_path, range(5), identity="b") == {}
    assert "written under other settings" in caplog.text
    assert found(tmp_path, range(5)) == {}  # the file is the new run's now
    write(tmp_path, [group(0)], step=5)
    assert found(tmp_path, range(5), step=6) == {}


def test_phases_that_a_checkpoint_covers_are_deleted_and_others_kept(tmp_path: Path) -> None:
    for step in (3, 4, 5):
        write(tmp_path, [group(0)], step=step)
    (tmp_path / "step_notes.journal").write_text("mine")
    Journal(tmp_path, "a", refuse).forget(lambda step: step < 5)
    assert {path.name for path in tmp_path.iterdir()} == {"step_000005.journal", "step_notes.journal"}


def test_a_full_disk_is_told_once_and_costs_the_journal_only(tmp_path: Path) -> None:
    told: list[OSError] = []
    journal = Journal(tmp_path, "a", told.append)
    journal.open(4)

    async def append() -> None:
        await journal.append(group(0))
        assert journal._file is not None
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, journal._file.fileno())  # type: ignore[attr-defined]
        os.close(full)
        await asyncio.gather(journal.append(group(1)), journal.append(group(2)))
        await journal.append(group(3))

    asyncio.run(append())
    assert [error.errno for error in told] == [errno.ENOSPC]
    assert sorted(found(tmp_path, range(4))) == [0]


def test_a_group_without_a_verdict_is_not_kept(tmp_path: Path) -> None:
    late = replace(group(1), samples=tuple(replace(s, reason="timeout") for s in group(1).samples))
    write(tmp_path, [group(0), late])
    assert sorted(found(tmp_path, range(4))) == [0]


def test_a_phase_that_samples_anew_takes_the_later_ones_with_it(tmp_path: Path) -> None:
    for step in (3, 4, 5, 6):
        write(tmp_path, [group(0)], step=step)
    assert sorted(found(tmp_path, range(4), step=4)) == [0]
    assert sorted(found(tmp_path, range(4), step=5)) == [0]  # nothing was sampled in step 4, so step 5 is as it was

    async def sample_another() -> None:
        journal = Journal(tmp_path, "a", refuse)
        journal.open(4)
        await journal.append(group(1))
        journal.close()

    asyncio.run(sample_another())
    assert sorted(found(tmp_path, range(4), step=4)) == [0, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"step_000003.journal", "step_000004.journal"}


def test_a_group_in_the_journal_is_not_sampled_again(tmp_path: Path) -> None:
    write(tmp_path, [group(7)])
    journal = Journal(tmp_path, "a", refuse)
    journal.open(4)
    rollout = RolloutSection(prompts_per_step=1, samples_per_prompt=2, max_response_tokens=64)

    class NoServers:
        num_slots = 4

    def rank_of_reward(responses: object, rewards: np.ndarray) -> np.ndarray:
        return rewards * 10

    sampler = Sampler(
        NoServers(), Rewards(RewardSection(timeout_seconds=240)), str, rank_of_reward, rollout, 1, 0, journal
    )  # type: ignore[arg-type]
    prompt = Prompt(id="x", domain="math", prompt="?", answer="1")
    (recalled,) = asyncio.run(sampler.sample([Question(prompt_id=7, prompt=prompt, input_ids=(5, 6))], 4))
    assert same(recalled, group(7))
    assert [sample.advantage for sample in recalled.samples] == [10.0, 0.0]  # of the present run
    journal.close()


def test_groups_that_end_together_share_an_fsync(tmp_path: Path, monkeypatch) -> None:
    calls = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append(number), sync(number)))
    write(tmp_path, [group(i) for i in range(40)])
    assert len(calls) <= 3  # the header, the first, all others


def test_groups_of_a_run_that_trains_otherwise_are_not_used(tmp_path: Path) -> None:
    # Without a checkpoint a run begins anew, and comes to other weights from its first step on.
    (tmp_path / "model").mkdir()

    def identity(*changes: str) -> str:
        config = config_of(tmp_path, f"model.path={tmp_path / 'model'}", "model.dtype=bfloat16", *changes)
        return journal_identity(config, Layout(world_size=1), "data")

    others = [
        *("lora.rank=4", "lora.rank=8", 'lora.targets=["experts"]', "model.router_dtype=bfloat16", "seed=2"),
        *(
            "model.head_dtype=bfloat16",
            "optimizer.beta2=0.99",
            "algorithm.clip_high=0.3",
            "moe.z_loss_coefficient=0.01",
        ),
        *("budget.tokens=300", "rollout.temperature=0.9", "train.micro_batch_tokens=256", "model.dtype=float32"),
    ]
    found = [identity(), *map(identity, others)]
    assert len(set(found)) == len(found)
    same = ("train.save_every=7", "train.steps=9", "tracking.name=other", "sync.transport=distributed", "threads=3")
    assert {identity(change) for change in same} == {identity()}
