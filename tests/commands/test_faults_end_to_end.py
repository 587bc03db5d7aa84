"""Tests whole runs whose servers are lost: the numbers stay the same, or the message says why they cannot."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import httpx
import psutil
import pytest
from inputs import make_inputs
from liar import Exchange, liar
from ports import free_port
from safetensors.torch import save_file
from tiny_model import tensors_of

from megatron_rl.keys import bearer
from megatron_rl.rollout.archive import unpack_carry
from megatron_rl.rollout.server import EmbeddedServer

ROOT = Path(__file__).parents[2]
LENGTH = 160
CONFIG = """
run_dir = "{run}"
threads = 1
[model]
path = "{folder}/model"
[data]
train = "{folder}/data/train.jsonl"
[rollout]
prompts_per_step = 4
samples_per_prompt = 4
max_prompt_tokens = 32
max_response_tokens = 160
max_running_requests = 8
servers = 2
silence_seconds = 20
[budget]
tokens = 2000
[optimizer]
learning_rate = 1e-3
[algorithm]
kl_coefficient = 1e-3
[train]
steps = 3
micro_batch_tokens = 512
phase_deadline_seconds = 600
"""
# Seeds alone decide these metrics, whatever happens to the servers.
NUMBERS = ("reward", "num_loss_tokens", "loss", "entropy", "kl", "grad_norm", "num_carried", "num_generated_tokens")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(
        tmp_path_factory.mktemp("inputs"), 1, 100, 1, "--max-position-embeddings", "512", "--init-std", "0.1"
    )


KEY = "known-to-the-tests-alone"
WITH_KNOWN_KEY = f"""
import sys
from megatron_rl.cli import main
from megatron_rl.rollout import supervisor as supervisor

supervisor.new_key = lambda: {KEY!r}
sys.exit(main())
"""
# The beginning of code that a run executes before WITH_KNOWN_KEY, to act in the very phase that is meant.
SABOTAGE = """
import json, os, pathlib, signal, time
from megatron_rl.checkpoint import steps
from megatron_rl.rollout.archive import unpack_carry
from megatron_rl.rollout.client import GenerationClient
from megatron_rl.rollout.pool import ServerPool
from megatron_rl.train.run.metrics import MetricsLog

run, step = pathlib.Path(os.environ["RUN_DIR"]), 0
generate, write, point_to, ask = ServerPool.generate, MetricsLog.write, steps.point_to, GenerationClient.generate

def send(name, number):
    os.kill(int((run / f"{name}.pid").read_text()), number)
"""
# Kills server_0 in the rollout phases of `in_rollout`, when the first response has come and it owes others. Behind the
# steps of `behind` it sends a signal to a server, before the next weights are pushed.
SERVERS_GO = (
    SABOTAGE
    + """
async def generate_and_kill(pool, *arguments, **more):
    completion = await generate(pool, *arguments, **more)
    if step in in_rollout and pool._members[0].outstanding_requests:
        in_rollout.remove(step)
        send("server_0", signal.SIGKILL)
    return completion

def write_and_send(log, row):
    global step
    write(log, row)
    step = row["step"] + 1
    if row["step"] in behind:
        send(*behind[row["step"]])

