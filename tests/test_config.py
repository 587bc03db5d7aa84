"""Tests that mistakes in a configuration are named, with the remedy, before anything heavy is imported."""

import argparse
import json
import logging
import re
import tomllib
from pathlib import Path

import pytest
from tiny_model import TINY_CONFIG

from megatron_rl.c3po.algorithms import ALGORITHMS
from megatron_rl.config.evaluation import EvaluateConfig
from megatron_rl.config.kinds import kind_of
from megatron_rl.config.layout import Layout
from megatron_rl.config.limits import doubtful
from megatron_rl.config.load import dump_config, load_config, read_values
from megatron_rl.config.schema import RlConfig, SamplingConfig, SftConfig
from megatron_rl.families import Architecture, architecture_of, fields, load_architecture
from megatron_rl.plan.show import run_plan
from megatron_rl.simulation.rates import Rates

ROOT = Path(__file__).parents[1]
RL = """
run_dir = "run"
[model]
path = "model"
[data]
train = "train.jsonl"
[rollout]
prompts_per_step = 4
samples_per_prompt = 4
max_response_tokens = 64
[budget]
tokens = 200
[train]
steps = 2
micro_batch_tokens = 256
"""


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "c.toml").write_text(text)
    return tmp_path / "c.toml"


RATES = sorted(ROOT.glob("examples/ring_lite/rates/*.toml"))
SHIPPED = sorted(set(ROOT.glob("examples/**/*.toml")) - set(RATES))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_every_shipped_configuration_loads_and_survives_a_round_trip_and_plans(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # paths in them start from the root of a checkout
    kind = kind_of(read_values(path))
    config = load_config(kind, path)
    assert load_config(kind, write(tmp_path, dump_config(config))) == config
    # Those of the paper's size say what a model will look like that is not there yet.
    values = read_values(path)
    with_shape = "teacher" in values or "shape" in values.get("model", {})
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | {"max_position_embeddings": 4096}))
    overrides = [] if with_shape else [f"model.shape={tmp_path}"]
    overrides += [f"distillation.shape={tmp_path}"] if "distillation" in values else []
    options = dict.fromkeys(("nodes", "gpus_per_node", "serving_nodes", "gpu_memory_gb", "rates"))
    code = run_plan(argparse.Namespace(config=path, set=overrides, json=False, suggest=False, **options))
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    assert re.search(r"^launch    (megatron-rl|torchrun) .*" + re.escape(str(path)), said.out, re.MULTILINE)


@pytest.mark.parametrize("path", RATES, ids=lambda path: path.name)
def test_every_shipped_file_of_rates_loads(path: Path) -> None:
    assert load_config(Rates, path).train_flops > 0


def test_the_tables_of_the_papers_values_have_every_key_of_the_files_and_a_source() -> None:
    text = (ROOT / "docs/paper_configs.md").read_text()
    names = []
    for table in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        name, *lines = table.splitlines()
        rows = [re.fullmatch(r"\| `(.+?)` \| `(.+)` \| (.+) \|", line) for line in lines if line.startswith("| `")]
        assert all(rows), name
        told = tomllib.loads("\n".join(f"{row[1]} = {row[2]}" for row in rows if row))
        written = tomllib.loads((ROOT / "examples/ring_lite" / name).read_text())
        assert told == {key: value for key, value in written.items() if key != "base"}, name
        names.append(ROOT / "examples/ring_lite" / name)
    assert sorted(names) == [
        path for path in SHIPPED if "paper_256gpu" in path.parts or path.name.startswith("one_node")
    ]


def test_an_evaluation_needs_a_model_and_a_benchmark_and_has_the_settings_of_the_paper(tmp_path: Path) -> None:
    path = write(tmp_path, '[model]\npath = "model"\n[benchmarks.aime24]\npath = "aime24.jsonl"\n')
    config = load_config(EvaluateConfig, path, ["benchmarks.aime24.samples=64"])
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.max_response_tokens) == (1.0, 0.95, 32768)
    assert config.benchmarks["aime24"].at == (1, 2, 4, 8, 16, 32, 64)
    with pytest.raises(ValueError, match="unknown key benchmarks.aime24.sample"):
        load_config(EvaluateConfig, path, ["benchmarks.aime24.sample=64"])
    with pytest.raises(ValueError, match=r"benchmarks.a\+b.*: String should match pattern"):
        load_config(EvaluateConfig, path, ["benchmarks.a+b.path=x"])


