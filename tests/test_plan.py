"""Tests `megatron-rl plan`: Ling-lite's numbers computed by hand, and all numbers that do not divide told at once."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import TINY_CONFIG

from megatron_rl.config.layout import Layout
from megatron_rl.families import architecture_of
from megatron_rl.memory import stage_parameters
from megatron_rl.plan.show import run_plan
from megatron_rl.plan.text import _step

ROOT = Path(__file__).parents[1]

LING_LITE = TINY_CONFIG | {
    "vocab_size": 126464,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_shared_experts": 2,
    "first_k_dense_replace": 0,
    "norm_head": True,
    "max_position_embeddings": 16384,
}
CONFIG = """
run_dir = "{folder}/run"
[model]
path = "{folder}/model"
dtype = "bfloat16"
trust_remote_code = true
[data]
train = "nowhere.jsonl"
[parallel]
tensor = 2
expert = 8
[rollout]
engine = "sglang"
prompts_per_step = 512
samples_per_prompt = 16
max_prompt_tokens = 2048
max_response_tokens = 14336
[budget]
tokens = 409600
scope = "per_gpu"
[train]
steps = 100
micro_batch_tokens = 16384
"""
# The parameters of one layer: queries, keys and values of 24 heads of 128; attention's output; both norms; and so on.
ATTENTION, NORMS = 2048 * 3072 + 2048 * 2048, 2 * 2048
EXPERT, ROUTER, SHARED = 3 * 2048 * 1408, 64 * 2048, 3 * 2048 * 2816
VOCABULARY = 126464 * 2048


def written(folder: Path) -> Path:
    """Write the configuration and the config.json of its model."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(LING_LITE))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder / "config.toml"


