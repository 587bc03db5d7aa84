"""Packaging. On Python 3.11 megatron-core has no wheel: `make install` builds its source distribution first."""

from setuptools import find_packages, setup

# The set that is tested together; see CONTRIBUTING.md before moving one of them.
INSTALL = [
    'megatron-core==0.19.2; python_version >= "3.12"',
    "torch>=2.11",
    "numpy>=2.0",
    "pydantic>=2.10",
    "httpx>=0.28",
    "starlette>=0.40",
    "uvicorn>=0.30",
    "transformers>=5.0",
    "tokenizers>=0.22",
    "sentencepiece>=0.2.1",
    "safetensors>=0.5",
    "tensorboard>=2.18",
    "rich>=13.9",
    "matplotlib>=3.9",
    "math-verify==0.9.0",
    "pebble>=5.1",
    "psutil>=6",
]

setup(
    name="megatron_rl",
    version="0.1.0",
    description="C3PO reinforcement learning for Ling-lite on Megatron-core and SGLang",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_rl", "megatron_rl.*"]),
    install_requires=INSTALL,
    extras_require={
        "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "pre-commit"],
        "gpu": ["transformer-engine[pytorch]", "sglang==0.5.23"],
        "logging": ["wandb"],
    },
    entry_points={"console_scripts": ["megatron-rl = megatron_rl.cli:main"]},
)
