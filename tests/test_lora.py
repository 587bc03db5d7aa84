"""Adapters: every layout has the gradient of one process, and peft's on transformers' class is the same."""

from pathlib import Path

import pytest
import torch
from parallel import run_ranks
from test_parallel import ALGORITHMS, EXACT, INTERLEAVED, LAYOUTS, SHAPE, make_spec, moe, worst
from tiny_model import write_tiny_model

from megatron_rl.config.layout import Layout

LORA = {"rank": 4, "alpha": 8.0}
# ETP over a part of TP too: four ranks, of which two divide each expert.
OF_ADAPTERS = {name: LAYOUTS[name] for name in ("DP2", "TP2", "TP2-ETP2", "TP2-EP2", "PP2", "CP2-EP2")} | {
    "TP2xDP2-EP2xETP2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "CP2xTP2": LAYOUTS["CP2xTP2"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **SHAPE)


def spec_of(model: Path, layout: Layout, **changes: object) -> dict:
    common = {"dtype": "float64", "moe": moe(layout), "algorithms": ALGORITHMS, "reference_scale": 1.0, "lora": LORA}
    return make_spec(model, **common | changes)


@pytest.fixture(scope="module")
def exact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, dict[str, torch.Tensor]]:
    """One process in fp64, by the balance loss."""
    found = {}
    for world_size in (1, 2):
        spec = spec_of(model, Layout(world_size=world_size))
        run = run_ranks(1, spec, tmp_path_factory.mktemp("exact") / "run")
        found[spec["moe"]["load_balance_coefficient"]] = run
    return found


@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_every_layout_gives_the_adapters_the_gradient_of_one_process_to_rounding(
    name: str, model: Path, exact: dict[float, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    num_ranks, parallel = OF_ADAPTERS[name]
    layout = Layout(world_size=num_ranks, **parallel)
    spec = spec_of(model, layout, parallel=parallel, token_cap=80 // layout.context)
    found = run_ranks(num_ranks, spec, tmp_path / "run")
    expected = exact[spec["moe"]["load_balance_coefficient"]]
    for prefix in ("logprobs/", "traced/", "measured", "grad/", "factor/", "weight/"):
        assert worst(found, expected, prefix) < (EXACT, ""), prefix
    assert float(found["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-6)
