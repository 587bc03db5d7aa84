"""Tests that a whole run with a teacher is the same to the bit after kills; and tests a teacher's servers."""

import asyncio
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from inputs import make_inputs
from inside import BEHIND_A_GROUP, killed
from reference import load_reference, segment_logprobs
from samples import random_segment
from tiny_model import tensors_of, write_tiny_model

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.metric_names import unknown
from megatron_rl.records import Response, Segment
from megatron_rl.rollout.pool import Counts, ServerPool
from megatron_rl.rollout.server import EmbeddedServer
from megatron_rl.rollout.supervisor import ServerSupervisor
from megatron_rl.rollout.teacher_scorer import TeacherScorer

ROOT = Path(__file__).parents[2]
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
max_response_tokens = 40
max_running_requests = 8
ready_deadline_seconds = 600
token_deadline_seconds = 20
silence_seconds = 300
servers = 1
[distillation]
path = "{folder}/teacher"
coefficient = 0.5
servers = 1
[budget]
tokens = 500
[optimizer]
learning_rate = 1e-3
[train]
steps = 3
save_every = 1
micro_batch_tokens = 512
"""
ROLLOUT = RolloutSection(
    prompts_per_step=1, samples_per_prompt=2, max_prompt_tokens=8, max_response_tokens=40, max_running_requests=4
)
# Metrics with these words in their names depend on clocks and kills.
OF_TIME = ("seconds", "per_second", "num_starts", "num_lost", "num_resent", "num_teacher_tokens")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    shape = ("--hidden-size", "32", "--layers", "2", "--experts", "4", "--moe-intermediate-size", "32")
    command = [sys.executable, ROOT / "tools/make_tiny_model.py", folder / "teacher", *shape, "--init-std", "0.1"]
    forked.run([*command, "--seed", "9"]).check_returncode()
    return make_inputs(folder, 1, 100, 1, "--init-std", "0.1")


# Kills the teacher's server when the first step has ended.
TEACHER_GOES = """
import pathlib
from megatron_rl.train.run.metrics import MetricsLog
write = MetricsLog.write
def write_and_kill(log, row):
    write(log, row)
    if row["step"] == 0:
        os.kill(int((log._path.parent / "teacher_server_0.pid").read_text()), signal.SIGKILL)
MetricsLog.write = write_and_kill
"""


class Run:
    """Holds a run of `megatron-rl train` and its folder."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        folder.mkdir()
        self.run_dir = folder / "run"
        config = folder / "config.toml"
        config.write_text(CONFIG.format(folder=inputs, run=self.run_dir))
        self.command = [sys.executable, "-m", "megatron_rl.cli", "train", str(config)]

    def finish(self, *options: str) -> str:
        """Run to the end, and return what was said."""
        done = forked.run([*self.command, *options])
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def numbers(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if not any(word in k for word in OF_TIME)} for row in self.rows]

    def file_texts(self) -> dict[str, str]:
        names = ("rollouts", "tokens")
        return {f"{p.parent.name}/{p.name}": p.read_text() for name in names for p in (self.run_dir / name).iterdir()}


@pytest.mark.timeout(2700)
def test_kills_change_no_number_of_a_run_with_a_teacher(inputs: Path, tmp_path: Path) -> None:
    whole = Run(inputs, tmp_path / "whole")
    whole.finish()
    rows = whole.rows
    assert unknown(name for row in rows for name in row) == []
    assert [row["num_loss_tokens"] for row in rows] == [500] * 3
    for row in rows:
        assert row["teacher_kl"] > 0
        assert row["teacher_seconds"] > 0
        assert row["teacher_coefficient"] == 0.5
        assert row["num_lost_teachers"] == 0
    first = [json.loads(line) for line in (whole.run_dir / "tokens/step_000000.jsonl").open()]
    assert all(len(row["teacher_logprobs"]) == len(row["tokens"]) for row in first)

    again = Run(inputs, tmp_path / "killed")
    killed(again.command, TEACHER_GOES + BEHIND_A_GROUP.format(step=1))
    assert [row["step"] for row in again.rows] == [0]
    assert "groups of this phase were completed before" in again.finish("--resume")
    assert again.numbers() == whole.numbers()
    assert again.file_texts() == whole.file_texts()
    ours, theirs = (tensors_of(run.run_dir / "hf") for run in (again, whole))
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


@pytest.fixture(scope="module")
def teacher_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher") / "model", 3, hidden_size=32, num_hidden_layers=2)


@pytest.fixture(scope="module")
def supervisor(teacher_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerSupervisor]:
    log = tmp_path_factory.mktemp("servers") / "teacher.log"
    with ServerSupervisor(
        [lambda port: EmbeddedServer(teacher_model, log, port=port, max_running_requests=4, context_length=48)], ROLLOUT
    ) as found:
        found.wait_ready()
        yield found


def response_of(index: int, segments: Sequence[Segment]) -> Response:
    return Response(prompt_id=0, sample_index=index, segments=tuple(segments), finish_reason="stop")


def test_the_teacher_scores_the_policys_tokens_alone_and_a_server_that_ends_comes_back_with_the_same_numbers(
    teacher_model: Path, supervisor: ServerSupervisor
) -> None:
    # As long as any may be; with turns of others between and behind the policy's; a trajectory of two, one of nothing.
    responses = [
        response_of(0, [random_segment(0, 40)]),
        response_of(1, [random_segment(1, 20, [(0, 3), (9, 12)]), random_segment(2, 5)]),
        response_of(2, [random_segment(3, 4, []), random_segment(4, 1)]),
    ]

    async def run() -> tuple[list[Response], list[Response], dict[str, float], Counts]:
        pool = ServerPool(supervisor.urls, ROLLOUT, supervisor.replace, keeps_weights=True)
        await pool.connect()
        try:
            scorer = TeacherScorer(pool)
            first = await scorer.scored(responses)
            metrics = scorer.take_metrics()
            supervisor._kept[0].server._process.send_signal(signal.SIGKILL)
            again = await scorer.scored(responses)
            return first, again, metrics, pool.counts
        finally:
            await pool.close()

    first, again, metrics, counts = asyncio.run(run())
    config, weights = load_reference(teacher_model)
    for response in first:
        for segment in response.segments:
            expected = segment_logprobs(config, weights, segment)
            assert segment.teacher_logprobs.dtype == np.float32
            assert segment.teacher_logprobs == pytest.approx(expected, abs=2e-5)
    for one, other in zip(first, again, strict=True):
        assert one.teacher_logprobs.tobytes() == other.teacher_logprobs.tobytes()
    assert counts.num_taken_out == 1
    assert metrics["num_teacher_tokens"] == 48 + (8 + 12) + (8 + 5) + (8 + 1)  # not what follows a policy's last turn
    assert metrics["teacher_seconds"] > 0
    assert metrics["num_lost_teachers"] == 0
