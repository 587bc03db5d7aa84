"""Torch's Adam by one kernel, as on a GPU, takes the steps that it takes otherwise."""

import copy
from types import SimpleNamespace

import torch

from megatron_rl.train.state import _initialize_adam, _without_step
from megatron_rl.train.trainer import fuse_adam


def made(fused: bool) -> SimpleNamespace:
    """As far as the trainer looks at megatron's: one part with parameters, and one without."""
    torch.manual_seed(0)
    groups = [{"params": [torch.nn.Parameter(torch.randn(n)) for n in (5, 1000)]}, {"params": []}]
    adam = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    optimizer = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam), SimpleNamespace(optimizer=None)])
    if fused:
        fuse_adam(optimizer)
    return optimizer


def test_steps_are_the_same_with_a_save_and_a_load_between(monkeypatch) -> None:
    calls = []
    kernel = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **options: calls.append(kernel(*args, **options)))
    weights = []
    for fused in (False, True):
        calls.clear()
        optimizer = made(fused)
        _initialize_adam(optimizer)
        adam = optimizer.chained_optimizers[0].optimizer
        parameters = adam.param_groups[0]["params"]
        for number in range(3):
            if number == 2:
                adam.load_state_dict(copy.deepcopy(adam.state_dict()))
                with _without_step(adam):
                    pass
            torch.manual_seed(number)
            for p in parameters:
                p.grad = torch.randn_like(p)
            adam.step()
        assert [float(adam.state[p]["step"]) for p in parameters] == [3.0, 3.0]
        assert bool(calls) == fused
        weights.append(torch.cat([p.detach() for p in parameters]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