ServerPool.generate, MetricsLog.write = generate_and_kill, write_and_send
"""
)


class Run:
    """Runs `megatron-rl train` in a process of its own."""

    def __init__(
        self,
        inputs: Path,
        folder: Path,
        *options: str,
        resume: bool = False,
        code: tuple[str, str] = ("-c", WITH_KNOWN_KEY),
        inside: str = "",
        **environment: str,
    ) -> None:
        """Start the run. code: the interpreter's arguments that stand in for the command. inside: runs before them."""
        folder.mkdir(exist_ok=True)
        self.folder, self.run_dir = folder, folder / "run"
        config = folder / "config.toml"
        config.write_text(CONFIG.format(folder=inputs, run=self.run_dir))
        command = [sys.executable, code[0], inside + code[1], "train", str(config)]
        command += [part for option in options for part in ("--set", option)] + (["--resume"] if resume else [])
        self.log = folder / f"log{environment.get('RANK', '')}{'_resumed' if resume else ''}"
        self.process = forked.Program(command, self.log, os.environ | environment | {"RUN_DIR": str(self.run_dir)})

    def finish(self, code: int = 0) -> str:
        """Wait for the exit code `code`, check that no process of the run is left, and return its log."""
        try:
            assert self.process.wait(900) == code, self.log.read_text()[-4000:]
        finally:
            self.end()
        pids = [int(path.read_text()) for path in self.run_dir.glob("*.pid")]
        assert not any(map(psutil.pid_exists, pids))
        return self.log.read_text()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def until(self, condition: Callable[[], object], seconds: float = 600) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < give_up, self.log.read_text()[-4000:]
            time.sleep(0.005)

    def pid(self, name: str) -> int:
        return int((self.run_dir / f"{name}.pid").read_text())

    def is_running(self, name: str) -> bool:
        """Return whether the server of this name draws tokens."""
        with contextlib.suppress(OSError, httpx.HTTPError):
            url = re.findall(r"serving .* on (\S+)", (self.run_dir / f"{name}.log").read_text())
            if url:
                info = httpx.get(f"{url[-1]}/server_info", headers=bearer(KEY), timeout=2, trust_env=False).json()
                return bool(info["internal_states"][0]["running"] > 0)
        return False

    @property
    def sampled(self) -> list[dict[str, Any]]:
        """Return the rows of all samples of all phases, with text, reward and outcome."""
        paths = sorted((self.run_dir / "rollouts").glob("*.jsonl"))
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(inputs, tmp_path_factory.mktemp("undisturbed") / "run")
    run.finish()
    assert [row["num_lost_servers"] for row in run.rows] == [0, 0, 0]
    assert not [path for path in run.folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    return run


def assert_same(found: Run, expected: Run) -> None:
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        assert {name: ours[name] for name in NUMBERS} == {name: theirs[name] for name in NUMBERS}
    assert found.sampled == expected.sampled


def test_two_servers_that_go_one_after_the_other_change_no_number(
    inputs: Path, undisturbed: Run, tmp_path: Path
) -> None:
    # The second one hangs.
    goes = 'in_rollout, behind = {0}, {0: ("server_1", signal.SIGSTOP)}'
    run = Run(inputs, tmp_path / "run", inside=SERVERS_GO + goes + "\n")
    run.finish()
    assert sum(row["num_lost_servers"] for row in run.rows) == 2
    assert_same(run, undisturbed)


def test_the_only_server_may_go_though_its_weights_came_over_a_process_group_and_it_had_released_its_memory(
    inputs: Path, undisturbed: Run, tmp_path: Path
) -> None:
    options = ("rollout.servers=1", "sync.transport=distributed", "rollout.max_running_requests=16")
    options += ("rollout.release_memory=true",)
    goes = 'in_rollout, behind = {1}, {1: ("server_0", signal.SIGKILL)}'
    run = Run(inputs, tmp_path / "run", *options, inside=SERVERS_GO + goes + "\n")
    said = run.finish()
    assert "pushing the weights again and starting the phase anew" in said
    assert_same(run, undisturbed)


@pytest.fixture
def server(inputs: Path, tmp_path: Path) -> Iterator[EmbeddedServer]:
    log = tmp_path / "server.log"
    settings = {"max_running_requests": 8, "context_length": 192, "weights_roots": [tmp_path], "key": KEY}
    server = EmbeddedServer(inputs / "model", log, **settings)
    try:
        server.wait_ready(600)
        yield server
    finally:
        server.stop()


def test_a_server_whose_weights_are_not_the_trainers_stops_the_run_with_the_names_of_the_tensors(
    inputs: Path, server: EmbeddedServer, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    name = "model.layers.1.attention.dense.weight"

    def load_others(exchange: Exchange) -> None:
        """Replace the weights of the second update by damaged ones, under the right version."""
        body = json.loads(exchange.body)
        if body["weight_version"] == "1":
            damaged.mkdir()
            (damaged / "config.json").write_bytes((Path(body["model_path"]) / "config.json").read_bytes())
            tensors = tensors_of(Path(body["model_path"]))
            tensors[name] = tensors[name].flip(0)
            save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
            exchange.body = json.dumps(body | {"model_path": str(damaged)}).encode()
        exchange.say(exchange.forwarded().content)

    with liar(server.url, update_weights_from_disk=load_others) as url:
        options = f'rollout.urls=["{url}"]', "rollout.api_key_variable=ATTACHED"
        assert "names ATTACHED, which is not in the environment" in Run(inputs, tmp_path / "none", *options).finish(2)
        said = Run(inputs, tmp_path / "run", *options, ATTACHED=KEY).finish(code=1)
    assert re.search(rf"weights 1 did not arrive whole at {url}: log-probs of \d+ tokens differ by ", said)
    assert re.search(rf"; 1 of \d+ tensors differ: {re.escape(name)}\n", said)
    assert "Traceback" not in said
    rows = [json.loads(line) for line in (tmp_path / "run/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0]  # whose probe agreed


def two_ranks() -> dict[str, str]:
    """Return the environment variables that two ranks share; each also needs its RANK."""
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}


# Notes behind the first step who has generated, and waits for the test.
USED = (
    SABOTAGE
    + """
used = set()
async def ask_and_note(client, *arguments, **more):
    used.add(client.url)
    return await ask(client, *arguments, **more)

def write_and_wait(log, row):
    write(log, row)
    if row["step"] == 0:
        (run / "used.part").write_text(json.dumps(sorted(used)))
        (run / "used.part").rename(run / "used.json")
        while not (run / "may_go_on").exists():
            time.sleep(0.01)

GenerationClient.generate, MetricsLog.write = ask_and_note, write_and_wait
"""
)


def test_each_of_two_nodes_owns_its_servers_and_rank_0_uses_them_all(
    inputs: Path, undisturbed: Run, tmp_path: Path
) -> None:
    shared = two_ranks() | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    options = ("rollout.servers=1", "train.steps=2")
    nodes = [
        Run(inputs, tmp_path / "run", *options, inside=USED, RANK=str(i), GROUP_RANK=str(i), **shared) for i in range(2)
    ]
    run_dir, names = nodes[0].run_dir, ("server_0", "node1_server_0")
    try:
        nodes[0].until((run_dir / "used.json").exists)
        for name, node in zip(names, nodes, strict=True):
            owner = psutil.Process(node.pid(name)).parent()
            assert owner is not None
            assert owner.pid == node.process.pid
        (run_dir / "may_go_on").touch()
        for node in nodes:
            node.process.wait(900)
    finally:
        for node in nodes:
            node.end()
    urls = [re.findall(r"serving .* on (\S+)", (run_dir / f"{name}.log").read_text())[-1] for name in names]
    assert json.loads((run_dir / "used.json").read_text()) == sorted(urls)
    nodes[1].finish()
    nodes[0].finish()
    # After the first step rounding tells two data-parallel ranks from one.
    ours, theirs = nodes[0].rows[0], undisturbed.rows[0]
    for name in ("reward", "num_loss_tokens", "num_generated_tokens", "num_carried"):
        assert ours[name] == theirs[name], name
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)
    assert [row["num_lost_servers"] for row in nodes[0].rows] == [0, 0]


def test_a_hung_server_of_another_node_is_started_again_there_and_the_run_goes_on_with_it(
    inputs: Path, tmp_path: Path
) -> None:
    """Check a server whose weights come over a process group, so that only a push can bring them back.

    The push is one while the others generate, or that of a later step.
    """
    shared = two_ranks() | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    options = ("rollout.servers=1", "train.steps=9999", "sync.transport=distributed")
    nodes = [Run(inputs, tmp_path / "run", *options, RANK=str(i), GROUP_RANK=str(i), **shared) for i in range(2)]
    name = "node1_server_0"
    try:
        nodes[0].until(lambda: nodes[0].is_running(name))
        hung = nodes[0].pid(name)
        os.kill(hung, signal.SIGSTOP)
        nodes[0].until(lambda: nodes[0].pid(name) != hung)
        again = psutil.Process(nodes[0].pid(name)).parent()
        assert again is not None
        assert again.pid == nodes[1].process.pid
        assert not psutil.pid_exists(hung)
        before = len(nodes[0].rows)
        nodes[0].until(lambda: nodes[0].is_running(name))
        nodes[0].until(lambda: len(nodes[0].rows) >= before + 2)
    finally:
        for node in nodes:
            node.end()
    assert "ending the generation server" in nodes[1].log.read_text()
    assert sum(row["num_lost_servers"] for row in nodes[0].rows) == 1


OUT_OF_MEMORY = """
import sys
from megatron_rl.cli import main
from megatron_rl.sync import distributed

def filled(*_):
    raise MemoryError

distributed.gathered = filled
sys.exit(main())
"""


def test_rank_0_that_fails_in_a_push_says_why_and_the_other_rank_ends_with_it(inputs: Path, tmp_path: Path) -> None:
    shared = two_ranks() | {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    options = ("rollout.servers=1", "sync.transport=distributed", "parallel.tensor=2")
    code = {"0": ("-c", OUT_OF_MEMORY), "1": ("-m", "megatron_rl.cli")}
    ranks = [
        Run(inputs, tmp_path / "run", *options, code=code[rank], RANK=rank, LOCAL_RANK=rank, **shared) for rank in code
    ]
    try:
        said = ranks[0].finish(code=1)
        assert re.search(r"rank 0, phase sync of step 0: out of memory \(MemoryError\)", said)
        # It waits in a collective, long before phase_deadline_seconds.
        assert "rank 1, phase sync of step 0: lost contact with another rank" in ranks[1].finish(code=1)
    finally:
        for rank in ranks:
            rank.end()


# Kills the run behind the second checkpoint, or a later one, that has a response with tokens which goes on.
CUT = (
    SABOTAGE
    + """
def point_and_end(path):
    point_to(path)
    unfinished = unpack_carry((path / "carried.npz").read_bytes()).unfinished
    is_cut = any(one.num_policy_tokens and not one.finish_reason for group in unfinished for one in group.responses)
    if path.name != "step_1" and is_cut:
        os.kill(os.getpid(), signal.SIGKILL)

steps.point_to = point_and_end
"""
)


def test_a_killed_run_goes_on_with_its_unfinished_groups(inputs: Path, tmp_path: Path) -> None:
    options = ("rollout.partial=true", "rollout.servers=1", "train.save_every=1", "train.steps=400")
    run = Run(inputs, tmp_path / "run", *options, inside=CUT)
    try:
        assert run.process.wait(900) == -signal.SIGKILL, run.log.read_text()[-4000:]
    finally:
        run.end()
    newest = run.run_dir / "checkpoints" / (run.run_dir / "checkpoints/latest").read_text()
    step = json.loads((newest / "driver.json").read_text())["step"]
    carry = unpack_carry((newest / "carried.npz").read_bytes())
    cut = {
        (response.prompt_id, response.sample_index): response
        for group in carry.unfinished
        for response in group.responses
        if response.num_policy_tokens and not response.finish_reason
    }
    assert cut
    for path in (run.run_dir / "rollouts").glob("*.jsonl"):
        if int(path.stem.removeprefix("step_")) >= step:
            path.unlink()  # of a phase that the kill has undone
    options = (*options[:-1], f"train.steps={step + 3}")
    again = Run(inputs, tmp_path / "run", *options, resume=True)
    again.finish()
    assert [row["step"] for row in again.rows] == list(range(step + 3))
    ended = 0
    for row in again.sampled:
        before = cut.get((row["position"], row["sample_index"]))
        if before is not None and row["outcome"] != "dropped: kept for too long":
            versions = {int(version): count for version, count in row["policy_versions"].items()}
            assert sum(count for version, count in versions.items() if version < step) == before.num_policy_tokens
            assert row["num_tokens"] >= before.num_policy_tokens
            ended += 1
    assert ended > 0
