"""Tests the head divided over tensor-parallel gloo ranks: values and gradients are those of the formula."""

from pathlib import Path

import pytest
import torch
from parallel import run_ranks
from safetensors.torch import save_file

T, M, V, H, RANKS = 18, 11, 97, 16, 3
ROWS = 49 * RANKS  # of vocabulary: the last rank has nothing but padding


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sequence parallel", "replicated sequence"])
def test_three_ranks_give_the_values_and_gradients_of_the_formula(sequence_parallel: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hidden = 4 * torch.randn(T, 1, H, dtype=torch.float64)
    weight = torch.randn(ROWS, H, dtype=torch.float64)
    weight[V:] *= 1e3
    index, targets = torch.randperm(T)[:M], torch.randint(0, V, (M,))
    upstream = torch.randn(2, M, dtype=torch.float64)
    file = tmp_path / "inputs.safetensors"
    tensors = {"hidden": hidden, "weight": weight, "index": index, "targets": targets, "upstream": upstream}
    save_file(tensors, file)
    spec = {"tensors": str(file), "sequence_parallel": sequence_parallel, "vocab_size": V, "temperature": 0.8}
    found = run_ranks(RANKS, spec, tmp_path / "run", worker="head_worker.py")

    hidden.requires_grad_()
    weight.requires_grad_()
    real = weight[:V]
    normed = real / (real.detach().square().sum(0).sqrt() + 1e-7)
    logp = (hidden[index, 0] @ normed.T / 0.8).log_softmax(-1)
    chosen, entropy = logp[range(M), targets], -(logp.exp() * logp).sum(-1)
    (upstream[0] @ chosen + upstream[1] @ entropy).backward()

    def same(name: str, expected: torch.Tensor) -> bool:
        return torch.allclose(found[name], expected, rtol=1e-11, atol=1e-12)

    for rank in range(RANKS):
        assert same(f"logprobs/{rank}", chosen)
        assert same(f"entropy/{rank}", entropy)
        assert same(f"grad_weight/{rank}", weight.grad.chunk(RANKS)[rank])
        assert same(f"grad_hidden/{rank}", hidden.grad.chunk(RANKS)[rank] if sequence_parallel else hidden.grad)
