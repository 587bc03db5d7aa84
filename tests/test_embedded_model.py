"""Tests the embedded network against a naive fp64 forward pass, and its sampling."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import routed_by
from reference_forward import reference_logprobs
from safetensors.torch import load_file, save_file
from tiny_model import TINY_CONFIG, write_tiny_model

from megatron_rl.families import load_architecture, tensor_shapes
from megatron_rl.rollout.embedded.engine import Engine, EngineOptions
from megatron_rl.rollout.embedded.load import load_weights
from megatron_rl.rollout.embedded.protocol import Limits, parse_sampling
from megatron_rl.rollout.embedded.sampling import SamplingRows, derive_seeds, draw, keep_top, sample, uniforms
from megatron_rl.rollout.embedded.sequence import Sequence


class DirectEngine:
    """Steps an engine in the test's thread: sequences are submitted, then it runs until all are done."""

    def __init__(self, directory, *, dtype=torch.float32, slots=64, context_length=512):
        self.events = []
        self.config = load_architecture(directory)
        options = EngineOptions(
            model_path=str(directory), dtype=dtype, max_running_requests=slots, context_length=context_length
        )
        self.engine = Engine(self.config, options, self.events.extend)
        self.order = itertools.count()
        self.limits = Limits(vocab_size=self.config.vocab_size, context_length=context_length)

    def add(self, prompt, seed=0, input_logprob_start=None, return_routed_experts=False, **params):
        sequence = Sequence(
            rid=str(len(self.events)),
            prompt=list(prompt),
            params=parse_sampling({"ignore_eos": True, **params}, len(prompt), self.limits),
            seed=seed,
            stop_ids=(),
            input_logprob_start=input_logprob_start,
            return_routed_experts=return_routed_experts,
            order=next(self.order),
        )
        self.engine._waiting.add([sequence])
        return sequence

    @torch.inference_mode()
    def step(self, count=1):
        for _ in range(count):
            self.engine._admit()
            self.engine._decode()

    def run(self):
        while self.engine._waiting or self.engine._slots.num_active:
            self.step()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


VARIANTS = {
    "plain": {},
    "norm_head": {"norm_head": True},
    "no renormalisation, no shared expert": {"norm_topk_prob": False, "num_shared_experts": 0},
    "two shared experts, head_dim of its own": {"num_shared_experts": 2, "head_dim": 24, "first_k_dense_replace": 0},
    "multi-query": {"num_key_value_heads": 1, "num_experts_per_tok": 3},
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_logprobs_of_prompt_and_output_equal_a_naive_fp64_forward(tmp_path, overrides):
    directory = write_tiny_model(tmp_path, seed=3, num_hidden_layers=2, **overrides)
    direct = DirectEngine(directory, slots=4)
    prompt = np.random.default_rng(0).integers(0, 96, 21).tolist()  # more than one prefill chunk
    sequence = direct.add(prompt, seed=5, input_logprob_start=0, max_new_tokens=50, temperature=1.0)
    direct.run()
    ids = prompt + sequence.output_ids  # crosses a cache block at 64
    expected = reference_logprobs(directory, {**TINY_CONFIG, "num_hidden_layers": 2, **overrides}, ids)
    ours = sequence.input_logprobs[1:] + sequence.output_logprobs
    theirs = [expected[t, ids[t + 1]] for t in range(len(ids) - 1)]
    assert np.abs(np.array(ours) - theirs).max() < 2e-5


def random_requests(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": rng.integers(0, 96, rng.integers(1, 90)).tolist(),
            "seed": int(rng.integers(0, 2**62)),
            "max_new_tokens": int(rng.integers(1, 80)),
            "temperature": float(rng.choice([0.0, 0.7, 1.0, 1.3])),
            "top_p": float(rng.choice([0.8, 1.0])),
            "top_k": int(rng.choice([-1, 20])),
        }
        for _ in range(count)
    ]


SHAPES = {
    "fp32": ({}, torch.float32, 1),
    "two threads": ({}, torch.float32, 2),
    "bf16": ({}, torch.bfloat16, 1),
    "odd sizes": (
        {"vocab_size": 101, "hidden_size": 60, "head_dim": 14, "moe_intermediate_size": 23, "intermediate_size": 37,
         "num_experts": 5},
        torch.float32,
        1,
    ),
    "odd sizes in bf16": (
        {"vocab_size": 101, "hidden_size": 60, "head_dim": 14, "moe_intermediate_size": 23, "num_experts": 5},
        torch.bfloat16,
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "dtype", "threads"), SHAPES.values(), ids=SHAPES.keys())
def test_a_request_gets_the_same_bits_alone_and_among_others_in_any_order(tmp_path, overrides, dtype, threads):
    torch.set_num_threads(threads)
    directory = write_tiny_model(tmp_path, num_hidden_layers=2, **overrides)
    direct = DirectEngine(directory, dtype=dtype)
    assert direct.engine.row_counts.invariant
    requests = random_requests(65)
    crowded = [direct.add(**request) for request in requests]
    direct.run()
    # Other order, arriving while others run, one at a time.
    order = np.random.default_rng(1).permutation(len(requests))
    trickled = {}
    for position in order:
        trickled[position] = direct.add(**requests[position])
        direct.step(2)
    direct.run()
    for position, sequence in enumerate(crowded):
        assert trickled[position].output_ids == sequence.output_ids
        assert trickled[position].output_logprobs == sequence.output_logprobs
    fresh = DirectEngine(directory, dtype=dtype, slots=1)  # another number of slots, never anyone else
    for position in order[:5]:
        alone = fresh.add(**requests[position])
        fresh.run()
        assert alone.output_ids == crowded[position].output_ids
        assert alone.output_logprobs == crowded[position].output_logprobs


def test_samples_sharing_a_prompt_get_the_bits_of_samples_that_do_not(tmp_path):
    directory = write_tiny_model(tmp_path, num_hidden_layers=2)
    direct = DirectEngine(directory, slots=16)
    prompt = list(range(40))
    shared = [direct.add(prompt, seed=s, max_new_tokens=20) for s in range(24)]
    direct.run()
    for seed, sequence in enumerate(shared):
        direct.engine._prefixes.clear()
        alone = direct.add(prompt, seed=seed, max_new_tokens=20)
        direct.run()
        assert (alone.output_ids, alone.output_logprobs) == (sequence.output_ids, sequence.output_logprobs)
    assert len({tuple(s.output_ids) for s in shared}) == 24


def test_routed_experts_are_those_of_a_plain_forward_and_the_same_alone_and_among_others(tmp_path):
    directory = write_tiny_model(tmp_path)
    direct = DirectEngine(directory, slots=16)
    requests = random_requests(24)
    for i, request in enumerate(requests):  # prompts that several share, among them such as nobody asks about
        request["prompt"] = requests[i - i % 3]["prompt"]
        request["return_routed_experts"] = i % 4 != 0
    direct.add(requests[0]["prompt"], max_new_tokens=60)  # in no way a source for those that want experts
    direct.step()
    # Short and long ones: slots are left, taken again, and moved to run with fewer rows.
    crowded = [direct.add(**request) for request in requests]
    moves = []
    direct.engine._slots.move = lambda slot, move=direct.engine._slots.move: moves.append(slot) or move(slot)
    direct.run()
    assert moves
    fresh = DirectEngine(directory, slots=1)
    for request, sequence in zip(requests, crowded, strict=True):
        if not request["return_routed_experts"]:
            assert sequence.routed_experts is None
            continue
        record = sequence.routed_experts
        ids = sequence.prompt + sequence.output_ids
        assert (record.dtype, record.shape) == (np.uint8, (len(ids) - 1, 3, 2))
        assert (record[:, 0] == 0).all()  # a dense layer, as SGLang answers
        assert np.array_equal(np.sort(record, axis=2), routed_by(directory, ids)[:-1])
        alone = fresh.add(**request)
        fresh.run()
        assert np.array_equal(alone.routed_experts, record)
    plain = [direct.add(**request | {"return_routed_experts": False}) for request in requests]
    direct.run()
    assert [s.output_logprobs for s in plain] == [s.output_logprobs for s in crowded]


def test_continuing_from_a_prefix_with_the_same_seed_draws_the_same_tokens(tmp_path):
    direct = DirectEngine(write_tiny_model(tmp_path), slots=4)
    whole = direct.add([5, 6, 7], seed=9, max_new_tokens=30)
    direct.run()
    rest = direct.add([5, 6, 7, *whole.output_ids[:12]], seed=9, max_new_tokens=18)
    direct.run()
    assert rest.output_ids == whole.output_ids[12:]
    np.testing.assert_allclose(rest.output_logprobs, whole.output_logprobs[12:], atol=2e-5)


def test_logprobs_follow_temperature_but_not_top_k_and_top_p(tmp_path):
    directory = write_tiny_model(tmp_path, num_hidden_layers=2)
    direct = DirectEngine(directory, slots=4)
    sequence = direct.add([3, 4], max_new_tokens=1, temperature=0.5, top_k=3, top_p=0.9)
    greedy = direct.add([3, 4], max_new_tokens=1, temperature=0)
    direct.run()
    plain = reference_logprobs(directory, {**TINY_CONFIG, "num_hidden_layers": 2}, [3, 4])[-1]
    sharp = plain * 2 - np.log(np.exp(plain * 2).sum())
    assert sequence.output_logprobs[0] == pytest.approx(sharp[sequence.output_ids[0]], abs=2e-5)
    assert greedy.output_ids == [int(plain.argmax())]
    assert greedy.output_logprobs[0] == pytest.approx(plain.max(), abs=2e-5)


