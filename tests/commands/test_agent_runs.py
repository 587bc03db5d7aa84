"""Tests whole runs with an agent: the budget is exact over turns, and a killed run ends with the same bits."""

import json
from pathlib import Path

import example_runs
import numpy as np
import pytest
from example_runs import finish, numbers
from inputs import ROOT, make_inputs
from inside import killed

from megatron_rl.config.data import RlData
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.mixture import load_stream
from megatron_rl.rollout.journal import records

SMALL = [
    *("rollout.prompts_per_step=3", "rollout.samples_per_prompt=4", "rollout.max_response_tokens=8"),
    *("rollout.max_prompt_tokens=88", "rollout.max_running_requests=4", "rollout.servers=1", "rollout.threads=1"),
    *("threads=1", "budget.tokens=60", "train.steps=3", "train.micro_batch_tokens=256", "train.save_every=1"),
    *(
        "reward.workers=1",
        "optimizer.warmup_steps=0",
        "rollout.agent_seconds=600",
        f"rollout.agent={ROOT}/tests/agent_of_parity.py:run",
    ),
]


# By (prompt_id, sample_index): the tokens of each turn, and the versions of the weights that they came from.
Kept = dict[tuple[int, int], list[tuple[list[int], list[int]]]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), 8, 40, 8, "--init-std", "0.06")


def command(inputs: Path, run: Path, *options: str) -> list[str]:
    return example_runs.command("agents/guess", inputs, run, SMALL, *options)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(command(inputs, run))
    return run


def test_every_step_trains_exactly_the_budget_of_the_policys_tokens(whole: Path) -> None:
    rows = numbers(whole)
    assert [row["num_loss_tokens"] for row in rows] == [60] * 3
    assert all(row["turns_mean"] == 2 and row["segments_mean"] == 1 for row in rows)
    assert all(row["num_failed_agents"] == row["num_new_segments"] == 0 for row in rows)
    # The log-probs of servers are those of the trainer, token by token over both turns.
    assert all(row["logprob_difference_p999"] < 2e-5 for row in rows)
    for line in (whole / "rollouts/step_000000.jsonl").read_text().splitlines():
        sample = json.loads(line)
        spans = [is_policys for _, is_policys in sample["segments"][0]["spans"]]
        assert spans.count(True) == 2
        assert sample["num_tokens"] <= 8


# Ends the run in the middle of its second phase.
AT_THE_TWELFTH_TURN = """
from megatron_rl.gateway.turn_journal import TurnJournal
keep, count = TurnJournal.keep, 0
def keep_and_end(journal, key, digest, turn):
    global count
    keep(journal, key, digest, turn)
    count += journal._path(1).exists()
    if count == 12:
        end_now()
TurnJournal.keep = keep_and_end
"""


