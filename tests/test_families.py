"""Every family against transformers' own classes: log-probs, gradients, files; and what config.json must say."""

import json
import random
from pathlib import Path

import pytest
import torch
from family_models import CASES, ROPES, make, transformers_logprobs, transformers_model
from parallel import run_ranks
from reference import load_reference, policy_loss
from test_embedded_model import DirectEngine
from test_parallel import make_spec, relative
from tiny_model import tensors_of

from megatron_rl.families import load_architecture, tensor_shapes

LAYOUTS = {"alone": (1, {}), "TP2": (2, {"tensor": 2}), "PP2": (2, {"pipeline": 2}), "CP2": (2, {"context": 2})}
# Each family whole, and divided; scaled rotary embeddings beyond the original length.
DIVIDED = ["llama", "qwen2, tied, yarn", "qwen3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {case: make(case, tmp_path_factory.mktemp("families") / "model") for case in CASES}


def spec_of(model: Path, **changes: object) -> dict:
    """As in test_parallel; the recorded log-probs are near those of the model, so that ratios are near 1."""
    spec = make_spec(model, token_cap=400, traced=[], **changes)
    rng = random.Random(5)
    spec["sequences"].append(
        {
            "token_ids": [rng.randrange(97) for _ in range(120)],
            "num_prompt_tokens": 3,
            "advantage": 0.7,
            "rollout_logprobs": [-1000 / 256] * 117,
            "num_stale_tokens": 0,
        }
    )
    return spec


@pytest.mark.parametrize("case", CASES)
def test_the_embedded_server_has_the_logprobs_of_transformers(case: str, models: dict[str, Path]) -> None:
    engine = DirectEngine(models[case], slots=4, context_length=256)
    ids = [random.Random(1).randrange(97) for _ in range(130)]
    sequence = engine.add(ids, max_new_tokens=1, input_logprob_start=0)
    engine.run()
    with torch.no_grad():
        expected = transformers_logprobs(transformers_model(models[case]), ids)
    found = torch.tensor(sequence.input_logprobs[1:])
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_has_the_logprobs_and_gradients_of_transformers(
    case: str, models: dict[str, Path], tmp_path: Path
) -> None:
    spec = spec_of(models[case])
    model = transformers_model(models[case])
    with torch.no_grad():
        logprobs = [transformers_logprobs(model, row["token_ids"]) for row in spec["sequences"]]
    gradient = transformers_gradient(model, spec)
    for layout, (num_ranks, parallel) in LAYOUTS.items():
        if layout != "alone" and case not in DIVIDED:
            continue
        found = run_ranks(num_ranks, spec | {"parallel": parallel}, tmp_path / layout)
        for i, (row, expected) in enumerate(zip(spec["sequences"], logprobs, strict=True)):
            own = expected[row["num_prompt_tokens"] - 1 :]
            assert (found[f"logprobs/{i}"] - own).abs().max() < 2e-5, (layout, i)
        for name, expected in gradient.items():
            assert relative(found[f"grad/c3po/{name}"], expected) < 1e-5, (layout, name)


def transformers_gradient(model, spec: dict) -> dict[str, torch.Tensor]:
    """Of the C3PO loss, by transformers' forward pass and torch's autograd."""
    total = 0.0
    algorithm = spec["algorithms"][0]
    low, high = 1 - algorithm["clip_low"], 1 + algorithm["clip_high"]
    for row in spec["sequences"]:
        start, ids = row["num_prompt_tokens"], row["token_ids"]
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)[start - 1 : -1]
        logp = logits[range(len(logits)), ids[start:]]
        entropy = -(logits.exp() * logits).sum(-1)
        stale = torch.arange(len(logp)) < row["num_stale_tokens"]
        old = torch.where(stale, torch.tensor(row["rollout_logprobs"]), logp.detach())
        ratio, advantage = (logp - old).exp(), row["advantage"]
        gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        total = total - (gain + algorithm["entropy_coefficient"] * entropy).sum()
    (total / spec["budget"]).backward()
    return {name: p.grad for name, p in model.named_parameters()}