def plan(folder: Path, *options: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """Run `plan`. Return its JSON and its stderr."""
    command = [sys.executable, "-m", "megatron_rl.cli", "plan", str(written(folder)), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return (json.loads(done.stdout) if done.stdout else {}), done.stderr


def test_the_papers_run_on_256_gpus(tmp_path: Path) -> None:
    found, _ = plan(tmp_path, "--nodes", "34", "--serving-nodes", "2", "--set", "rollout.max_running_requests=32")
    # 28 layers of 16.8 B parameters, of which 6 of 64 experts are active in each.
    assert found["model"] == {"parameters": 16_801_974_272, "active_parameters": 2_753_153_024}
    layout = found["layout"]
    assert (layout["world_size"], layout["data"]) == (256, 128)
    assert found["budget"] == {
        "responses_of_first_phase": 8_192,
        "tokens": 409_600,
        "scope": "per_gpu",
        "step_tokens": 104_857_600,
        "optimizer_steps": 1,
        "phase_tokens": 104_857_600,
        "filling_mean_tokens": 12_800.0,
        "min_responses": 7_315,  # 104,857,600 / 14,336 = 7,314.3
        "tokens_per_data_rank": 819_200,
        "min_micro_batches": 50,
    }
    assert found["memory"]["serving_gpu"] == {
        "server_weights": 2 * 16_801_974_272,
        "server_cache": 32 * 16_384 * 28 * 2 * 512 * 2,  # slots, tokens, layers, keys and values of 4 heads, bf16
        "total": 2 * 16_801_974_272 + 32 * 16_384 * 57_344,
    }
    assert found["launch"] == [
        "SERVING_NODES=2 sbatch --nodes=34 --gpus-per-node=8 examples/ring_lite/slurm/separate.sbatch "
        f"{tmp_path}/config.toml --set 'rollout.max_running_requests=32'"
    ]
    assert not (tmp_path / "run").exists(), "a plan makes nothing"


def text_in_process(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str, **options: Any) -> str:
    names = ("nodes", "gpus_per_node", "serving_nodes", "gpu_memory_gb", "rates")
    values = {"json": False, "suggest": False} | dict.fromkeys(names) | options
    run_plan(argparse.Namespace(config=config, set=list(overrides), **values))
    return capsys.readouterr().out


def run_in_process(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return dict(json.loads(text_in_process(capsys, config, *overrides, json=True, **options)))


def test_the_shipped_stage_1_plans_the_papers_run_without_any_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = Path("examples/ring_lite/paper_256gpu/stage1_math.toml")
    found = run_in_process(capsys, config)
    assert found["problems"] == []
    rates = "examples/ring_lite/rates/h800_assumed.toml"
    cluster = {"nodes": 32, "gpus_per_node": 8, "serving_nodes": 0, "gpu_memory_gb": 80.0, "rates": rates}
    assert found["cluster"] == cluster
    assert found["model"]["parameters"] == 16_801_974_272
    assert found["shape"] == "examples/ring_lite/ling_lite_1_5/config.json"
    budget = found["budget"]
    assert (budget["tokens"], budget["scope"], budget["step_tokens"]) == (409_600, "per_gpu", 409_600 * 256)
    assert (budget["responses_of_first_phase"], budget["filling_mean_tokens"]) == (512 * 16, 12_800.0)
    # 55 % of what the trainer's state leaves free of 80 GiB, for a quarter of the weights and the cache.
    memory = found["memory"]["training_gpu"]
    state = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert memory["server_weights"] == 2 * 16_801_974_272 // 4
    assert memory["server_weights"] + memory["server_cache"] == round(0.55 * (80 * 2**30 - state))
    assert found["servers"]["full_length_responses"] == memory["server_cache"] * 4 // (24_576 * 57_344)
    assert memory["total"] < 80 * 2**30
    assert found["launch"][1] == f"sbatch --nodes=32 --gpus-per-node=8 examples/ring_lite/slurm/train.sbatch {config}"
    step = found["step"]
    assert step["num_loss_tokens"] == {"mean": 409_600 * 256, "variation": 0.0}
    # The share of 104,857,600 response tokens and prompts of 200 (1/64 of the mean response each), in 5 forward passes
    # of 2 FLOPs per active parameter, without the embedding; attention of the mean length alone adds less than it has.
    matmuls = 5 * 2 * (2_753_153_024 - 126_464 * 2048) * (409_600 * (1 + 200 / 12_800)) / 3e14
    attention = 5 * 2 * 28 * 2048 * 13_000 * 409_600 / 3e14
    assert matmuls + attention < step["train_seconds"]["mean"] < matmuls + 2 * attention + 2
    # Options come before the file.
    apart = {"nodes": 34, "serving_nodes": 2, "gpu_memory_gb": 192.0}
    found = run_in_process(capsys, config, "sync.transport=distributed", **apart)
    assert (found["problems"], found["layout"]["world_size"]) == ([], 256)
    assert found["memory"]["serving_gpu"]["total"] == pytest.approx(0.55 * 192 * 2**30, abs=1)


def test_router_replay_says_its_bytes_and_refuses_more_than_rank_0_can_carry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, replay = written(tmp_path), "rollout.router_replay=true"
    # 104,857,600 tokens x 28 layers x 6 experts are bytes that rank 0 keeps; int32 in base64 they are 16/3 as many.
    found = run_in_process(capsys, config, replay, nodes=32, gpu_memory_gb=0)
    assert found["router_replay"] == {
        "tokens": 104_857_600,
        "wire_bytes": 93_952_409_600,
        "kept_bytes": 17_616_076_800,
    }
    (problem,) = found["problems"]
    assert "sends 94.0 GB through rank 0 in every step, for 104,857,600 tokens x 28 layers x 6 experts" in problem
    assert "set rollout.router_replay = false, or sample at most 27,901,785 tokens" in problem
    told = text_in_process(capsys, config, replay, nodes=8, gpu_memory_gb=0)
    assert "replay    23.5 GB of routed experts through rank 0 in a step, of which it keeps 4.4 GB" in told
    assert run_in_process(capsys, config, replay, nodes=8, gpu_memory_gb=0)["problems"] == []
    assert "router_replay" not in run_in_process(capsys, config, nodes=8, gpu_memory_gb=0)


def test_a_predicted_step_says_what_gpus_wait_for_rank_0_by_part() -> None:
    seconds = {"rollout": 300.0, "train": 50.0, "sync": 15.0, "switch": 20.0, "host": 70.0, "other": 1.0}
    step = {f"{part}_seconds": {"mean": value} for part, value in seconds.items()}
    step |= {
        "step_seconds": {"mean": 456.0},
        "tokens_per_second": {"mean": 1000.0, "variation": 0.01},
        "tokens_per_second_per_gpu": 10.0,
        "run_steps": 100,
        "host": {"schedule": 0.25, "rollouts_file": 69.75, "journal": 0.0},
        "idle": {"host": 0.153, "sync": 0.03},
        "busy": 0.817,
        "rates": "rates.toml",
        "lengths": "assumed",
    }
    lines = list(_step({"step": step}))
    assert "rollout 300, train 50, sync 15, switch 20, host 70, other 1" in lines[0]
    assert lines[2] == "GPUs wait for rank 0's processor: rollouts file 69.8, schedule 0.25"
    assert "host 15%" in lines[3]
    assert len(list(_step({"step": step | {"host": {}}}))) == len(lines) - 1


def test_a_predicted_step_says_what_its_rates_do_not_have(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config, shape = Path("examples/ring_lite/one_node_8gpu.toml"), "examples/ring_lite/ling_lite_1_5/config.json"
    told = text_in_process(capsys, config)
    assert "engines of 4 GPUs" not in told
    assert "host.teacher" not in told
    smaller = ["rollout.servers=4", 'rollout.sglang_arguments=["--tp-size", "2", "--mem-fraction-static", "0.8"]']
    assert "these rates are of engines of 4 GPUs; here one has 2" in text_in_process(capsys, config, *smaller)
    teacher = ["distillation.path=missing", f"distillation.shape={shape}", 'distillation.urls=["http://elsewhere:1"]']
    assert "the teacher's seconds are not counted" in text_in_process(capsys, config, *teacher)


def test_what_cannot_be_where_servers_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path)

    def problems(*overrides: str, serving: int = 0) -> list[str]:
        options = {"nodes": 2, "serving_nodes": serving, "gpu_memory_gb": 0.0}
        return list(run_in_process(capsys, config, *overrides, **options)["problems"])

    nccl = ("sync.transport=distributed", "sync.backend=nccl")
    (problem,) = problems(*nccl)
    assert problem.startswith("sync.backend 'nccl' is for servers on GPUs of their own")
    assert problems(*nccl, serving=1) == problems("sync.transport=distributed") == problems("sync.transport=ipc") == []
    (problem,) = problems("sync.transport=ipc", serving=1)
    assert problem.startswith("sync.transport 'ipc' is for SGLang servers that this run starts")
    (problem,) = problems("rollout.release_memory=true", serving=1)
    assert problem.startswith("rollout.release_memory is for servers that this run starts")


def test_embedded_servers_are_on_the_cpu_and_for_small_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path)
    embedded = ("rollout.engine=embedded", "rollout.servers=2")
    (problem,) = run_in_process(capsys, config, *embedded)["problems"]
    # 2 x 2.75e9 operations for each of 64 responses, at 60e9 a second.
    assert problem.startswith("rollout.engine 'embedded' generates on the CPU, and for 2.75 B active parameters")
    assert "about 5.9 s there, more than rollout.token_deadline_seconds 1; set rollout.engine = 'sglang'" in problem
    slow = (*embedded, "rollout.token_deadline_seconds=10")
    assert "servers   2 per node, each on the CPU\n" in text_in_process(capsys, config, *slow, gpu_memory_gb=192.0)
    found = run_in_process(capsys, config, *slow, gpu_memory_gb=192.0)
    assert found["problems"] == []
    assert not found["memory"]["training_gpu"].keys() & {"server_weights", "server_cache"}
    # Two servers with old and new weights, and a cache in fp32 of 64 slots of 16,384 tokens.
    assert found["memory"]["host"]["server_weights"] == 2 * 2 * 2 * 16_801_974_272
    assert found["memory"]["host"]["server_cache"] == 2 * 64 * 16_384 * 28 * 2 * 512 * 4


def test_host_memory_of_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, parameters = written(tmp_path), 16_801_974_272
    gpus = {"gpu_memory_gb": 0.0}
    found = run_in_process(capsys, config, **gpus)["memory"]["host"]
    assert found == {"checkpoint": 14 * parameters, "exports": 4 * parameters, "total": 18 * parameters}
    options = ("algorithm.kl_coefficient=0.1", "optimizer.offload_fraction=0.25", "sync.transport=distributed")
    found = run_in_process(capsys, config, *options, nodes=4, **gpus)["memory"]["host"]
    weights = run_in_process(capsys, config, nodes=4, **gpus)["memory"]["training_gpu"]["weights"]
    assert found == {
        "checkpoint": 14 * parameters // 4,
        "optimizer": 12 * parameters // 4 // 4,
        "reference": 2 * 8 * weights,
        "buckets": 9 * 512 * 2**20,  # two on the first rank
        "total": found["total"],
    }
    turns = ("rollout.release_memory=true", "train.offload_while_generating=true")
    assert run_in_process(capsys, config, *turns, **gpus)["memory"]["host"]["optimizer"] == 12 * parameters


def test_gpus_that_do_not_generate_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path)
    small = "rollout.max_running_requests=8"
    by_default = run_in_process(capsys, config, small)["servers"]
    assert (by_default["per_node"], by_default["gpus_each"], by_default["idle_gpus"]) == (8, 1, 0)
    text = text_in_process(capsys, config, small, "rollout.servers=1")
    assert "7 of a node's 8 GPUs do not generate: raise rollout.servers, or --tp-size" in text
    # On nodes of their own job.sh starts as many as fit, whatever rollout.servers says.
    options = ("rollout.sglang_arguments=['--tp-size', '3']", "rollout.servers=7", small)
    apart = run_in_process(capsys, config, *options, nodes=3, serving_nodes=1, gpu_memory_gb=192.0)["servers"]
    assert (apart["per_node"], apart["gpus_each"], apart["idle_gpus"]) == (2, 3, 2)


def test_a_serving_node_starts_as_many_processes_as_servers_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path)
    parts = "sed -n '/ each=/,/ per_node=/p' " + str(ROOT / "examples/ring_lite/slurm/job.sh")
    job = f'set -euo pipefail; gpus=8; logs={tmp_path}; eval "$({parts})"; echo $per_node'
    fast = "rollout.token_deadline_seconds=10"
    for override, expected in [
        ("rollout.sglang_arguments=['--tp-size', '4']", "2"),
        ("rollout.sglang_arguments=['--tp=3']", "2"),
        ("rollout.sglang_arguments=[]", "8"),
        ("rollout.engine=embedded", "8"),
        ("rollout.sglang_arguments=['--tp-size', '16']", "0"),  # which the script refuses
    ]:
        options = {"nodes": 2, "serving_nodes": 1, "gpu_memory_gb": 0.0}
        text = text_in_process(capsys, config, override, fast, json=True, **options)
        (tmp_path / "plan.json").write_text(text)
        done = subprocess.run(["bash", "-c", job], capture_output=True, text=True, check=True)
        assert done.stdout == f"{expected}\n", override


