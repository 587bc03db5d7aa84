"""Tests that every key has a type, a default and a description, and is found by its names in other programs."""

import argparse
import re
from collections.abc import Iterator

import pytest
from rank_zero import config_of

from megatron_rl.cli import command_parser, main
from megatron_rl.config.kinds import KINDS
from megatron_rl.config.load import load_config
from megatron_rl.config.other_names import _NAMES, _NONE, keys_called, names_of
from megatron_rl.config.reference import keys_of
from megatron_rl.config.schema import RlConfig, SftConfig
from megatron_rl.config.show import all_keys, with_names
from megatron_rl.data.curation.config import CurationConfig
from megatron_rl.simulation.rates import Rates


def test_every_key_of_every_command_has_a_description_and_a_type() -> None:
    keys = [key for key, _ in all_keys()]
    assert len(keys) > 150
    assert [key.path for key in keys if not key.description] == []
    assert [key.path for key in keys if key.type in ("", "value")] == []


def test_every_description_is_whole_sentences_with_and_without_the_names_of_others() -> None:
    descriptions = [(key.path, key.description) for key, _ in all_keys()]
    descriptions += [(key.path, key.description) for kind in (CurationConfig, Rates) for key in keys_of(kind)]
    for path, text in descriptions:
        for told in (text, with_names(text, names_of(path))):
            assert re.fullmatch(r"[A-Z0-9].*[^.]\.", told), path
            assert not re.search(r"[.;:,][.;,]|  ", told.replace("...", "_")), path


def test_every_help_text_of_a_command_is_whole_sentences() -> None:
    def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for choice in action._choices_actions:
                    assert re.fullmatch(r"[A-Z].*[^.]\.", choice.help or ""), choice.dest
                for one in action.choices.values():
                    yield from parsers(one)

    for parser in parsers(command_parser()):
        assert re.fullmatch(r"[A-Z].*[^.]\.", parser.description or ""), parser.prog
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                assert re.fullmatch(r"[A-Z].*[^.]\.", action.help or ""), (parser.prog, action.dest)


def test_the_list_has_exactly_what_a_resolved_configuration_has(tmp_path) -> None:
    """Compare the list of keys with model_dump, which is pydantic's own walk through the sections."""

    def leaves(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict) and f"{prefix}{name}" not in tables:
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    known = {key.path for key in keys_of(RlConfig)}
    tables = {key.path for key in keys_of(RlConfig) if key.type.startswith("table")}
    found = set(leaves(config_of(tmp_path).model_dump()))
    absent = {"cluster", "distillation", "lora", "validation"}  # sections that are None here
    assert found - absent <= known | {"teacher"}  # which training refuses
    left = {path for path in known - found if ".NAME." not in path and not path.startswith("data.stages.")}
    assert {path.partition(".")[0] for path in left} == absent


def test_other_names_are_of_keys_that_exist_and_of_no_other_key() -> None:
    known = {key.path for key, _ in all_keys()}
    assert set(_NAMES) <= known
    for key in _NAMES:
        assert names_of(key) == list(dict.fromkeys(names_of(key))), key
    # A name of somebody else's that is also a whole key of ours would never be looked up.
    assert not {name for names in _NAMES.values() for name in names.split()} & known
    assert not set(_NONE) & {name for names in _NAMES.values() for name in names.split()}


# From the documentation of each: TRL's GRPOConfig, verl's ppo_trainer.yaml, slime's arguments, prime-rl's rl.toml.
MEANT = {
    "model.lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_target_modules": "lora.targets",
    "optimizer.lr": "optimizer.learning_rate",
    "train.lr": "optimizer.learning_rate",
    "algorithm.beta": "algorithm.kl_coefficient",
    "rollout.num_generations": "rollout.samples_per_prompt",
    "rollout.n": "rollout.samples_per_prompt",
    "rollout.max_completion_length": "rollout.max_response_tokens",
    "data.max_response_length": "rollout.max_response_tokens",
    "rollout.rollout-max-response-len": "rollout.max_response_tokens",
    "algorithm.kl_coef": "algorithm.kl_coefficient",
    "algorithm.kl_loss_coef": "algorithm.kl_coefficient",
    "algorithm.clip_ratio": "algorithm.clip_low",
    "algorithm.clip_ratio_high": "algorithm.clip_high",
    "algorithm.eps_clip": "algorithm.clip_low",
    "algorithm.epsilon": "algorithm.clip_low",
    "optimizer.eps": "optimizer.epsilon",
    "train.max_steps": "train.steps",
    "train.num_rollout": "train.steps",
    "train.save_interval": "train.save_every",
    "train.max_tokens_per_gpu": "train.micro_batch_tokens",
    "parallel.tp": "parallel.tensor",
    "parallel.expert_model_parallel_size": "parallel.expert",
    "model.gradient_checkpointing": "model.recompute",
    "rollout.gpu_memory_utilization": "rollout.sglang_arguments",
    "optimizer.max_grad_norm": "optimizer.clip_grad",
    "train.temperature": "rollout.temperature or validation.temperature",
    "algorithm.samples_per_prompt": "rollout.samples_per_prompt",
    "optimizer.learning_rte": "optimizer.learning_rate",
    "train.report_to": "tracking.to",
    "train.logger": "tracking.to",
    "train.run_name": "tracking.name",
    "train.experiment_name": "tracking.name",
    "train.project_name": "tracking.project",
    "tracking.wandb_project": "tracking.project",
    "tracking.wandb_group": "tracking.group",
    "train.eval_steps": "validation.every",
    "train.test_freq": "validation.every",
    "train.eval_interval": "validation.every",
    "data.val_files": "validation.benchmarks",
    "validation.n_samples_per_eval_prompt": "validation.samples",
    "train.save_steps": "train.save_every",
    "train.save_freq": "train.save_every",
    "train.save_total_limit": "train.keep_last",
    "train.metric_for_best_model": "train.keep_best",
    "train.ddp_timeout": "train.phase_deadline_seconds",
    "rollout.rollout_batch_size": "rollout.prompts_per_step",
    "train.n_gpus_per_node": "cluster.gpus_per_node",
    "train.nnodes": "cluster.nodes",
    "rollout.custom_generate_function_path": "rollout.agent",
    "rollout.agent_loop_config_path": "rollout.agent",
    "algorithm.custom_advantage_function_path": "algorithm.advantage",
    "algorithm.custom_tis_function_path": "algorithm.correction",
    "algorithm.custom_loss_function_path": "algorithm.surrogate",
    "reward.rm_url": "reward.kind",
    "reward.reward_weights": "reward.parts",
    "train.opd_teacher_load": "distillation.path",
    "train.opd_kl_coef": "distillation.coefficient",
    "rollout.rollout_external_engine_addrs": "rollout.urls",
    "rollout.enable_rollout_routing_replay": "rollout.router_replay",
    "train.use_fault_tolerance": "rollout.max_restarts",
    "rollout.rollout_health_check_timeout": "rollout.silence_seconds",
    "rollout.vllm_server_timeout": "rollout.ready_deadline_seconds",
}


