"""Tests rank 0's part of a step: what is retried, told and kept, with a made source, transport and context."""

import asyncio
import contextlib
import errno
import threading
import time
from concurrent.futures import wait
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from alone import world
from rank_zero import FakeGroups, config_of, context_of, result

from megatron_rl.c3po.packing import CostModel
from megatron_rl.errors import EXIT_DONE, Fault, SharedFault, StopRequested
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import RequestRefused, ServerLost
from megatron_rl.rollout.pool import WeightsNeeded
from megatron_rl.sync.transport import PushSeconds
from megatron_rl.train.driver import _save
from megatron_rl.train.orchestrator import orchestrator as orchestrator_module
from megatron_rl.train.orchestrator.commands import Probe, Push, Stop
from megatron_rl.train.orchestrator.group_source import ServerGroups
from megatron_rl.train.orchestrator.orchestrator import Orchestrator
from megatron_rl.train.orchestrator.weight_updates import WeightUpdates
from megatron_rl.train.run.metrics import read_metrics


class FakeTransport:
    """Notes the versions that are pushed, and raises what it is told to."""

    def __init__(self):
        self.pushed, self.raises = [], []

    def push(self, version, receivers):
        self.pushed.append(version)
        if self.raises and (error := self.raises.pop(0)):
            raise error
        return PushSeconds(export=1.0, send=2.0, install=3.0)

    def close(self):
        pass


class FakeServers(FakeGroups):
    """Stands in for servers that give the groups."""

    pool = SimpleNamespace()

    def run(self, work):
        return work


VALIDATION = ("validation.every=2", 'validation.benchmarks={toys = {path = "x"}}', "train.keep_best=toys")


class FakeValidation:
    """Finds the scores that it is given by step; raises what it is told to."""

    def __init__(self, scores):
        self.scores, self.validated, self.raises, self.closed = scores, [], [], False

    def run(self, step):
        if self.raises and (error := self.raises.pop(0)):
            raise error
        self.validated.append(step)
        score = self.scores[step]
        return {"benchmarks": {"toys": {"average": {"value": score, "low": score - 0.1, "high": score + 0.1}}}}

    @property
    def best_step(self):
        return max(self.validated, key=self.scores.__getitem__, default=None)

    def has(self, step):
        return step in self.validated

    def told_best(self):
        return f"best: step {self.best_step}"

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def control():
    with world():
        yield dist.new_group(backend="gloo")


@pytest.fixture
def orchestrate(tmp_path, control, monkeypatch):
    """Yield a function that makes an orchestrator of a source and a transport."""
    monkeypatch.setattr(orchestrator_module, "cost_model", lambda _: CostModel(linear=1.0, quadratic=0.0))
    orchestrators = []

    def make(source, transport=None, *changes, first=0, latest=None):
        config = config_of(tmp_path, "sync.probe_every=0", *changes)
        orchestrators.append(
            Orchestrator(config, context_of(config, control, latest), first, None, lambda: source, transport)
        )
        return orchestrators[-1]

    yield make
    for orchestrator in orchestrators:
        orchestrator.close()


def test_weights_are_pushed_and_a_plan_of_the_budget_is_trained(orchestrate, tmp_path):
    source, transport = FakeServers(), FakeTransport()
    orchestrator = orchestrate(source, transport)
    plan, work = orchestrator.begin(0)
    assert transport.pushed == [0]
    assert plan.steps[0].num_loss_tokens == 200 == sum(len(s.loss_positions) for batch in work[0] for s in batch)
    orchestrator.end(0, [result()])
    (row,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert (row["step"], row["num_loss_tokens"], row["send_seconds"], row["num_generated_tokens"]) == (0, 200, 2.0, 200)
    assert orchestrator.finish() == Stop(exit_code=EXIT_DONE)


def test_a_push_that_lost_its_servers_is_tried_again_three_times(orchestrate):
    transport = FakeTransport()
    transport.raises = [ServerLost("gone"), ServerLost("gone"), None]
    orchestrate(FakeServers(), transport).begin(0)
    assert transport.pushed == [0, 0, 0]
    transport = FakeTransport()
    transport.raises = [ServerLost("gone")] * 3
    with pytest.raises(WeightsNeeded, match="gone"):
        orchestrate(FakeServers(), transport).begin(0)
    assert transport.pushed == [0, 0, 0]


def test_servers_that_come_back_while_others_generate_get_the_weights_of_the_last_push(orchestrate):
    source, transport = FakeServers(), FakeTransport()
    receivers, seen = [], []
    transport.push = lambda version, to: receivers.append((version, to.late)) or PushSeconds()
    orchestrator = orchestrate(source, transport, "sync.transport=distributed")
    watchdog = orchestrator._context.watchdog
    watchdog.enter = lambda phase, step: seen.append(phase) or vars(watchdog).update(phase=phase, step=step)
    source.groups = lambda *more: source.refill() or FakeServers.groups(source, *more)
    orchestrator.begin(3)
    assert receivers == [(3, False), (3, True)]
    assert seen == ["sync", "rollout", "sync", "rollout"]
    # Nothing is pushed meanwhile if servers find weights on a disk, or if the trainer has no memory for a push.
    for changes in (["sync.transport=disk"], ["sync.transport=distributed", "rollout.release_memory=true"]):
        other = FakeServers()
        orchestrate(other, FakeTransport(), *changes)
        assert not hasattr(other, "refill")


def test_work_for_which_servers_generate_ends_with_what_goes_wrong_in_a_push_meanwhile():
    """Check that the thread that waits for the work orders the push, and again while a server lacks its weights."""
    servers = ServerGroups.__new__(ServerGroups)
    servers._loop, servers._supervisors, servers._trouble = BackgroundLoop(), (), None
    servers._signals = SimpleNamespace(check=lambda: None)
    servers.pool, pushes = SimpleNamespace(returned=["one"]), []

    def refill():
        pushes.append(threading.current_thread())
        if len(pushes) == 2:
            servers.pool.returned = []

    async def until_both_pushes():
        while servers.pool.returned:
            await asyncio.sleep(0.01)
        return "done"

    servers.refill = refill
    assert servers.run_generating(until_both_pushes()) == "done"
    assert pushes == [threading.main_thread()] * 2
    servers.pool.returned = ["one"]
    servers.refill = lambda: pushes.append(1 / 0)
    with pytest.raises(ZeroDivisionError):
        servers.run_generating(asyncio.sleep(60))
    servers._loop.close()


def test_servers_that_came_back_without_weights_get_them_and_the_phase_begins_anew(orchestrate):
    source, transport = FakeServers(), FakeTransport()
    source.raises = [WeightsNeeded("new"), None]
    orchestrate(source, transport).begin(3)
    assert transport.pushed == [3, 3]
    assert [version for version, _ in source.asked] == [3, 3]
    source.raises = [WeightsNeeded("new")] * 3
    with pytest.raises(WeightsNeeded):
        orchestrate(source, FakeTransport()).begin(4)


@pytest.mark.parametrize(
    ("difference", "theirs", "fault"),
    [
        (0.09, None, None),
        (0.11, {"a": "1", "b": "2"}, None),  # every tensor is there: a warning
        (1.1, {"a": "1", "b": "2"}, r"http://s has weights 1 and computes something else .* 0 of 2 tensors differ"),
        (0.11, {"a": "1", "b": "3"}, r"weights 1 did not arrive whole at http://s: .* 1 of 2 tensors differ: b"),
        (0.11, {"a": "1"}, r"did not arrive whole .*\(1 could not be compared: b\)"),
        (0.11, RequestRefused("none"), r"did not arrive whole .* which tensors differ cannot be told \(none\)"),
    ],
)
def test_weights_arrived_where_every_tensor_is_the_trainers(tmp_path, caplog, difference, theirs, fault):
    """Check that different roundings of two programs in bfloat16 do not end a run."""

    def checksums():
        if isinstance(theirs, Exception):
            raise theirs
        return theirs, {}

    def command(what, _):
        return {Push: PushSeconds(export=1.0, send=2.0, install=3.0), Probe: [difference]}.get(
            type(what), {"a": "1", "b": "2"}
        )

    servers = SimpleNamespace(
        pool=SimpleNamespace(client=lambda _: SimpleNamespace(weight_checksums=checksums)),
        run=lambda found: found,
        probe=lambda count: (["http://s"], Probe(token_ids=[1] * 65, start=1, logprobs=[[0.0] * 64])),
    )
    updates = WeightUpdates(config_of(tmp_path, "sync.probe_tolerance=0.1"), servers, command)
    with pytest.raises(Fault, match=fault) if fault else contextlib.nullcontext():
        updates.update(1)
    warned = "weights 1 are at http://s, every tensor of them, and yet log-probs of 64 tokens differ by 0.11"
    assert (warned in caplog.text) == (difference == 0.11 and not fault)


def test_weights_are_validated_between_push_and_rollout_every_other_step_and_at_the_end(
    orchestrate, tmp_path, monkeypatch, capsys
):
    """Check a run that overfits: the score rises up to step 2, whose checkpoint is the one to keep, and then falls."""
    fake, told = FakeValidation({0: 0.3, 2: 0.7, 4: 0.4}), []
    monkeypatch.setattr(orchestrator_module, "Validation", lambda *_: fake)
    monkeypatch.setattr(orchestrator_module, "Trackers", lambda *_: SimpleNamespace(
        log=lambda step, numbers: told.append((step, numbers.get("validation/toys"))), close=lambda: None,
    ))  # fmt: skip
    source, transport = FakeServers(), FakeTransport()
    orchestrator = orchestrate(source, transport, *VALIDATION)
    best = []
    for step in range(4):
        orchestrator.begin(step)
        orchestrator.end(step, [result()])
        best.append(orchestrator._context.checkpoints.best)
    assert orchestrator.finish() == Stop(exit_code=EXIT_DONE)
    assert fake.validated == [0, 2, 4]
    assert transport.pushed == [0, 1, 2, 3, 4]
    assert best == [0, 0, 2, 2]
    assert orchestrator._context.checkpoints.best == 2
    assert "best: step 2" in capsys.readouterr().out
    assert told == [(0, 0.3), (1, None), (2, 0.7), (3, None), (4, 0.4)]
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row.get("validation/toys") for row in rows] == [0.3, None, 0.7, None]
    assert (rows[2]["validation_low/toys"], rows[2]["validation_high/toys"]) == (0.6, pytest.approx(0.8))
    assert ["validation_seconds" in row for row in rows] == [True, False, True, False]