def test_servers_of_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path)

    def planned(servers: int, arguments: str) -> dict[str, Any]:
        options = (f"rollout.servers={servers}", f"rollout.sglang_arguments={arguments.split()}")
        return run_in_process(capsys, config, *options, "model.recompute=true")

    # Over 8 GPUs each has an eighth of the weights, and one of 4 key-value heads.
    memory = planned(1, "--tp-size 8")["memory"]["training_gpu"]
    assert memory["server_weights"] == 2 * 16_801_974_272 // 8
    assert memory["server_cache"] == 64 * 16_384 * 57_344 // 4
    (problem,) = planned(4, "--tp-size 4 --mem-fraction-static 0.3")["problems"]
    assert problem.startswith("rollout.servers 4 x --tp-size 4 is more than the 8 GPUs of a node")
    (problem,) = planned(2, "--tp-size 4 --mem-fraction-static 0.1")["problems"]
    assert problem.startswith("--mem-fraction-static 0.1 leaves no cache for one response of 16384 tokens")


def test_servers_of_a_teacher_are_where_training_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path)
    teacher = (f"distillation.path={tmp_path}/model", "distillation.dtype=bfloat16", "model.recompute=true")
    # 16 sequences of one token more than the policy's, which SGLang wants spare.
    parts = {"teacher_server_weights": 2 * 16_801_974_272, "teacher_server_cache": 16 * 16_385 * 57_344}

    def places(*changes: str, **options: int) -> list[str]:
        memory = run_in_process(capsys, config, *teacher, *changes, **options)["memory"]
        assert all(held["total"] == sum(held.values()) - held["total"] for held in memory.values())
        return [name for name, held in memory.items() if parts.items() <= held.items()]

    assert places() == ["training_gpu"]
    assert places("rollout.release_memory=true") == ["training_gpu", "serving_gpu"]
    assert places(nodes=2, serving_nodes=1) == ["training_gpu"]
    assert places('distillation.urls=["http://elsewhere:1"]') == []
    changes = ("rollout.engine=embedded", "rollout.token_deadline_seconds=1000", "distillation.servers=3")
    embedded = run_in_process(capsys, config, *teacher, *changes, gpus_per_node=8)
    assert embedded["memory"]["host"]["teacher_server_weights"] == 3 * parts["teacher_server_weights"]


