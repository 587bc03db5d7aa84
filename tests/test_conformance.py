"""Tests the embedded server by conformance.py, as real SGLang is tested."""

import re

import pytest
from subject import CONTEXT, SLOTS, HeldServer, Kind, Subject, make_models

from megatron_rl.keys import new_key
from megatron_rl.tensor_bytes import checksum

pytest.register_assert_rewrite("conformance")
from conformance import *  # noqa: E402, F403
from conformance import assert_serves, sender, update, versions  # noqa: E402


@pytest.fixture(scope="module")
def _server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conformance")
    models = make_models(folder)
    process = HeldServer(
        models[0].path,
        folder / "server.log",
        max_running_requests=SLOTS,
        context_length=CONTEXT,
        weight_version="0",
        key=new_key(),
    )
    process.wait_ready(240)
    subject = Subject(process, models, Kind(seeds=True, whole=True, long_tokens=600))
    yield subject
    subject.close()


# The embedded server alone: where it is stricter, and what real SGLang cannot do on a CPU -----------------------------


def checksums(server):
    return server.post("/weights_checker", action="checksum").json()["checksums"]


def test_checksums_are_those_of_the_tensors_that_serve(server):
    def of(model):
        return {name: checksum(tensor) for name, tensor in model.tensors.items()}

    assert checksums(server) == of(server.first)
    update(server, "flattened")
    assert checksums(server) == of(server.second)
    assert server.http.get("/weights_checker").json()["checksums"] == of(server.second)
    assert server.post("/weights_checker", action="compare").status_code == 400


def test_what_it_cannot_do_is_refused_with_the_remedy(server):
    where = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
    answer = server.post("/init_weights_update_group", **where, backend="nccl")
    assert answer.status_code == 400
    assert "gloo" in answer.json()["error"]["message"]
    answer = server.post("/update_weights_from_tensor", serialized_named_tensors=["aaaa"])
    assert answer.status_code == 400
    assert re.search("unpickle.*update_weights_from_distributed", answer.json()["message"])
    server.post("/begin_weight_update")
    assert "end_weight_update first" in server.load(server.second, "v1").json()["message"]


def test_what_would_end_sglang_or_make_it_answer_nonsense_while_memory_is_released_is_refused(server):
    def refusal(route, **body):
        answer = server.post(route, **body)
        assert answer.status_code == 400
        return answer.json().get("message") or answer.json()["error"]["message"]

    generate = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
    (running,) = server.start([5], tokens=300)
    assert "idle" in refusal("/release_memory_occupation", tags=["weights"])
    server.let_go()
    running.result()
    assert "weights was not released" in refusal("/resume_memory_occupation", tags=["weights"])
    assert "tags must be a list out of kv_cache, weights, cuda_graph" in refusal(
        "/release_memory_occupation", tags=["x"]
    )
    assert server.post("/release_memory_occupation").status_code == 200  # all of it
    assert "kv_cache is released already" in refusal("/release_memory_occupation", tags=["kv_cache"])
    assert "memory is released: cuda_graph, kv_cache, weights" in refusal("/generate", **generate)
    assert "resume it before new ones come" in server.load(server.second, "v1").json()["message"]
    assert "resume it before new ones come" in refusal("/begin_weight_update")
    assert server.http.get("/ready").status_code == 200
    server.post("/resume_memory_occupation", tags=["weights", "kv_cache"])
    assert "memory is released: cuda_graph" in refusal("/generate", **generate)
    server.post("/resume_memory_occupation", tags=["cuda_graph"])
    assert "no new ones came since" in refusal("/generate", **generate)
    assert server.load(server.second, "v1").json()["success"]
    assert_serves(server, server.second, "v1")


def test_a_flush_that_would_end_sglang_is_refused(server):
    (running,) = server.start([5], tokens=300)
    server.post("/pause_generation", mode="in_place")
    answer = server.load(server.second, "v1", flush_cache=True)
    assert answer.status_code == 400
    assert "flush_cache must be false" in answer.json()["message"]
    server.post("/continue_generation")
    server.let_go()
    assert versions(running.result()) == [("0", 300)]


def test_an_update_that_is_not_whole_is_refused_at_its_end_and_the_old_weights_serve_on(server):
    tensors = dict(server.second.tensors)
    del tensors["model.norm.weight"]
    before = checksums(server)
    with sender(server) as trainer:
        server.post("/begin_weight_update")
        assert trainer.send(tensors, weight_version="bad").json()["success"]
        answer = server.post("/end_weight_update")
        assert answer.status_code == 400
        assert re.search(r"weights are unchanged: 1 of \d+ .* missing: model.norm.weight", answer.json()["message"])
        assert checksums(server) == before
        assert_serves(server, server.first, "0")


def test_the_server_answers_while_it_waits_for_a_broadcast(server):
    with sender(server) as trainer:
        server.post("/begin_weight_update")
        answer = trainer.announce(server.second.tensors)
        for _ in range(5):
            assert server.http.get("/ready").status_code == 200
            assert server.version() == "0"
        assert not answer.done()
        trainer.leave()
        assert "weights are unchanged" not in answer.result().json()["message"]
