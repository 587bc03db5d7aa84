"""Tests that megatron-core and the embedded server agree on the log-prob of every token of the same model."""

from pathlib import Path

import pytest
import torch
from parallel import SHAPE, make_spec, run_ranks
from served import input_logprobs
from tiny_model import write_tiny_model

from megatron_rl.rollout.server import EmbeddedServer

LAYOUTS = {"alone": (1, {}), "TP2": (2, {"tensor": 2}), "EP2": (2, {"expert": 2})}


@pytest.fixture(
    scope="module",
    params=[{"norm_head": True}, {"norm_head": False}, {"norm_head": True, "tie_word_embeddings": True}],
    ids=["norm_head", "plain_head", "tied"],
)
def model_and_scores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """Return a model directory and a real server's log-probs of the tokens of the spec's sequences."""
    folder = tmp_path_factory.mktemp("parity")
    model = write_tiny_model(folder / "tiny", **(SHAPE | request.param))
    server = EmbeddedServer(model, folder / "server.log", context_length=64)
    sequences = [row["token_ids"] for row in make_spec(model)["sequences"]]
    return model, input_logprobs(server, sequences, max_new_tokens=0, seconds=240)


@pytest.mark.parametrize("name", LAYOUTS)
def test_megatron_and_the_embedded_server_agree(name: str, model_and_scores: tuple[Path, list], tmp_path: Path) -> None:
    model, scores = model_and_scores
    num_ranks, parallel = LAYOUTS[name]
    spec = make_spec(model, parallel=parallel)
    found = run_ranks(num_ranks, spec, tmp_path / "run")
    for i, row in enumerate(spec["sequences"]):
        expected = torch.tensor(scores[i][row["num_prompt_tokens"] :], dtype=torch.float64)
        assert len(expected) == len(found[f"logprobs/{i}"])
        assert float((found[f"logprobs/{i}"] - expected).abs().max()) <= 2e-5
