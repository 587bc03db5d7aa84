"""Tests that a checkpoint comes at least every train.save_minutes, unless the configuration says otherwise."""

from types import SimpleNamespace

import pytest

from megatron_rl.config.train import TrainSection
from megatron_rl.train.run import context as module
from megatron_rl.train.run.context import TrainContext


def due(seconds_ago: float, step: int, monkeypatch: pytest.MonkeyPatch, *, rank: int = 0, **changes: float) -> bool:
    """Return whether a checkpoint is due after `step` of 100 steps, where no other rank asks for one."""
    section = TrainSection(micro_batch_tokens=1, **changes)
    monkeypatch.setattr(module.time, "monotonic", lambda: 1000.0 + seconds_ago)
    context = SimpleNamespace(
        config=SimpleNamespace(train=section), is_rank_zero=rank == 0, _saved_at=1000.0, any_rank=lambda flag: flag
    )
    return TrainContext.save_is_due(context, step, 100)  # type: ignore[arg-type]


def test_a_checkpoint_is_due_by_steps_by_time_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not due(29 * 60, 7, monkeypatch)
    assert due(31 * 60, 7, monkeypatch)
    assert not due(31 * 60, 7, monkeypatch, rank=1), "rank 0's clock says it"
    assert due(0, 100, monkeypatch)
    assert due(0, 8, monkeypatch, save_every=4)
    assert not due(0, 7, monkeypatch, save_every=4)
    assert due(31 * 60, 7, monkeypatch, save_every=4)
    assert not due(1e9, 7, monkeypatch, save_minutes=0)
    assert due(61, 7, monkeypatch, save_minutes=1)
    assert TrainSection(micro_batch_tokens=1).has_checkpoints
    assert not TrainSection(micro_batch_tokens=1, save_minutes=0).has_checkpoints