def test_a_run_that_was_killed_comes_to_the_same_bits(whole: Path, inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed(command(inputs, run), AT_THE_TWELFTH_TURN)
    assert len(list(records(run / "journal/step_000001.turns"))) > 12
    finish(command(inputs, run, "--resume"))
    assert numbers(run) == numbers(whole)
    for step in range(3):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (run / name).read_text() == (whole / name).read_text()


def test_responses_of_agents_are_sampled_into_a_file_that_training_takes(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "rollouts.jsonl"
    arguments = command(inputs, tmp_path / "run", "--prompts", "2", "--output", str(out))
    arguments[3] = "rollout"
    finish(arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 8
    assert {len(row["segments"][0]["turns"]) for row in rows} == {2}


def test_benchmarks_are_answered_by_the_agent_inside_a_run_and_by_evaluate(inputs: Path, tmp_path: Path) -> None:
    games = f'benchmarks.games]\npath = "{inputs}/data/test.jsonl"\nprompts = 4\nsamples = 2\n'
    config = tmp_path / "rl.toml"
    config.write_text(f'base = "{ROOT}/examples/agents/guess/rl.toml"\n[validation]\nevery = 1\n[validation.{games}')
    arguments = command(inputs, tmp_path / "run", "--set", "train.steps=1", "--set", "optimizer.learning_rate=1e-12")
    arguments[4] = str(config)
    finish(arguments)
    validations = [tmp_path / f"run/validation/step_00000{step}/games.jsonl" for step in (0, 1)]

    settings = [option for option in SMALL if option.startswith(("rollout.max", "rollout.servers", "rollout.agent"))]
    table = tmp_path / "benchmarks.toml"
    table.write_text(f"[{games}")
    out = tmp_path / "evaluation"
    evaluate = [*arguments[:3], "evaluate", str(table), "--model", f"{inputs}/model", "--output", str(out)]
    evaluate += [part for setting in settings for part in ("--set", setting)]
    finish(evaluate)

    # The weights did not change, and seeds are the same: each of the three plays the same games.
    played = [sorted(path.read_text().splitlines()) for path in (*validations, out / "games.jsonl")]
    assert played[0] == played[1] == played[2]
    rows = [json.loads(row) for row in played[0]]
    assert len(rows) == 8
    assert {row["turns"] for row in rows} == {2}
    assert {row["score"] for row in rows} == {0.0, 1.0}
    assert len({row["response"] for row in rows}) > 1
    assert "responses to" not in finish([*evaluate, "--resume"])  # nothing was left to do


# Ends the run in the phase that has turns carried from the one before, and turns of its own, of five trajectories or
# more. The checkpoint between the phases is on the disk then: without it the first phase would be done again.
WITH_CARRIED_TURNS = """
import json, time
import numpy as np
from megatron_rl.gateway.turn_journal import TurnJournal
begin, write = TurnJournal.open, TurnJournal._write
phase, keys, versions = 0, set(), set()
def begin_and_note(journal, step, carried):
    global phase
    phase = step
    keys.clear()
    versions.clear()
    begin(journal, step, carried)
def write_and_end(journal, content):
    write(journal, content)
    line, _, data = content.partition(b"\\n")
    head = json.loads(line)
    if "digest" in head:
        keys.add(tuple(head["key"]))
        if sum(position == 0 for position, _ in keys) == 4:
            (journal._folder.parent.parent / "first_prompt_has_turns").touch()
        versions.update(np.split(np.frombuffer(data, "<i4"), 3)[2].tolist())
    if len(keys) >= 5 and min(versions) < phase == max(versions):
        latest = journal._folder.parent / "checkpoints/latest"
        while not latest.exists() or latest.read_text() != f"step_{phase}":
            time.sleep(0.01)
        end_now()
TurnJournal.open, TurnJournal._write = begin_and_note, write_and_end
"""


def test_a_run_of_c3po_plus_plus_goes_on_from_the_turns_of_a_phase_that_was_killed(
    inputs: Path, tmp_path: Path
) -> None:
    """Check that a resumed phase trains what was sampled before, also of trajectories carried from an earlier phase.

    The agents of the first prompt do not go on in the first phase, so that phase leaves them unfinished. All others
    wait until these have had their first turn.
    """
    run, train = tmp_path / "run", tmp_path / "train.jsonl"
    order, _ = load_stream(RlData(train=inputs / "data/train.jsonl"), seed=1).take(0, 1)
    rows = [json.loads(line) for line in (inputs / "data/train.jsonl").read_text().splitlines()]
    for row in rows:
        until = run / "journal/step_000001.turns" if row["id"] == order[0].id else tmp_path / "first_prompt_has_turns"
        row["meta"] = row.get("meta", {}) | {"until": str(until)}
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ("rollout.partial=true", "rollout.max_running_requests=8", f"data.train={train}", "train.steps=4")
    options = [part for change in changes for part in ("--set", change)]
    killed(command(inputs, run, *options), WITH_CARRIED_TURNS)
    kept = turns_of(run / "journal/step_000001.turns")
    carried = {key for key, turns in kept.items() if any(min(versions, default=1) < 1 for _, versions in turns)}
    assert len(kept) >= 5
    assert carried >= {(0, index) for index in range(4)}
    finish(command(inputs, run, *options, "--resume"))

    assert [row["num_loss_tokens"] for row in numbers(run)] == [60] * 4
    tokenizer = load_tokenizer(inputs / "model")
    seen, num_continued = set(), 0
    for step in range(4):
        for line in (run / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["outcome"] != "trained":
                continue
            key = row["position"], row["sample_index"]
            assert key not in seen
            seen.add(key)
            said = [text for text, is_policys in row["segments"][0]["spans"] if is_policys]
            for ids, _ in kept.get(key, []) if step >= 1 else []:
                has_ended = ids and ids[-1] == tokenizer.eos_token_id
                text = tokenizer.decode(ids[:-1] if has_ended else ids)
                num_continued += 1
                assert any(one.startswith(text) for one in said), (key, text, said)
    assert num_continued >= 4


def turns_of(path: Path) -> Kept:
    """Read the turns of a phase that are on disk."""
    kept: Kept = {}
    for content in [content for content, _ in records(path)][1:]:
        line, _, data = content.partition(b"\n")
        head = json.loads(line)
        if "outcome" not in head:
            ids, _, versions = np.split(np.frombuffer(data, "<i4"), 3)
            kept.setdefault(tuple(head["key"]), []).append((ids.tolist(), versions.tolist()))
    return kept
