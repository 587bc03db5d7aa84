"""Runs the tests of gateway_conformance.py over the embedded server."""

import pytest

from megatron_rl.keys import new_key
from megatron_rl.rollout.server import EmbeddedServer

pytest.register_assert_rewrite("gateway_conformance")
from gateway_conformance import *  # noqa: E402, F403
from gateway_conformance import CONTEXT, Served  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    def start(model, log):
        return EmbeddedServer(model, log, max_running_requests=32, context_length=CONTEXT, key=new_key())

    found = Served(tmp_path_factory.mktemp("gateway"), start)
    yield found
    found.close()
