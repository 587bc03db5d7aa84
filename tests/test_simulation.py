"""Tests the simulator: decoding against a slower one that goes token by token, steps by hand, rates found again."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.c3po.budget import Shortfall
from megatron_rl.c3po.packing import CostModel
from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.simulation.calibrate import calibrate
from megatron_rl.simulation.cluster import Cluster, Step
from megatron_rl.simulation.decode import decode
from megatron_rl.simulation.forecast import PARTS, summary
from megatron_rl.simulation.rates import Rates
from megatron_rl.simulation.rollout import Engines, OpenGroup, roll_out_partially
from megatron_rl.simulation.workload import Groups, Lengths, Take, group_correlation, lognormal, read_lengths, scaled

ROOT = Path(__file__).parents[1]
CONFIG = """
run_dir = "run"
[model]
path = "model"
recompute = true
[data]
train = "train.jsonl"
[rollout]
prompts_per_step = 8
samples_per_prompt = 2
max_prompt_tokens = 10
max_response_tokens = 100
max_running_requests = 4
servers = 2
[budget]
tokens = 100
margin = 0.0
[algorithm]
kl_coefficient = 0.1
[parallel]
pipeline = 2
[train]
steps = 10
micro_batch_tokens = 130
"""
COST = CostModel(linear=10.0, quadratic=0.5)
RATES = Rates(
    decode=((1, 10.0), (3, 15.0)),  # iterations of 0.1 and 0.2 s: 0.05 s + 0.05 s for each response
    response_seconds=0.25,
    train_flops=1000.0,
    micro_batch_seconds=2.0,
    optimizer_seconds=3.0,
    sync_seconds=4.0,
    switch_seconds=5.0,
    step_seconds=6.0,
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def all_equal(length: int) -> Take:
    return lambda count: Groups(np.full((count, 2), length), np.ones(count, bool))


def seconds_token_by_token(queue: list[int], slots: int, rates: Rates) -> float:
    waiting, running, seconds = list(queue), [], 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop(0))
        seconds += 0.05 + 0.05 * len(running)
        running = [left - 1 for left in running if left > 1]
    return seconds


@given(queues=st.lists(st.lists(st.integers(1, 12), max_size=9), min_size=1, max_size=4), slots=st.integers(1, 5))
def test_engines_decode_as_if_they_went_token_by_token(queues: list[list[int]], slots: int) -> None:
    found = decode([np.array(queue, int) for queue in queues], slots, RATES.iteration_seconds)
    expected = [seconds_token_by_token(queue, slots, RATES) for queue in queues]
    assert found.seconds.tolist() == pytest.approx(expected)
    assert found.tokens.tolist() == [sum(queue) for queue in queues]


def test_the_time_of_an_iteration_is_a_line_through_what_was_measured() -> None:
    table = Rates(decode=((2, 20.0), (4, 32.0), (8, 40.0)), train_flops=1.0)  # 0.1, 0.125, 0.2 s
    assert table.iteration_seconds(np.array([2, 3, 4, 6, 8, 12])).tolist() == pytest.approx(
        [0.1, 0.1125, 0.125, 0.1625, 0.2, 0.275]
    )
    # Below the first point the line goes on, but no response alone is faster than one of two.
    assert table.iteration_seconds(np.array([1])).tolist() == pytest.approx([0.0875])
    assert Rates(decode=((4, 40.0),), train_flops=1.0).iteration_seconds(np.array([1, 9])).tolist() == [0.1, 0.1]
    assert table.full_speed(8) == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("decode_table", "told"),
    [
        ("[[8, 1.0], [2, 1.0]]", "from few to many"),
        ("[[1, 1.0], [2, 3.0]]", "takes no less time"),
        ("[]", "at least 1"),
    ],
)
def test_rates_that_cannot_be_are_named(decode_table: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.toml"
    path.write_text(f"decode = {decode_table}\ntrain_flops = 1.0\n")
    with pytest.raises(ValueError, match=told):
        load_config(Rates, path)


def test_a_c3po_step_takes_what_its_parts_take_by_hand(config: Path) -> None:
    simulated = Cluster(
        load_config(RlConfig, config), ClusterSection(gpus_per_node=4), COST, RATES, all_equal(10), prompt_tokens=5
    )
    first, second = simulated.run(2)
    # 8 prompts x 2 responses x 10 tokens = 160 on 2 engines of 4 slots: each decodes 8 responses as 4 and 4, so
    # 2 x 10 iterations of 0.25 s, and 8 responses of 0.25 s beside it.
    assert first.rollout_seconds == pytest.approx(20 * 0.25 + 8 * 0.25)
    assert (first.num_generated_tokens, first.num_loss_tokens, first.num_carried) == (160, 100, 6)
    # 10 responses of 5 + 10 tokens on 2 data-parallel ranks: 5 on each in 1 micro-batch, which costs 3 + 1 passes for
    # recomputation + 1 for the reference, over 2 ranks of a pipeline, of which each waits as long for the other.
    forward = 5 * (10.0 * 15 + 0.5 * 15**2)
    work = 5 * forward / (1000.0 * 2) + 2.0
    assert first.train_seconds == pytest.approx(2 * work + 3.0)
    assert first.seconds == pytest.approx(first.rollout_seconds + first.train_seconds + 4.0 + 5.0 + 6.0)
    # 60 tokens are carried, so 40 are missing: 2 prompts of 20.
    assert (second.num_generated_tokens, second.num_loss_tokens, second.num_carried) == (40, 100, 0)
    assert second.rollout_seconds == pytest.approx(10 * 0.15 + 2 * 0.25)


def test_gpus_wait_for_what_rank_0_has_left_by_hand(config: Path) -> None:
    host = {
        "reading": {"when": "rollout", "token_seconds": 0.04, "response_seconds": 0.1},
        "rewards": {"when": "rollout", "response_seconds": 0.05},
        "plan": {"when": "between", "token_seconds": 0.01, "response_seconds": 0.5},
        "file": {"when": "beside", "token_seconds": 9.0},
    }
    rates = Rates(**RATES.model_dump() | {"host": host})
    cluster = ClusterSection(gpus_per_node=4)
    loaded = load_config(RlConfig, config)
    (first,) = Cluster(loaded, cluster, COST, rates, all_equal(10), 5).run(1)
    (without,) = Cluster(loaded, cluster, COST, RATES, all_equal(10), 5).run(1)
    # 16 responses of 10 tokens in 7 s: reading takes 160 x 0.04 + 16 x 0.1 = 8 s and rewards 0.8 s, together 1.8 s more
    # than the phase, of which reading has 8 of 8.8 parts.
    assert first.rollout_seconds == pytest.approx(7.0)
    waits = {"reading": 1.8 * 8 / 8.8, "rewards": 1.8 * 0.8 / 8.8, "plan": 160 * 0.01 + 16 * 0.5, "file": 0.0}
    assert first.host == pytest.approx(waits)
    assert first.seconds == pytest.approx(without.seconds + 1.8 + 9.6)
    assert first.idle["host"] == pytest.approx((1.8 + 9.6) / first.seconds)
    found = summary([first], cluster)
    assert found["host"] == pytest.approx(waits)
    assert found["host_seconds"]["mean"] == pytest.approx(11.4)
    assert found["busy"] + sum(found["idle"].values()) == pytest.approx(1.0)
    # If the host keeps up, only the last response is left: 8.8 s / 16.
    assert sum(rates.host_waits(100.0, 160, 16).values()) == pytest.approx(0.55 + 9.6)


def test_idle_shares_and_busy_are_the_whole(config: Path) -> None:
    together = ClusterSection(gpus_per_node=4)
    steps = Cluster(load_config(RlConfig, config), together, COST, RATES, all_equal(10), 5).run(3)
    found = summary(steps, together)
    assert found["busy"] + sum(found["idle"].values()) == pytest.approx(1.0)
    assert found["idle"]["waiting_for_training"] == found["idle"]["waiting_for_rollout"] == 0.0
    assert found["idle"]["sync"] == pytest.approx(np.mean([4.0 / step.seconds for step in steps]))
    # The busy share of the first step by hand: decoding and FLOPs, both at full speed.
    full_speed = 2 * 4 / 0.25
    even = 5 * 10 * (10.0 * 15 + 0.5 * 15**2) / 2 / 2000.0
    assert 1.0 - sum(steps[0].idle.values()) == pytest.approx((160 / full_speed + even) / steps[0].seconds)

    apart = ClusterSection(gpus_per_node=4, nodes=4, serving_nodes=3)
    (step,) = Cluster(load_config(RlConfig, config), apart, COST, RATES, all_equal(10), 5).run(1)
    assert step.switch_seconds == 0.0
    assert step.idle["waiting_for_training"] == pytest.approx(0.75 * step.train_seconds / step.seconds)
    assert step.idle["waiting_for_rollout"] == pytest.approx(0.25 * step.rollout_seconds / step.seconds)
    assert step.rollout_seconds == pytest.approx(10 * 0.25 + 4 * 0.25)  # 16 responses on 6 engines: 4 or 2 on each


def test_without_a_budget_every_step_trains_its_prompts(config: Path) -> None:
    grpo = load_config(RlConfig, config, ["algorithm.name=grpo", "algorithm.optimizer_steps_per_rollout=2"])
    for step in Cluster(grpo, ClusterSection(gpus_per_node=4), COST, RATES, all_equal(10), 5).run(3):
        assert (step.num_generated_tokens, step.num_loss_tokens, step.num_carried) == (160, 160, 0)
        assert len(step.trained) == 2

    def half_uniform(count: int) -> Groups:
        return Groups(np.full((count, 2), 10), np.arange(count) % 2 == 0)

    dapo = load_config(RlConfig, config, ["algorithm.name=dapo"])
    (step,) = Cluster(dapo, ClusterSection(gpus_per_node=4), COST, RATES, half_uniform, 5).run(1)
    # 8 prompts give 4 groups, 8 more the other 4, by what is expected then.
    assert (step.num_generated_tokens, step.num_loss_tokens, len(step.waves)) == (320, 160, 2)


@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=2), min_size=60, max_size=60),
    missing=st.integers(1, 200),
)
def test_a_partial_phase_goes_on_where_the_last_one_stopped(lengths: list[list[int]], missing: int) -> None:
    table, taken = np.array(lengths), 0

    def take(count: int) -> Groups:
        nonlocal taken
        taken += count
        return Groups(table[taken - count : taken], np.ones(count, bool))

    engines = Engines(count=1, slots=4, rates=Rates(decode=((1, 10.0),), train_flops=1.0))
    unfinished: list[OpenGroup] = []
    decoded = completed = 0
    for _ in range(2):
        need = Shortfall(unit="tokens", missing=missing)
        found = roll_out_partially(engines, take, need, unfinished, group_size=2, max_retention=9, filters=False)
        unfinished = found.unfinished
        decoded += found.num_tokens
        completed += sum(int(group.sum()) for group in found.kept)
        assert need.missing <= 0
        assert found.seconds * 10.0 == pytest.approx(round(found.seconds * 10.0))  # whole iterations
        # Four slots, each busy in every iteration; a group starts whole, so one slot more may be in use.
        assert 3 * round(found.seconds * 10.0) <= found.num_tokens <= 5 * round(found.seconds * 10.0) + 30
    assert decoded == completed + sum(int(group.done.sum()) for group in unfinished)
    assert all((group.done <= group.lengths).all() for group in unfinished)


@given(mean=st.floats(5, 900), lengths=st.lists(st.integers(1, 4000), min_size=5, max_size=50))
def test_scaled_lengths_have_the_mean_that_is_asked_for(mean: float, lengths: list[int]) -> None:
    found = scaled(np.array(lengths, float), mean, 1000)
    assert found.min() >= 1
    assert found.max() <= 1000
    assert found.mean() == pytest.approx(mean, abs=1.0)  # they are rounded, and at least 1


def test_groups_have_the_distribution_and_the_correlation_that_were_asked_for() -> None:
    lengths = scaled(lognormal(), 500, 2000)
    for correlation in (0.0, 0.5, 0.9):
        drawn = Lengths(lengths, 8, correlation, uniform_share=0.25, seed=1).take(4000)
        assert drawn.lengths.mean() == pytest.approx(500, rel=0.05)
        assert np.quantile(drawn.lengths, [0.1, 0.9]) == pytest.approx(np.quantile(lengths, [0.1, 0.9]), rel=0.1)
        assert group_correlation(list(drawn.lengths)) == pytest.approx(correlation, abs=0.03)
        assert drawn.kept.mean() == pytest.approx(0.75, abs=0.03)
    equal = Lengths(lengths, 8, 1.0, 0.0, seed=1).take(20).lengths
    assert (equal == equal[:, :1]).all()
    with pytest.raises(ValueError, match="must be from 0 to 1, got 1.5"):
        Lengths(lengths, 8, 1.5, 0.0, seed=1)


def test_files_of_lengths_that_hold_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lengths"
    with pytest.raises(ValueError, match="no file of response lengths"):
        read_lengths(path)
    path.write_text("3\n0\n")
    with pytest.raises(ValueError, match="lengths above 0"):
        read_lengths(path)
    with pytest.raises(ValueError, match="not between 1 and rollout.max_response_tokens = 10"):
        scaled(np.array([3.0]), 12.0, 10)


def test_calibration_finds_the_rates_that_a_run_was_made_with(config: Path, tmp_path: Path) -> None:
    options = ["rollout.max_running_requests=6", "parallel.pipeline=1", "algorithm.optimizer_steps_per_rollout=1"]
    loaded = load_config(RlConfig, config, [*options, "budget.tokens=600", f"run_dir={tmp_path}/run"])
    cluster = ClusterSection(gpus_per_node=2)
    lengths = Lengths(np.arange(3, 60), 2, 0.5, 0.3, seed=2)
    drawn: list[Groups] = []

    def take(count: int) -> Groups:
        drawn.append(lengths.take(count))
        return drawn[-1]

    write_run(Cluster(loaded, cluster, COST, RATES, take, 5, num_packed=None).run(40), drawn, tmp_path / "run")
    (tmp_path / "run/config.toml").write_text(dump_config(loaded))
    found = calibrate(tmp_path / "run", loaded, cluster, COST)
    ours = np.array([1, 2, 6])
    assert found.iteration_seconds(ours) == pytest.approx(RATES.iteration_seconds(ours), rel=0.02)
    for name in ("response_seconds", "train_flops", "sync_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(RATES, name), rel=0.02), name
    assert found.step_seconds == pytest.approx(
        RATES.step_seconds + RATES.switch_seconds
    )  # a run does not tell them apart
    last = tmp_path / "run/rollouts/step_000039.jsonl"
    last.write_text('{"segments": []}\n')
    with pytest.raises(
        ValueError, match="step_000039.jsonl has trajectories of agents; calibrate with a run of single"
    ):
        calibrate(tmp_path / "run", loaded, cluster, COST)
    last.unlink()
    with pytest.raises(ValueError, match="step_000039.jsonl is missing"):
        calibrate(tmp_path / "run", loaded, cluster, COST)


def write_run(steps: list[Step], waves: list[Groups], folder: Path) -> None:
    """Write the files of a run that took these steps and sampled these waves."""
    (folder / "rollouts").mkdir(parents=True)
    left, position, metrics = iter(waves), 0, []
    for number, step in enumerate(steps):
        rows = []
        for wave in (next(left) for _ in step.waves):
            for lengths, kept in zip(wave.lengths, wave.kept, strict=True):
                for index, tokens in enumerate(lengths.tolist()):
                    row = {"position": position, "sample_index": index, "num_tokens": tokens}
                    rows.append(row | {"policy_versions": {str(number): tokens}, "reward": float(kept and index)})
                position += 1
        (folder / f"rollouts/step_{number:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics.append(
            {
                "step": number,
                "rollout_seconds": step.rollout_seconds,
                "train_seconds": step.train_seconds,
                "update_weights_seconds": step.sync_seconds,
                "step_seconds": step.seconds,
                "num_loss_tokens_by_step": [step.num_loss_tokens],
                "num_trained_samples": 10,
                "num_forward_tokens": step.num_loss_tokens + 10 * 5,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs tools/simulate_cluster.py on the paper's first stage."""
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("simulate_cluster", ROOT / "tools/simulate_cluster.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = [
        "examples/ring_lite/paper_256gpu/stage1_math.toml",
        "--rates",
        "examples/ring_lite/rates/h800_assumed.toml",
    ]
    return lambda *options: module.main(module.parsed([*files, *options]))