def test_the_shape_of_a_model_that_is_not_there_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, model = written(tmp_path), tmp_path / "model"
    for shape in (model, model / "config.json"):
        found = run_in_process(capsys, config, "model.path=later", f"model.shape={shape}")
        assert found["shape"] == str(model / "config.json")
        assert found["model"]["parameters"] == 16_801_974_272
    assert "shape" not in run_in_process(capsys, config, "model.shape=/nowhere"), "the model itself comes first"
    with pytest.raises(ValueError, match="model.shape /nowhere is neither a config.json nor a folder that has one"):
        run_in_process(capsys, config, "model.path=later", "model.shape=/nowhere")


def test_a_plan_of_what_only_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path)
    model = f'[model]\npath = "{tmp_path}/model"\ndtype = "bfloat16"\ntrust_remote_code = true\n'
    sampling = tmp_path / "sampling.toml"
    rollout = "prompts_per_step = 100\nsamples_per_prompt = 4\nmax_response_tokens = 8192\nmax_prompt_tokens = 2048\n"
    sampling.write_text(
        f'run_dir = "r"\n{model}[data]\ntrain = "x"\n[rollout]\nengine = "sglang"\nservers = 8\n{rollout}'
    )
    found = run_in_process(capsys, sampling, "rollout.max_running_requests=16")
    assert (found["problems"], found["launch"]) == (
        [],
        [f"megatron-rl rollout {sampling} --set 'rollout.max_running_requests=16'"],
    )
    assert found["responses"] == {"prompts": 100, "samples": 4, "total": 400}
    assert found["memory"] == {
        "serving_gpu": {
            "server_weights": 2 * 16_801_974_272,
            "server_cache": 16 * 10_240 * 57_344,
            "total": 2 * 16_801_974_272 + 16 * 10_240 * 57_344,
        }
    }
    with pytest.raises(ValueError, match="this command runs on one machine, got --nodes 2"):
        run_in_process(capsys, sampling, nodes=2)

    (tmp_path / "seen.jsonl").write_text("{}\n" * 30)
    evaluation = tmp_path / "evaluation.toml"
    evaluation.write_text(
        f'{model}[rollout]\nengine = "sglang"\nmax_prompt_tokens = 2048\nmax_response_tokens = 8192\n'
        f'[benchmarks.seen]\npath = "{tmp_path}/seen.jsonl"\nsamples = 32\n'
        f'[benchmarks.first]\npath = "{tmp_path}/seen.jsonl"\nsamples = 2\nprompts = 10\n'
        '[benchmarks.unseen]\npath = "nowhere.jsonl"\n'
    )
    found = run_in_process(capsys, evaluation)
    assert {name: one["total"] for name, one in found["responses"]["benchmarks"].items()} == {
        "seen": 960,
        "first": 20,
        "unseen": None,
    }
    assert found["responses"]["total"] == 980
    long = "rollout.max_response_tokens=16384"
    (problem,) = run_in_process(capsys, evaluation, long, gpu_memory_gb=0.0)["problems"]
    assert "= 18432 is over the model's max_position_embeddings 16384" in problem


