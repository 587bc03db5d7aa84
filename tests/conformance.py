"""Tests what a rollout client may rely on with any kind of server: SGLang's routes and their values.

These are plain tests that take a `server` (subject.Subject). test_conformance.py runs them against the embedded server,
real_sglang/test_conformance.py against an unmodified SGLang.
"""

import json
import math

import pytest
import torch
from reference_forward import reference_logprobs
from subject import CONTEXT, ENDLESS_TOKENS, PROMPT, SLOTS, sender
from tokenizers import Tokenizer

TEXT = [5, 6, 7, 8, 30, 31, 90]


@pytest.fixture
def server(_server):
    """Yield the subject that each of the two modules defines as `_server`, and reset it after each test."""
    yield _server
    _server.reset()


def drawn(answer):
    """Return the log-probs of the output tokens."""
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def reason(answer):
    return answer["meta_info"]["finish_reason"]["type"]


def versions(answer):
    """Return [(version, number of tokens)] and check the ends of the spans."""
    spans = answer["meta_info"]["weight_versions"]
    assert [span["start"] for span in spans] == [0] + [span["end"] for span in spans[:-1]]
    assert spans[-1]["end"] == len(answer["output_ids"])
    return [(span["version"], span["end"] - span["start"]) for span in spans]


def truth(model):
    """Return the log-probs of TEXT[1:] by the reference in fp64."""
    config = json.loads((model.path / "config.json").read_text())
    table = reference_logprobs(model.path, config, TEXT)
    return [table[i][token] for i, token in enumerate(TEXT[1:])]


def assert_serves(server, model, version):
    answer = server.generate(TEXT, {"logprob_start_len": 0}, max_new_tokens=2)
    found = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
    assert found[0] is None
    assert found[1:] == pytest.approx(truth(model), abs=1e-4)
    assert answer["meta_info"]["weight_version"] == version == server.version()
    assert versions(answer)[0][0] == version


# Generation ----------------------------------------------------------------------------------------------------------


def test_one_prompt_answers_one_object_with_everything_asked_for(server):
    answer = server.generate(PROMPT, {"logprob_start_len": 1, "rid": "mine"}, max_new_tokens=4, ignore_eos=True)
    meta = answer["meta_info"]
    assert isinstance(answer["text"], str)
    assert len(answer["output_ids"]) == 4
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (3, 4)
    assert meta["weight_version"] == "0"
    assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": 4}]
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert all(entry[0] < 0 and entry[2] is None for entry in meta["output_token_logprobs"])
    # The first position asked for has no log-prob, wherever it stands.
    assert [entry[1] for entry in meta["input_token_logprobs"]] == [6, 7]
    assert meta["input_token_logprobs"][0][0] is None
    assert meta["input_token_logprobs"][1][0] == pytest.approx(server.scores(PROMPT)[1], abs=2e-5)
    assert meta["e2e_latency"] > 0


def test_log_probs_are_left_out_unless_asked_for(server):
    meta = server.generate([5], {"return_logprob": False}, max_new_tokens=2)["meta_info"]
    assert "output_token_logprobs" not in meta
    assert "input_token_logprobs" not in meta
    meta = server.generate([5], max_new_tokens=2)["meta_info"]
    assert meta["input_token_logprobs"] == []


def test_log_probs_are_those_of_the_model(server):
    assert_serves(server, server.first, "0")


def test_input_log_probs_of_a_sequence_equal_the_output_log_probs_it_was_drawn_with(server):
    answer = server.generate([5, 6], max_new_tokens=40, ignore_eos=True)
    assert server.scores([5, 6, *answer["output_ids"]])[1:] == pytest.approx(drawn(answer), abs=2e-5)


def test_no_new_tokens_means_that_only_the_prompt_is_scored(server):
    answer = server.generate([5, 6], {"logprob_start_len": 0}, max_new_tokens=0)
    assert (answer["output_ids"], drawn(answer)) == ([], [])
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert answer["meta_info"]["weight_versions"] == [{"version": "0", "start": 0, "end": 0}]