def test_the_seconds_of_a_validation_are_no_part_of_a_step(orchestrate, tmp_path, monkeypatch):
    fake = FakeValidation({0: 0.5})
    fake.run = lambda step: time.sleep(0.3) or FakeValidation.run(fake, step)
    monkeypatch.setattr(orchestrator_module, "Validation", lambda *_: fake)
    orchestrator = orchestrate(FakeServers(), FakeTransport(), *VALIDATION)
    began = time.monotonic()
    orchestrator.begin(0)
    orchestrator.end(0, [result()])
    (row,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert row["validation_seconds"] >= 0.3
    assert row["step_seconds"] + row["validation_seconds"] <= time.monotonic() - began


def test_servers_that_are_lost_in_or_behind_a_validation_get_weights_and_it_is_made_once(orchestrate, monkeypatch):
    fake = FakeValidation({0: 0.5})
    fake.raises = [WeightsNeeded("new")]
    monkeypatch.setattr(orchestrator_module, "Validation", lambda *_: fake)
    source, transport = FakeServers(), FakeTransport()
    source.raises = [WeightsNeeded("new"), None]
    orchestrate(source, transport, *VALIDATION).begin(0)
    assert transport.pushed == [0, 0, 0]
    assert fake.validated == [0]


def test_a_stop_in_a_validation_stops_all_ranks_also_in_the_last_one(orchestrate, monkeypatch):
    fake = FakeValidation({0: 0.5, 4: 0.5})
    fake.raises = [StopRequested(), StopRequested()]
    monkeypatch.setattr(orchestrator_module, "Validation", lambda *_: fake)
    orchestrator = orchestrate(FakeServers(), FakeTransport(), *VALIDATION)
    assert orchestrator.begin(0) == Stop(exit_code=None)
    assert orchestrator.finish() == Stop(exit_code=None)
    assert fake.validated == []
    orchestrator.close()
    assert fake.closed


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_full_disk_in_a_validation_ends_the_run_or_costs_the_validation(orchestrate, monkeypatch, on_error):
    fake = FakeValidation({})
    fake.raises = [OSError(errno.ENOSPC, "No space left on device")]
    monkeypatch.setattr(orchestrator_module, "Validation", lambda *_: fake)
    orchestrator = orchestrate(FakeServers(), FakeTransport(), *VALIDATION, f"train.on_save_error={on_error}")
    with pytest.raises(Fault, match="No space left") if on_error == "stop" else contextlib.nullcontext():
        orchestrator.begin(0)
        assert "validation/toys" not in orchestrator._row


def test_a_signal_between_or_in_a_phase_stops_all_ranks(orchestrate):
    source = FakeServers()
    source.raises = [StopRequested()]
    assert orchestrate(source, FakeTransport()).begin(0) == Stop(exit_code=None)


def test_a_first_step_whose_log_probs_differ_ends_the_run_at_the_next_step(orchestrate, tmp_path):
    source = FakeGroups()
    for step in (1, 2):
        (tmp_path / f"run/validation/step_{step:06d}").mkdir(parents=True)
    orchestrator = orchestrate(source, None, "rollout.logprob_tolerance=0.1", first=2)
    orchestrator.begin(2)
    orchestrator.end(2, [result(difference=0.5)])
    assert source.forgotten[-1] == [2, 3, 4, 5, 6, 7, 8, 9]  # what wrong weights sampled is not for a resume
    assert not (tmp_path / "run/validation/step_000002").exists()
    assert (tmp_path / "run/validation/step_000001").exists()
    with pytest.raises(Fault, match="differ by 0.5"):
        orchestrator.begin(3)


@pytest.mark.parametrize(("dtype", "ends"), [("float32", True), ("bfloat16", False)])
def test_rounding_to_bfloat16_ends_no_run(orchestrate, dtype, ends):
    orchestrator = orchestrate(FakeGroups(), None, f"model.dtype={dtype}", "train.steps=1", first=0)
    orchestrator.begin(0)
    orchestrator.end(0, [result(difference=0.527)])  # SmolLM2-135M, one token in a thousand
    with pytest.raises(Fault, match=r"rollout.logprob_tolerance 0.5") if ends else contextlib.nullcontext():
        orchestrator.finish()


@pytest.mark.parametrize(("counts", "said"), [((200, 0), ""), ((0, 0), "nothing trained"), ((0, 200), "entropy 1.00")])
def test_the_line_of_a_step_says_what_there_is_to_say_of_its_optimizer_steps(orchestrate, capsys, counts, said):
    orchestrator = orchestrate(FakeGroups(), None, "algorithm.optimizer_steps_per_rollout=2")
    orchestrator.begin(0)
    steps = [replace(result(), num_loss_tokens=count) for count in counts]
    nothing = {"entropy": float("nan")}
    orchestrator.end(
        0, [step if step.num_loss_tokens else replace(step, metrics=step.metrics | nothing) for step in steps]
    )
    printed = capsys.readouterr().out
    assert said in printed
    assert "nan" not in printed
    assert ("nothing trained" in printed) == (said == "nothing trained")


def test_a_later_step_may_differ(orchestrate):
    orchestrator = orchestrate(FakeGroups(), None, "rollout.logprob_tolerance=0.1", first=0)
    for step in (0, 1):
        orchestrator.begin(step)
        orchestrator.end(step, [result(difference=0.5 * step)])
    assert orchestrator.finish() == Stop(exit_code=EXIT_DONE)


def test_a_gate_that_failed_in_the_last_step_is_told_at_the_end(orchestrate):
    orchestrator = orchestrate(FakeGroups(), None, "rollout.logprob_tolerance=0.1", first=3)
    orchestrator.begin(3)
    orchestrator.end(3, [result(difference=0.5)])
    with pytest.raises(Fault, match="differ by 0.5"):
        orchestrator.finish()


def test_metrics_on_a_full_disk_end_the_run_at_the_next_step(orchestrate, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    orchestrator = orchestrate(FakeGroups())
    orchestrator.begin(0)
    monkeypatch.setattr("megatron_rl.train.run.metrics.MetricsLog.write", full)
    orchestrator.end(0, [result()])
    with pytest.raises(Fault, match="No space left on device"):
        orchestrator.begin(1)


def test_responses_on_a_full_disk_end_the_run_at_the_next_step_or_checkpoint(orchestrate, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr("megatron_rl.train.orchestrator.phase_metrics.Phase.lines", full)
    orchestrator = orchestrate(FakeGroups())
    orchestrator.begin(0)
    orchestrator.end(0, [result()])
    wait(orchestrator.collector.files._files)
    with pytest.raises(Fault, match="No space left on device.*the responses of this step are not written"):
        orchestrator.begin(1)
    orchestrator = orchestrate(FakeGroups())
    orchestrator.begin(1)
    orchestrator.end(1, [result()])
    assert "the responses of this step are not written. Make room and --resume" in orchestrator.settle()


def test_before_a_checkpoint_the_files_of_its_steps_are_there(orchestrate, tmp_path):
    orchestrator = orchestrate(FakeGroups(), None, "train.traced_groups=1")
    for step in range(3):
        orchestrator.begin(step)
        orchestrator.end(step, [result()])
    assert orchestrator.settle() is None
    for folder in ("rollouts", "tokens"):
        names = sorted(path.name for path in (tmp_path / "run" / folder).iterdir())
        assert names == [f"step_{step:06d}.jsonl" for step in range(3)]


def test_no_checkpoint_covers_a_step_whose_responses_could_not_be_written(orchestrate, control, tmp_path, monkeypatch):
    saved = []

    def save(orchestrator, step):
        context = SimpleNamespace(
            control=control,
            watchdog=SimpleNamespace(enter=lambda phase, step: None),
            save=lambda *what: saved.append((what, (tmp_path / "run/rollouts/step_000000.jsonl").exists())),
        )
        _save(context, orchestrator, step)

    orchestrator = orchestrate(FakeGroups())
    orchestrator.begin(0)
    save(orchestrator, 1)
    state, carried = orchestrator.collector.state()
    assert saved == [((1, {"step": 1, **state}, carried), True)]

    def full(*_):
        yield "a part of it\n"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_rl.train.orchestrator.phase_metrics.Phase.lines", full)
    orchestrator.begin(1)
    with pytest.raises(SharedFault, match="the responses of this step are not written. Make room and --resume"):
        save(orchestrator, 2)
    assert len(saved) == 1


def test_the_journal_of_steps_before_the_newest_checkpoint_is_forgotten(orchestrate):
    source = FakeGroups()
    orchestrate(source, None, "train.save_every=1", latest=2, first=3).begin(3)
    assert source.forgotten == [[0, 1]]
    orchestrate(source, None, "train.save_every=0").begin(3)  # there will be one by train.save_minutes
    assert source.forgotten[-1] == []
    orchestrate(source, None, "train.save_every=0", "train.save_minutes=0").begin(3)
    assert source.forgotten[-1] == [0, 1, 2]


def test_a_skipped_step_keeps_its_batch(orchestrate, tmp_path):
    orchestrator = orchestrate(FakeGroups())
    orchestrator.begin(0)
    orchestrator.end(0, [result(skipped=True)])
    assert {path.name for path in (tmp_path / "run/skipped").iterdir()} == {"step_000000.npz", "step_000000.json"}


def test_a_source_that_cannot_be_opened_frees_the_other_ranks(tmp_path, control, monkeypatch):
    monkeypatch.setattr(orchestrator_module, "cost_model", lambda _: CostModel(linear=1.0, quadratic=0.0))
    told = []
    monkeypatch.setattr(orchestrator_module, "send_command", lambda order, _: told.append(order))

    def broken():
        raise ValueError("no such file")

    config = config_of(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        Orchestrator(config, context_of(config, control), 0, None, broken, None)
    assert told == [Stop(exit_code=2)]
