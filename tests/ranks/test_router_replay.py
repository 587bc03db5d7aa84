"""Tests router replay (R3): in any layout the trainer uses exactly the experts that came with the responses."""

import json
import random
import weakref
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro_batches import micro_batch
from parallel import ALGORITHMS, EXACT, SHAPE, exact_spec, run_ranks, worst
from reference import forward, load_reference, loss_positions, policy_loss
from samples import make_sample, make_schedule, make_segment, make_trajectory
from tiny_model import TINY_CONFIG, write_tiny_model

from megatron_rl.config.layout import Layout
from megatron_rl.records import Group, Sample
from megatron_rl.train.orchestrator import commands
from megatron_rl.train.orchestrator.commands import _gather, _routing, _sequences
from megatron_rl.train.step.batch import TrainSequence

LAYERS = 7  # the first dense; over six interleaved stages 1, 2, 1, 1, 1, 1
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "TP2-EP2": (2, {"tensor": 2, "expert": 2}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "PP3-VPP2": (3, {"pipeline": 3, "virtual_pipeline": 2}),
}
CAP = 44  # tokens of a micro-batch: about four of them
NUM_LAYERS, TOPK = 3, 2


def replay_spec(model: Path, **changes: object) -> dict:
    """Make a spec with random experts for every token but the last. The router would hardly ever choose them."""
    spec = exact_spec(model, **{"token_cap": CAP, "algorithms": ALGORITHMS[:1], **changes})
    spec["sequences"] = spec["sequences"][:5]
    rng = random.Random(1)
    for row in spec["sequences"]:
        row["routed_experts"] = [
            [[0, 0]] + [rng.sample(range(TINY_CONFIG["num_experts"]), TOPK) for _ in range(LAYERS - 1)]
            for _ in row["token_ids"][:-1]
        ]
    return spec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {**SHAPE, "num_hidden_layers": LAYERS}
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **shape)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    tensors = run_ranks(1, replay_spec(model), folder)
    share = json.loads((folder / "result.json").read_text())["metrics"]["router_replay_changed_share"]
    return tensors | {"changed_share": torch.tensor(share)}


def test_one_process_has_the_log_probs_and_the_gradient_of_the_formula_with_the_given_experts(
    model: Path, alone: dict[str, torch.Tensor]
) -> None:
    spec = replay_spec(model)
    config, weights = load_reference(model)
    present = {name: w * 1.1 for name, w in weights.items()}
    changed: list[bool] = []
    for i, row in enumerate(spec["sequences"]):
        ids, at = row["token_ids"], loss_positions(row)
        routers: dict[int, list[torch.Tensor]] = {}
        expected = forward(config, present, ids, routers, row["routed_experts"]).log_softmax(-1).detach()
        expected = expected[[position - 1 for position in at], [ids[position] for position in at]]
        assert float((alone[f"logprobs/{i}"] - expected).abs().max()) < 1e-5
        assert float((alone[f"free/{i}"] - expected).abs().max()) > 0.01
        for layer, (logits,) in routers.items():
            for experts, own in zip(row["routed_experts"], logits.topk(TOPK, -1).indices.tolist(), strict=False):
                changed += [expert not in own for expert in experts[layer]]
    assert float(alone["changed_share"]) == pytest.approx(sum(changed) / len(changed))
    policy_loss(config, weights, spec, ALGORITHMS[0]).backward()
    gradients = {f"grad/c3po/{name}": w.grad / 1.1 for name, w in weights.items()}
    assert worst(alone, gradients, "grad/") < (1e-6, "")
    # The log-prob pass, the pass of the reference policy and the step.
    assert int(alone["times/0"]) == 3


