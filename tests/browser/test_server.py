"""Checks that a page in a browser on the machine of a generation server cannot make the server do anything."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from chromium import REBOUND, Chromium
from hostile_page import hostile_page
from tiny_model import write_tiny_model

from megatron_rl.rollout.server import EmbeddedServer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write_tiny_model(folder / "ours", 0), write_tiny_model(folder / "theirs", 1)


@pytest.fixture(scope="module")
def server(models: tuple[Path, Path]) -> Iterator[EmbeddedServer]:
    """Start a server as a person starts one by hand: it asks for no key."""
    server = EmbeddedServer(models[0], models[0].parent / "server.log", context_length=64, weight_version="ours")
    try:
        server.wait_ready(240)
        yield server
    finally:
        server.stop()


def state(server: EmbeddedServer) -> tuple[str, dict[str, str], list[dict[str, object]]]:
    """Return the version and the checksums of the server's weights, and what runs or is paused."""
    info = httpx.get(f"{server.url}/server_info", trust_env=False, timeout=240).json()
    sums = httpx.get(f"{server.url}/weights_checker", trust_env=False, timeout=240).json()
    return info["weight_version"], sums["checksums"], info["internal_states"]


def test_a_page_of_another_origin_is_refused_whatever_it_sends(
    browser: Chromium, server: EmbeddedServer, models: tuple[Path, Path]
) -> None:
    before = state(server)
    with hostile_page(server.url, models[1]) as page:
        browser.open(page, 800, 600)
        assert browser.value("attack()") == []  # it may read nothing
        paths = {"/generate", "/update_weights_from_disk", "/flush_cache"}

        def are_answered() -> bool:
            found = browser.statuses(server.port)
            return len(found) > 40 and {path for path, _ in found} >= paths

        browser.until(are_answered, "answers")  # of beacons too
        statuses = browser.statuses(server.port)
    assert {status for _, status in statuses} == {403}
    assert state(server) == before
    # The same from a program, and it does.
    body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 3}}
    assert httpx.post(f"{server.url}/generate", json=body, trust_env=False, timeout=240).status_code == 200


def test_a_page_whose_name_was_made_to_lead_here_is_refused(
    browser: Chromium, server: EmbeddedServer, models: tuple[Path, Path]
) -> None:
    before = state(server)
    browser.open(f"http://{REBOUND}:{server.port}/server_info", 800, 600)
    body = json.dumps({"model_path": str(models[1]), "weight_version": "theirs"})
    options = f"{{method: 'POST', body: {body!r}, headers: {{'Content-Type': 'application/json'}}}}"
    asked = f"fetch('/update_weights_from_disk', {options}).then(answer => answer.status)"
    assert browser.value(asked) == 421  # of its own origin, so it may read the refusal
    assert browser.value("fetch('/server_info').then(answer => answer.status)") == 421
    assert {status for _, status in browser.statuses(server.port)} == {421}
    assert state(server) == before
