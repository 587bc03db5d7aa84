"""Tests whole runs of the command line on a tiny model: the loop, resuming, being killed, and mistakes."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import forked
import psutil
import pytest
from inputs import make_inputs
from small_disk import NO_MOUNT, resize, small_disk
from until import wait_until

from megatron_rl.c3po.packing import cost_model
from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.data import RlData
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.mixture import load_stream
from megatron_rl.families import load_architecture
from megatron_rl.locks import sole_writer
from megatron_rl.metric_names import unknown
from megatron_rl.report.sections import SECTIONS
from megatron_rl.report.status import status
from megatron_rl.simulation.calibrate import replay
from megatron_rl.simulation.rates import Rates
from megatron_rl.train.run.starts import read_starts

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
CONFIG = """
run_dir = "{folder}/run"
threads = 1
[model]
path = "{folder}/model"
[data]
train = "{folder}/data/train.jsonl"
[rollout]
prompts_per_step = 4
samples_per_prompt = 4
max_prompt_tokens = 32
max_response_tokens = 24
max_running_requests = 16
threads = 1
[budget]
tokens = 300
[optimizer]
learning_rate = 1e-3
[algorithm]
kl_coefficient = 1e-3
[train]
steps = 4
save_every = 2
micro_batch_tokens = 128
phase_deadline_seconds = 900
"""
# On a CPU servers only answer as if, and the trainer's states move from host memory to host memory.
SHARED_GPUS = ("rollout.release_memory=true", "train.offload_while_generating=true")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), 200, 100, 8)


def command(inputs: Path, folder: Path, name: str, *options: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    config = folder / "config.toml"
    config.write_text(CONFIG.format(folder=inputs).replace(f'run_dir = "{inputs}/run"', f'run_dir = "{folder}/run"'))
    return [PYTHON, "-m", "megatron_rl.cli", name, str(config), *options]


def finish(arguments: list[str], code: int = 0) -> str:
    done = forked.run(arguments)
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout + done.stderr


def rows_of(folder: Path) -> list[dict]:
    """Return the metrics, also of a run that is writing its next line."""
    lines = (folder / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    assert unknown(name for row in rows for name in row) == []
    return rows


def has_steps(folder: Path, count: int) -> bool:
    return (folder / "run/metrics.jsonl").exists() and len(rows_of(folder)) >= count


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "said").write_text(finish(command(inputs, folder, "train")), encoding="utf-8")
    return folder


def test_a_run_trains_exactly_the_budget_and_leaves_everything_a_reader_expects(whole: Path) -> None:
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["num_loss_tokens"] for row in rows] == [300] * 4
    for row in rows:
        assert row["logprob_difference_max"] < 2e-5
        assert row["grad_norm"] >= 0
    run = whole / "run"
    for name in ("config.toml", "tensorboard", "checkpoints/latest", "hf/config.json", "hf/tokenizer.json"):
        assert (run / name).exists(), name
    samples = [json.loads(line) for line in (run / "rollouts/step_000001.jsonl").read_text().splitlines()]
    assert sum(sample["num_loss_tokens"] for sample in samples) == 300
    assert {sample["outcome"] for sample in samples} <= {"trained", "carried"}
    assert {*(v for s in samples if s["position"] >= rows[0]["num_prompts"] for v in s["policy_versions"])} == {"1"}


def test_a_run_that_has_ended_says_so_and_where_its_model_is(whole: Path) -> None:
    found = status(whole / "run")
    assert (found["state"], found["num_done"], found["num_steps"]) == ("ended", 4, 4)
    assert found["checkpoint"] == str(whole / "run/checkpoints/step_4")
    (start,) = read_starts(whole / "run")
    assert (start.number, start.step) == (1, 0)
    said = (whole / "said").read_text(encoding="utf-8")
    assert said.startswith("megatron-rl train ")
    assert f"done: 4 steps; the model is in {whole}/run/hf" in said


def test_a_run_that_learns_nothing_says_so_in_its_third_step(whole: Path) -> None:
    """The model has random weights, so no response is right, and few end."""
    assert [row["uniform_group_share"] for row in rows_of(whole)] == [1.0] * 4
    said = (whole / "said").read_text(encoding="utf-8")
    for step in range(4):
        (line,) = [line for line in said.splitlines() if line.startswith(f"step {step} of 4  reward 0.000  no answer ")]
        assert len(line) <= 80
        assert ("ETA " in line) == (step < 3)
    assert said.count("step 2: all responses of a prompt have the same reward") == 1
    (expected,) = [line for line in said.splitlines() if "step 2: for example prompt " in line]
    rows = [json.loads(line) for line in (whole / "run/rollouts/step_000002.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["prompt_id"] in expected and row["sample_index"] == 0][:1]
    assert f"expected {row['expected']!r}" in expected


def test_the_simulator_takes_the_steps_that_a_run_took(whole: Path) -> None:
    run = whole / "run"
    config = load_config(RlConfig, run / "config.toml")
    rates = Rates(decode=((1, 1.0),), train_flops=1.0)
    cost = cost_model(load_architecture(config.model.path))
    for row, step in zip(
        rows_of(whole), replay(run, config, ClusterSection(gpus_per_node=1), cost, rates), strict=True
    ):
        assert step.num_generated_tokens == row["num_generated_tokens"]
        assert step.num_loss_tokens == row["num_loss_tokens"]
        assert step.num_carried == row["num_carried"]
        assert [one.num_rows for one in step.trained] == [row["num_micro_batches"]]


def traces_of(folder: Path, step: int) -> list[tuple[dict, dict]]:
    """Return two rows for each traced response of a step: from the rollouts file and from the tokens file."""
    rollouts, tokens = (
        [json.loads(line) for line in (folder / f"run/{name}/step_{step:06d}.jsonl").open()]
        for name in ("rollouts", "tokens")
    )
    by_id = {(row["position"], row["sample_index"]): row for row in rollouts}
    return [(by_id[row["position"], row["sample_index"]], row) for row in tokens]


def test_the_tokens_of_the_first_trained_group_are_beside_its_responses(whole: Path) -> None:
    for step in range(4):
        rollouts = [json.loads(line) for line in (whole / f"run/rollouts/step_{step:06d}.jsonl").open()]
        with_loss = [row for row in rollouts if row["num_loss_tokens"]]
        first = min(row["position"] for row in with_loss if row["policy_versions"].keys() == {str(step)})
        found = traces_of(whole, step)
        assert [row for row, _ in found] == sorted(
            (row for row in rollouts if row["position"] == first), key=lambda row: row["sample_index"]
        )
        for row, trace in found:
            count, trained = row["num_tokens"], row["num_loss_tokens"]
            assert "".join(trace["tokens"]) == row["response"]
            assert {len(trace[name]) for name in ("tokens", "rollout_logprobs", "train_logprobs")} == {count}
            assert [x is None for x in trace["train_logprobs"]] == [False] * trained + [True] * (count - trained)
            assert trace["optimizer_step"] == (0 if trained else None)
            assert {str(version): num for version, num in trace["policy_versions"]} == row["policy_versions"]
            if row["policy_versions"] == {str(step): count}:
                pairs = zip(trace["rollout_logprobs"], trace["train_logprobs"][:trained], strict=False)
                assert max((abs(a - b) for a, b in pairs), default=0) < 1.5e-4  # both rounded


def test_the_report_draws_the_metrics_that_a_run_has(whole: Path) -> None:
    """Check that the report knows every metric, so that a renamed or new one is not forgotten."""
    present = set(rows_of(whole)[0]) - {"step"}
    known = {metric for section in SECTIONS for plot in section.plots for metric in plot.curves.values()}
    of_others = {"validation_loss", "validation_entropy", "rest_seconds", "peak_memory_gb"}
    of_others |= {"offload_seconds", "reload_seconds", "release_seconds", "resume_seconds"}
    of_others |= {"turns_mean", "segments_mean", "masked_token_share", "no_token_share", "validation_seconds"}
    of_others |= {f"teacher_{name}" for name in ("kl", "kl_max", "disagreement_share", "advantage_std", "coefficient")}
    of_others |= {"teacher_seconds", "num_teacher_tokens", "num_lost_teachers"}
    of_others |= {
        "num_tool_calls",
        "num_broken_tool_calls",
        "num_new_segments",
        "num_failed_agents",
        "num_ended_by_limit",
    }
    assert {metric for metric in known - present if not metric.endswith("/*")} == of_others
    assert present - known == {
        "response_tokens_std",
        "advantage_mean",
        "num_trained_samples",
        "num_unfinished_tokens",
        "num_dropped_unfinished_tokens",
        "num_micro_batches",
        "num_forward_tokens",
        "num_loss_tokens_by_step",
        "num_starts",
    }


def test_a_second_optimizer_step_is_corrected_by_the_log_probs_that_the_phase_started_from(
    inputs: Path, tmp_path: Path
) -> None:
    options = ["train.steps=2", "algorithm.optimizer_steps_per_rollout=2", "algorithm.correction=icepop"]
    options += ["train.traced_groups=1000", "train.overlap=on", *SHARED_GPUS]
    finish(command(inputs, tmp_path, "train", "--nproc", "2", *(o for x in options for o in ("--set", x))))
    for row in rows_of(tmp_path):
        assert row["num_loss_tokens_by_step"] == [300, 300]
        assert min(row["offload_seconds"], row["reload_seconds"]) > 0
        assert row["budget_use"] == 1.0
        assert row["ratio_max"] > 1.0 + 1e-6  # the first of the two steps has moved the weights
        # Carried responses of the phase before are off-policy by its two steps; all others by rounding.
        assert abs(row["train_rollout_log_ratio_p50"]) < 2e-5
        assert row["correction_masked_share"] == 0.0
        assert abs(row["correction_weight"] - 1.0) < 0.1
        traced = [trace for _, trace in traces_of(tmp_path, row["step"])]
        for number in range(2):
            of_step = [trace["train_logprobs"] for trace in traced if trace["optimizer_step"] == number]
            assert sum(x is not None for logprobs in of_step for x in logprobs) == 300


def test_a_mixture_of_domains_trains_each_with_its_reward_and_budget_and_resumes_only_as_what_it_was(
    inputs: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) | {"domain": "physics"} for line in (inputs / "data/train.jsonl").open()][:20]
    physics = tmp_path / "physics.jsonl"
    physics.write_text("".join(json.dumps(row | {"id": f"p{i}"}) + "\n" for i, row in enumerate(rows)))
    mixture = f'data.train={{"{inputs}/data/train.jsonl" = 2, "{physics}" = 1}}'
    options = ["--set", mixture, "--set", "reward.domains.physics=stem"]
    options += ["--set", "budget.domains={tasks = 0.35, physics = 0.65}", "--set", "reward.timeout_seconds=300"]
    said = finish(command(inputs, tmp_path, "train", *options, "--set", "train.steps=1"))
    assert "the weights of data.train only say how files of the same domain mix" in " ".join(said.split())
    finish(command(inputs, tmp_path, "train", *options, "--resume", "--set", "train.steps=2"))
    rows = rows_of(tmp_path)
    assert {key for row in rows for key in row if key.startswith("reward/")} == {"reward/tasks", "reward/physics"}
    for row in rows:
        assert (row["num_loss_tokens"], row["num_loss_tokens/tasks"], row["num_loss_tokens/physics"]) == (300, 105, 195)
    # Each domain has gone through the one order by itself, the resumed run from where the first one was.
    order, _ = load_stream(RlData(train={inputs / "data/train.jsonl": 2, physics: 1}), seed=1).take(0, 60)
    taken: dict[str, list[int]] = {"tasks": [], "physics": []}
    for step in range(2):
        for line in (tmp_path / f"run/rollouts/step_{step:06d}.jsonl").open():
            position = json.loads(line)["position"]
            if position not in taken[order[position].domain]:
                taken[order[position].domain].append(position)
    for domain, positions in taken.items():
        assert len(positions) > 1
        assert sorted(positions) == [i for i, prompt in enumerate(order) if prompt.domain == domain][: len(positions)]
    said = finish(command(inputs, tmp_path, "train", *options, "--resume", "--set", "seed=2"), code=2)
    assert "are not those that this run began with" in said
    assert "seed is 2 and was 1" in said
    # The refused start has changed nothing in the run's folder.
    assert load_config(RlConfig, tmp_path / "run/config.toml").seed == 1


def test_router_replay_trains_on_the_servers_experts(inputs: Path, whole: Path, tmp_path: Path) -> None:
    # Two ranks, so that experts travel; responses that are carried over to the next step keep theirs.
    options = ["train.steps=2", "rollout.router_replay=true"]
    finish(command(inputs, tmp_path, "train", "--nproc", "2", *(o for x in options for o in ("--set", x))))
    rows = rows_of(tmp_path)
    assert rows[0]["num_carried"] > 0
    assert "router_replay_changed_share" not in rows_of(whole)[0]
    # The same weights in the same precision choose the same experts.
    assert rows[0]["router_replay_changed_share"] == 0.0
    assert rows[0]["num_generated_tokens"] == rows_of(whole)[0]["num_generated_tokens"]
    assert rows[0]["entropy"] == pytest.approx(rows_of(whole)[0]["entropy"], rel=1e-5)
    # Those of carried responses were chosen by other weights.
    assert 0.0 <= rows[1]["router_replay_changed_share"] < 0.1
    assert max(row["logprob_difference_max"] for row in rows) < 2e-5


def test_dynamic_sampling_that_finds_nothing_says_so(inputs: Path, tmp_path: Path) -> None:
    options = ["--set", "algorithm.name=dapo", "--set", "budget.max_waves=2"]  # a random model is never right
    said = finish(command(inputs, tmp_path, "train", *options), code=2)
    assert "still lacks 4 groups after 2 waves (budget.max_waves), of 8 groups 8 had equal rewards" in said


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(inputs: Path, whole: Path, tmp_path: Path) -> None:
    # Stop at step 2 by configuration, then ask for all 4: the run continues from its checkpoint.
    finish(command(inputs, tmp_path, "train", "--set", "train.steps=2"))
    finish(command(inputs, tmp_path, "train"), code=2)  # refuses to write over a run
    finish(command(inputs, tmp_path, "train", "--resume"))
    same = ("reward", "num_loss_tokens", "loss", "entropy", "kl", "grad_norm", "num_carried", "num_generated_tokens")
    for found, expected in zip(rows_of(tmp_path), rows_of(whole), strict=True):
        assert {k: found[k] for k in same} == {k: expected[k] for k in same}


def test_a_resumed_run_says_what_it_does_not_find_as_it_was(inputs: Path, tmp_path: Path) -> None:
    config, model = tmp_path / "sft.toml", Path(shutil.copytree(inputs / "model", tmp_path / "model"))
    config.write_text(
        f'run_dir = "{tmp_path}/sft"\n[model]\npath = "{model}"\n'
        f'[data]\ntrain = "{inputs}/data/sft.jsonl"\nbatch_tokens = 400\n'
        "[train]\nsteps = 2\nmicro_batch_tokens = 400\n"
    )
    arguments = [PYTHON, "-m", "megatron_rl.cli", "sft", str(config)]
    assert "warning" not in finish(arguments)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
    arguments += ["--resume", "--set"]
    said = finish([*arguments, "train.steps=3"])
    assert f"warning: tokenizer_config.json of {model}: changed since this checkpoint was made" in said
    assert "changed since this checkpoint" not in finish([*arguments, "train.steps=4"])  # the newest has it so
    shutil.rmtree(tmp_path / "sft/checkpoints")
    said = finish([*arguments, "train.steps=4"])
    assert "so the run goes on from step 0; the 4 steps in metrics.jsonl are trained again" in said


def test_two_context_parallel_ranks_train_the_steps_of_one_process(inputs: Path, whole: Path, tmp_path: Path) -> None:
    # Half the cap on each of two ranks: the same micro-batches, and so the same balance loss.
    options = ["train.steps=2", "parallel.context=2", "train.micro_batch_tokens=64"]
    finish(command(inputs, tmp_path, "train", "--nproc", "2", *(o for option in options for o in ("--set", option))))
    for found, expected in zip(rows_of(tmp_path), rows_of(whole)[:2], strict=True):
        for name in ("reward", "num_loss_tokens", "num_forward_tokens", "num_generated_tokens"):
            assert found[name] == expected[name], name
        for name in ("loss", "entropy", "kl", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    for (row, trace), (expected_row, expected) in zip(traces_of(tmp_path, 0), traces_of(whole, 0), strict=True):
        assert row == expected_row
        logprobs = [x for x in expected.pop("train_logprobs") if x is not None]
        assert trace.pop("train_logprobs")[: len(logprobs)] == pytest.approx(logprobs, abs=2e-4)
        assert trace == expected


def processes_with(marker: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if marker in " ".join(p.info["cmdline"] or [])]


def addresses_listened_on(process: psutil.Process) -> set[str]:
    """Return the addresses that a run listens on: those of the process and of the servers and ranks below it."""
    sockets = []
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets += one.net_connections("inet")
    return {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}


def test_sigkill_of_the_launcher_leaves_no_process_and_resume_goes_on(inputs: Path, tmp_path: Path) -> None:
    options = ["--set", "train.steps=100000", "--set", "train.save_every=1", "--set", "parallel.tensor=2"]
    arguments = command(inputs, tmp_path, "train", "--nproc", "2", *options)
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(arguments, stderr=log, stdout=log)
    try:
        wait_until(lambda: (tmp_path / "run/checkpoints/latest").exists(), "there is a checkpoint")
        assert len(processes_with(str(tmp_path))) >= 3  # the launcher and two ranks; the server names the model instead
        server = int((tmp_path / "run/server_0.pid").read_text())
        assert addresses_listened_on(psutil.Process(launcher.pid)) == {"127.0.0.1"}
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        wait_until(lambda: not processes_with(str(tmp_path)), "its processes have ended")
        wait_until(lambda: not psutil.pid_exists(server), "its server has ended")
    finally:
        for process in processes_with(str(tmp_path)):
            process.kill()
    done = len(rows_of(tmp_path))
    options[1] = f"train.steps={done + 1}"
    finish(command(inputs, tmp_path, "train", "--nproc", "2", "--resume", *options))
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(done + 1))


def test_ctrl_c_saves_stops_the_server_and_asks_for_another_run(inputs: Path, tmp_path: Path) -> None:
    options = [o for option in ("train.steps=100000", *SHARED_GPUS) for o in ("--set", option)]
    process = subprocess.Popen(command(inputs, tmp_path, "train", *options), stderr=subprocess.PIPE)
    wait_until(lambda: has_steps(tmp_path, 2), "two steps are done")
    server = int((tmp_path / "run/server_0.pid").read_text())
    with (
        pytest.raises(ValueError, match="another process is writing to .*run; wait"),
        sole_writer(tmp_path / "run", ""),
    ):
        pass
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=600)
    assert process.returncode == 75, message[-2000:]
    assert not psutil.pid_exists(server)
    saved = json.loads(
        (tmp_path / "run/checkpoints" / (tmp_path / "run/checkpoints/latest").read_text() / "driver.json").read_text()
    )
    assert saved["step"] == len(rows_of(tmp_path))


# Rank 0 waits for its server until the signal comes.
NEVER_READY = """
import os
if os.environ.get("RANK") == "0":
    from megatron_rl.rollout.server import GenerationServer
    GenerationServer.is_ready = lambda server: False