def test_a_sequence_as_long_as_any_may_be_is_drawn_to_its_end_goes_on_from_anywhere_and_is_scored(server):
    prompt = [5 + i % 80 for i in range(CONTEXT - 10)]
    answer = server.generate(prompt, max_new_tokens=10, ignore_eos=True)
    ids = prompt + answer["output_ids"]
    assert len(ids) == CONTEXT
    assert server.scores(ids)[-10:] == pytest.approx(drawn(answer), abs=2e-5)
    last = server.generate(ids[:-1], {"logprob_start_len": 0}, max_new_tokens=1, ignore_eos=True)
    assert len(last["output_ids"]) == 1
    assert len(last["meta_info"]["input_token_logprobs"]) == CONTEXT - 1


def test_a_batch_answers_all_samples_of_each_prompt_in_order(server):
    answers = server.generate([[5, 6], [7, 8, 9]], n=3, max_new_tokens=12, ignore_eos=True)
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [2, 2, 2, 3, 3, 3]
    assert len({tuple(a["output_ids"]) for a in answers}) == 6
    assert len({a["meta_info"]["id"] for a in answers}) == 6
    for answer, prompt in zip(answers[2:4], ([5, 6], [7, 8, 9]), strict=True):
        whole = server.scores([*prompt, *answer["output_ids"]])
        assert whole[len(prompt) - 1 :] == pytest.approx(drawn(answer), abs=2e-5)
    assert isinstance(server.generate([[5, 6]], max_new_tokens=1), list)


def test_prompts_of_a_batch_may_have_params_and_ids_of_their_own(server):
    each = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "ignore_eos": True}]
    body = {"input_ids": [[5, 6], [7, 8]], "sampling_params": each, "return_logprob": [True, False], "rid": ["a", "b"]}
    first, second = server.post("/generate", **body).json()
    assert [first["meta_info"]["id"], second["meta_info"]["id"]] == ["a", "b"]
    assert [len(first["output_ids"]), len(second["output_ids"])] == [1, 2]
    assert "output_token_logprobs" in first["meta_info"]
    assert "output_token_logprobs" not in second["meta_info"]
    ids = [a["meta_info"]["id"] for a in server.generate([[5], [6]], {"rid": "base"}, max_new_tokens=1)]
    assert ids == ["base_0", "base_1"]


@pytest.mark.parametrize("sampling", [{"temperature": 0.5}, {"temperature": 2.0, "top_p": 0.3}, {"top_k": 2}])
def test_output_log_probs_are_after_temperature_and_before_top_p_and_top_k(server, sampling):
    assert float(server.next_tokens.exp().sum()) == pytest.approx(1, abs=1e-4)
    expected = (server.next_tokens / sampling.get("temperature", 1.0)).log_softmax(0)
    for answer in server.generate([PROMPT] * 4, max_new_tokens=1, **sampling):
        assert drawn(answer)[0] == pytest.approx(float(expected[answer["output_ids"][0]]), abs=1e-4)


def test_greedy_is_repeatable_and_has_the_log_probs_of_temperature_one(server):
    first = server.generate(PROMPT, max_new_tokens=20, ignore_eos=True, temperature=0)
    again = server.generate(PROMPT, max_new_tokens=20, ignore_eos=True, temperature=0)
    other = server.generate(PROMPT, max_new_tokens=20, ignore_eos=True, top_k=1)
    assert first["output_ids"] == again["output_ids"] == other["output_ids"]
    assert server.scores([*PROMPT, *first["output_ids"]])[2:] == pytest.approx(drawn(first), abs=2e-5)


