"""Tests that the benchmark at a small size keeps the bounds that it has at a million rows."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "bench_curation.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_curation", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_curation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_planted_rows_are_found_and_the_others_kept(tool: ModuleType, tmp_path: Path) -> None:
    found = tool.bench(tmp_path, 5000, workers=1, seed=3)
    assert set(found["planted"]) == {kind.partition("/")[0] for kind in tool.SHARES}
    near = found["recall"].pop("near_duplicate")
    assert near >= 0.98
    assert set(found["recall"].values()) == {1.0}
    assert found["false_drop_rate"] < 0.001
    assert found["peak_anonymous_bytes"] > 1e7


def test_the_similarity_of_planted_rows_is_that_of_sets(tool: ModuleType) -> None:
    assert tool.jaccard("A b, c d", "a b c e") == pytest.approx(1 / 3)
    assert tool.jaccard("a b c d", "A, b (c) d.") == 1