"""


def test_a_stop_before_the_first_step_has_nothing_to_save(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NEVER_READY)
    process = subprocess.Popen(
        command(inputs, tmp_path, "train", "--nproc", "2"),
        env=os.environ | {"PYTHONPATH": f"{tmp_path}/site:{ROOT}"},
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: (tmp_path / "run/server_0.pid").exists(), "there is a server")
    server = int((tmp_path / "run/server_0.pid").read_text())
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=600)
    assert process.returncode == 130, message[-2000:]
    assert b"Traceback" not in message
    assert not psutil.pid_exists(server)
    assert not (tmp_path / "run/checkpoints/latest").exists()
    assert not has_steps(tmp_path, 1)


def test_a_run_directory_that_another_run_holds_is_left_alone_by_every_rank(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with sole_writer(run, "wait"):
        said = finish(command(inputs, tmp_path, "train", "--resume", "--nproc", "2"), code=2)
    assert said.count(f"another process is writing to {run}; wait for it, or set run_dir to a new folder") == 1
    assert "Traceback" not in said, said
    assert list(run.iterdir()) == []


def test_a_clean_stop_of_several_ranks_keeps_its_exit_code(inputs: Path, tmp_path: Path) -> None:
    options = ["--nproc", "2", "--set", "train.steps=100000"]
    process = subprocess.Popen(command(inputs, tmp_path, "train", *options), stderr=subprocess.PIPE)
    wait_until(lambda: has_steps(tmp_path, 1), "a step is done")
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=600)
    assert process.returncode == 75, message[-2000:]
    assert b"Traceback" not in message
    assert (tmp_path / "run/checkpoints/latest").exists()


def test_a_server_that_cannot_be_kept_alive_ends_the_run_with_its_last_words(inputs: Path, tmp_path: Path) -> None:
    options = ["--set", "train.steps=100000", "--set", "rollout.max_restarts=0"]
    process = subprocess.Popen(command(inputs, tmp_path, "train", *options), stderr=subprocess.PIPE)
    wait_until(lambda: has_steps(tmp_path, 1), "a step is done")
    os.kill(int((tmp_path / "run/server_0.pid").read_text()), signal.SIGKILL)
    _, message = process.communicate(timeout=600)
    assert process.returncode == 1
    assert b"the generation server ended with code -9" in message
    assert b"rollout.max_restarts" in message
    assert b"Traceback" not in message


def test_the_warm_start_works_from_the_command_line(inputs: Path, tmp_path: Path) -> None:
    config = tmp_path / "sft.toml"
    config.write_text(
        f'run_dir = "{tmp_path}/sft"\n[model]\npath = "{inputs}/model"\n[optimizer]\nlearning_rate = 3e-3\n'
        f'[data]\ntrain = "{inputs}/data/sft.jsonl"\nbatch_tokens = 1000\n'
        "[train]\nsteps = 12\nmicro_batch_tokens = 400\n"
    )
    finish([PYTHON, "-m", "megatron_rl.cli", "sft", str(config)])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.3


def test_a_damaged_checkpoint_and_a_full_disk_stop_a_run_or_cost_it_a_checkpoint_as_configured(
    inputs: Path, tmp_path: Path
) -> None:
    config, disk = tmp_path / "sft.toml", tmp_path / "sft/checkpoints"
    config.write_text(
        f'run_dir = "{tmp_path}/sft"\n[model]\npath = "{inputs}/model"\n'
        f'[data]\ntrain = "{inputs}/data/sft.jsonl"\nbatch_tokens = 400\n'
        "[train]\nsteps = 4\nsave_every = 2\nmicro_batch_tokens = 400\n"
    )
    arguments = [PYTHON, "-m", "megatron_rl.cli", "sft", str(config)]
    with small_disk(disk, 2**28) as mounted:
        if not mounted:
            pytest.skip(NO_MOUNT)
        finish(arguments)
        weights = disk / "step_4/megatron/__0_0.distcp"
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        usage = shutil.disk_usage(disk)
        resize(disk, usage.used + len(content) // 2)
        arguments += ["--resume", "--set", "train.steps=6"]
        said = finish(arguments, code=1)
        assert "damaged: step_4 (megatron/__0_0.distcp has checksum" in said
        assert "going on from step_2 instead" in said
        assert f"checkpoint {disk}/step_4 was not written: too little room (" in said
        assert "Traceback" not in said
        said = finish([*arguments, "--set", "train.on_save_error=continue"])
        assert "damaged: " not in said
        rows = [json.loads(line) for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
        assert [(row["step"], row["num_failed_saves"]) for row in rows[2:]] == [(2, 0), (3, 0), (4, 1), (5, 1)]
        assert sorted(path.name for path in disk.iterdir()) == ["latest", "step_2", "step_4.damaged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "model.path=/nowhere"], "model directory /nowhere does not exist"),
        (["--set", "parallel.tensor=3", "--nproc", "3"], "parallel.tensor 3 does not divide num_attention_heads 4"),
        (["--set", "budgt.tokens=3"], "unknown key budgt; did you mean"),
        (
            ["--set", "reward.domains.taskz=math"],
            "no prompt of data.train has that domain (tasks); rename it, or take it out. Did you mean",
        ),
        (["--set", "budget.tokens=10"], "budget.tokens 10 is smaller than one response can be"),
        (["--set", "data.train=/nowhere.jsonl"], "data file /nowhere.jsonl does not exist"),
        (["--set", "rollout.max_running_requests=9000000"], "rollout.engine 'embedded' generates on the CPU"),
        (
            ["--set", "rollout.max_running_requests=900000000", "--set", "rollout.token_deadline_seconds=1e6"],
            "this run needs about",
        ),
        (
            [
                "--set",
                "rollout.router_replay=true",
                "--set",
                "rollout.engine=sglang",
                "--set",
                "model.trust_remote_code=true",
            ],
            "rollout.router_replay needs a GPU for SGLang",
        ),
        (["--set", "rollout.max_prompt_tokens=4"], "have more tokens than rollout.max_prompt_tokens = 4"),
    ],
)
def test_a_users_mistake_ends_in_one_message_and_exit_code_2(
    inputs: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    stderr = finish(command(inputs, tmp_path, "train", *options), code=2)
    assert message in stderr
    assert "Traceback" not in stderr


def in_parts(row: dict, kind: int) -> dict:
    """Return a recorded row as it is, as a trajectory of two turns, or as one of two segments."""
    ids, logprobs = row["output_ids"], row["rollout_logprobs"]
    half = len(ids) // 2
    if not kind or not half:
        return row
    whole = {name: row.pop(name) for name in ("prompt_token_ids", "output_ids", "rollout_logprobs")}
    if kind == 1:
        return row | {"segments": [whole | {"turns": [[0, half], [half, len(ids)]]}]}
    first = {"output_ids": ids[:half], "rollout_logprobs": logprobs[:half]}
    second = {"output_ids": ids[half:], "rollout_logprobs": logprobs[half:]}
    prompt = whole["prompt_token_ids"]
    return row | {
        "segments": [{"prompt_token_ids": prompt} | first, {"prompt_token_ids": prompt + ids[:half]} | second]
    }


def test_recorded_rollouts_train_as_the_servers_would_have(inputs: Path, whole: Path, tmp_path: Path) -> None:
    rollouts = tmp_path / "rollouts.jsonl"
    finish(command(inputs, tmp_path, "rollout", "--prompts", "6", "--output", str(rollouts)))
    assert "exists; add --resume" in finish(command(inputs, tmp_path, "rollout", "--output", str(rollouts)), code=2)
    # A kill in the middle of a group's lines: that group is sampled again, to the same tokens.
    lines = rollouts.read_text().splitlines(keepends=True)
    rollouts.write_text("".join(lines[:-2]) + lines[-2][:40])
    finish(command(inputs, tmp_path, "rollout", "--prompts", "6", "--output", str(rollouts), "--resume"))
    assert sorted(rollouts.read_text().splitlines(keepends=True)) == sorted(lines)
    other = ["--resume", "--set", "rollout.temperature=0.5", "--set", "seed=99"]
    message = finish(command(inputs, tmp_path, "rollout", "--output", str(rollouts), *other), code=2)
    assert "rollouts.jsonl holds responses with other settings: seed was " in message
    assert "rollout.temperature was 1.0, now 0.5; data.digest was " in message
    # These are the groups that the whole run sampled in its first step, in whatever order they were completed. All of
    # the budget for one domain is no other budget.
    options = ["--set", "train.steps=1", "--set", "budget.domains={tasks = 1.0}"]
    finish(command(inputs, tmp_path, "train", "--rollouts", str(rollouts), *options))
    (row,), expected = rows_of(tmp_path), rows_of(whole)[0]
    for name in ("reward", "loss", "grad_norm", "num_loss_tokens", "logprob_difference_p999"):
        assert row[name] == expected[name], name
    # Cut into turns and segments, whose prompts are what came before, the same tokens are trained after the same ones.
    # Sorted, since a line's kind is by its number, and groups come in the order in which they were completed.
    cut = [in_parts(json.loads(line), i % 3) for i, line in enumerate(sorted(lines))]
    rollouts.write_text("".join(json.dumps(row) + "\n" for row in cut))
    finish(command(inputs, tmp_path / "parts", "train", "--rollouts", str(rollouts), *options))
    (found,) = rows_of(tmp_path / "parts")
    for name in ("reward", "num_loss_tokens", "num_trained_samples", "response_tokens_mean"):
        assert found[name] == row[name], name
    assert found["entropy"] == pytest.approx(row["entropy"], rel=1e-6)
    assert found["logprob_difference_max"] < 2e-5
    assert found["num_forward_tokens"] > row["num_forward_tokens"]
    assert 1 < found["segments_mean"] < found["turns_mean"] < 2
    assert found["masked_token_share"] == found["no_token_share"] == 0
    message = finish(command(inputs, tmp_path, "train", "--rollouts", str(tmp_path / "none"), "--resume"), code=2)
    assert "none does not exist" in message


def test_weights_that_cannot_be_written_end_every_rank_at_once_with_the_reason(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.hf.partial").write_text("in the way")
    options = ["--nproc", "2", "--set", "parallel.tensor=2", "--set", "train.steps=1"]
    message = finish(command(inputs, tmp_path, "train", *options), code=1)
    assert "weights could not be written to" in message
    assert "rank 0" in message
    assert "Traceback" not in message


def test_a_port_in_use_is_named(inputs: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        stderr = finish(command(inputs, tmp_path, "train", "--set", f"rollout.port={port}"), code=2)
    assert f"rollout.port {port} cannot be used" in stderr
