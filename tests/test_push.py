"""Weights over a process group: whole and right in every layout, and never a mixture when something goes."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel import run_ranks
from safetensors.torch import save_file
from tiny_model import TINY_CONFIG, tensors_of, write_tiny_model

from megatron_rl.checkpoint.names import name_table
from megatron_rl.config.bailing import BailingConfig
from megatron_rl.rollout.update_group import checksum
from megatron_rl.sync.buckets import divide

# 97 rows of vocabulary: padded under tensor parallelism. Three layers, the first dense.
UNTIED = {"vocab_size": 97, "num_hidden_layers": 4, "norm_head": True}
TIED = {"vocab_size": 97, "num_hidden_layers": 4, "tie_word_embeddings": True}
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}, TIED),
    "TP2-EP2": (2, {"tensor": 2, "expert": 2}, UNTIED),
    "EP2": (2, {"expert": 2}, UNTIED),
    "PP2": (2, {"pipeline": 2}, TIED),
}
DAMAGED = "model.layers.1.attention.dense.weight"


def run(num_ranks: int, scenario: str, parallel: dict[str, int], shape: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report of a scenario of push_worker.py."""
    mine = write_tiny_model(folder / "mine", 0, **shape)
    damaged = write_tiny_model(folder / "damaged", 0, **shape)
    tensors = tensors_of(damaged)
    tensors[DAMAGED] = tensors[DAMAGED].flip(0)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    other = write_tiny_model(folder / "other", 1, **shape)
    spec = {
        "scenario": scenario,
        "model": str(mine),
        "other": str(other),
        "damaged": str(damaged),
        "parallel": parallel,
    }
    run_ranks(num_ranks, spec, folder / "run", worker="push_worker.py", timeout_seconds=120)
    return dict(json.loads((folder / "run/report.json").read_text()))


def expected_checksums(model: Path) -> dict[str, str]:
    return {name: checksum(tensor) for name, tensor in tensors_of(model).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_sends_the_tensors_of_the_checkpoint_and_the_probe_knows_them(layout: str, tmp_path: Path) -> None:
    num_ranks, parallel, shape = LAYOUTS[layout]
    report = run(num_ranks, "layouts", parallel, shape, tmp_path)
    expected = expected_checksums(tmp_path / "mine")
    aside = ""
    if shape.get("norm_head"):  # which the server keeps normalised; the probe vouches for it
        del expected["lm_head.weight"]
        aside = " (1 could not be compared: lm_head.weight)"
    table = name_table(BailingConfig.model_validate(TINY_CONFIG | shape))
    assert [push["sent"] for push in report["pushes"]] == [len(table), 1]
    for push in report["pushes"]:
        assert push["checksums"] == [expected, expected]
        assert all(difference < 1e-5 for difference in push["differences"])
        whole, damaged = push["damaged"]
        assert whole < 1e-5
        assert damaged > 1e-3
        assert push["told"] == f"1 of {len(expected)} tensors differ: {DAMAGED}{aside}"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("faults") / "faults"
    report = run(2, "faults", {"tensor": 2}, TIED, folder)
    report["old"], report["new"] = (expected_checksums(folder / name) for name in ("other", "mine"))
    return report


def test_a_push_to_healthy_servers_takes_one_attempt(faults: dict[str, Any]) -> None:
    found = faults["nothing"]
    assert found["said"] == [""]
    assert found["checksums"] == [faults["new"]] * 2
    assert found["restarted"] == [False, False]


def test_a_server_that_was_started_again_unnoticed_joins_a_new_group(faults: dict[str, Any]) -> None:
    found = faults["killed before"]
    assert "did not reach" in found["said"][0]
    assert found["said"][1:] == [""]
    assert found["checksums"] == [faults["new"]] * 2
    assert found["versions"] == ["1", "1"]


@pytest.mark.parametrize("name", ["stopped", "killed within", "stopped within"])
def test_a_server_that_goes_in_a_push_is_replaced_and_nobody_serves_a_mixture(
    name: str, faults: dict[str, Any]
) -> None:
    found, gone = faults[name], 1 if name == "stopped within" else 0
    assert "did not reach" in found["said"][0]
    assert found["said"][1:] == [""]
    assert found["seconds"] < 12
    # After the push that failed: who serves has its old weights, whole; who went is taken out.
    assert found["between"] == {str(1 - gone): faults["old"]}
    assert found["restarted"] == [gone == 0, gone == 1], "the other one was not touched"
    assert found["checksums"] == [faults["new"]] * 2
    assert found["versions"] == ["1", "1"]


def test_a_stop_before_a_push_is_told_after_the_other_ranks_have_done_their_part(faults: dict[str, Any]) -> None:
    assert faults["stop"] == "StopRequested: stopped by the test"
    assert faults["after the stop"] == ""


# Buckets -------------------------------------------------------------------------------------------------------------

models = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 4),
        "num_experts": st.integers(2, 5),
        "first_k_dense_replace": st.integers(0, 1),
        "num_shared_experts": st.integers(0, 2),
        "tie_word_embeddings": st.booleans(),
        "vocab_size": st.integers(3, 40),
    }
)


@given(models, st.integers(1, 200_000), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_buckets_hold_every_tensor_once_in_order_and_runs_tile_them(
    shape: dict[str, Any], max_bytes: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    table = name_table(BailingConfig.model_validate(TINY_CONFIG | shape))
    buckets = divide(table.values(), dtype, max_bytes)
    assert [entry.megatron for bucket in buckets for entry in bucket.entries] == list(table)
    owner_of = {name: data.draw(st.integers(0, 2)) for name in table}
    for number, bucket in enumerate(buckets):
        assert bucket.num_bytes <= max_bytes or len(bucket.entries) == 1
        if number + 1 < len(buckets):  # the next parameter would not have fitted
            following = buckets[number + 1].places[0]
            assert bucket.num_bytes + following[-1].end > max_bytes
        end = 0
        for entry, places in zip(bucket.entries, bucket.places, strict=True):
            assert tuple(place.name for place in places) == entry.hf
            for place in places:
                assert place.start == end
                end = place.start + torch.empty(place.shape, dtype=dtype, device="meta").numel() * dtype.itemsize
                assert place.end == end
        runs = bucket.runs(owner_of)
        assert [start for _, start, _ in runs] == [0] + [end for _, _, end in runs[:-1]]
        assert runs[-1][2] == bucket.num_bytes == end
        assert all(a[0] != b[0] for a, b in itertools.pairwise(runs)), "as long as possible"
        for entry, places in zip(bucket.entries, bucket.places, strict=True):
            owners = [rank for rank, start, stop in runs if start <= places[0].start and places[-1].end <= stop]
            assert owners == [owner_of[entry.megatron]]
