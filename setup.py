"""Packaging. On Python 3.11 megatron-core has no wheel: `make install` builds its source distribution first."""

import re
import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# These versions may work; constraints.txt has the tested set. See CONTRIBUTING.md before you change one of them.
INSTALL = [
    'megatron-core==0.19.2; python_version >= "3.12"',
    "torch>=2.11",  # `make install` takes 2.13.0, the CPU build; a GPU's torch comes with the `gpu` extra
    "numpy>=2.3,<3",  # on Python 3.12 mistral-common, which SGLang asks for, refuses 2.4
    "pydantic~=2.14",
    "tomli-w~=1.2",
    "httpx~=0.28",
    "pybase64~=1.5",  # the routed experts of router replay
    "h11~=0.16",  # the connections to generation servers
    "msgspec~=0.22",  # their replies
    "starlette~=1.10",
    "uvicorn~=0.54",
    "transformers~=5.12",
    "tokenizers~=0.22",
    "sentencepiece~=0.2",
    "safetensors~=0.8",
    "tensorboard~=2.21",  # the tracker that runs have unless told otherwise; the others are extras
    "rich~=15.0",
    "matplotlib~=3.11",
    "plotly~=7.1",  # for plotly.js in it, which reports embed
    "math-verify==0.9.0",
    "pebble~=5.2",
    'pyseccomp==0.1.2; sys_platform == "linux"',  # the code sandbox's filter of system calls; needs libseccomp2
    "psutil~=7.2",
    "datasketch~=2.0",  # curation: MinHash
    "pyarrow~=26.0",  # curation: Parquet
    "xxhash~=4.1",  # digests of rows and of checkpoints
    "scipy~=1.17",  # Student's t, and the least squares of the simulator
]


class BuildWithCommit(build_py):
    """Write the commit into a wheel, for `megatron-rl --version`; megatron_rl/versions.py reads it."""

    def run(self):
        super().run()
        asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
        try:
            commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no checkout, or no git
            return
        if not self.editable_mode:
            (Path(self.build_lib) / "megatron_rl" / "commit.txt").write_text(commit + "\n", encoding="utf-8")


def version() -> str:
    """Return the version, which stands in the package alone. A release is tagged with it."""
    text = (ROOT / "megatron_rl/__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


setup(
    name="megatron_rl",
    version=version(),
    cmdclass={"build_py": BuildWithCommit},
    description="C3PO and other reinforcement learning of language models, on Megatron-core and SGLang",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_rl", "megatron_rl.*"]),
    package_data={
        "megatron_rl.rollout.sglang_cpu": ["requirements.txt", "constraints.txt"],
        "megatron_rl.report": ["*.html", "*.css", "*.js"],
    },
    install_requires=INSTALL,
    extras_require={
        "dev": [
            "pytest~=9.2",
            "pytest-timeout~=2.4",
            "pytest-xdist~=3.8",
            "hypothesis~=6.170",
            "peft~=0.21",  # what adapters are compared with
            "openai~=3.57",  # the client that talks to the gateway of agents
            "ruff==0.17.6",
            "mypy==2.4.1",
            "pre-commit",
        ],
        # One set, for CUDA 13; docs/gpu.md says how it was found and how to install it. SGLang pins torch.
        "gpu": ["torch==2.14.1", "sglang==0.5.23", "transformer-engine[core-cu13,pytorch]==2.20.2"],
        # The documentation site: `make docs`.
        "docs": ["mkdocs~=1.6", "mkdocs-material~=9.8"],
        # `tracking.to` may also name these.
        "wandb": ["wandb~=0.31"],
        "trackio": ["trackio~=0.43"],
    },
    entry_points={"console_scripts": ["megatron-rl = megatron_rl.cli:main"]},
)