def test_a_sampling_seed_repeats_a_response_where_the_server_supports_it(server):
    def ids(**params):
        return server.generate(PROMPT, max_new_tokens=20, ignore_eos=True, **params)["output_ids"]

    assert ids() != ids()
    # SGLang without --enable-deterministic-inference takes a seed and draws as if there were none.
    assert (ids(sampling_seed=1) == ids(sampling_seed=1)) is server.kind.seeds
    assert ids(sampling_seed=1) != ids(sampling_seed=2)


@pytest.mark.parametrize("trims", [True, False])
def test_a_stop_string_ends_a_response_as_soon_as_it_is_whole_and_its_text_before_it(server, trims):
    tokenizer = Tokenizer.from_file(str(server.first.path / "tokenizer.json"))
    params = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True, "skip_special_tokens": False}
    whole = server.generate(PROMPT, **params)
    stop = whole["text"][9:13]
    text = whole["text"][: whole["text"].index(stop)]
    ids = whole["output_ids"]
    count = next(n for n in range(41) if stop in tokenizer.decode(ids[:n], skip_special_tokens=False))
    for stops in (stop, ["never there", stop]):
        stopped = server.generate(PROMPT, **params, stop=stops, no_stop_trim=not trims)
        assert stopped["output_ids"] == ids[:count]
        assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert stopped["text"] == text + ("" if trims else stop)
    (first, second) = server.generate([PROMPT, PROMPT], **params, stop="never there")
    assert first["output_ids"] == second["output_ids"] == ids


def test_a_stop_token_ends_a_response_and_belongs_to_it(server):
    greedy = server.generate(PROMPT, max_new_tokens=40, ignore_eos=True, temperature=0)["output_ids"]
    token = greedy[10]
    params = {"max_new_tokens": 40, "temperature": 0, "stop_token_ids": [token]}
    stopped = server.generate(PROMPT, **params)
    assert stopped["output_ids"] == greedy[: greedy.index(token) + 1]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert len(drawn(stopped)) == stopped["meta_info"]["completion_tokens"] == len(stopped["output_ids"])
    # ignore_eos covers the stop tokens of the request too.
    assert server.generate(PROMPT, ignore_eos=True, **params)["output_ids"] == greedy


def test_the_models_eos_token_ends_a_response_and_belongs_to_it(server):
    eos = json.loads((server.first.path / "config.json").read_text())["eos_token_id"]
    ended = []
    for _ in range(10):  # at this temperature every 128th token or so is one
        answers = server.generate([[5 + i] for i in range(SLOTS)], max_new_tokens=100, temperature=4.0)
        ended += [answer for answer in answers if reason(answer) == "stop"]
        if ended:
            break
    assert ended
    for answer in ended:
        assert answer["output_ids"].index(eos) == len(answer["output_ids"]) - 1
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": eos}


def test_streams_are_cumulative_and_end_with_done(server):
    parts = list(server.stream([5], max_new_tokens=30, ignore_eos=True, temperature=0))
    final = server.generate([5], max_new_tokens=30, ignore_eos=True, temperature=0)
    assert len(parts) > 1
    for part in parts:
        ids = part["output_ids"]
        assert ids == final["output_ids"][: len(ids)]
        assert len(drawn(part)) == len(ids)
    assert parts[-1]["output_ids"] == final["output_ids"]
    assert drawn(parts[-1]) == pytest.approx(drawn(final), abs=2e-5)
    assert parts[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 30}
    assert all(part["meta_info"]["finish_reason"] is None for part in parts[:-1])


