"""Tests the shipped sbatch files on a real Slurm of two nodes: undisturbed, signalled, a node lost, servers apart."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import Cluster, until

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples/ring_lite/slurm"
CONFIG = """
run_dir = "{folder}/{name}"
threads = 1
[model]
path = "{folder}/model"
[data]
train = "{folder}/data/train.jsonl"
[rollout]
prompts_per_step = 4
samples_per_prompt = 4
max_prompt_tokens = 32
max_response_tokens = 24
max_running_requests = 16
servers = 1
[budget]
tokens = 300
[train]
steps = {steps}
save_every = 5
micro_batch_tokens = 128
phase_deadline_seconds = 900
"""
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "MEGATRON_RL_BIN": str(Path(sys.executable).parent),
    "MEGATRON_RL_DEVICE": "cpu",
    "PWD": str(ROOT),
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture(scope="module")
def folder(cluster: Cluster) -> Path:
    model = ["--hidden-size", "32", "--layers", "2", "--experts", "4", "--moe-intermediate-size", "32"]
    cluster.run(sys.executable, str(ROOT / "tools/make_tiny_model.py"), str(cluster.folder / "model"), *model)
    data = ["--num-sft", "20", "--num-train", "100", "--num-test", "8"]
    cluster.run(sys.executable, str(ROOT / "tools/make_task_data.py"), str(cluster.folder / "data"), *data)
    return cluster.folder


# The kernel tells its boot time, from which a process's age is counted, in whole seconds.
_CLOCK_SECONDS = 1.5


class Job:
    """Runs a job. Each wait has a deadline and, when it is over, shows the output of the job and its ranks."""

    def __init__(
        self, cluster: Cluster, folder: Path, name: str, script: str, *options: str, steps: int = 3, site: str = ""
    ) -> None:
        """Submit the job. site: code that its processes run first."""
        self.run_dir = folder / name
        self._cluster = cluster
        self._config = folder / f"{name}.toml"
        self._config.write_text(CONFIG.format(folder=folder, name=name, steps=steps))
        self._output = folder / f"{name}.out"
        self._submitted = time.time()
        sbatch = ["sbatch", "--parsable", f"--output={self._output}", "--gpus-per-node=1", "--time=60", *options]
        (folder / f"{name}_site").mkdir()
        (folder / f"{name}_site/sitecustomize.py").write_text(site)
        environment = ENVIRONMENT | {"PYTHONPATH": f"{folder}/{name}_site:{ROOT}", "RUN_DIR": str(self.run_dir)}
        self.id = cluster.run(*sbatch, str(SCRIPTS / script), str(self._config), **environment).strip()

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def logs(self, start: int) -> Path:
        return self.run_dir / f"logs/slurm-{self.id}.{start}"

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the job's steps, also children that left their process group, and slurmstepd."""
        found = []
        for process in psutil.process_iter():
            try:
                is_step = process.name() == "slurmstepd" and f"[{self.id}." in " ".join(process.cmdline())
                if process.create_time() > self._submitted - _CLOCK_SECONDS and (
                    is_step or process.environ().get("SLURM_JOB_ID") == self.id
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def until_gone(self) -> None:
        self.until("the end of the processes", lambda: not self.processes())

    def field(self, name: str) -> str:
        return self._cluster.job(self.id).get(name, "")

    def said(self) -> str:
        paths = [self._output, *sorted(self.run_dir.glob("logs/*/*.log")), *sorted(self.run_dir.glob("*.log"))]
        return f"{self._cluster.job(self.id)}\n" + "".join(
            f"--- {path}\n{path.read_text(errors='replace')[-3000:]}\n" for path in paths if path.exists()
        )

    def until(self, what: str, found: Callable[[], Any], seconds: float = 900) -> Any:
        return until(f"{what} of job {self.id}", found, seconds, self.said)

    def until_rows(self, count: int) -> None:
        def enough() -> bool:
            assert self.field("JobState") in ("PENDING", "RUNNING", "CONFIGURING"), self.said()
            return len(self.rows) >= count

        self.until(f"{count} steps", enough)

    def until_state(self, *states: str) -> str:
        def reached() -> str:
            state = self.field("JobState")
            return state if state in states else ""

        return str(self.until(" or ".join(states), reached))

    def shorten(self, steps: int) -> int:
        """Make the next start end so many steps after the last checkpoint, and return the step of that end."""
        end = int((self.run_dir / "checkpoints/latest").read_text().removeprefix("step_")) + steps
        text = self._config.read_text()
        self._config.write_text(re.sub(r"(?m)^steps = \d+", f"steps = {end}", text))
        return end

    def begin_now(self) -> None:
        """Start a requeued job three seconds from now. Slurm itself would wait two minutes.

        Its last start must first have ended on all nodes. slurmd tells a start from the last one by whole seconds
        ("already killed, do not launch").
        """
        self.until_state("PENDING")
        assert self.field("Restarts") == "1"
        self.until_gone()
        self._cluster.wait_idle()
        self._cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now+3")

    def finish(self, steps: int) -> None:
        assert self.until_state("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", self.said()
        assert [row["step"] for row in self.rows] == list(range(steps)), "every step once"
        assert [row["num_loss_tokens"] for row in self.rows] == [300] * steps
        assert (self.run_dir / "hf/config.json").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sbatch")))
def test_slurm_accepts_what_is_shipped(cluster: Cluster, script: str) -> None:
    # As it is, but for the GPUs of this cluster's nodes.
    said = cluster.run("sbatch", "--test-only", "--gpus-per-node=2", str(SCRIPTS / script), "config.toml")
    assert "to start at" in said


def test_the_scripts_are_plain_bash() -> None:
    for path in SCRIPTS.iterdir():
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_two_nodes_train_and_serve(cluster: Cluster, folder: Path) -> None:
    job = Job(cluster, folder, "together", "train.sbatch", "--nodes=2")
    job.finish(3)
    plan = json.loads((job.logs(0) / "plan.json").read_text())
    assert plan["layout"]["world_size"] == 2
    for name in ("train_node0.log", "train_node1.log"):
        assert (job.logs(0) / name).exists()
    assert (job.run_dir / "server_0.log").exists()
    assert (job.run_dir / "node1_server_0.log").exists()
    job.until_gone()


def test_a_signalled_job_saves_goes_back_into_the_queue_and_finishes(cluster: Cluster, folder: Path) -> None:
    job = Job(cluster, folder, "signalled", "train.sbatch", "--nodes=2", steps=100000)
    job.until_rows(2)
    servers = [int(path.read_text()) for path in job.run_dir.glob("*.pid")]
    assert len(servers) == 2
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    job.until_state("PENDING")
    saved = (job.run_dir / "checkpoints/latest").read_text()
    assert saved == f"step_{len(job.rows)}"
    assert "stopped with 75; back into the queue" in job.said()
    log = (job.logs(0) / "train_node0.log").read_text()
    assert "SIGUSR1: stopping after a checkpoint" in log
    assert "generation server ended" not in log, "the signal reached the servers"
    steps = job.shorten(3)
    job.begin_now()
    job.finish(steps)
    assert f"resuming from {job.run_dir}/checkpoints/{saved}" in (job.logs(1) / "train_node0.log").read_text()


def test_a_job_that_lost_a_node_is_started_again_and_finishes(cluster: Cluster, folder: Path) -> None:
    job = Job(cluster, folder, "lost", "train.sbatch", "--nodes=2", steps=100000)
    job.until("a checkpoint", (job.run_dir / "checkpoints/latest").exists)
    cluster.kill_node("n2")
    try:
        job.until_state("PENDING")  # after SlurmdTimeout
        job.until_gone()
    finally:
        cluster.start_node("n2")
    steps = job.shorten(3)
    job.begin_now()
    job.finish(steps)


# Rank 0 waits behind its first step until there is a file.
WAITS = """
import os, pathlib, time
if os.environ.get("RANK") == "0":
    from megatron_rl.train.run.metrics import MetricsLog
    write = MetricsLog.write
    def write_and_wait(log, row):
        write(log, row)
        while not pathlib.Path(os.environ["RUN_DIR"], "may_go_on").exists():
            time.sleep(0.05)
    MetricsLog.write = write_and_wait
"""


def test_serving_and_training_steps_find_each_other(cluster: Cluster, folder: Path) -> None:
    job = Job(cluster, folder, "apart", "separate.sbatch", "--nodes=2", "--gpus-per-node=2", steps=20, site=WAITS)
    job.until_rows(1)
    pids = [int(path.read_text()) for path in (job.logs(0) / "servers").glob("*.pid")]
    gpus = [psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] for pid in pids]
    assert sorted(gpus) == ["0", "1"], "a GPU for each of two servers"
    (job.run_dir / "may_go_on").touch()
    job.finish(20)
    job.until_gone()
    config = (job.run_dir / "config.toml").read_text()
    assert config.count("http://127.0.0.1:") == 2


def test_a_mistake_ends_the_job_at_once_with_the_reason(cluster: Cluster, folder: Path) -> None:
    job = Job(cluster, folder, "mistaken", "train.sbatch", steps=0)
    assert job.until_state("FAILED", "COMPLETED") == "FAILED"
    assert job.field("ExitCode") == "2:0"
    assert job.field("Restarts") == "0"
    assert "train.steps" in job.said()


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, folder: Path) -> None:
    # Two ranks on a node without GPUs.
    options = ["--gpus-per-node=0", "--ntasks-per-node=2"]
    job = Job(cluster, folder, "cancelled", "train.sbatch", *options, steps=100000)
    job.until_rows(1)
    cluster.run("scancel", job.id)
    job.until_state("CANCELLED")
    job.until_gone()
    assert job.field("JobState") == "CANCELLED"
    assert job.field("Restarts") == "0"


def test_a_rank_that_dies_ends_the_job_and_its_servers(cluster: Cluster, folder: Path) -> None:
    job = Job(cluster, folder, "broken", "train.sbatch", "--nodes=2", steps=100000)
    job.until_rows(1)
    (rank,) = (p for p in job.processes() if p.environ().get("RANK") == "1" and "train" in p.cmdline())
    rank.kill()
    job.until_state("FAILED")
    job.until_gone()
    assert job.field("Restarts") == "0"
    assert "the last lines of node 0" in job.said()
