"""The embedded server does what real SGLang does: the tests of conformance.py."""

import asyncio

import pytest
from subject import CONTEXT, SLOTS, Kind, Subject, make_models

from megatron_rl.rollout.server import EmbeddedServer

pytest.register_assert_rewrite("conformance")
from conformance import *  # noqa: E402, F403


@pytest.fixture(scope="module")
def _server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conformance")
    models = make_models(folder)
    process = EmbeddedServer(
        models[0].path, folder / "server.log", max_running_requests=SLOTS, context_length=CONTEXT, weight_version="0"
    )
    asyncio.run(process.wait_ready(60))
    subject = Subject(process, models, Kind(seeds=True, whole=True))
    yield subject
    subject.close()


@pytest.fixture
def server(_server):
    yield _server
    _server.reset()
