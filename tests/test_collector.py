"""Checks what rank 0 collects, carries over and plans, with a source that the test fills."""

import errno
import json

import pytest
from rank_zero import FakeGroups, config_of

from megatron_rl.c3po.packing import CostModel
from megatron_rl.config.layout import Layout
from megatron_rl.errors import StopRequested
from megatron_rl.train.orchestrator.collector import Collector
from megatron_rl.train.orchestrator.phase_metrics import Phase

COST = CostModel(linear=1.0, quadratic=0.0)


def collector_of(config, source):
    return Collector(config, Layout(world_size=1), COST, source)


def loss_tokens(plan):
    return [step.num_loss_tokens for step in plan.plan.steps]


def test_a_phase_asks_for_the_budget_trains_exactly_it_and_carries_the_rest(tmp_path):
    source = FakeGroups(length=30)  # 60 tokens a group, so four groups for 200
    collector = collector_of(config_of(tmp_path, "budget.cut=response"), source)
    plan, metrics = collector.collect(0)
    assert source.asked == [(0, [200])]
    # Whole responses of 30: the seventh crosses 200, the eighth is left over.
    assert (loss_tokens(plan), metrics["num_carried"], metrics["num_generated_tokens"]) == ([210], 1, 240)
    collector.collect(1)
    assert source.asked[1] == (1, [170])


def test_the_last_response_is_cut_where_the_budget_ends(tmp_path):
    plan, metrics = collector_of(config_of(tmp_path, "budget.cut=token"), FakeGroups(length=30)).collect(0)
    assert (loss_tokens(plan), metrics["num_cut_tokens"]) == ([200], 10)


def test_without_refill_a_phase_asks_for_prompts_and_may_be_short(tmp_path):
    source = FakeGroups(length=20)
    plan, metrics = collector_of(config_of(tmp_path, "budget.under_full=short"), source).collect(0)
    assert source.asked == [(0, [2])]  # groups
    assert (loss_tokens(plan), metrics["budget_use"]) == ([80], 0.4)


def test_two_optimizer_steps_of_a_phase_get_one_budget_each(tmp_path):
    source = FakeGroups(length=30)
    plan, metrics = collector_of(config_of(tmp_path, "algorithm.optimizer_steps_per_rollout=2"), source).collect(0)
    # A response that ends the first budget may have up to 49 of its 50 tokens beyond it.
    assert source.asked == [(0, [400 + 49])]
    assert loss_tokens(plan) == [200, 200]
    assert metrics["budget_use"] == 1.0


def test_carried_responses_may_be_longer_than_a_limit_that_was_lowered(tmp_path):
    two = "algorithm.optimizer_steps_per_rollout=2"
    before, after = FakeGroups(length=50), FakeGroups(length=20)
    collector = collector_of(config_of(tmp_path, two), before)
    collector.collect(0)
    state, carried = collector.state()
    resumed = collector_of(config_of(tmp_path, two, "rollout.max_response_tokens=20"), after)
    resumed.restore(state, carried)
    plan, _ = resumed.collect(1)
    assert after.asked == [(1, [400 + 49 - 50 * (2 * before.next - 8)])]  # eight responses fill two budgets
    assert loss_tokens(plan) == [200, 200]


def test_what_waited_longer_than_allowed_is_dropped_and_sampled_anew(tmp_path):
    source = FakeGroups(length=30)
    collector = collector_of(config_of(tmp_path, "budget.cut=response", "budget.max_staleness=1"), source)
    collector.collect(0)
    _, metrics = collector.collect(2)
    assert source.asked[1] == (2, [200])
    assert metrics["num_dropped_stale"] == 1
    collector.close()
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000002.jsonl").open(encoding="utf-8")]
    (stale,) = (row["position"] for row in rows if row["outcome"] == "dropped: stale")
    assert stale in range(4)  # of the first phase


def test_an_abandoned_phase_changes_nothing(tmp_path):
    source = FakeGroups(length=30)
    collector = collector_of(config_of(tmp_path, "budget.cut=response"), source)
    collector.collect(0)
    before = collector.state()
    source.raises = [StopRequested()]
    with pytest.raises(StopRequested):
        collector.collect(1)
    assert collector.state() == before
    assert not (tmp_path / "run/rollouts/step_000001.jsonl").exists()


def test_a_restored_collector_plans_what_the_first_would_have(tmp_path):
    config = config_of(tmp_path, "budget.cut=response")
    sources = FakeGroups(length=30), FakeGroups(length=30)
    collectors = [collector_of(config, source) for source in sources]
    collectors[0].collect(0)
    state, carried = collectors[0].state()
    collectors[1].restore(json.loads(json.dumps(state)), carried)
    plans = [collector.collect(1)[0] for collector in collectors]
    assert plans[0].plan == plans[1].plan
    assert [s.id for s in plans[0].samples] == [s.id for s in plans[1].samples]


@pytest.mark.parametrize(("coefficient", "is_told"), [(0.001, True), (0.0, False)])
def test_other_weights_of_the_reference_policy_are_told_at_a_resume(tmp_path, caplog, coefficient, is_told):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model/model-00001-of-00002.safetensors"
    weights.write_bytes(b"12345")
    config = config_of(tmp_path, f"algorithm.kl_coefficient={coefficient}", f"model.path={tmp_path}/model")
    state, carried = collector_of(config, FakeGroups()).state()
    state = json.loads(json.dumps(state))
    collector_of(config, FakeGroups()).restore(state, carried)
    (tmp_path / "model/README.md").write_text("not weights", encoding="utf-8")
    assert caplog.text == ""
    weights.write_bytes(b"123456789")
    collector_of(config, FakeGroups()).restore(state, carried)
    said = "model-00001-of-00002.safetensors was '5 bytes of "
    assert (said in caplog.text) == ("algorithm.kl_coefficient measures" in caplog.text) == is_told


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_full_disk_ends_a_run_before_its_next_checkpoint_or_costs_only_the_file(tmp_path, monkeypatch, choice):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(Phase, "lines", full)
    collector = collector_of(config_of(tmp_path, f"train.on_save_error={choice}"), FakeGroups())
    assert loss_tokens(collector.collect(0)[0]) == [200]
    fault = collector.files.settle()
    if choice == "continue":
        assert fault is None
    else:
        assert "No space left on device" in str(fault)
        assert "the responses of this step are not written. Make room and --resume" in str(fault)
    assert list((tmp_path / "run/rollouts").iterdir()) == []


def test_the_responses_of_a_step_are_those_of_its_prompts_whatever_the_source_does_meanwhile(tmp_path):
    source = FakeGroups(length=30)
    collector = collector_of(config_of(tmp_path, "budget.cut=response"), source)
    collector.collect(0)
    source.prompt_of = None  # as if it were at work for the next phase
    assert collector.files.settle() is None
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000000.jsonl").open(encoding="utf-8")]
    assert sorted((row["prompt_id"], row["sample_index"]) for row in rows) == [
        (f"p{position}", index) for position in range(4) for index in range(2)
    ]
