"""Runs the tests of gateway_conformance.py over real SGLang."""

import pytest

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.keys import new_key
from megatron_rl.rollout.server import SGLANG_SPARE_TOKENS, SglangServer, find_sglang

pytest.register_assert_rewrite("gateway_conformance")
from gateway_conformance import *  # noqa: E402, F403
from gateway_conformance import CONTEXT, Served  # noqa: E402
from inputs import ROOT  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    python = ROOT / ".venv-sglang/bin/python"
    section = RolloutSection(prompts_per_step=1, samples_per_prompt=2, max_response_tokens=64, sglang_python=python)

    def start(model, log):
        return SglangServer(
            model,
            log,
            python=find_sglang(section),
            max_running_requests=32,
            context_length=CONTEXT + SGLANG_SPARE_TOKENS,
            key=new_key(),
        )

    found = Served(tmp_path_factory.mktemp("gateway"), start, seeds=False)
    yield found
    found.close()