# Both kinds of servers refuse these. Real SGLang takes much that is wrong, and a token id out of range ends it.
@pytest.mark.parametrize(
    "body",
    [
        {"input_ids": None},
        {"input_ids": []},
        {"input_ids": "text"},
        {"input_ids": [5, "6"]},
        {"input_ids": [5] * 1100},
        {"input_ids": [5], "return_logprob": True, "logprob_start_len": 7},
        {"sampling_params": {"max_new_tokens": 1100}},
        {"sampling_params": {"max_new_tokens": -1}},
        {"sampling_params": {"max_new_tokens": 2, "temperature": -0.5}},
        {"sampling_params": {"max_new_tokens": 2, "top_p": 1.5}},
        {"sampling_params": {"max_new_tokens": 2, "top_k": 0}},
        {"sampling_params": {"max_new_tokens": 2, "sampling_seed": 0.5}},
    ],
    ids=lambda body: str(body)[:60],
)
def test_bad_requests_are_refused_with_400(server, body):
    answer = server.post("/generate", **{"input_ids": [5], "sampling_params": {"max_new_tokens": 2}} | body)
    assert answer.status_code == 400
    said = answer.json().get("error", answer.json())
    assert said if isinstance(said, str) else said["message"]  # SGLang 0.5.22 says some of them as a text


def test_bodies_that_are_missing_or_no_json_are_refused_with_400(server):
    for content in (b"{", b"[]", b"\xff"):
        answer = server.http.post("/generate", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
    for route in ("/pause_generation", "/continue_generation", "/begin_weight_update"):
        assert server.http.post(route).status_code == 400


def test_unknown_routes_and_methods_are_told_so(server):
    assert server.post("/nothing").status_code == 404
    assert server.http.get("/generate").status_code == 405


# Control -------------------------------------------------------------------------------------------------------------


def test_information_routes_describe_the_server(server):
    for path in ("/health", "/health_generate", "/ready", "/ping"):
        assert server.http.get(path).status_code == 200
    info = server.http.get("/server_info").json()
    assert info == server.http.get("/server_info").json() | {"internal_states": info["internal_states"]}
    assert (info["context_length"], info["max_running_requests"]) == (CONTEXT + server.kind.spare_tokens, SLOTS)
    assert (info["model_path"], info["dtype"]) == (str(server.first.path), "float32")
    assert isinstance(info["version"], str)
    assert len(info["internal_states"]) == 1
    model = server.http.get("/model_info").json()
    assert model == server.http.get("/get_model_info").json()
    assert model["model_path"] == model["tokenizer_path"] == model["served_model_name"] == str(server.first.path)
    assert (model["is_generation"], model["weight_version"]) == (True, "0")
    assert (model["model_type"], model["architectures"]) == ("bailing_moe", ["BailingMoeForCausalLM"])
    assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] == info["context_length"]


def test_the_cache_is_flushed_when_idle_and_not_when_busy(server):
    assert server.http.get("/flush_cache").status_code == 200
    (running,) = server.start([5])
    assert server.post("/flush_cache").status_code == 400
    server.post("/abort_request", abort_all=True)
    running.result()
    server.wait_idle()


def test_an_abort_returns_the_partial_response_with_its_log_probs(server):
    doomed, survivor = server.start([5], [6], rid="request-", tokens=server.kind.long_tokens)
    assert server.post("/abort_request", rid="request-0").status_code == 200
    server.let_go()
    answer = doomed.result()
    assert reason(answer) == "abort"
    assert isinstance(answer["meta_info"]["finish_reason"]["message"], str)
    assert 0 < len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] < server.kind.long_tokens
    assert versions(answer) == [("0", len(answer["output_ids"]))]
    whole = server.scores([5, *answer["output_ids"]])
    assert whole == pytest.approx(drawn(answer), abs=2e-5)
    assert reason(survivor.result()) == "length"


def test_an_abort_hits_every_request_whose_id_starts_with_its_own(server):
    body = {"sampling_params": {"max_new_tokens": server.kind.long_tokens, "ignore_eos": True}}
    server.hold()
    calls = [server.later(server.post, "/generate", input_ids=[5], rid=rid, **body) for rid in ("p", "px", "q")]
    server.settle(calls)
    server.post("/abort_request", rid="p")
    server.let_go()
    assert [reason(call.result().json()) for call in calls] == ["abort", "abort", "length"]


def test_an_abort_of_nobody_is_fine(server):
    assert server.post("/abort_request", rid="nobody").status_code == 200


