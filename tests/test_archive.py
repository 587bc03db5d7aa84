"""Checks that a checkpoint restores what it keeps of a rollout phase."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.records import Response, Sample, Segment, UnfinishedGroup
from megatron_rl.rollout.archive import Carry, pack_carry, unpack_carry

WRITABLE = st.characters(exclude_categories=["Cs"])


@st.composite
def segments(draw: st.DrawFn, is_plain: bool) -> Segment:
    num_prompt, num_output = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    turns = None
    if not is_plain and draw(st.booleans()):
        bounds = sorted(draw(st.sets(st.integers(0, num_output), max_size=num_output)))
        turns = np.array(bounds[: len(bounds) // 2 * 2], np.int32).reshape(-1, 2)
    num_policy = num_output if turns is None else int((turns[:, 1] - turns[:, 0]).sum())
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return Segment(
        prompt_ids=rng.integers(0, 2**31 - 1, num_prompt).astype(np.int32),
        output_ids=rng.integers(0, 2**31 - 1, num_output).astype(np.int32),
        rollout_logprobs=rng.normal(size=num_policy).astype(np.float32),
        policy_versions=np.sort(rng.integers(0, 9, num_policy)).astype(np.int32),
        turns=turns,
        routed_experts=rng.integers(0, 255, (num_prompt + num_output - 1, 2, 3)).astype(np.uint8)
        if draw(st.booleans())
        else None,
        teacher_logprobs=rng.normal(size=num_policy).astype(np.float32) if draw(st.booleans()) else None,
    )


@st.composite
def responses(draw: st.DrawFn) -> Response:
    is_plain = draw(st.booleans())
    parts = draw(st.lists(segments(is_plain), min_size=int(is_plain), max_size=1 if is_plain else 3))
    response = Response(
        prompt_id=draw(st.integers(0, 2**40)),
        sample_index=draw(st.integers(0, 15)),
        segments=tuple(parts),
        finish_reason=draw(st.sampled_from(["", "stop", "length", "turns"])),
    )
    # Only a trajectory's text cannot be decoded again.
    return response if response.is_plain else replace(response, text=draw(st.none() | st.text(WRITABLE)))


samples = st.builds(
    Sample,
    response=responses(),
    reward=st.floats(allow_nan=False),
    reason=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    advantage=st.floats(allow_nan=False),
    details=st.text(WRITABLE),
)
groups = st.builds(
    UnfinishedGroup,
    prompt_id=st.integers(0, 2**40),
    responses=st.lists(responses(), min_size=1, max_size=4).map(tuple),
    retention=st.integers(0, 9),
)


def plain(value: object) -> object:
    """Return the value in a form that == compares, arrays with their types."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tolist()
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    fields = getattr(value, "__slots__", None)
    return {name: plain(getattr(value, name)) for name in fields} if fields else value


@settings(deadline=None)
@given(st.lists(samples, max_size=4).map(tuple), st.lists(groups, max_size=3).map(tuple))
def test_surplus_and_unfinished_groups_come_back_exactly(
    kept: tuple[Sample, ...], unfinished: tuple[UnfinishedGroup, ...]
) -> None:
    carry = Carry(samples=kept, since=tuple(range(len(kept))), unfinished=unfinished)
    assert plain(unpack_carry(pack_carry(carry))) == plain(carry)
