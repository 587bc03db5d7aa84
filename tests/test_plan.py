"""`megatron-rl plan`: Ling-lite's numbers, worked out here by hand, and all that does not divide told at once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import TINY_CONFIG

from megatron_rl.config.bailing import BailingConfig
from megatron_rl.layout import Layout
from megatron_rl.memory import stage_parameters

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
# Of one layer: queries, keys and values of 24 heads of 128; the output of attention; both norms; and so on.
ATTENTION, NORMS = 2048 * 3072 + 2048 * 2048, 2 * 2048
EXPERT, ROUTER, SHARED = 3 * 2048 * 1408, 64 * 2048, 3 * 2048 * 2816
VOCABULARY = 126464 * 2048


def plan(folder: Path, *options: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """The plan as JSON, and what was said against it."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(LING_LITE))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    command = [sys.executable, "-m", "megatron_rl.cli", "plan", str(folder / "config.toml"), "--json", *options]
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


def test_memory_of_a_training_gpu(tmp_path: Path) -> None:
    options = ["--nodes", "34", "--serving-nodes", "2", "--set", "rollout.max_running_requests=32"]
    found, _ = plan(tmp_path, *options)
    # Two tensor-parallel ranks share all but norms and routers; eight of 64 experts are on each rank.
    dense = 28 * (ATTENTION // 2 + NORMS + ROUTER + SHARED // 2) + 2 * VOCABULARY // 2 + 2048
    routed = 28 * 8 * EXPERT
    # Residual stream and normalised inputs; q, k, v, rotated q and k, output; shared experts; six routed copies.
    per_token = 2 * (4 * 2048 + 3 * 2048 + 3 * 512 + 3 * 2816 + 6 * (2 * 2048 + 3 * 1408)) + 2 * 4 * 64
    layer = 16_384 * per_token // 2
    training = found["memory"]["training_gpu"]
    assert training == {
        "weights": 2 * (dense + routed),
        "gradients": 4 * (dense + routed),
        # 128 ranks hold the same dense parameters, 32 the same experts: 256 / 8.
        "optimizer": 12 * dense // 128 + 12 * routed // 32,
        "activations": 28 * layer,
        "logits": 3 * 128 * 2**20,
        "total": training["total"],
    }
    assert training["total"] == sum(training.values()) - training["total"]
    options += ["--set", "budget.domains={code = 0.6, science = 0.4}"]
    recomputed, _ = plan(tmp_path, *options, "--set", "model.recompute=true")
    assert recomputed["budget"]["domain_tokens"] == {"code": 62_914_560, "science": 41_943_040}
    assert recomputed["memory"]["training_gpu"]["activations"] == 28 * 16_384 * 2048 * 2 // 2 + layer


def test_one_rank_holds_the_whole_model_and_stages_share_it_out() -> None:
    model = BailingConfig.model_validate(LING_LITE | {"first_k_dense_replace": 1})
    ((dense, routed),) = stage_parameters(model, Layout(world_size=1))
    assert dense + routed == model.num_parameters()
    stages = stage_parameters(model, Layout(world_size=4, pipeline=4))
    assert sum(map(sum, stages)) == model.num_parameters()
    # 27 layers with experts: the first stage has the dense one in place of one of them.
    assert [routed for _, routed in stages] == [n * 64 * EXPERT for n in (6, 7, 7, 7)]
    tied = BailingConfig.model_validate(LING_LITE | {"tie_word_embeddings": True})
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
    assert len(found["problems"]) == 7
    for part in (
        "8 training process(es) cannot be divided by tensor 3",
        "8 training process(es) cannot be divided by expert 7",
        "parallel.tensor must divide num_attention_heads 16, got 3",
        "parallel.tensor must divide num_key_value_heads 4, got 3",
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
    config.write_text(text + 'data = {train = "x", batch_tokens = 9}\ntrain = {steps = 3, micro_batch_tokens = 4096}\n')
    command = [sys.executable, "-m", "megatron_rl.cli", "plan", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"megatron-rl sft {config} --nproc 8" in done.stdout