def test_requests_aborted_in_the_queue_answer_without_tokens_and_without_a_prompt_length(server):
    calls = server.start(*([5, i] for i in range(3 * SLOTS)))
    server.post("/abort_request", abort_all=True)
    answers = [call.result() for call in calls]
    assert [reason(answer) for answer in answers] == ["abort"] * len(answers)
    queued = [a for a in answers if a["meta_info"]["finish_reason"]["message"].startswith("Abort in waiting queue")]
    assert len(queued) >= SLOTS
    for answer in queued:
        meta = answer["meta_info"]
        assert answer["output_ids"] == []
        assert (meta["output_token_logprobs"], meta["input_token_logprobs"]) == ([], [])
        assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": 0}]
        assert meta["completion_tokens"] == 0
        assert "prompt_tokens" not in meta


def test_a_rid_in_flight_cannot_be_used_twice(server):
    (running,) = server.start([5], rid="twin")
    answer = server.post("/generate", input_ids=[5], rid="twin0", sampling_params={"max_new_tokens": 1})
    assert answer.status_code == 400
    assert "twin0" in answer.json()["error"]["message"]
    server.post("/abort_request", rid="twin0")
    assert reason(running.result()) == "abort"


def test_pause_abort_ends_what_runs_or_waits_and_holds_what_comes(server):
    calls = server.start(*([5, i] for i in range(SLOTS + 1)))
    assert server.post("/pause_generation", mode="abort").json()["status"] == "ok"
    assert [reason(call.result()) for call in calls] == ["abort"] * len(calls)
    assert server.post("/flush_cache").status_code == 200
    held = server.later(server.generate, [5], max_new_tokens=2, ignore_eos=True)
    with pytest.raises(TimeoutError):
        held.result(0.3)
    assert server.post("/continue_generation").json()["status"] == "ok"
    assert len(held.result()["output_ids"]) == 2


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_request_finishes_after_continue_as_if_nothing_had_been(server, mode):
    (running,) = server.start([5], tokens=server.kind.long_tokens)
    assert server.post("/pause_generation", mode=mode).status_code == 200
    server.let_go()
    held = server.later(server.generate, [6], {"rid": "held"}, max_new_tokens=3, ignore_eos=True)
    with pytest.raises(TimeoutError):
        running.result(0.3)
    assert not held.done()
    # A retracted request holds no cache; one that stands still does.
    assert server.post("/flush_cache").status_code == {"in_place": 400, "retract": 200}[mode]
    server.post("/abort_request", rid="held")  # does not reach a request that the pause holds back
    server.post("/continue_generation")
    answer = running.result()
    assert versions(answer) == [("0", server.kind.long_tokens)]
    assert reason(answer) == "length"
    assert server.scores([5, *answer["output_ids"]]) == pytest.approx(drawn(answer), abs=2e-5)
    assert len(held.result()["output_ids"]) == 3


def test_an_abort_in_a_pause_hits_a_retracted_request_at_once_and_one_in_place_when_it_goes_on(server):
    (running,) = server.start([5], rid="retracted")
    server.post("/pause_generation", mode="retract")
    server.post("/abort_request", rid="retracted0")
    answer = running.result()
    assert reason(answer) == "abort"
    # SGLang answers with what its front end has seen, every 50th token of a request that is not streamed: maybe none.
    assert len(drawn(answer)) == len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"]
    assert "prompt_tokens" not in answer["meta_info"]
    server.post("/continue_generation")
    (running,) = server.start([5], rid="still")
    server.post("/pause_generation", mode="in_place")
    server.post("/abort_request", rid="still0")
    server.let_go()
    with pytest.raises(TimeoutError):
        running.result(0.3)
    server.post("/continue_generation")
    answer = running.result()
    assert reason(answer) == "abort"
    assert 0 < len(drawn(answer)) == len(answer["output_ids"]) < ENDLESS_TOKENS


