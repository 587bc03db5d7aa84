"""Tests rollouts in a file: they come back as they were sampled, and rows that cannot be trained from are named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from samples import make_sample

from megatron_rl.data.prompts import Prompt
from megatron_rl.records import Group
from megatron_rl.rollout.append_log import whole_groups
from megatron_rl.rollout.rollout_file import RowLimits, check_rows, group_rows, read_groups
from megatron_rl.rollout.sample import claim

# Rows of make_sample have 4 prompt tokens from 0 on, and here 5 output tokens.
LIMITS = RowLimits(vocab_size=9, max_prompt_tokens=4, max_response_tokens=6, smallest_group=2)


def rank_of_reward(_: object, rewards: np.ndarray) -> np.ndarray:
    return rewards - rewards.mean()


def prompt(position: int) -> Prompt:
    return Prompt(id=f"name-{position}", domain="math", prompt="what?", answer="7")


def write(path: Path, *groups: Group) -> list[str]:
    text = "".join(group_rows(g, prompt(g.prompt_id), "math", lambda ids: " ".join(map(str, ids))) for g in groups)
    path.write_text(text)
    return text.splitlines()


def test_groups_come_back_with_this_runs_advantages(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    groups = []
    for position in (7, 3):
        samples = [
            replace(make_sample(position, i, 5 + i, version=4, reward=float(i == 0)), details="why") for i in range(3)
        ]
        for sample in samples:
            sample.response.rollout_logprobs[:] = -abs(rng.normal(size=sample.response.num_policy_tokens)) * 1e-3
        groups.append(Group(prompt_id=position, samples=tuple(samples)))
    write(tmp_path / "file", *groups)
    found, prompts = read_groups(tmp_path / "file", rank_of_reward)
    assert prompts == {position: prompt(position) for position in (7, 3)}
    assert [group.prompt_id for group in found] == [3, 7]  # as a run would have taken their prompts
    for group, expected in zip(found, groups[::-1], strict=True):
        assert [sample.advantage for sample in group.samples] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
        for sample, other in zip(group.samples, expected.samples, strict=True):
            assert (sample.id, sample.reward, sample.reason, sample.details) == (
                other.id,
                other.reward,
                other.reason,
                "why",
            )
            for name in ("prompt_ids", "output_ids", "rollout_logprobs", "policy_versions"):
                ours, theirs = (getattr(one.response.segments[0], name) for one in (sample, other))
                assert ours.dtype == theirs.dtype
                assert np.array_equal(ours, theirs), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_ids": None}, r"file line 2: output_ids must be a list of token ids and not empty, got None"),
        ({"output_ids": [], "rollout_logprobs": []}, r"line 2: output_ids must be .* not empty, got \[\]"),
        ({"output_ids": [0, 1, 9, 3, 4]}, r"output_ids\[2\] must be a token id of the model, .* from 0 to 8, got 9"),
        ({"output_ids": [0, -1, 2, 3, 4]}, r"output_ids\[1\] must be .* got -1"),
        ({"output_ids": [0, 1, 2, 3, 1.5]}, r"output_ids\[4\] must be .* got 1.5"),
        ({"output_ids": [0, True, 2, 3, 4]}, r"output_ids\[1\] must be .* got True"),
        ({"output_ids": [[0, 1], 2, 3, 4, 5]}, r"output_ids\[0\] must be .* got \[0, 1\]"),
        ({"output_ids": [10**30, 1, 2, 3, 4]}, r"output_ids\[0\] must be .* got 10+"),
        ({"prompt_token_ids": [0, 99]}, r"prompt_token_ids\[1\] must be .* got 99"),
        ({"prompt_token_ids": []}, r"prompt_token_ids must be .* not empty"),
        ({"prompt_token_ids": [1] * 5}, r"prompt_token_ids has 5 tokens, more than rollout.max_prompt_tokens 4; raise"),
        (
            {"output_ids": [1] * 7, "rollout_logprobs": [-1.0] * 7},
            r"output_ids has 7 tokens, more than rollout.max_response_tokens 6",
        ),
        ({"rollout_logprobs": [-1.0]}, r"it has 5 output_ids and 1 rollout_logprobs; they must be equally many"),
        ({"rollout_logprobs": None}, r"5 output_ids and None rollout_logprobs"),
        ({"rollout_logprobs": [-1.0, None, -1, -1, -1]}, r"rollout_logprobs\[1\] must be a finite .* got None"),
        ({"rollout_logprobs": [-1.0, -1, float("nan"), -1, -1]}, r"line 2: rollout_logprobs\[2\] .* got nan"),
        ({"rollout_logprobs": [float("-inf"), -1, -1, -1, -1]}, r"rollout_logprobs\[0\] .* got -inf"),
        ({"rollout_logprobs": [-1, -1, -1, -1, 0.5]}, r"rollout_logprobs\[4\] .* at most 0, got 0.5"),
        ({"rollout_logprobs": [-1, -1, -1, "-1", -1]}, r"rollout_logprobs\[3\] .* got '-1'"),
        ({"reward": "good"}, r"reward must be a finite number, got 'good'"),
        ({"reward": None}, r"reward must be a finite number, got None"),
        ({"reward": float("nan")}, r"reward must be a finite number, got nan; record its group again, or remove it"),
        ({"reward": float("inf")}, r"reward must be a finite number, got inf"),
        ({"policy_version": -1}, r"policy_version must be a whole number from 0 on, got -1"),
        ({"position": 0.5}, r"position must be a whole number"),
        ({"sample_index": 2}, "samples of position 0 are not 0, 1, 2"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    lines = write(tmp_path / "file", Group(prompt_id=0, samples=(make_sample(0, 0, 5), make_sample(0, 1, 5))))
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    (tmp_path / "file").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_groups(tmp_path / "file", rank_of_reward, LIMITS)
    if "samples of position" not in message:  # of a row alone, and so known before a model is loaded
        with pytest.raises(ValueError, match=message):
            check_rows(tmp_path / "file", LIMITS)


def test_a_row_says_what_was_expected_and_what_was_extracted(tmp_path: Path) -> None:
    group = Group(prompt_id=3, samples=(make_sample(3, 0, 5), make_sample(3, 1, 5)))
    for kind, text, extracted in [
        ("math", "so \\boxed{8}", "8"),
        ("exact", "I do not know", None),
        ("code", '```python\nprint("\\boxed{8}")\n```', None),  # the program is the response
    ]:
        rows = [json.loads(line) for line in group_rows(group, prompt(3), kind, lambda ids, t=text: t).splitlines()]
        assert [(row["expected"], row["extracted"]) for row in rows] == [("7", extracted)] * 2
    long = group_rows(group, replace(prompt(3), answer="7" * 10**6), "code", lambda ids: "")
    assert len(long) < 10_000  # tests of programs have megabytes
    # A file of before, whose rows have neither, is read as before.
    (tmp_path / "file").write_text("".join(_without(line, "expected", "extracted") for line in long.splitlines()))
    groups, prompts = read_groups(tmp_path / "file", rank_of_reward, LIMITS)
    assert ([len(g.samples) for g in groups], prompts[3].answer) == ([2], "")


def _without(line: str, *keys: str) -> str:
    return json.dumps({key: value for key, value in json.loads(line).items() if key not in keys}) + "\n"


def test_a_row_without_a_key_is_none_and_a_group_of_one_teaches_nothing(tmp_path: Path) -> None:
    lines = write(tmp_path / "file", Group(prompt_id=3, samples=(make_sample(3, 0, 5),)))
    check_rows(tmp_path / "file", LIMITS)
    with pytest.raises(ValueError, match=r"position 3 has one response, and a group of one has no advantage; remove"):
        read_groups(tmp_path / "file", rank_of_reward, LIMITS)
    row = json.loads(lines[0])
    del row["rollout_logprobs"]
    (tmp_path / "file").write_text("\n".join([*lines, json.dumps(row)]))
    with pytest.raises(ValueError, match="line 2 is not a scored response .*rollout_logprobs"):
        check_rows(tmp_path / "file", LIMITS)


def test_a_file_that_a_kill_cut_short_keeps_its_whole_groups(tmp_path: Path) -> None:
    assert whole_groups(tmp_path / "file", 2, "set it right") == set()
    assert not (tmp_path / "file").exists()
    # Characters at which str.splitlines would break a line.
    groups = [Group(prompt_id=p, samples=(make_sample(p, 0, 5), make_sample(p, 1, 5))) for p in (4, 2)]
    odd = "".join(
        group_rows(group, replace(prompt(0), prompt="a\u2028b\u0085c"), "math", lambda ids: "\u2029")
        for group in groups
    )
    (tmp_path / "file").write_text(odd + odd.splitlines()[0][:30])
    assert whole_groups(tmp_path / "file", 2, "set it right") == {4, 2}
    assert (tmp_path / "file").read_text() == odd
    cut = odd[: odd.rindex("\n", 0, -1) + 20]  # into the second response of the second group
    (tmp_path / "file").write_text(cut)
    assert whole_groups(tmp_path / "file", 2, "set it right") == {4}
    assert (tmp_path / "file").read_text() == odd[: len(odd) // 2]
    (tmp_path / "file").write_text(odd[:-1])  # all but the end of the line, to which the next response would be added
    assert whole_groups(tmp_path / "file", 2, "set it right") == {4}
    assert (tmp_path / "file").read_text() == odd[: len(odd) // 2]


def test_responses_of_unknown_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path / "file", Group(prompt_id=0, samples=(make_sample(0, 0, 5),)))
    with pytest.raises(ValueError, match=r"file.settings.json is missing, so nobody knows .*; name another --output"):
        claim(tmp_path / "file", {"seed": 1}, 1)


def test_a_file_of_groups_of_another_size_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "file", *(Group(prompt_id=p, samples=(make_sample(p, 0, 5),)) for p in range(3)))
    before = (tmp_path / "file").read_text()
    with pytest.raises(ValueError, match=r"position 0 has 1 responses, not 2; set it right"):
        whole_groups(tmp_path / "file", 2, "set it right")
    assert (tmp_path / "file").read_text() == before
