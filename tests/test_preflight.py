"""Checks before a start: each has a name and says what it looks at, and every problem says its remedy."""

import json
import logging
import re
import socket
from pathlib import Path

import pytest
from rank_zero import config_of
from tiny_model import TINY_CONFIG

from megatron_rl.config.model import ServingSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.mixture import load_stream
from megatron_rl.families import load_architecture
from megatron_rl.preflight import process_limits
from megatron_rl.preflight.checks import check_start, serving_problems
from megatron_rl.preflight.registry import CHECKS, Start
from megatron_rl.rollout.sampler import requests_in_flight


@pytest.fixture
def start_of(tmp_path: Path):
    """Return a function that makes a start without a fault, but for the changes."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY_CONFIG), encoding="utf-8")
    rows = [{"id": "1", "domain": "math", "prompt": "1+1? Put it in \\boxed{}.", "answer": "2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(*changes: str, world_size: int = 1, **more) -> Start:
        paths = [f"model.path={json.dumps(str(model))}", f"data.train={json.dumps(str(tmp_path / 'rows.jsonl'))}"]
        config: RlConfig = config_of(tmp_path, *paths, *changes)
        return Start(config=config, world_size=world_size, **more)

    return make


def found_by(name: str, start: Start) -> list[str]:
    try:
        return list(CHECKS[name].find(start))
    except ValueError as error:
        return [str(error)]


def test_every_check_says_what_it_looks_at_and_finds_nothing_wrong_with_a_good_start(start_of) -> None:
    check_start(start_of())
    for name, check in CHECKS.items():
        assert check.name == name
        assert check.about
        assert found_by(name, start_of()) == []


def test_each_problem_names_what_is_wrong_and_a_remedy(start_of, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "held/checkpoints").mkdir(parents=True)
    (tmp_path / "held/checkpoints/latest").write_text("step_1", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n', encoding="utf-8")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            "layout": (start_of("parallel.tensor=2"), "start a multiple of 2 processes"),
            "rows": (start_of(f'data.train="{tmp_path}/bad.jsonl"'), "its column 'question' may be it"),
            "domains": (start_of('reward.domains={mathe="math"}'), "rename it"),
            "rollouts": (start_of(rollouts=tmp_path / "none.jsonl"), "megatron-rl rollout writes one"),
            "run_dir": (start_of(f"run_dir={tmp_path}/file"), "set it to another folder"),
            "agent": (start_of('rollout.agent_command=["no-such-program"]'), "which is not found; give its path"),
            "servers": (start_of(f"rollout.port={port}"), "set another or 0"),
        }
        for name, (start, remedy) in cases.items():
            (problem, *_) = found_by(name, start)
            assert remedy in problem, name
            with pytest.raises(ValueError, match="(?s).+"):
                check_start(start)
    (problem,) = found_by("run_dir", start_of(f"run_dir={tmp_path}/model/../model"))
    assert problem.endswith("is the folder of the model; set it to another one")
    # 3 layers x 2 experts x 16/3 bytes are 32 of a token: 25.6 GB.
    (problem,) = found_by("layout", start_of("rollout.router_replay=true", "budget.tokens=800000000"))
    assert "sends 25.6 GB through rank 0" in problem
    assert "set rollout.router_replay = false" in problem
    (problem,) = found_by("run_dir", start_of(f"run_dir={tmp_path}/held"))
    assert "add --resume" in problem
    assert found_by("run_dir", start_of(f"run_dir={tmp_path}/held", resume=True)) == []


def test_a_run_does_not_go_on_as_another_model(start_of, tmp_path: Path) -> None:
    checkpoint = tmp_path / "held/checkpoints/step_1"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text("step_1", encoding="utf-8")

    def found(resume: bool = True, **changes) -> list[str]:
        (checkpoint / "config.json").write_text(json.dumps(TINY_CONFIG | changes), encoding="utf-8")
        return found_by("run_dir", start_of(f"run_dir={tmp_path}/held", resume=resume))

    assert found() == []
    # where responses end, and how long they may be, is no matter of the weights
    assert found(eos_token_id=2, max_position_embeddings=100) == []
    (problem,) = found(vocab_size=95, rope_theta=500.0)
    assert problem.startswith(f"{checkpoint} is of another model than {tmp_path}/model (vocab_size is 96 and was 95, ")
    assert "rotary is" in problem and problem.endswith("; set model.path back, or start anew in another run_dir")
    (problem,) = found(resume=False, vocab_size=95)
    assert "add --resume" in problem
    # A damaged checkpoint is for the run to find, which has an earlier one.
    (checkpoint / "config.json").write_text("{", encoding="utf-8")
    assert found_by("run_dir", start_of(f"run_dir={tmp_path}/held", resume=True)) == []


def test_what_a_run_says_of_its_rows_is_not_said_before_it(
    start_of, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"{i}+1?", "answer": "2", "level": i, "domain": d} for i, d in enumerate(("math", None))]
    for name, row in zip("ab", rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    weights = f'data.train={{"{tmp_path}/a.jsonl" = 1, "{tmp_path}/b.jsonl" = 2}}'
    start = start_of(weights, 'data.domain="algebra"', "budget.domains={math = 0.5, algebra = 0.5}")
    with caplog.at_level(logging.INFO):
        assert found_by("domains", start) == []
        assert caplog.messages == []
        load_stream(start.config.data, 1).check_shares(start.config.budget.domains)
    assert len(caplog.messages) == 4  # columns of both, no domain, weights that do not say what is trained


def test_more_connections_than_the_hard_limit_of_files_are_refused_with_the_name_of_the_limit(
    start_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = "rollout.urls=['http://a:1','http://b:1','http://c:1']"
    slots = "rollout.max_running_requests=400", "rollout.samples_per_prompt=4"
    many = start_of(servers, *slots)
    # Twice 3 * 400, two more of each server, and 512 files with four of each of 2 * 2 workers.
    for limit, num_problems in ((2400 + 6 + 512 + 16, 0), (2400 + 6 + 512 + 15, 1)):
        monkeypatch.setattr(process_limits, "possible_open_files", lambda limit=limit: limit)
        problems = found_by("limits", many)
        assert len(problems) == num_problems
    assert "2406 connections to 3 servers and up to 528 other files" in problems[0]
    assert f"may have {limit} here (RLIMIT_NOFILE, the hard one: ulimit -Hn)" in problems[0]
    # C3PO++ has one for each slot, and up to three of a group that is started whole.
    partial = start_of(
        servers, "rollout.max_running_requests=400", "rollout.samples_per_prompt=4", "rollout.partial=true"
    )
    assert requests_in_flight(partial.config.rollout, 3) == 1203
    assert found_by("limits", partial) == []


def test_more_threads_than_are_left_are_refused_with_the_name_of_the_limit(
    start_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_limits, "_thread_limits", lambda: iter([("pids.max", 20), ("RLIMIT_NPROC", 10**6)]))
    (problem,) = found_by("limits", start_of())
    assert re.search(r"starts about \d+ threads, and pids.max leaves it 20; raise that limit", problem)


def test_code_of_a_model_directory_needs_leave_where_a_server_would_run_it(tmp_path: Path) -> None:
    rollout = RolloutSection(prompts_per_step=1, samples_per_prompt=2, engine="sglang", max_response_tokens=64)
    allowed = {"dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | {"max_position_embeddings": 2**20}))
    ling = load_architecture(tmp_path)
    (problem,) = serving_problems(rollout, ServingSection(**allowed), ling)
    assert "(configuration_bailing_moe.py), since transformers does not know this model; read it and set" in problem
    told = ServingSection(**allowed, trust_remote_code=True), ServingSection(**allowed)
    assert not list(serving_problems(rollout, told[0], ling))
    assert not list(serving_problems(rollout, told[1], ling.model_copy(update={"family": "qwen3"})))
    elsewhere = rollout.model_copy(update={"urls": ("http://a:1",)})
    assert not list(serving_problems(elsewhere, told[1], ling))


def test_end_tokens_that_no_response_can_have_are_refused(tmp_path: Path) -> None:
    rollout = RolloutSection(prompts_per_step=1, samples_per_prompt=2, max_response_tokens=64)
    size, found = TINY_CONFIG["vocab_size"], {}
    for ids in ([size], [size, size - 1], size - 1):
        config = TINY_CONFIG | {"max_position_embeddings": 2**20, "eos_token_id": ids}
        (tmp_path / "config.json").write_text(json.dumps(config))
        found[str(ids)] = list(serving_problems(rollout, ServingSection(), load_architecture(tmp_path)))
    assert [len(problems) for problems in found.values()] == [1, 0, 0]
    assert f"eos_token_id {size} of config.json or" in found[f"[{size}]"][0]


def test_what_sglang_does_not_read_of_config_json_is_refused_there(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 2**19, "attention_factor": 1.0}
    shape = {"max_position_embeddings": 2**20, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | shape | {"rope_scaling": yarn}))
    llama, rollout = (
        load_architecture(tmp_path),
        {"prompts_per_step": 1, "samples_per_prompt": 2, "max_response_tokens": 64},
    )
    found = [
        list(serving_problems(RolloutSection(**rollout, engine=engine), ServingSection(), llama))
        for engine in ("embedded", "sglang")
    ]
    assert not found[0]
    assert "config.json gives yarn attention_factor, which SGLang does not read" in found[1][0]


def test_an_own_reward_and_an_own_objective_are_tried_before_a_model_is_built(start_of, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def good(response, meta): return len(response)\n"
        "def last(response): return float(response.split()[-1] == '2')\n"
        "def column(response, meta): return meta['level']\n"
        "def flat(logprobs, advantages): return logprobs.detach() * advantages\n",
        encoding="utf-8",
    )
    assert found_by("rewards", start_of("reward.kind=mine.py:good")) == []
    for name, told in {
        "last": r"no score to the response '' to the row .*rows.jsonl:1: IndexError: .* < mine.py line 2 in last",
        "column": r"no score to the response '\\\\boxed\{2\}' to the row .*: KeyError: 'level' < mine.py line 3",
        "lost": "has no function 'lost'; it has good, last, column, flat",
    }.items():
        (problem, *_) = found_by("rewards", start_of(f"reward.kind=mine.py:{name}"))
        assert re.search(told, problem), problem
    (problem, *_) = found_by("rewards", start_of("reward.kind=http://127.0.0.1:9/", "reward.service.tries=1"))
    assert "the service http://127.0.0.1:9/ cannot be asked" in problem
    (problem,) = found_by("objective", start_of("algorithm.surrogate=mine.py:flat"))
    assert "has no gradient in logprobs" in problem