# Sampling ------------------------------------------------------------------------------------------------------------


def draws(logits, count, *, temperature=1.0, top_k=10**6, top_p=1.0):
    rows = SamplingRows(
        temperature=np.full(count, temperature, np.float32),
        top_p=np.full(count, top_p),
        top_k=np.full(count, top_k),
        seeds=np.arange(count, dtype=np.uint64),
        positions=np.full(count, 7),
    )
    tokens, _ = sample(torch.tensor(logits).expand(count, -1), rows)
    return np.bincount(tokens, minlength=len(logits)) / count


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0]


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_sampled_frequencies_follow_the_softmax_at_each_temperature():
    for temperature in (0.5, 1.0, 2.0):
        expected = softmax(np.array(LOGITS) / temperature)
        assert np.abs(draws(LOGITS, 40_000, temperature=temperature) - expected).max() < 0.01


def test_top_k_and_top_p_keep_the_most_probable_tokens_and_their_proportions():
    probs = softmax(np.array(LOGITS))  # 0.56 0.21 0.13 0.08 0.03
    for options, kept in (({"top_k": 2}, 2), ({"top_p": 0.5}, 1), ({"top_p": 0.7}, 2), ({"top_p": 0.8, "top_k": 2}, 2)):
        expected = np.where(np.arange(5) < kept, probs, 0) / probs[:kept].sum()
        assert np.abs(draws(LOGITS, 40_000, **options) - expected).max() < 0.01


def test_uniform_numbers_are_uniform_and_uncorrelated_over_seeds_and_positions():
    u = uniforms(np.repeat(np.arange(300, dtype=np.uint64), 300), np.tile(np.arange(300), 300)).reshape(300, 300)
    assert np.abs(np.histogram(u, 20, (0, 1))[0] / u.size - 0.05).max() < 0.004
    for neighbour in (u[1:, :] * u[:-1, :], u[:, 1:] * u[:, :-1]):
        assert abs(neighbour.mean() - 0.25) < 0.004


def test_samples_of_one_prompt_have_seeds_of_their_own():
    seeds = {seed for first in (0, 1, 2**63, -1) for seed in derive_seeds(first, 100)}
    assert len(seeds) == 400
    assert derive_seeds(12, 1) == [12] == derive_seeds(12, 5)[:1]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda p: sum(p) > 1e-3),
    st.floats(0, 1, exclude_max=True),
)
def test_draw_never_returns_a_token_of_probability_zero(probs, u):
    token = draw(np.array([probs]), np.array([u]))[0]
    assert probs[token] > 0


def test_rows_without_filter_are_untouched_by_filtered_rows():
    probs = np.array([softmax(np.array(LOGITS))] * 2)
    out = keep_top(probs.copy(), np.array([5, 1]), np.array([1.0, 1.0]))
    assert (out[0] == probs[0]).all()
    assert np.flatnonzero(out[1]).tolist() == [0]


# Weights -------------------------------------------------------------------------------------------------------------


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def break_shape(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def break_value(tensors):
    tensors["model.norm.weight"][0] = float("nan")


BROKEN = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.gate.weight"), "missing.*model.layers.1.mlp.gate.weight"),
    "unknown": (lambda t: t.update({"model.extra": torch.zeros(2)}), "unknown.*model.extra"),
    "shape": (break_shape, r"model.norm.weight must have shape \(64,\), got \(63,\)"),
    "not finite": (break_value, "model.norm.weight.*not finite"),
    "integers": (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}), "int32"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    directory = write_tiny_model(tmp_path)
    config = load_architecture(directory)
    rewrite(directory, change)
    with pytest.raises(ValueError, match=message):
        load_weights(directory, config, torch.float32)


def test_a_tensor_in_two_files_is_refused_and_a_split_checkpoint_is_not(tmp_path):
    directory = write_tiny_model(tmp_path)
    config = load_architecture(directory)
    whole = load_weights(directory, config, torch.float32)
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:9]}, directory / "a.safetensors")
    with pytest.raises(ValueError, match="more than once"):
        load_weights(directory, config, torch.float32)
    # An index says which files are the model, as it does for the trainer.
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert torch.equal(load_weights(directory, config, torch.float32).embedding, whole.embedding)
    index.unlink()
    save_file({n: tensors[n] for n in names[9:]}, directory / "model.safetensors")
    split = load_weights(directory, config, torch.float32)
    assert torch.equal(split.layers[2].experts[5].gate_up, whole.layers[2].experts[5].gate_up)
    assert set(names) == set(tensor_shapes(config))
    assert sum(t.numel() for t in tensors.values()) == config.num_parameters()