def test_the_tool_simulates_every_combination(
    tool: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--vary", "algorithm.name=c3po,grpo", "--gpus", "8", "16", "--weak", "--steps", "3"]
    tool(*options, "--output", str(tmp_path / "out"))
    told = json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert told["rates"]["train_flops"] == 3e14
    names = [(case["name"], case["num_gpus"]) for case in told["cases"]]
    assert names == [(f"algorithm.name={name}", gpus) for name in ("c3po", "grpo") for gpus in (8, 16)]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1:3] for row in rows] == [[f" {name} ", f" {gpus} "] for name, gpus in names]
    for case in told["cases"]:
        if case["name"].endswith("c3po"):
            assert case["num_loss_tokens"] == {"mean": 409_600 * case["num_gpus"], "variation": 0.0}
        parts = [case[f"{part}_seconds"]["mean"] for part in PARTS]
        assert case["step_seconds"]["mean"] == pytest.approx(sum(parts))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gpus", "12"], "--gpus 12 is no multiple of cluster.gpus_per_node = 8"),
        (["--gpus", "4"], "4 training process(es) cannot be divided by expert 8"),
        (["--vary", "rollout.partial"], "--vary takes KEY=VALUE,VALUE..., got 'rollout.partial'"),
        (["--lengths", "/nowhere"], "/nowhere is no file of response lengths"),
        (["--set", "budget.domains={math = 1.0}"], "set budget.domains={}"),
    ],
)
def test_mistakes_at_the_tool_are_told(tool: Callable[..., None], options: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        tool(*options)
