"""Tests that imports only point down, and that light modules do not import torch or megatron."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megatron_rl"
LAYERS = {
    "cli": 5,
    "preflight": 4,
    "plan": 4,
    "simulation": 4,
    "report": 4,
    "launch": 4,
    "train": 4,
    "evaluation": 3,
    "gateway": 3,
    "selection": 3,
    "sync": 3,
    "model": 2,
    "rollout": 2,
    "checkpoint": 1,
    "data": 1,
    "reward": 1,
    "c3po": 1,
    "config": 0,
    "families": 0,
    "rotary": 0,
    "expert_choice": 0,
    "records": 0,
    "device": 0,
    "gpus": 0,
    "hub": 0,
    "memory": 0,
    "metric_names": 0,
    "lifeline": 0,
    "locales": 0,
    "endpoint": 0,
    "errors": 0,
    "keys": 0,
    "open_files": 0,
    "own_functions": 0,
    "stores": 0,
    "place": 0,
    "locks": 0,
    "files": 0,
    "parsing": 0,
    "proxies": 0,
    "tensor_bytes": 0,
    "terminal": 0,
    "unloadable": 0,
    "versions": 0,
    "": 0,
}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else ""


def test_imports_only_point_down() -> None:
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(["megatron_rl", *path.relative_to(PACKAGE).with_suffix("").parts])
        here = part_of(module)
        assert here or path.name == "__init__.py", f"{path.name} belongs to no layer of this test"
        for name in imports_of(path):
            if name.split(".")[0] == "megatron_rl" and part_of(name):
                there = part_of(name)
                seen.add((here, there))
                assert LAYERS[there] <= LAYERS[here], f"{module} imports {name}, which is above it"
    for a, b in [("rollout", "model"), ("rollout", "checkpoint"), ("c3po", "data"), ("c3po", "reward")]:
        assert (a, b) not in seen
        assert (b, a) not in seen
    assert ("train", "model") in seen, "the walk found nothing"


def test_pure_parts_import_no_megatron_and_no_sglang() -> None:
    torchless = ("config", "records", "endpoint", "data", "reward", "gpus", "memory")
    torchless += ("preflight", "plan", "simulation", "report")
    for part in (*torchless, "c3po", "lifeline", "rollout", "evaluation", "selection", "cli"):
        paths = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else list((PACKAGE / part).rglob("*.py"))
        assert paths
        for path in paths:
            roots = {name.split(".")[0] for name in imports_of(path)}
            assert not roots & {"megatron", "sglang"}, path
            if part in torchless or (path.name in (
                "budget.py", "packing.py", "plan.py", "advantage.py", "client.py", "sampler.py", "server.py",
            ) and "embedded" not in path.parts):  # fmt: skip
                assert "torch" not in roots, path


def test_only_one_module_says_cuda() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("device.py", "preflight.py"):
            source = path.read_text()
            assert "torch.cuda" not in source, path
            assert '"cuda"' not in source, path


def test_help_imports_neither_torch_nor_megatron() -> None:
    script = (
        "import sys\nfrom megatron_rl import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'megatron', 'sglang', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout
