"""Tests real SGLang by conformance.py, so that what it says of a server is true of the one that we stand in for.

It is the one of .venv-sglang on a CPU. With MEGATRON_RL_SGLANG_ON_GPU set it is this interpreter's, on a GPU, and gets
the arguments in the variable.
"""

import os
import sys
from pathlib import Path

import pytest
from subject import CONTEXT, ROOT, SLOTS, Kind, Subject, make_models

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.gpus import visible_gpus
from megatron_rl.keys import new_key
from megatron_rl.rollout.server import SGLANG_SPARE_TOKENS, SglangServer, find_sglang

pytest.register_assert_rewrite("conformance")
from conformance import *  # noqa: E402, F403


@pytest.fixture(scope="module")
def _server(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("conformance")
    models = make_models(folder)
    arguments = os.environ.get("MEGATRON_RL_SGLANG_ON_GPU")
    python = ROOT / ".venv-sglang/bin/python" if arguments is None else Path(sys.executable)
    process = SglangServer(
        models[0].path,
        folder / "server.log",
        python=find_sglang(
            RolloutSection(prompts_per_step=1, samples_per_prompt=2, sglang_python=python, max_response_tokens=64)
        ),
        max_running_requests=SLOTS,
        context_length=CONTEXT,
        weight_version="0",
        gpus=() if arguments is None else visible_gpus(),
        releases_memory=True,
        arguments=(arguments or "").split(),
        key=new_key(),
    )
    process.wait_ready(900)  # on a GPU it compiles first
    subject = Subject(
        process, models, Kind(seeds=False, whole=False, long_tokens=250, spare_tokens=SGLANG_SPARE_TOKENS)
    )
    yield subject
    subject.close()
