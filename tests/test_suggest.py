"""Tests `megatron-rl plan --suggest`: the fastest layout that fits, against layouts found by hand."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.cluster import ClusterSection
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig, SftConfig
from megatron_rl.families import Architecture
from megatron_rl.plan.shape import shape_of
from megatron_rl.plan.show import run_plan
from megatron_rl.plan.suggest import _SAME, Search, _replaced, suggest

ROOT = Path(__file__).parents[1]
# Ling-lite as the paper trains it, with shorter responses so that their simulation is short.
FILE = ROOT / "examples/ring_lite/one_node_8gpu.toml"
SHORT = ["rollout.max_response_tokens=2048", "budget.tokens=51200", "train.micro_batch_tokens=16384"]
SERVERS = [
    'rollout.sglang_arguments=["--tp-size","4"]',
    "rollout.servers=0",
    "rollout.max_running_requests=64",
    "rollout.release_memory=true",
]
# Layouts found by hand: the number of GPUs, GiB of each, and the settings that fit.
BY_HAND = [
    (8, 80, ["parallel.expert=8", "parallel.tensor=1", "model.recompute=full", *SERVERS]),
    (
        8,
        40,
        ["parallel.expert=8", "parallel.tensor=2", "model.recompute=full", "optimizer.offload_fraction=1", *SERVERS],
    ),
    (
        4,
        80,
        ["parallel.expert=4", "parallel.tensor=2", "model.recompute=full", "optimizer.offload_fraction=1", *SERVERS],
    ),
]


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in the files start from there


def loaded(*changes: str) -> tuple[RlConfig, Architecture]:
    config = load_config(RlConfig, FILE, [*SHORT, *changes], without_weights=True)
    return config, shape_of(config)[0]


def cluster(gpus: int, memory: float) -> ClusterSection:
    return ClusterSection(nodes=1, gpus_per_node=gpus, gpu_memory_gb=memory)


@pytest.mark.parametrize(("gpus", "memory", "layout"), BY_HAND, ids=lambda value: str(value)[:12])
def test_what_is_suggested_is_no_slower_than_what_fits_by_hand(gpus: int, memory: float, layout: list[str]) -> None:
    config, architecture = loaded()
    found = suggest(Search(config, architecture, cluster(gpus, memory)))
    assert found, "something fits by hand"
    by_hand, _ = loaded(*layout)
    (other,) = Search(config, architecture, cluster(gpus, memory)).evaluated(by_hand)
    assert found[0].step_seconds <= other.step_seconds * (1 + _SAME)
    # As it is printed it is a configuration that loads, and the plan of which says that it fits.
    changes = [f"{key}={json.dumps(value)}" for key, value in found[0].keys.items()]
    assert loaded(*changes)[0] == found[0].config
    assert max(found[0].memory.values()) <= memory * 2**30
    assert [one.step_seconds for one in found] == sorted(one.step_seconds for one in found)


def plan(capsys: pytest.CaptureFixture[str], *changes: str, code: int, **options: Any) -> tuple[str, str]:
    names = ("nodes", "gpus_per_node", "serving_nodes", "gpu_memory_gb", "rates")
    values = {"json": False, "suggest": True} | dict.fromkeys(names) | options
    assert run_plan(argparse.Namespace(config=FILE, set=[*SHORT, *changes], **values)) == code
    said = capsys.readouterr()
    return said.out, said.err


def test_the_keys_to_set_are_printed_and_a_plan_with_them_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["model.recompute=none", "parallel.expert=1", "parallel.tensor=1"]
    _, said = plan(capsys, *wrong, code=2, suggest=False, gpu_memory_gb=40.0)
    assert "a training gpu needs about" in said
    out, said = plan(capsys, *wrong, code=0, gpu_memory_gb=40.0)
    assert said == ""
    first = out[out.index("\nsuggested") :].partition("\nor ")[0]
    assert "as it is" not in out  # it does not fit
    keys = [line.split("'")[1] for line in first.splitlines() if line.strip().startswith("--set")]
    assert any(key.startswith("parallel.") for key in keys)
    assert plan(capsys, *wrong, *keys, code=0, suggest=False, gpu_memory_gb=40.0)[1] == ""


def test_the_configuration_is_told_by_the_same_estimate_and_unfinished_responses_make_it_faster(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {}
    for partial in ("false", "true"):
        out, _ = plan(capsys, f"rollout.partial={partial}", code=0, json=True, gpu_memory_gb=141.0)
        found[partial] = json.loads(out)
    as_it_is, suggested = (found["false"][name] for name in ("as_it_is", "suggestions"))
    assert as_it_is["set"] == {}
    assert suggested[0]["step_seconds"] <= as_it_is["step_seconds"] * (1 + _SAME)
    assert as_it_is["host_memory"] == found["false"]["memory"]["host"]["total"]
    # Slots are never empty while unfinished responses go on under the next weights.
    assert found["true"]["as_it_is"]["seconds"]["rollout"] < 0.9 * as_it_is["seconds"]["rollout"]
    assert found["true"]["as_it_is"]["seconds"]["train"] == as_it_is["seconds"]["train"]


def test_what_is_suggested_is_predicted_the_same_once_it_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    """Check it with rates that are of engines of four GPUs, whatever the engines of the file have."""
    rates = ROOT / "examples/ring_lite/rates/h800_assumed.toml"
    for size in (2, 4):
        before = [f'rollout.sglang_arguments=["--tp-size", "{size}", "--mem-fraction-static", "0.4"]']
        suggested = json.loads(plan(capsys, *before, code=0, json=True, rates=rates)[0])["suggestions"][0]
        keys = [f"{key}={json.dumps(value)}" for key, value in suggested["set"].items()]
        after = json.loads(plan(capsys, *before, *keys, code=0, json=True, rates=rates)[0])["as_it_is"]
        assert after["seconds"] == suggested["seconds"]
        assert (after["memory"], after["host_memory"]) == (suggested["memory"], suggested["host_memory"])


def test_where_nothing_fits_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    _, said = plan(capsys, code=2, gpus_per_node=1, gpu_memory_gb=16.0)
    assert "no layout fits on 1 x 1 GPUs of 16 GiB" in said
    with pytest.raises(ValueError, match="--suggest needs the memory of a GPU"):
        plan(capsys, code=2, gpu_memory_gb=0.0)


def test_fine_tuning_is_searched_too() -> None:
    """Check fine-tuning: the states of 16.8 B parameters are 18 bytes each, 302 GB in all, 38 GB on each of 8 GPUs."""
    config = load_config(SftConfig, ROOT / "examples/ring_lite/paper_256gpu/sft.toml", without_weights=True)
    found = suggest(Search(config, shape_of(config)[0], cluster(8, 80)))
    assert found
    assert found[0].seconds["pauses"] == 0
    assert "rollout" not in found[0].seconds
    for one in found:
        parallel = one.config.parallel
        assert 8 % (parallel.tensor * parallel.pipeline) == 0
        assert 64 % parallel.expert == 0


def test_adapters_are_searched_on_one_gpu_where_all_weights_do_not_fit() -> None:
    """Check adapters: frozen weights take 34 GB of the 80, and all states of 16.8 B parameters would take 302 GB."""
    loose = ["parallel.expert=1", "parallel.tensor=1", *SERVERS[1:]]
    config, architecture = loaded(*loose)
    assert suggest(Search(config, architecture, cluster(1, 80))) == []
    adapted, _ = loaded(*loose, "lora={rank=32}")
    found = suggest(Search(adapted, architecture, cluster(1, 80)))
    assert found
    assert max(found[0].memory.values()) <= 80 * 2**30
    engine = loaded("model.layers=transformer_engine", "lora={rank=32}")[0]
    assert suggest(Search(engine, architecture, cluster(1, 80))) == []  # which adapters do not go with


def test_remedies_name_what_is_not_set_yet_and_do_not_contradict_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    tight = {"suggest": False, "gpu_memory_gb": 24.0}
    _, said = plan(capsys, "rollout.release_memory=false", code=2, **tight)
    assert "rollout.release_memory = true" in said
    assert "offload_while_generating" not in said
    assert "a smaller --mem-fraction-static" not in said
    _, said = plan(capsys, "rollout.release_memory=true", code=2, **tight)
    assert "set train.offload_while_generating = true" in said
    assert "rollout.release_memory = true" not in said
    assert "model.recompute" not in said, "it is full already"


def test_arguments_of_a_server_are_replaced_however_they_are_written() -> None:
    names = ("--tp-size", "--tp", "--tensor-parallel-size")
    assert _replaced(["--tp 2", "--x", "1"], names, "4") == ("--x", "1", "--tp-size", "4")
    assert _replaced(["--tp-size=2", "--x"], names, "") == ("--x",)
    assert _replaced([], names, "8") == ("--tp-size", "8")
