"""Tests that every start of a run keeps the configuration that it trained with, and says what it changed."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_runs import make_run
from rank_zero import config_of

from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.report.build import page_data
from megatron_rl.report.runs import read_run
from megatron_rl.train.orchestrator.group_source import _restored_cursors
from megatron_rl.train.run.starts import read_starts, record_start, what_differs


def test_each_start_keeps_its_configuration_and_says_what_it_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert record_start(config_of(tmp_path), 0, resume=False) == []
    assert record_start(config_of(tmp_path), 2, resume=True) == []
    changed = config_of(tmp_path, "optimizer.learning_rate=1e-6", "algorithm.clip_low=0.1", "train.steps=9")
    said = ["algorithm.clip_low: not set -> 0.1", "optimizer.learning_rate: 3e-06 -> 1e-06", "train.steps: 4 -> 9"]
    assert sorted(map(str, record_start(changed, 3, resume=True))) == said
    assert all(one in caplog.text for one in said)
    starts = read_starts(tmp_path / "run")
    assert [(start.number, start.step) for start in starts] == [(1, 0), (2, 2), (3, 3)]
    assert [start.values["train.steps"] for start in starts] == [4, 4, 9]
    assert load_config(RlConfig, tmp_path / "run/config.toml") == changed
    # A run that begins anew in the folder has nothing to do with them.
    record_start(config_of(tmp_path), 0, resume=False)
    assert [start.number for start in read_starts(tmp_path / "run")] == [1]


def test_a_configuration_from_before_starts_were_kept_is_the_first_one(tmp_path: Path) -> None:
    """Check a configuration of a version that lacked some keys. Their defaults are no change."""
    config = config_of(tmp_path)
    lines = [line for line in dump_config(config).splitlines() if not line.startswith(("margin", "seed"))]
    (tmp_path / "run/config.toml").write_text("\n".join(lines), encoding="utf-8")
    assert list(map(str, record_start(config_of(tmp_path, "budget.tokens=400"), 5, resume=True))) == [
        "budget.tokens: 200 -> 400"
    ]
    starts = read_starts(tmp_path / "run")
    assert [(start.step, start.values["budget.tokens"]) for start in starts] == [(0, 200), (5, 400)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.train=other.jsonl", r'data.train is {"other.jsonl": 1.0} and was {"train.jsonl": 1.0}; put'),
        ("seed=2", "seed is 2 and was 1; put"),
        ('data.suffix="\\n Box it."', r'data.suffix is "\n Box it." and was ""; put'),
        ("optimizer.learning_rate=1", "no key has changed, so a file of data.train has; put"),
    ],
)
def test_a_refusal_names_the_key_that_differs_and_leaves_no_trace(tmp_path: Path, change: str, said: str) -> None:
    record_start(config_of(tmp_path), 0, resume=False)
    state = {"data": "of these prompts", "cursor": 3}
    with pytest.raises(ValueError, match="mean other prompts: ") as refused:
        _restored_cursors(config_of(tmp_path, change), state, {"": 1.0}, "of other prompts", from_rollouts=False)
    assert said in str(refused.value)
    assert load_config(RlConfig, tmp_path / "run/config.toml") == config_of(tmp_path)


def test_without_an_earlier_configuration_the_keys_are_named(tmp_path: Path) -> None:
    assert what_differs(config_of(tmp_path), ("seed", "data")) == "one of seed, data has changed"


def test_the_report_has_every_start_but_the_first_with_what_it_changed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    assert page_data([read_run(folder, "run")], 1, [])["runs"][0]["starts"] == []
    config = load_config(RlConfig, folder / "config.toml")
    record_start(config, 0, resume=False)
    record_start(config, 1, resume=True)
    record_start(load_config(RlConfig, folder / "config.toml", ["optimizer.clip_grad=0.5"]), 2, resume=True)
    (run,) = page_data([read_run(folder, "run")], 1, [])["runs"]
    assert run["starts"] == [("start 2", "1", "nothing"), ("start 3", "2", "optimizer.clip_grad: 1.0 -> 0.5")]


def test_what_is_accepted_is_what_could_not_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a start is accepted only after rank 0 has restored everything: other data still refuse it."""
    import megatron_rl.train.orchestrator.orchestrator as module

    accepted: list[int] = []
    context = SimpleNamespace(
        accept=accepted.append,
        layout=None,
        architecture=None,
        control=None,
        checkpoints=None,
        watchdog=None,
        resume=True,
    )

    class Refusing:
        def __init__(self, *_: object) -> None: ...

        def restore(self, *_: object) -> None:
            raise ValueError("other prompts")

    monkeypatch.setattr(module, "Collector", Refusing)
    monkeypatch.setattr(module, "cost_model", lambda _: None)
    monkeypatch.setattr(module, "send_command", lambda *_: None)
    with pytest.raises(ValueError, match="other prompts"):
        module.Orchestrator(config_of(tmp_path), context, 3, ({}, b""), lambda: None, None)  # type: ignore[arg-type]
    assert accepted == []
