"""Tests weights over a process group: whole and right in every layout, and never a mixture after a failure."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
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
from megatron_rl.families import architecture_of
from megatron_rl.gpus import chosen_backend
from megatron_rl.rollout.server import EmbeddedServer
from megatron_rl.sync.buckets import Place, divide
from megatron_rl.sync.distributed import join_request
from megatron_rl.sync.handles import serialized
from megatron_rl.sync.spans import gather_spans
from megatron_rl.tensor_bytes import checksum

# 97 rows of vocabulary: padded under tensor parallelism. Three layers, the first dense.
SHAPES: dict[str, dict[str, Any]] = {
    "untied": {"vocab_size": 97, "num_hidden_layers": 4, "norm_head": True},
    "tied": {"vocab_size": 97, "num_hidden_layers": 4, "tie_word_embeddings": True},
}
LAYOUTS: dict[str, list[dict[str, int]]] = {
    "untied": [{"tensor": 2, "expert": 2}, {"expert": 2}],
    "tied": [{"tensor": 2}, {"pipeline": 2}],
}
DAMAGED = "model.layers.1.attention.dense.weight"


def make_models(folder: Path, shape: dict[str, Any]) -> Path:
    """Write three models: the trainer's `mine`, `damaged` with one other tensor, and `other` with other tensors
    only."""
    write_tiny_model(folder / "mine", 0, **shape)
    damaged = write_tiny_model(folder / "damaged", 0, **shape)
    tensors = tensors_of(damaged)
    tensors[DAMAGED] = tensors[DAMAGED].flip(0)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    write_tiny_model(folder / "other", 1, **shape)
    return folder


def run(num_ranks: int, scenario: str, models: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """Run a scenario of push_worker.py and return its report."""
    spec = {"scenario": scenario, "other": str(models / "other"), "damaged": str(models / "damaged"), **more}
    run_ranks(num_ranks, spec | {"model": str(models / "mine")}, folder, worker="push_worker.py")
    return dict(json.loads((folder / "report.json").read_text()))


@pytest.fixture(scope="module", params=SHAPES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, str]]:
    """Yield the name of a shape, the folder of its models, and the URL of a server of one."""
    folder = make_models(tmp_path_factory.mktemp(request.param) / "models", SHAPES[request.param])
    server = EmbeddedServer(folder / "other", folder / "server.log", max_running_requests=2, context_length=64)
    try:
        server.wait_ready(240)
        yield request.param, folder, server.url
    finally:
        server.stop()


def expected_checksums(model: Path) -> dict[str, str]:
    return {name: checksum(tensor) for name, tensor in tensors_of(model).items()}


@pytest.mark.parametrize("number", [0, 1])
def test_every_layout_sends_the_tensors_of_the_checkpoint_and_the_probe_knows_them(
    served: tuple[str, Path, str], number: int, tmp_path: Path
) -> None:
    name, folder, url = served
    shape = SHAPES[name]
    report = run(2, "layouts", folder, tmp_path / "run", url=url, parallel=LAYOUTS[name][number])
    expected = expected_checksums(folder / "mine")
    num_tensors, aside = len(expected), ""
    if shape.get("norm_head"):  # which the server keeps normalised; the probe vouches for it
        del expected["lm_head.weight"]
        aside = " (1 could not be compared: lm_head.weight)"
    table = name_table(architecture_of(TINY_CONFIG | shape))
    assert [push["sent"] for push in report["pushes"]] == [len(table), 1]
    for push in report["pushes"]:
        assert push["checksums"] == [expected]
        assert max(push["differences"]) < 1e-5
        assert min(push["damaged"]) > 1e-3
        assert push["told"] == f"1 of {num_tensors} tensors differ: {DAMAGED}{aside}"


@pytest.mark.parametrize(
    ("parallel", "nodes", "spans"),
    [
        ({"expert": 2}, [0, 1], [[0, 1], [0, 1]]),  # neither node has all experts
        ({}, [0, 1], [[0], [1]]),
    ],
)
def test_every_rank_gathers_the_whole_model_from_its_node_if_that_holds_it(
    parallel: dict[str, int], nodes: list[int], spans: list[list[int]], tmp_path: Path
) -> None:
    models = make_models(tmp_path / "models", SHAPES["untied"])
    report = run(2, "gather", models, tmp_path / "run", parallel=parallel, nodes=nodes)
    assert report["spans"] == spans
    assert report["checksums"] == [expected_checksums(models / "mine")] * 2


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = make_models(tmp_path_factory.mktemp("faults") / "models", SHAPES["tied"])
    report = run(2, "faults", folder, folder / "run", parallel={"tensor": 2})
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
    assert found["restarted"] == [False, True], "the other one was not touched"


@pytest.mark.parametrize("name", ["killed within", "stopped within"])
def test_a_server_that_goes_in_a_push_is_replaced_and_nobody_serves_a_mixture(
    name: str, faults: dict[str, Any]
) -> None:
    found, gone = faults[name], 1 if name == "stopped within" else 0
    assert "did not reach" in found["said"][0]
    assert found["said"][1:] == [""]
    assert found["seconds"] < 200, "it was noticed: nothing waited for the end of the phase"
    # After the push that failed: who serves has its old weights, whole; who went is taken out.
    assert found["between"] == {str(1 - gone): faults["old"]}
    assert found["restarted"] == [gone == 0, gone == 1], "the other one was not touched"
    assert found["checksums"] == [faults["new"]] * 2
    assert found["versions"] == ["1", "1"]


@pytest.mark.parametrize("name", ["distributed", "disk"])
def test_a_push_does_not_wait_for_a_server_that_restarts_which_has_the_weights_before_it_serves(
    name: str, faults: dict[str, Any]
) -> None:
    found = faults[f"restarting, {name}"]
    assert set(found["said"]) == {""}
    both, one = found["seconds"]
    assert one < both + 150, "the other cannot start before the push has ended, and would be given up after 240 s"
    assert found["serving"] == [0]
    assert found["first"] == ["8"]
    assert found["versions"] == (["9", "9"] if name == "distributed" else ["8", "8"])
    assert found["checksums"] == [faults["new"]] * 2


def test_a_group_that_nccl_refuses_is_told_with_the_remedy_and_not_tried_again(faults: dict[str, Any]) -> None:
    said, then = faults["no communicator"]
    assert said.startswith("RequestRefused: weights 4 did not reach all 2 servers")
    assert "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000" in said
    assert "set sync.backend = 'gloo', or give the servers GPUs of their own" in said
    assert then == "", "the other rank and the servers were not left waiting"


def test_a_stop_before_a_push_is_told_after_the_other_ranks_have_done_their_part(faults: dict[str, Any]) -> None:
    assert faults["stop"] == "StopRequested: stopped by the test"
    assert faults["after the stop"] == ""


def test_what_servers_make_of_handles_is_told_after_the_other_ranks_have_done_their_part(
    faults: dict[str, Any],
) -> None:
    refused, stopped, gone = faults["handles"]
    assert refused.startswith("RequestRefused: weights 3 did not reach all 2 servers")
    assert "does not unpickle" in refused
    assert stopped == "StopRequested: stopped by the test"
    assert gone.startswith("ServerLost: weights 3 did not reach all 2 servers")


# Shared memory -------------------------------------------------------------------------------------------------------

OPEN = """
import base64, pickle, sys
import torch
found = pickle.loads(base64.b64decode(sys.stdin.read()))
for meta in found["metadata"]:
    tensor = found["flattened_tensor"][meta.start_idx:meta.end_idx].view(meta.dtype).reshape(meta.shape)
    print(meta.name, tensor.tolist())
