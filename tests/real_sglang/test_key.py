"""Tests that real SGLang serves only clients with the run's key, which shows nowhere. A page in a browser has none."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/browser"))

from chromium import Chromium, executable  # noqa: E402
from hostile_page import hostile_page  # noqa: E402

from megatron_rl.config.rollout import RolloutSection  # noqa: E402
from megatron_rl.keys import bearer, new_key  # noqa: E402
from megatron_rl.rollout.server import SglangServer, find_sglang  # noqa: E402

# SGLang serves these to everybody. /health makes a token to know that the model still does.
OPEN = ("/health", "/health_generate", "/ready")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    folder = tmp_path_factory.mktemp("key")
    subprocess.run([sys.executable, ROOT / "tools/make_tiny_model.py", folder / "model"], check=True)
    rollout = RolloutSection(
        prompts_per_step=1, samples_per_prompt=2, sglang_python=ROOT / ".venv-sglang/bin/python", max_response_tokens=64
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "a secret")
        server = SglangServer(
            folder / "model",
            folder / "server.log",
            python=find_sglang(rollout),
            max_running_requests=4,
            context_length=128,
            key=new_key(),
        )
    try:
        server.wait_ready(900)
        yield server
    finally:
        server.stop()


def test_requests_without_the_key_are_refused(server: SglangServer) -> None:
    with httpx.Client(base_url=server.url, timeout=300, trust_env=False) as http:
        routes = http.get("/openapi.json", headers=bearer(server.key)).json()["paths"]
        assert len(routes) > 40
        for path, methods in routes.items():
            for method in methods:
                status = http.request(method, path.replace("{", "").replace("}", ""), json={}).status_code
                assert status in (401, 403) or path in OPEN, (method, path, status)
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
        assert http.post("/generate", json=body, headers=bearer(server.key)).status_code == 200


def test_the_key_shows_neither_in_the_process_list_nor_in_the_log_nor_in_a_file(server: SglangServer) -> None:
    key, log = server.key, server.log_path.read_text()
    assert "'api_key': '...'" in log  # SGLang logs its arguments
    assert key not in log
    assert key not in subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout
    process = psutil.Process(int(server.log_path.with_suffix(".pid").read_text()))
    family = [process, *process.children(recursive=True)]
    assert len(family) >= 4
    for one in family:
        environment = str(one.environ())
        assert key not in environment
        assert "a secret" not in environment
    (config,) = (part for one in family for part in one.cmdline() if part.endswith("/config.yaml"))
    assert not Path(config).parent.exists()


@pytest.mark.skipif(executable() is None, reason="no Chromium: make install-browser")
def test_a_page_of_another_origin_is_refused_whatever_it_sends(server: SglangServer, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(server.log_path.parent / "model", theirs)
    browser = Chromium()
    try:
        with hostile_page(server.url, theirs) as page:
            browser.open(page, 800, 600)
            # SGLang lets pages of every origin read what it refuses them.
            assert {status for _, status in browser.value("attack()")} <= {401}
            browser.until(lambda: len(browser.statuses(server.port)) > 40, "answers")  # of beacons too
            statuses = browser.statuses(server.port)
    finally:
        browser.close()
    assert {status for _, status in statuses} == {401}
    info = httpx.get(f"{server.url}/model_info", headers=bearer(server.key), trust_env=False).json()
    assert info["weight_version"] == "0"