def test_overrides_reach_nested_keys_with_their_types(tmp_path: Path) -> None:
    overrides = ["budget.tokens=300", "optimizer.learning_rate=1e-4", "model.path=other/dir", "train.save_every=3"]
    config = load_config(RlConfig, write(tmp_path, RL), overrides)
    assert config.budget.tokens == 300
    assert config.optimizer.learning_rate == 1e-4
    assert config.model.path == Path("other/dir")
    assert config.train.save_every == 3


@pytest.mark.parametrize(("name", "misspelt"), [("samples_per_prompt", "samples_per_promt"), ("[rollout]", "[rolout]")])
def test_a_misspelt_required_key_is_told_alone(tmp_path: Path, name: str, misspelt: str) -> None:
    path = write(tmp_path, RL.replace(name, misspelt))
    assert kind_of(read_values(path)) is RlConfig
    with pytest.raises(ValueError, match=r"unknown key \S+; did you mean \S+\?$") as caught:
        load_config(RlConfig, path)
    assert misspelt.strip("[]") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("budget.tokns=3", r"unknown key budget.tokns; did you mean budget.tokens\?"),
        ("rollout.temprature=1.0", r"unknown key rollout.temprature; did you mean rollout.temperature\?"),
        ("tokens=5", "unknown key tokens; did you mean budget.tokens"),
        ("budget.tokens=63", r"budget.tokens 63 is smaller than one response can be .*64.*at least 64"),
        ("train.micro_batch_tokens=100", r"micro_batch_tokens 100 is smaller than one sequence can be .* = 128\)"),
        ("rollout.port=65535", r"rollout.port 65535 leaves no room for"),
        ("train.phase_deadline_seconds=inf", r"phase_deadline_seconds: .*finite number, got inf"),
        ("rollout.samples_per_prompt=1", r"samples_per_prompt must be at least 2"),
        ("rollout.samples_per_prompt=201", r"budget.tokens 200 is below one group: its 201 responses .* raise the bud"),
        (
            "algorithm={name = 'grpo', optimizer_steps_per_rollout = 17}",
            r"optimizer_steps_per_rollout 17 is more than the 16 responses of a phase .* lower it",
        ),
        (
            "budget={tokens = 1025, under_full = 'short'}",
            r"step 4 x samples_per_prompt 4 x max_response_tokens 64 = 1024 tokens can never fill .* of 1025",
        ),
        ("rollout.temperature=0", r"temperature 0 makes the 4 responses of a prompt .* all alike.*above 0"),
        ("rollout.temperature=1e-7", r"temperature 1e-07 is too near to 0 .* set 0, which is greedy"),
        ("rollout.temperature=-1", r"rollout.temperature: .*greater than or equal to 0, got -1"),
        ("train.steps=0", r"train.steps: .*greater than 0, got 0"),
        ("rollout.agent_command=python agent.py", r"agent_command: must be a list, in brackets, got 'python agent.py'"),
        ("reward.domains=math", r"reward.domains: must be a table, got 'math'"),
        ("train=5", r"train: must be a table, got 5"),
        ("run_dir=''", r"run_dir: must name a file or a folder, got an empty text"),
        ("model.path=''", r"model.path: must name a file or a folder, got an empty text"),
        ("algorithm.name=ppo", r"algorithm.name: .*'c3po', 'grpo', .* or 'reinforce_pp', got 'ppo'"),
        (
            "reward.overlong_buffer_tokens=65",
            r"overlong_buffer_tokens 65 must be at most rollout.max_.* 64",
        ),
        ("budget.domains={code = 0.5, math = 0.6}", r"shares of budget.domains must sum to 1, got 0.5 \+ 0.6 = 1.1"),
        ("budget.domains={code = 0.7, math = 0.3}", r"gives 'math' 0.3 of budget.tokens 200, which is less .* 64\)"),
        ("budget={tokens = 200, domains = {a = 1}, under_full = 'short'}", r"needs budget.under_full = 'refill', got"),
        ("sync.transport=ipc", r"sync.transport 'ipc' is for SGLang servers that this run starts; .* 'distributed'"),
        ("sync.backend=nccl", r"sync.backend 'nccl' is for SGLang servers on GPUs, rollout.engine is 'embedded'"),
        (
            "rollout={prompts_per_step=4, samples_per_prompt=2, max_response_tokens=64, release_memory=true, "
            "urls=['http://a:1']}",
            r"release_memory is for servers that this run starts.*leave rollout.urls empty",
        ),
        (
            "train.offload_while_generating=true",
            r"makes room for servers that give it back; set rollout.release_memory",
        ),
        ("steps", r"--set takes key.path=value, got 'steps'"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(RlConfig, write(tmp_path, RL), [change, "rollout.servers=2"] if "=" in change else [change])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.epochs=2"], r"train: set either train.steps or train.epochs, not both and not neither"),
        (["train={micro_batch_tokens=9}"], r"train: set either train.steps or train.epochs"),
        (["optimizer.warmup_steps=2"], r"optimizer.warmup_steps 2 must be below train.steps 2"),
        (
            ["optimizer.warmup_steps=1", "optimizer.warmup_share=0.1"],
            "either warmup_steps or warmup_share, got 1 and 0.1",
        ),
        (["optimizer.warmup_share=1"], r"warmup_share: .*less than 1, got 1"),
        (
            ["optimizer.min_learning_rate=1e-7"],
            "min_learning_rate 1e-07 is where a cosine ends; set schedule = 'cosine'",
        ),
        (
            ["optimizer={schedule='cosine',min_learning_rate=1}"],
            "min_learning_rate 1 must be at most learning_rate 3e-06",
        ),
        (["train.validate_every=2"], "train.validate_every 2 has nothing to validate on; set data.validation"),
        (["data.train={}"], r'data.train: names no file; write \{"file.jsonl" = 1\}'),
        (["data.train={'a'=0}"], r"data.train.a: .*greater than 0, got 0"),
        (["data.train=3"], r'data.train: must be a file, or files with weights, .*"b.jsonl" = 1\}, got 3'),
        (["data.validate=a"], r"unknown key data.validate; did you mean data.validation\?"),
    ],
)
def test_a_mistake_about_fine_tuning_is_named_with_its_remedy(tmp_path: Path, changes: list[str], message: str) -> None:
    text = 'run_dir = "r"\nmodel.path = "m"\ndata = {train = "a", batch_tokens = 9}\n'
    text += "train = {steps = 2, micro_batch_tokens = 9}\n"
    with pytest.raises(ValueError, match=message):
        load_config(SftConfig, write(tmp_path, text), changes)


def test_the_epochs_of_fine_tuning_are_not_for_reinforcement_learning(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key train.epochs"):
        load_config(RlConfig, write(tmp_path, RL), ["train.epochs=2"])
    options = ["optimizer={schedule='cosine',warmup_share=0.1,min_learning_rate=1e-7}"]
    assert load_config(RlConfig, write(tmp_path, RL), options).optimizer.num_warmup_steps(20) == 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_domains_divide_the_budget_of_an_algorithm_that_has_one(tmp_path: Path, name: str) -> None:
    change = [f"algorithm.name={name}", "budget.domains={code = 0.6, science = 0.4}"]
    if ALGORITHMS[name].uses_budget:
        config = load_config(RlConfig, write(tmp_path, RL), change)
        assert config.budget.domains == {"code": 0.6, "science": 0.4}
    else:
        with pytest.raises(ValueError, match=f"divides the token budget, and algorithm '{name}' has none; set"):
            load_config(RlConfig, write(tmp_path, RL), change)


def test_a_correction_cannot_compare_the_sampler_with_itself(tmp_path: Path) -> None:
    options = ["algorithm.correction=icepop", "algorithm.old_logprobs=rollout"]
    with pytest.raises(ValueError, match=r"correction 'icepop' compares .* so old_logprobs must be 'train'"):
        load_config(RlConfig, write(tmp_path, RL), options)


def test_a_missing_section_a_missing_file_and_broken_toml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget.tokens is required: .* 4 prompts x 4 responses of half the longest"):
        load_config(RlConfig, write(tmp_path, RL.replace("[budget]\ntokens = 200\n", "")))
    with pytest.raises(ValueError, match="config file nowhere.toml does not exist"):
        load_config(RlConfig, "nowhere.toml")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_config(RlConfig, write(tmp_path, "a = [1"))


def test_budget_per_gpu_is_multiplied_by_the_training_ranks(tmp_path: Path) -> None:
    options = ["budget.scope=per_gpu", "algorithm.optimizer_steps_per_rollout=2"]
    assert load_config(RlConfig, write(tmp_path, RL), options).phase_budgets(8) == (1600, 1600)
    assert load_config(RlConfig, write(tmp_path, RL)).phase_budgets(8) == (200,)


def small_model(**changes: object) -> Architecture:
    fields = dict(
        model_type="bailing_moe", vocab_size=96, hidden_size=64, intermediate_size=80, moe_intermediate_size=32,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, num_experts=6, num_experts_per_tok=2,
        max_position_embeddings=64, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return architecture_of(fields | changes)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"world_size": 3, "tensor": 3},
            r"parallel.tensor 3 does not divide num_attention_heads 4 and num_key_value_heads 2 .*\[1, 2, 4\]",
        ),
        ({"world_size": 4, "expert": 4}, r"parallel.expert must divide num_experts 6, got 4; .*\[1, 2, 3, 6\]"),
        ({"world_size": 5, "pipeline": 5}, r"parallel.pipeline 5 .* = 5 must be at most num_hidden_layers 4"),
        ({"world_size": 3, "tensor": 2}, r"3 training process\(es\) cannot be divided by tensor 2"),
        ({"world_size": 3, "context": 2}, r"3 training process\(es\) cannot be divided by tensor 1 .* context 2 = 2"),
        ({"world_size": 2, "pipeline": 2, "virtual_pipeline": 2}, "2 needs parallel.pipeline of at least 3, got 2"),
        (
            {"world_size": 3, "pipeline": 3, "virtual_pipeline": 2},
            "pipeline 3 x virtual_pipeline 2 = 6 must be at most",
        ),
        ({"world_size": 2, "expert": 3}, r"2 training process\(es\) cannot be divided by expert 3"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(layout: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**layout).check(small_model())


@pytest.mark.parametrize(
    ("num_layers", "pipeline", "expected"),
    [(28, 1, (28,)), (28, 4, (7, 7, 7, 7)), (5, 2, (3, 2)), (28, 8, (3, 4, 4, 4, 4, 3, 3, 3)), (27, 4, (7, 7, 7, 6))],
)
def test_layers_are_divided_over_stages_in_order_and_as_evenly_as_can_be(
    num_layers: int, pipeline: int, expected: tuple[int, ...]
) -> None:
    assert Layout(world_size=pipeline, pipeline=pipeline).layers_per_stage(num_layers) == expected


def test_virtual_stages_take_their_layers_in_the_order_of_the_model() -> None:
    layout = Layout(world_size=4, pipeline=4, virtual_pipeline=2)
    assert layout.layers_per_stage(28) == (3, 4, 4, 4, 4, 3, 3, 3)
    assert (layout.micro_batch_multiple, Layout(world_size=4, pipeline=4).micro_batch_multiple) == (4, 1)


def test_data_ranks_follow_megatrons_order() -> None:
    layout = Layout(world_size=8, tensor=2, pipeline=2)
    assert layout.data == 2
    assert [layout.data_rank(r) for r in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    layout = Layout(world_size=8, context=2, pipeline=2)
    assert [layout.data_rank(r) for r in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_context_parallel_ranks_share_a_sequence_and_so_the_cap_of_a_micro_batch(tmp_path: Path) -> None:
    options = ["train.micro_batch_tokens=64", "parallel.context=2"]
    config = load_config(RlConfig, write(tmp_path, RL), options)
    assert config.micro_batch_cap == 128
    with pytest.raises(ValueError, match=r"micro_batch_tokens 63 x parallel.context 2 is smaller than .* = 128\)"):
        load_config(RlConfig, write(tmp_path, RL), ["train.micro_batch_tokens=63", "parallel.context=2"])


def test_a_model_of_no_known_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type 'gemma3' is not implemented; it can be BailingMoeForCausalLM, B"):
        small_model(model_type="gemma3")
    with pytest.raises(ValueError, match=r"use_qkv_bias must be False .*, got True"):
        small_model(use_qkv_bias=True)
    with pytest.raises(ValueError, match="model directory .*nothing does not exist"):
        load_architecture(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no config.json"):
        load_architecture(tmp_path)


def test_dropout_is_left_out_and_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check dropout, which Ling-lite-base's config.json sets to 0.1 and the chat model's to 0."""
    shape = {"embedding_dropout": 0.1, "output_dropout": 0.1, "attention_dropout": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | shape))
    fields._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "megatron_rl"):
        assert load_architecture(tmp_path) == load_architecture(tmp_path)
    assert load_architecture(tmp_path) == architecture_of(TINY_CONFIG)
    assert [r.getMessage() for r in caplog.records] == [
        "config.json asks for embedding_dropout 0.1, output_dropout 0.1; training and servers here run without dropout"
    ]


def test_what_sglang_is_told_last_is_what_counts(tmp_path: Path) -> None:
    given = ["--tp-size 2", "--mem-fraction-static", "0.4", "--tp=8", "--mem-fraction-static=0.5"]
    rollout = load_config(RlConfig, write(tmp_path, RL), [f"rollout.sglang_arguments={given}"]).rollout
    assert (rollout.sglang_tensor_size, rollout.sglang_memory_share) == (8, 0.5)
    rollout = load_config(RlConfig, write(tmp_path, RL)).rollout
    assert (rollout.sglang_tensor_size, rollout.sglang_memory_share) == (1, None)


def test_a_cluster_has_nodes_that_train(tmp_path: Path) -> None:
    options = ["cluster.nodes=34", "cluster.serving_nodes=2"]
    config = load_config(RlConfig, write(tmp_path, RL), options)
    assert config.cluster is not None and config.cluster.training_ranks == 256
    with pytest.raises(ValueError, match="nodes 1 less serving_nodes 1 leaves none to train"):
        load_config(RlConfig, write(tmp_path, RL), ["cluster.serving_nodes=1"])
    with pytest.raises(ValueError, match=r"unknown key cluster.node; did you mean cluster.nodes\?"):
        load_config(RlConfig, write(tmp_path, RL), ["cluster.node=1"])


def test_a_file_says_only_what_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "first.toml").write_text(RL.replace("steps = 2", "steps = 2\nsave_every = 1"))
    (tmp_path / "second.toml").write_text('base = "first.toml"\nseed = 5\n[rollout]\nprompts_per_step = 7\n')
    config = load_config(RlConfig, write(tmp_path, 'base = "second.toml"\n[train]\nsteps = 3\n'))
    assert (config.seed, config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (5, 7, 4)
    assert (config.train.steps, config.train.save_every, config.budget.tokens) == (3, 1, 200)
    (tmp_path / "mixed.toml").write_text('base = "first.toml"\n[data]\ntrain = {"b.jsonl" = 2}\n')
    assert load_config(RlConfig, tmp_path / "mixed.toml").data.train == {Path("b.jsonl"): 2}  # not joined: a path below


def test_the_part_of_a_domain_must_hold_a_group(tmp_path: Path) -> None:
    changes = ["budget={tokens = 200, domains = {code = 0.5, math = 0.5}}", "rollout.samples_per_prompt=101"]
    with pytest.raises(
        ValueError, match=r"gives 'code' 0.5 of .*200, which is less than one group is at least .* 101\)"
    ):
        load_config(RlConfig, write(tmp_path, RL), changes)
    load_config(RlConfig, write(tmp_path, RL), [changes[0], "rollout.samples_per_prompt=100"])


def test_what_works_and_is_hardly_meant_is_told_at_start(tmp_path: Path) -> None:
    def doubts(*changes: str) -> list[str]:
        return list(doubtful(load_config(RlConfig, write(tmp_path, RL), changes)))

    assert doubts() == doubts("budget.tokens=128") == []  # half of 4 x 64
    (small,) = doubts("budget.tokens=127")
    assert "budget.tokens 127 is far below what one group can be" in small
    assert "= 256)" in small
    assert doubts("budget={tokens = 127, scope = 'per_gpu'}") == []
    assert doubts("budget.tokens=127", "algorithm.name=grpo") == []
    assert doubts("optimizer.warmup_steps=1") == []
    (slow,) = doubts("optimizer.warmup_steps=2")
    assert "optimizer.warmup_steps 2 is not below the run's 2 optimizer steps" in slow
    (nothing,) = doubts("optimizer.warmup_steps=1", "train.steps=1")
    assert "the only step has 0 and trains nothing" in nothing


def test_a_base_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.toml does not exist, which is the base of .*c\.toml"):
        load_config(RlConfig, write(tmp_path, 'base = "missing.toml"'))
    with pytest.raises(ValueError, match="is its own base"):
        load_config(RlConfig, write(tmp_path, 'base = "c.toml"'))
    with pytest.raises(ValueError, match="base must be the name of a TOML file"):
        load_config(RlConfig, write(tmp_path, "base = 3"))


def test_sampling_needs_no_word_about_training(tmp_path: Path) -> None:
    text = RL[: RL.index("[budget]")]
    path = write(tmp_path, text)
    assert kind_of(read_values(path)) is SamplingConfig
    assert load_config(SamplingConfig, path).rollout.samples_per_prompt == 4
    with pytest.raises(ValueError, match="train is required"):
        load_config(RlConfig, path)


def test_an_algorithm_without_a_budget_is_not_asked_for_one(tmp_path: Path) -> None:
    path = write(tmp_path, RL.replace("[budget]\ntokens = 200\n", '[algorithm]\nname = "grpo"\n'))
    config = load_config(RlConfig, path)
    assert config.phase_budgets(2) == (0,)  # their number is that of the optimizer steps
    assert load_config(RlConfig, write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("changes", "prompts"),
    [
        ([], 2),  # 200 tokens, 4 responses of 32 each: 1.6 prompts
        (["algorithm.optimizer_steps_per_rollout=3"], 5),  # 4.7
        (["rollout.prompts_per_step=9"], 9),
    ],
)
def test_the_first_phase_is_sized_by_the_budget_where_that_decides(
    tmp_path: Path, changes: list[str], prompts: int
) -> None:
    path = write(tmp_path, RL.replace("prompts_per_step = 4\n", ""))
    assert load_config(RlConfig, path, changes).rollout.prompts_per_step == prompts


@pytest.mark.parametrize("change", ["algorithm.name=grpo", "budget.under_full=short", "budget.scope=per_gpu"])
def test_where_the_budget_does_not_decide_prompts_are_asked_for(tmp_path: Path, change: str) -> None:
    path = write(tmp_path, RL.replace("prompts_per_step = 4\n", ""))
    with pytest.raises(ValueError, match="rollout.prompts_per_step is required"):
        load_config(RlConfig, path, [change])


def test_the_longest_response_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rollout.max_response_tokens is required"):
        load_config(RlConfig, write(tmp_path, RL.replace("max_response_tokens = 64\n", "")))