"""


def test_another_process_finds_the_tensors_of_a_bucket_that_it_was_handed() -> None:
    expected = {"a": torch.tensor([[1.5, -2.0]]), "b": torch.tensor([3.25, 4.0, 5.0])}
    flat = torch.cat([tensor.flatten() for tensor in expected.values()]).to(torch.bfloat16).view(torch.uint8)
    places = [Place(name="a", shape=(1, 2), start=0, end=4), Place(name="b", shape=(3,), start=4, end=10)]
    payload = serialized(flat, places, torch.bfloat16)
    opened = subprocess.run([sys.executable, "-c", OPEN], input=payload, capture_output=True, text=True, check=True)
    assert opened.stdout == "a [[1.5, -2.0]]\nb [3.25, 4.0, 5.0]\n"


def test_a_span_is_a_node_where_every_node_holds_the_model_and_else_everyone() -> None:
    def spans(*exports: str) -> list[tuple[tuple[int, ...], dict[str, int]]]:
        return [(span.ranks, span.owner_of) for span in gather_spans([0, 0, 1, 1], exports)]

    own = {"a": 0, "b": 1}
    assert spans("a", "b", "b", "ab") == [((0, 1), own), ((2, 3), {"a": 3, "b": 2})]
    assert spans("a", "a", "b", "ab") == [((0, 1, 2, 3), {"a": 0, "b": 2})]


@pytest.mark.parametrize(
    ("asked", "engine", "gpu", "beside", "expected"),
    [
        ("auto", "sglang", True, False, "nccl"),
        ("auto", "sglang", True, True, "gloo"),  # it may be on rank 0's GPU
        ("auto", "sglang", False, False, "gloo"),
        ("auto", "embedded", True, False, "gloo"),
        ("gloo", "sglang", True, False, "gloo"),
        ("nccl", "sglang", True, True, "nccl"),
    ],
)
def test_the_backend_is_nccl_between_gpus_of_different_machines(
    asked: str, engine: str, gpu: bool, beside: bool, expected: str
) -> None:
    assert chosen_backend(asked, engine, gpu, beside) == expected
    body = join_request("10.0.0.1", 29500, 3, 5, "weights", expected)
    assert (body["backend"], body["rank_offset"], body["world_size"]) == (expected, 3, 5)


def test_nccl_without_gpus_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sync.backend 'nccl' needs a run that trains on GPUs"):
        chosen_backend("nccl", "sglang", trains_on_gpu=False, beside=False)


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
    table = name_table(architecture_of(TINY_CONFIG | shape))
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