def test_a_plan_of_a_selection_and_of_a_teacher(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    folder = Path("examples/ring_lite/paper_256gpu")
    found = run_in_process(capsys, folder / "select.toml", "prompts=100", "rollout.samples_per_prompt=3")
    assert found["responses"] == {"prompts": 100, "samples": 3, "total": 300, "of": "each candidate"}
    assert found["memory"]["serving_gpu"]["total"] == round(0.85 * 80 * 2**30)
    assert found["launch"][0].startswith("megatron-rl select ")
    found = run_in_process(capsys, folder / "distill.toml", "rollout.prompts_per_step=100")
    assert found["responses"] == {"prompts": 100, "samples": 4, "total": 400}
    assert not {"memory", "servers", "model"} & found.keys(), "nothing is served here"


def test_memory_of_a_training_gpu(tmp_path: Path) -> None:
    options = ["--nodes", "34", "--serving-nodes", "2", "--set", "rollout.max_running_requests=32"]
    found, _ = plan(tmp_path, *options)
    # Two tensor-parallel ranks share all but norms and routers; eight of 64 experts are on each rank.
    dense = 28 * (ATTENTION // 2 + NORMS + ROUTER + SHARED // 2) + 2 * VOCABULARY // 2 + 2048
    routed = 28 * 8 * EXPERT
    # Residual stream and normalised inputs; rotated q and k, v, output; shared experts; six routed copies;
    # routers.
    per_token = 2 * (4 * 2048 + 2 * 2048 + 2 * 512 + 3 * 2816 + 6 * (2048 + 3 * 1408)) + 33 * 64 + 32 * 6
    layer = 16_384 * per_token // 2
    training = found["memory"]["training_gpu"]
    assert training == {
        "weights": 2 * (dense + routed),
        "gradients": 4 * (dense + routed),
        # 128 ranks hold the same dense parameters, 32 the same experts: 256 / 8.
        "optimizer": 12 * dense // 128 + 12 * routed // 32,
        "activations": 28 * layer,
        # Three chunks, and the weight's gradient in fp32 and bf16.
        # A chunk of logits in fp32 and of their gradient in bf16, the weight's gradient in both, two hidden states.
        "temporary": 512 * 2**20 * 3 // 2 + 6 * VOCABULARY // 2 + 2 * 2 * 16_384 * 2048,
        "total": training["total"],
    }
    assert training["total"] == sum(training.values()) - training["total"]
    options += ["--set", "budget.domains={code = 0.6, science = 0.4}"]
    options += ["--set", "model.recompute=true", "--set", "train.micro_batch_tokens=32768"]
    recomputed, _ = plan(tmp_path, *options)
    assert recomputed["budget"]["domain_tokens"] == {"code": 62_914_560, "science": 41_943_040}
    memory = recomputed["memory"]["training_gpu"]
    assert memory["activations"] == 28 * 32_768 * 2048 * 2 // 2
    # Beside the recomputed layer: gradients of its last product, of its input and its weight,
    # and of three residual streams. The head needs less.
    gradients = 16_384 * (6 * (2048 + 1408) + 3 * 2048) + 8 * 2048 * 1408
    assert memory["temporary"] == 2 * layer + 2 * gradients


def test_one_rank_holds_the_whole_model_and_stages_share_it_out() -> None:
    model = architecture_of(LING_LITE | {"first_k_dense_replace": 1})
    ((dense, routed),) = stage_parameters(model, Layout(world_size=1))
    assert dense + routed == model.num_parameters()
    stages = stage_parameters(model, Layout(world_size=4, pipeline=4))
    assert sum(map(sum, stages)) == model.num_parameters()
    # 27 layers with experts: the first stage has the dense one in place of one of them.
    assert [routed for _, routed in stages] == [n * 64 * EXPERT for n in (6, 7, 7, 7)]
    tied = architecture_of(LING_LITE | {"tie_word_embeddings": True})
    # The last stage has a copy of the embedding.
    assert sum(map(sum, stage_parameters(tied, Layout(world_size=2, pipeline=2)))) == tied.num_parameters() + VOCABULARY
    assert sum(map(sum, stage_parameters(tied, Layout(world_size=1)))) == tied.num_parameters()


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    options = [
        "parallel.tensor=3",
        "parallel.expert=7",
        "rollout.max_prompt_tokens=4096",
        "train.micro_batch_tokens=20000",
    ]
    found, said = plan(tmp_path, *(o for x in options for o in ("--set", x)), code=2)
    assert len(found["problems"]) == 6
    for part in (
        "8 training process(es) cannot be divided by tensor 3",
        "8 training process(es) cannot be divided by expert 7",
        "parallel.tensor 3 does not divide num_attention_heads 16 and num_key_value_heads 4",
        "parallel.tensor must divide shared expert width 2816, got 3",
        "parallel.expert must divide num_experts 64, got 7",
        "max_prompt_tokens + max_response_tokens = 18432 is over the model's max_position_embeddings 16384",
    ):
        assert part in said, part


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "a training gpu needs about"),  # and a server with all slots full beside
        (["--gpu-memory-gb", "0"], 0, ""),
        (["--gpu-memory-gb", "192"], 0, ""),
        (["--nodes", "2", "--serving-nodes", "2"], 2, "leaves no training"),
        (["--set", "budget.tokens=10"], 2, "budget.tokens 10 is smaller than one response can be"),
        (["--set", "model.path=/nowhere"], 2, "model directory /nowhere does not exist"),
    ],
)
def test_what_does_not_fit_is_exit_code_2(tmp_path: Path, options: list[str], code: int, message: str) -> None:
    assert message in plan(tmp_path, *options, code=code)[1]


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    for text in (b"[rollout\n", b"a = '\xff'"):
        (tmp_path / "bad.toml").write_bytes(text)
        command = [sys.executable, "-m", "megatron_rl.cli", "plan", str(tmp_path / "bad.toml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "bad.toml is not valid TOML" in done.stderr) == (2, True), done.stderr


def test_as_text_and_without_torch(tmp_path: Path) -> None:
    plan(tmp_path, "--gpu-memory-gb", "0")
    script = (
        "import sys\nfrom megatron_rl import cli\n"
        f"arguments = ['plan', {str(tmp_path / 'config.toml')!r}, '--nodes', '32', '--gpu-memory-gb', '0']\n"
        "assert cli.main([*arguments, '--set', 'budget.domains={code = 0.6, science = 0.4}']) == 0\n"
        "heavy = {'torch', 'megatron', 'sglang', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "409,600 x 256 = 104,857,600 tokens per optimizer step" in done.stdout
    assert "of them 62,914,560 of code\n          of them 41,943,040 of science\n" in done.stdout
    assert "torchrun --nnodes 32 --nproc_per_node 8" in done.stdout


def test_a_plan_of_fine_tuning(tmp_path: Path) -> None:
    plan(tmp_path, "--gpu-memory-gb", "0")
    config = tmp_path / "config.toml"
    text = f'run_dir = "r"\nmodel.path = "{tmp_path}/model"\nmodel.dtype = "bfloat16"\nparallel.expert = 8\n'
    text += 'data = {train = {"x" = 3, "y" = 1}, batch_tokens = 65536}\noptimizer = {warmup_share = 0.01}\n'
    config.write_text(text + "train = {epochs = 3, micro_batch_tokens = 4096}\n")
    command = [sys.executable, "-m", "megatron_rl.cli", "plan", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"megatron-rl sft {config} --nproc 8" in done.stdout
    assert "3 epochs; the number of optimizer steps follows from the data" in done.stdout
    assert "warm-up over 1.00% of them" in done.stdout
    assert "65,536 tokens at most per optimizer step" in done.stdout
    assert "each data-parallel rank trains 8,192 of them, in at least 2 micro-batches" in done.stdout
    assert "data x 75.0%, y 25.0%" in done.stdout