def test_an_unknown_pause_mode_is_refused(server):
    assert server.post("/pause_generation", mode="nap").status_code == 400


# Weights -------------------------------------------------------------------------------------------------------------


def test_weights_from_disk_take_effect_with_their_version(server):
    answer = server.load(server.second, "v1").json()
    assert answer["success"] is True
    assert answer["message"].startswith("Succeeded to update model weights.")
    assert_serves(server, server.second, "v1")
    assert server.http.get("/model_info").json()["model_path"] == str(server.second.path)
    # /server_info goes on telling how the server was started; /model_info tells what it serves.
    server.load(server.first, "v2")
    assert_serves(server, server.first, "v2")


def test_a_failed_update_from_disk_leaves_the_weights_alone(server, tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        answer = server.post("/update_weights_from_disk", model_path=str(path), weight_version="bad", flush_cache=False)
        assert answer.status_code == 400
        assert answer.json()["success"] is False
        assert answer.json()["message"]
    assert_serves(server, server.first, "0")


def test_memory_is_released_at_once_and_resumed_before_and_behind_new_weights(server):
    parts = ["weights", "kv_cache", "cuda_graph"]
    for model, version in ((server.second, "1"), (server.first, "0")):
        server.generate([5, 6], max_new_tokens=3)
        for route, tags in (("release", parts), ("resume", parts[:1]), ("resume", parts[1:])):
            if tags == parts[1:]:
                assert server.load(model, version).json()["success"]
            answer = server.post(f"/{route}_memory_occupation", tags=tags)
            assert (answer.status_code, answer.json()) == (200, None)
        assert_serves(server, model, version)


def test_an_update_without_a_pause_waits_for_what_runs(server):
    (running,) = server.start([5], tokens=server.kind.long_tokens)
    loading = server.later(server.load, server.second, "v1")
    server.let_go()
    assert loading.result().json()["success"]
    assert versions(running.result()) == [("0", server.kind.long_tokens)]
    assert_serves(server, server.second, "v1")


def test_an_update_can_abort_what_runs(server):
    (running,) = server.start([5])
    assert server.load(server.second, "v1", abort_all_requests=True).json()["success"]
    answer = running.result()
    assert reason(answer) == "abort"
    assert [version for version, _ in versions(answer)] == ["0"]


def update(server, how, **more):
    if how == "disk":
        answers = [server.load(server.second, "v1", **more)]
    else:
        with sender(server) as trainer:
            answers = [
                server.post("/begin_weight_update"),
                trainer.send(server.second.tensors, flat=how == "flattened", weight_version="v1", **more),
                server.post("/end_weight_update"),
            ]
    assert [answer.json()["success"] for answer in answers] == [True] * len(answers)


@pytest.mark.parametrize("how", ["disk", "flattened", "plain"])
@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_request_goes_on_with_the_new_weights_and_says_which_drew_which_token(server, mode, how):
    (running,) = server.start([5], tokens=server.kind.long_tokens)
    server.post("/pause_generation", mode=mode)
    server.let_go()
    update(server, how, flush_cache=mode == "retract")
    assert not running.done()
    server.post("/continue_generation")
    answer = running.result()
    (old, count), (new, rest) = versions(answer)
    assert (old, new, count + rest) == ("0", "v1", server.kind.long_tokens)
    assert 0 < count < server.kind.long_tokens
    assert answer["meta_info"]["weight_version"] == "v1"
    ids = [5, *answer["output_ids"]]
    under_new = server.scores(ids)
    if mode == "retract":  # in place the old weights' keys and values stay
        assert under_new[count:] == pytest.approx(drawn(answer)[count:], abs=2e-5)
    server.load(server.first, "0")
    under_old = server.scores(ids)
    assert under_old[:count] == pytest.approx(drawn(answer)[:count], abs=2e-5)
    assert math.dist(under_old[count:], drawn(answer)[count:]) > 1


def test_weights_arrive_in_buckets_and_their_version_with_the_last(server):
    names = list(server.second.tensors)
    half = len(names) // 2
    with sender(server) as trainer:
        assert server.post("/begin_weight_update").json()["success"]
        first = trainer.send({name: server.second.tensors[name] for name in names[:half]})
        assert first.json()["success"]
        assert server.version() == "0"
        last = trainer.send({name: server.second.tensors[name] for name in names[half:]}, weight_version="v1")
        assert last.json()["success"]
        assert server.post("/end_weight_update").json()["success"]
        assert_serves(server, server.second, "v1")
        # The group lives on, and so for the next update.
        assert server.post("/begin_weight_update").json()["success"]
        back = trainer.send(server.first.tensors, flat=False, weight_version="v2", flush_cache=True)
        assert back.json()["success"]
        assert server.post("/end_weight_update").json()["success"]
        assert_serves(server, server.first, "v2")


def refused(answer):
    body = answer.json()
    return answer.status_code == 400 and body["success"] is False and bool(body["message"])


def test_a_session_is_opened_once_and_closed_once_and_nothing_goes_without_it(server):
    with sender(server) as trainer:
        assert refused(trainer.announce(server.second.tensors, weight_version="bad").result())
        assert refused(server.post("/end_weight_update"))
        assert server.post("/begin_weight_update").json()["success"]
        assert refused(server.post("/begin_weight_update"))
        assert trainer.send(server.second.tensors, weight_version="v1").json()["success"]
        assert server.post("/end_weight_update").json()["success"]
    assert_serves(server, server.second, "v1")


def test_groups_are_made_and_left_by_name(server):
    with sender(server) as trainer:
        server.post("/begin_weight_update")
        trainer.name = "another"
        assert refused(trainer.announce(server.second.tensors).result())
        trainer.name = "weights"
        unknown = ["floaty"] * len(server.second.tensors)
        assert refused(trainer.announce(server.second.tensors, dtypes=unknown).result())
        server.post("/end_weight_update")
    assert refused(server.post("/destroy_weights_update_group", group_name="weights"))


def test_a_tensor_of_a_wrong_shape_is_refused_and_a_whole_update_mends_the_server(server):
    name = "model.layers.1.attention.dense.weight"
    with sender(server) as trainer:
        server.post("/begin_weight_update")
        answer = trainer.send({name: torch.ones(3, 4)}, weight_version="bad")
        assert refused(answer)
        server.post("/end_weight_update")
        assert server.version() == "0"
        if server.kind.whole:  # SGLang serves what it has: the old weights where the new ones did not come
            assert_serves(server, server.first, "0")
        server.post("/begin_weight_update")
        assert trainer.send(server.second.tensors, weight_version="v1").json()["success"]
        assert server.post("/end_weight_update").json()["success"]
        assert_serves(server, server.second, "v1")


def test_a_trainer_that_dies_in_a_broadcast_fails_the_update_and_not_the_server(server):
    with sender(server) as trainer:
        server.post("/begin_weight_update")
        answer = trainer.announce(server.second.tensors, weight_version="bad")
        with pytest.raises(TimeoutError):
            answer.result(0.3)
        trainer.leave()
        assert refused(answer.result())
    server.post("/end_weight_update")
    assert_serves(server, server.first, "0")
    update(server, "flattened")
    assert_serves(server, server.second, "v1")


def test_the_version_alone_can_be_changed_with_and_without_an_abort(server):
    (running,) = server.start([5])
    answer = server.post("/update_weight_version", new_version="renamed", abort_all_requests=False)
    assert answer.json() == {
        "success": True,
        "message": "Weight version updated to renamed",
        "new_version": "renamed",
    }
    server.settle([running])
    assert server.post("/update_weight_version", new_version="again").json()["success"]
    answer = running.result()
    assert reason(answer) == "abort"
    assert [version for version, _ in versions(answer)][:2] == ["0", "renamed"]
    assert server.version() == "again"
