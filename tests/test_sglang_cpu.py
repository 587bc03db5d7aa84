"""Tests what prepares an SGLang server's processes on a CPU (megatron_rl/rollout/sglang_cpu)."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PREPARES = Path(__file__).parents[1] / "megatron_rl/rollout/sglang_cpu/sitecustomize.py"


# A torch for CUDA comes with a torchvision whose operators load, and torch ends a process that declares one twice.
@pytest.mark.parametrize(("cuda", "expected"), [(None, ["nms", "qnms"]), ("13.0", [])])
def test_torchvisions_operators_are_declared_where_its_own_do_not_load(
    cuda: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    declared: list[str] = []

    class Library:
        def __init__(self, name: str, kind: str) -> None:
            assert (name, kind) == ("torchvision", "FRAGMENT")

        def define(self, schema: str) -> None:
            declared.append(schema.partition("(")[0])

    torch = SimpleNamespace(version=SimpleNamespace(cuda=cuda), library=SimpleNamespace(Library=Library))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    spec = importlib.util.spec_from_file_location("prepares", PREPARES)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    finder = sys.meta_path[0]
    monkeypatch.setitem(sys.modules, "torch", torch)
    for name in ("json", "torchvision", "torchvision"):
        assert finder.find_spec(name, None) is None
    assert declared == expected
