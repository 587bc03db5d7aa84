"""Tests that constraints.txt pins all requirements of setup.py, and that SGLang's list has pins of its own."""

import re
from pathlib import Path

import pytest
import setuptools  # noqa: F401  (it brings distutils on Python 3.12)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SGLANG = ROOT / "megatron_rl/rollout/sglang_cpu"


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def asked_by_setup() -> list[str]:
    from distutils.core import run_setup

    package = run_setup(str(ROOT / "setup.py"), stop_after="init")
    return [*package.install_requires, *package.extras_require["dev"], *package.extras_require["docs"]]


def unpinned(asked: list[str], pins: list[str]) -> list[str]:
    """Return the requirements that have no pin, several, or one that they refuse, whatever Python they are for."""
    versions: dict[str, list[str]] = {}
    for pin in pins:
        name, version = pin.split("==")
        versions.setdefault(canonicalize_name(name), []).append(version)
    wanted = {line: Requirement(line) for line in asked}
    return [
        line
        for line, requirement in wanted.items()
        if len(found := versions.get(canonicalize_name(requirement.name), [])) != 1
        or not requirement.specifier.contains(found[0], prereleases=True)
    ]


def test_every_requirement_of_the_package_and_its_development_has_one_pin_that_satisfies_it() -> None:
    assert unpinned(asked_by_setup(), lines_of(ROOT / "constraints.txt")) == []


def test_every_line_of_sglangs_list_has_one_pin_that_satisfies_it() -> None:
    assert unpinned(lines_of(SGLANG / "requirements.txt"), lines_of(SGLANG / "constraints.txt")) == []


def test_a_requirement_without_a_pin_or_with_a_refused_or_second_one_is_found() -> None:
    asked = ["torch>=2.11", "numpy>=2.3,<3", 'Tomli_W~=1.2; python_version < "3"', "rich"]
    assert unpinned(asked, ["torch==2.10", "numpy==2.4.6", "rich==15.0.0", "rich==14.0.0"]) == [asked[0], *asked[2:]]
    assert unpinned(asked, ["torch==2.13.0", "numpy==2.4.6", "tomli-w==1.2.0", "rich==15.0.0"]) == []


@pytest.mark.parametrize("folder", [ROOT, SGLANG], ids=["ours", "SGLang's"])
def test_pins_are_plain_versions_that_every_build_of_torch_can_live_with(folder: Path) -> None:
    lines = lines_of(folder / "constraints.txt")
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    pins = {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, lines)}
    assert len(pins) == len(lines)
    # torch 2.13.0 for CUDA asks for triton 3.7.1, where what goes with the CPU build came with 3.9.0.
    assert not {"pip", "setuptools", "wheel", "megatron-rl", "triton"} & set(pins)
    torch = str(pins["torch"]).removeprefix("==")
    assert all(pins["torch"].contains(torch + build) for build in ("", "+cpu", "+cu130"))