@pytest.mark.parametrize(("written", "meant"), MEANT.items())
def test_an_unknown_key_is_told_by_what_it_means(written: str, meant: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"unknown key {written}; did you mean {meant}\\?$"):
        config_of(tmp_path, f"{written}=1")


def test_what_has_no_key_says_why_and_what_is_near_to_nothing_lists_its_section(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown key rollout.top_p; training samples from the whole distribution"):
        config_of(tmp_path, "rollout.top_p=0.9")
    with pytest.raises(ValueError, match="unknown key data.prompt_key; columns have fixed names: prompt, answer"):
        config_of(tmp_path, "data.prompt_key=q")
    with pytest.raises(ValueError, match="unknown key rollout.max_model_len; the context of servers has room for"):
        config_of(tmp_path, "rollout.max_model_len=9")
    with pytest.raises(ValueError, match="unknown key moe.zzz; moe has load_balance_coefficient, z_loss_coefficient$"):
        config_of(tmp_path, "moe.zzz=1")
    with pytest.raises(
        ValueError, match=r"unknown key zzz; the sections are cluster, run_dir, .* \(`megatron-rl keys`\)"
    ):
        config_of(tmp_path, "zzz=1")


def test_what_is_said_of_names_without_a_key_names_keys_and_commands_that_exist() -> None:
    keys = {key.path for key, _ in all_keys()}
    sections, commands = {key.partition(".")[0] for key in keys}, {"train", "evaluate", "convert"}
    for why in _NONE.values():
        named = set(re.findall(r"(?<![\w./])[a-z_]+\.[a-z_]+\b", why)) - {"metrics.jsonl"}
        assert {one for one in named if one.partition(".")[0] in sections} == named <= keys, why
        assert set(re.findall(r"`megatron-rl (\w+)", why)) <= commands, why


def test_a_section_of_another_tool_is_told_by_its_keys(tmp_path) -> None:
    with pytest.raises(
        ValueError, match="unknown key wandb; wandb.project is tracking.project here, wandb.name is tracking.name here"
    ):
        config_of(tmp_path, "wandb.project=a", "wandb.name=b")
    with pytest.raises(
        ValueError, match="unknown key actor; actor.lr is optimizer.learning_rate here, actor.n is roll"
    ):
        config_of(tmp_path, "actor.lr=1", "actor.n=2", "actor.zzz=1")


def test_a_key_of_another_command_is_not_proposed() -> None:
    assert keys_called("train.num_generations", {key.path for key in keys_of(SftConfig)}) == []


def test_keys_are_found_by_name_by_anothers_name_and_by_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "learning_rate"]) == 0
    said = capsys.readouterr().out
    assert (
        "optimizer.learning_rate: number above 0; default 3e-06; train, sft\n    Peak learning rate of AdamW." in said
    )
    assert "optimizer.min_learning_rate" in said
    assert main(["keys", "num_generations"]) == 0
    assert capsys.readouterr().out.startswith(
        "rollout.samples_per_prompt: whole number above 0; required; train, rollout"
    )
    assert main(["keys", "C3PO\\+\\+"]) == 0
    assert "rollout.partial: true or false; default false" in capsys.readouterr().out
    assert main(["keys"]) == 0
    listed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert set(listed) == {key.path for kind in KINDS.values() for key in keys_of(kind)}
    assert main(["keys", "logging_steps"]) == 2
    assert "every step is in metrics.jsonl" in capsys.readouterr().err


def test_a_file_with_an_unknown_key_is_not_loaded_for_fine_tuning_either(tmp_path) -> None:
    path = tmp_path / "sft.toml"
    path.write_text('run_dir="r"\n[model]\npath="m"\n[data]\ntrain="a"\nbatch_tokens=9\n[train]\nnum_train_epochs=1\n')
    with pytest.raises(ValueError, match="unknown key train.num_train_epochs; did you mean train.epochs"):
        load_config(SftConfig, path)