def test_replaying_a_routers_own_choice_changes_nothing(alone: dict[str, torch.Tensor]) -> None:
    free = {name: tensor for name, tensor in alone.items() if name.startswith("free/")}
    assert len(free) == 5
    for name, logprobs in free.items():
        # Megatron adds up the probabilities of a token's experts in fp32, and in another order.
        assert float((alone[name.replace("free", "given")] - logprobs).abs().max()) < 1e-6


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_uses_exactly_the_given_experts_and_has_the_gradient_of_one_process(
    name: str, model: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    # Layers are computed again in the backward pass, while other micro-batches are on their way.
    num_ranks, parallel = LAYOUTS[name]
    cap = CAP // parallel.get("context", 1)
    spec = replay_spec(model, parallel=parallel, token_cap=cap, recompute="full")
    found = run_ranks(num_ranks, spec, tmp_path / "run")
    for prefix in ("logprobs/", "grad/", "weight/"):
        assert worst(found, alone, prefix) < (EXACT, ""), prefix
    assert [int(found[f"times/{rank}"]) for rank in range(num_ranks)] == [4] * num_ranks


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(2, 40), st.booleans()), max_size=5),
)
def test_every_packed_token_has_the_experts_of_its_own_position(
    size: int, multiple_of: int, rows: list[tuple[int, bool]]
) -> None:
    # Token ids tell the sequence and the position; the experts are a function of both that no neighbour shares.
    def experts(token: int) -> list[list[int]]:
        number, position = divmod(token, 1000)
        return [[(7 * number + 3 * position + 5 * layer + k) % 256 for k in range(TOPK)] for layer in range(NUM_LAYERS)]

    sequences = []
    for number, (length, has_record) in enumerate(rows):
        ids = 1000 * (number + 1) + np.arange(length)
        sequences.append(
            TrainSequence(
                token_ids=ids.astype(np.int32),
                loss_positions=np.arange(1, length, dtype=np.int32),
                weight=1.0,
                rollout_logprobs=np.zeros(length - 1, np.float32),
                num_stale_tokens=0,
                routed_experts=np.array([experts(t) for t in ids[:-1]], np.uint8) if has_record else None,
            )
        )
    for rank in range(size):
        batch = micro_batch(sequences, multiple_of, rank, size)
        routed = batch.packed.routed_experts
        if not any(has_record for _, has_record in rows):
            assert routed is None
            continue
        assert routed is not None
        assert routed.shape == (batch.token_ids.shape[1], NUM_LAYERS, TOPK)
        nothing = [[-1] * TOPK] * NUM_LAYERS
        for token, padding, found in zip(
            batch.token_ids[0].tolist(), batch.padding_mask[0].tolist(), routed.tolist(), strict=True
        ):
            length, has_record = rows[token // 1000 - 1] if not padding else (0, False)
            known = has_record and token % 1000 < length - 1
            assert found == (experts(token) if known else nothing)


def with_record(sample: Sample, has_record: bool) -> Sample:
    if not has_record:
        return sample
    rng = np.random.default_rng(sample.id)
    segments = []
    for segment in sample.response.segments:
        count = len(segment.prompt_ids) + len(segment.output_ids) - 1
        record = rng.integers(0, 256, (count, NUM_LAYERS, TOPK)).astype(np.uint8)
        segments.append(replace(segment, routed_experts=record))
    return replace(sample, response=replace(sample.response, segments=tuple(segments)))


def test_every_rank_gets_the_share_of_its_data_rank_and_one_share_is_copied_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = [with_record(make_sample(i, 0, n), True) for i, n in enumerate([9, 3, 12, 7, 20, 5])]
    schedule = make_schedule([Group(prompt_id=i, samples=(sample,)) for i, sample in enumerate(samples)])
    layout = Layout(world_size=8, tensor=2, pipeline=2)  # ranks 0, 1, 4, 5 train one share, 2, 3, 6, 7 the other
    routing = _routing(schedule.plan, schedule.samples)
    expected = [_gather(schedule.plan, schedule.samples, rank, routing) for rank in range(2)]
    sent: dict[int, list[np.ndarray]] = defaultdict(list)
    copies: list[weakref.ref] = []

    def gather(*arguments: Any) -> list[np.ndarray]:
        assert not [copy for copy in copies if copy() is not None]
        found = _gather(*arguments)
        copies.extend(map(weakref.ref, found))
        return found

    fake = SimpleNamespace(
        send=lambda tensor, dst, group: sent[dst].append(tensor.numpy().copy()), broadcast=lambda *_, **__: None
    )
    monkeypatch.setattr(commands, "dist", fake)
    monkeypatch.setattr(commands, "_gather", gather)
    _, own = commands.send_work(schedule.plan, schedule.samples, layout, None)
    assert sorted(sent) == list(range(1, 8))
    for rank, arrays in sent.items():
        for array, wanted in zip(arrays, expected[rank // 2 % 2], strict=True):
            assert np.array_equal(array, wanted)
    given = [sequence for micro_batch in own[0] for sequence in micro_batch]
    assert np.array_equal(np.concatenate([sequence.token_ids for sequence in given]), expected[0][0])
    assert len(copies) == 2 * len(expected[0])


@pytest.mark.parametrize("missing", [(), (1, 4), range(7)], ids=["none missing", "some missing", "none there"])
def test_a_ranks_sequences_come_with_the_experts_of_their_samples(missing: tuple[int, ...]) -> None:
    lengths = [9, 3, 12, 7, 20, 5]
    samples = [with_record(make_sample(i, 0, n), i not in missing) for i, n in enumerate(lengths)]
    # Two segments, the first of which has tokens of others.
    turns = [make_segment(6, turns=[(0, 1), (4, 6)]), make_segment(2, num_prompt_tokens=9)]
    samples.append(with_record(make_trajectory(6, 0, turns), 6 not in missing))
    groups = [Group(prompt_id=i, samples=(sample,)) for i, sample in enumerate(samples)]
    schedule = make_schedule(groups, budgets=(57,))
    plan = schedule.plan
    routing = _routing(plan, schedule.samples)
    seen = 0
    for rank in range(2):
        work = _sequences(plan, rank, routing, _gather(plan, schedule.samples, rank, routing))
        (step,) = plan.steps
        for positions, sequences in zip(step.micro_batches[rank], work[0], strict=True):
            for position, sequence in zip(positions, sequences, strict=True):
                selected = step.selected[position]
                segments = schedule.samples[selected.index].response.segments
                record = segments[selected.segment].routed_experts
                seen += 1
                if record is None:
                    assert sequence.routed_experts is None
                else:  # a response that was cut keeps the experts of what is left
                    assert np.array_equal(sequence.routed_experts, record[: len(sequence.token_ids) - 1])
    assert seen == len(plan.steps[0].selected)
