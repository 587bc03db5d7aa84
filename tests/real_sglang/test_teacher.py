"""Tests a teacher on real SGLang: its log-probs against another implementation, and a whole run with its servers."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from inputs import make_inputs
from reference import load_reference, segment_logprobs
from samples import random_segment

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.records import Response
from megatron_rl.rollout.pool import ServerPool
from megatron_rl.rollout.server import SglangServer, find_sglang
from megatron_rl.rollout.teacher_scorer import TeacherScorer

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang/bin/python"
ROLLOUT = RolloutSection(
    prompts_per_step=1,
    samples_per_prompt=2,
    max_prompt_tokens=8,
    max_response_tokens=40,
    max_running_requests=4,
    engine="sglang",
    sglang_python=PYTHON,
    token_deadline_seconds=20,
)
CONFIG = """
run_dir = "{run}"
threads = 1
[model]
path = "{folder}/model"
trust_remote_code = true
[data]
train = "{folder}/data/train.jsonl"
[rollout]
engine = "sglang"
sglang_python = "{python}"
prompts_per_step = 4
samples_per_prompt = 4
max_prompt_tokens = 32
max_response_tokens = 24
max_running_requests = 8
ready_deadline_seconds = 900
token_deadline_seconds = 20
silence_seconds = 300
[distillation]
path = "{teacher}"
trust_remote_code = true
coefficient = 0.5
[budget]
tokens = 300
[train]
steps = 2
micro_batch_tokens = 512
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    command = [sys.executable, ROOT / "tools/make_tiny_model.py", folder, "--init-std", "0.1", "--seed", "9"]
    forked.run(command).check_returncode()
    return folder


@pytest.fixture(scope="module")
def server(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    options = {"max_running_requests": 4, "context_length": ROLLOUT.max_sequence_tokens}
    found = SglangServer(teacher, log, python=find_sglang(ROLLOUT), **options)
    try:
        found.wait_ready(900)
        yield found
    finally:
        found.stop()


def test_its_log_probs_are_those_of_the_policys_tokens_at_temperature_1(teacher: Path, server: SglangServer) -> None:
    segments = [(random_segment(0, 40),), (random_segment(1, 20, [(0, 3), (9, 12)]), random_segment(2, 5))]
    responses = [
        Response(prompt_id=0, sample_index=index, segments=one, finish_reason="stop")
        for index, one in enumerate(segments)
    ]

    async def run() -> list[Response]:
        pool = ServerPool([server.url], ROLLOUT, keeps_weights=True)
        await pool.connect()
        try:
            return await TeacherScorer(pool).scored(responses)
        finally:
            await pool.close()

    config, weights = load_reference(teacher)
    for response in asyncio.run(run()):
        for segment in response.segments:
            expected = segment_logprobs(config, weights, segment)
            assert segment.teacher_logprobs == pytest.approx(expected, abs=1e-4)


def test_a_run_starts_teachers_on_sglang_beside_the_policys(teacher: Path, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, 1, 100, 1, "--init-std", "0.1")
    config, run = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(CONFIG.format(folder=inputs, run=run, teacher=teacher, python=PYTHON))
    done = forked.run([sys.executable, "-m", "megatron_rl.cli", "train", config], timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["num_loss_tokens"] for row in rows] == [300, 300]
    assert min(row["teacher_kl"] for row in rows) > 0.01
    assert min(row["teacher_seconds"] for row in rows) > 0
    assert all(row["num_lost_teachers"] == row["num_lost_servers"] == 0 for row in rows)
    assert "sglang" in (run / "teacher_server_0.log").read_text()
