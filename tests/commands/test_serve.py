"""Tests servers on machines of their own: how a run finds them, and which GPUs each gets."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from tiny_model import write_tiny_model

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.errors import EXIT_STOPPED
from megatron_rl.files import whole_file
from megatron_rl.keys import bearer
from megatron_rl.rollout import serve
from megatron_rl.rollout.ports import is_here
from megatron_rl.rollout.serve import check_registered_torch, registered_keys
from megatron_rl.rollout.server import torch_version
from megatron_rl.train.orchestrator.node_servers import is_one_machine


def register(folder: Path, name: str, keys: dict[str, str], num_processes: int = 2) -> None:
    with whole_file(folder / f"{name}.json") as file:
        json.dump({"keys": keys, "num_processes": num_processes}, file)


def test_a_run_waits_until_all_processes_have_registered(tmp_path: Path) -> None:
    register(tmp_path, "b", {"http://b:1": "k", "http://b:2": "k"})
    with pytest.raises(ValueError, match=r"1 of 2 serving processes have registered in .* within 0.3 s"):
        registered_keys(tmp_path, 0.3)
    threading.Timer(0.5, register, (tmp_path, "a", {"http://a:1": "other"})).start()
    assert registered_keys(tmp_path, 600) == {"http://a:1": "other", "http://b:1": "k", "http://b:2": "k"}


def test_servers_with_another_torch_are_no_members_of_an_nccl_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Path(__file__).parents[2] / "examples/ring_lite/paper_256gpu/stage1_math.toml"
    own = torch_version()
    monkeypatch.setattr(serve, "visible_gpus", lambda: ["0"])

    def check(*changes: str) -> None:
        check_registered_torch(tmp_path, load_config(RlConfig, stage, ["sync.transport=distributed", *changes]))

    for theirs in (own, "1.2.3"):
        entry = {"keys": {"http://a:1": "k"}, "num_processes": 1, "torch": theirs}
        (tmp_path / "a.json").write_text(json.dumps(entry))
        for changes in (["sync.backend=gloo"], ["sync.transport=disk"], ["rollout.engine=embedded"]):
            check(*changes)
        if theirs == own:
            check()
        else:
            with pytest.raises(ValueError, match=rf"have torch 1.2.3, this run {own}, .* set sync.backend = 'gloo'"):
                check()


def test_a_server_is_here_where_the_way_to_it_ends_at_its_beginning() -> None:
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    for address in own_addresses():
        assert is_here(address)
    if own_addresses():  # else there is no way to anywhere
        assert not is_here("192.0.2.1"), "an address of documentation, which nobody has"


def own_addresses() -> list[str]:
    """Return this machine's IPv4 addresses but for loopback."""
    found = [a for addresses in psutil.net_if_addrs().values() for a in addresses]
    return [a.address for a in found if a.family.name == "AF_INET" and a.address[:4] != "127."]


def test_servers_serve_until_they_are_told_to_stop_and_come_back_at_their_port(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    config = tmp_path / "config.toml"
    config.write_text(
        f'run_dir = "{tmp_path}/run"\nmodel.path = "{model}"\ndata.train = "none"\nbudget.tokens = 64\n'
        "rollout = {prompts_per_step = 1, samples_per_prompt = 2, max_response_tokens = 64, servers = 1}\n"
        "train = {steps = 1, micro_batch_tokens = 128}\n"
    )
    folder = tmp_path / "servers"
    folder.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    register(folder, f"{socket.gethostname()}-{gone.pid}", {"http://gone:1": "k"}, num_processes=1)  # it was killed
    stale = time.monotonic() + 600
    command = [sys.executable, "-m", "megatron_rl.cli", "serve", str(config), "--register", str(folder)]
    process = subprocess.Popen(command, env=os.environ | {"MASTER_ADDR": "localhost"}, stderr=subprocess.PIPE)
    try:
        while list(folder.glob(f"*-{gone.pid}.json")):
            assert time.monotonic() < stale, "the registration of a process that is gone stays"
            time.sleep(0.1)
        ((url, key),) = registered_keys(folder, 600).items()
        (registered,) = folder.glob("*.json")
        assert stat.S_IMODE(registered.stat().st_mode) == 0o600
        assert json.loads(registered.read_text())["torch"] == torch_version()
        assert httpx.get(f"{url}/server_info", timeout=60, trust_env=False).status_code == 401
        assert httpx.get(f"{url}/server_info", headers=bearer(key), timeout=60, trust_env=False).status_code == 200
        (path,) = folder.glob("*.pid")
        server = psutil.Process(int(path.read_text()))
        process.send_signal(signal.SIGUSR1)  # which is for training runs
        server.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        assert process.poll() is None
        assert httpx.get(f"{url}/health", timeout=60, trust_env=False).status_code == 200
        server.kill()
        give_up = time.monotonic() + 600
        while int(path.read_text()) == server.pid or not is_ready(url):
            assert time.monotonic() < give_up, "it did not come back"
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert not psutil.pid_exists(int(path.read_text()))
    assert not list(folder.glob("*.json")), "nobody should be sent to servers that are gone"


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=60, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_weights_pass_through_memory_on_one_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_one_machine([])
    assert is_one_machine(["http://127.0.0.1:1", "http://localhost:2"])
    for address in own_addresses():
        assert not is_one_machine(["http://127.0.0.1:1", f"http://{address}:1"])
    two_nodes = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    for name, value in (two_nodes | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    assert not is_one_machine([])


# One thread more than the main one when the signals are set up, as libraries start them; a child that knows nothing.
SIGNALLED = """
import subprocess, sys, threading, time
threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
from megatron_rl.errors import EXIT_STOPPED
from megatron_rl.train.run.signals import StopSignals
signals = StopSignals()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
print("ready", child.pid, flush=True)
while signals.name != "SIGUSR1":
    time.sleep(0.05)
sys.exit(EXIT_STOPPED)
"""


def test_sigusr1_asks_for_a_stop_and_spares_the_children() -> None:
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline().split()[1]))
    try:
        for one in (child.pid, process.pid):  # as Slurm does: every process of a step
            os.kill(one, signal.SIGUSR1)
        assert process.wait(600) == EXIT_STOPPED
        assert child.is_running()
    finally:
        child.kill()
        process.kill()


def test_a_job_whose_training_step_has_just_ended_still_finishes() -> None:
    script = Path(__file__).parents[2] / "examples/ring_lite/slurm/job.sh"
    parts = f"sed -n '/^pass_on/,/^}}/p' {script}"
    job = f'set -euo pipefail; signalled=0; say() {{ :; }}; true & training_step=$!; wait; eval "$({parts})"; '
    done = subprocess.run(
        ["bash", "-c", f"{job} pass_on; echo $signalled"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
