"""Tests `megatron-rl check`: one table shows everything that is wrong with a start, with what to do."""

import json
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from inputs import make_inputs

from megatron_rl.cli import main
from megatron_rl.config.load import load_config
from megatron_rl.config.lora import LoraSection
from megatron_rl.config.schema import RlConfig
from megatron_rl.families import load_architecture
from megatron_rl.preflight import thorough
from megatron_rl.preflight.registry import CHECKS, THOROUGH, Start
from megatron_rl.preflight.show import as_lines, start_of

CONFIG = """
run_dir = "run"
[model]
path = "model"
[data]
train = "data/train.jsonl"
[rollout]
prompts_per_step = 2
samples_per_prompt = 2
max_prompt_tokens = 64
max_response_tokens = 50
[budget]
tokens = 200
[train]
steps = 4
micro_batch_tokens = 128
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    make_inputs(folder, 8, 8, 8)
    (folder / "rl.toml").write_text(CONFIG)
    (folder / "sft.toml").write_text(
        'run_dir="run"\n[model]\npath="model"\n[data]\ntrain="data/sft.jsonl"\nbatch_tokens=400\n'
        "[train]\nsteps=2\nmicro_batch_tokens=200\n"
    )
    (folder / "evaluate.toml").write_text(
        '[model]\npath="model"\n[rollout]\nmax_prompt_tokens=64\nmax_response_tokens=50\n'
        '[benchmarks.toys]\npath="data/train.jsonl"\n'
    )
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def check(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    assert main(["check", *arguments]) == code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["rl", "sft", "evaluate"])
def test_a_good_start_of_every_kind_has_no_problem_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    said = check(capsys, f"{name}.toml", code=0)
    states = {line.split()[1]: line.split()[0] for line in said.splitlines()[:-1]}
    assert {*CHECKS, *THOROUGH} <= states.keys()
    assert set(states.values()) == {"ok"}
    assert said.splitlines()[-1].endswith("checks, no problem")
    assert max(map(len, said.splitlines())) <= 100
    run = here / "run"
    assert not run.exists() or list(run.iterdir()) == []


def test_a_remark_on_the_rows_is_made_once(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [json.loads(line) | {"level": 3} for line in Path("data/train.jsonl").read_text().splitlines()]
    Path("data/more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, key in (("rl", "data.train"), ("evaluate", "benchmarks.toys.path")):
        caplog.clear()
        assert main(["check", f"{name}.toml", "--set", f"{key}=data/more.jsonl"]) == 0
        assert caplog.text.count("columns level are no fields of ours and go into meta") == 1


def test_all_problems_are_told_at_once_with_their_remedies(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["rollout.max_prompt_tokens=8", 'reward.domains={physics="math"}', "train.keep_last=99999999"]
    options = [word for change in changes for word in ("--set", change)]
    said = check(capsys, "rl.toml", *options, code=2)
    told = re.sub(r"\s+", " ", said)
    for name in ("rows", "domains", "disk"):
        assert re.search(rf"^problem  {name} ", said, re.MULTILINE), said
    assert "have more tokens than rollout.max_prompt_tokens = 8" in told
    assert re.search(r"-> make room, lower train.keep_last, or set run_dir to another disk", told)
    assert re.search(r"\d+ checks, \d problems$", said.rstrip())
    found = json.loads(check(capsys, "rl.toml", "--json", *options, code=2))
    assert {one["check"] for one in found if one["state"] == "problem"} >= {"rows", "domains", "disk"}


def test_what_depends_on_a_fault_is_not_known_and_told_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(check(capsys, "rl.toml", "--json", "--set", "parallel.tensor=3", code=2))
    states = {one["check"]: one["state"] for one in found}
    assert (states["layout"], states["memory"], states["disk"]) == ("problem", "unknown", "unknown")
    found = json.loads(check(capsys, "rl.toml", "--json", "--set", "model.path=nowhere", code=2))
    states = {one["check"]: one["state"] for one in found}
    assert (states["layout"], states["disk"], states["memory"]) == ("problem", "unknown", "unknown")
    assert sum("model directory nowhere does not exist" in text for one in found for text in one["told"]) == 1


def test_a_model_whose_weights_are_missing_is_told_before_it_is_loaded(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(here / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    said = check(capsys, "rl.toml", "--set", f"model.path={tmp_path}/model", code=2)
    assert re.search("^problem  weights ", said, re.MULTILINE)
    assert "holds neither *.safetensors nor a megatron/ folder" in re.sub(r"\s+", " ", said)
    (tmp_path / "model/pytorch_model.bin").write_bytes(b"a pickle")
    said = check(capsys, "rl.toml", "--set", f"model.path={tmp_path}/model", code=2)
    told = re.sub(r"\s+", " ", said)
    assert "has its weights in pytorch_model.bin, a pickle, which is not opened" in told and "save_pretrained" in told


def test_a_reward_that_does_not_know_a_rows_own_answer_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"domain": "math", "prompt": "Which? Put it in \\boxed{}.", "answer": "x} or {y"}
    (here / "odd.jsonl").write_text(json.dumps(row) + "\n")
    said = check(capsys, "rl.toml", "--set", "data.train=odd.jsonl", "--set", "reward.kind=math", code=2)
    assert "calls the reference answer" in re.sub(r"\s+", " ", said)


def test_servers_that_do_not_answer_and_endpoints_that_are_not_there(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        port = taken.getsockname()[1]
        options = ["--set", f'rollout.urls=["http://127.0.0.1:{port}"]']
        said = re.sub(r"\s+", " ", check(capsys, "rl.toml", *options, code=2))
        assert f"no generation server is ready at http://127.0.0.1:{port} -> start it, or correct rollout.urls" in said
        url = f"http://127.0.0.1:{port}/v1"
        judge = f'reward.judge={{domains=["addition"], url="{url}", model="m", api_key_variable="NO_K"}}'
        said = re.sub(r"\s+", " ", check(capsys, "rl.toml", "--set", judge, code=2))
        assert "reward.judge.api_key_variable names NO_K, which is not in the environment" in said


def test_a_file_for_other_machines_is_not_held_against_this_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "cluster={nodes=2, gpus_per_node=2, gpu_memory_gb=0.00001}"]
    said = check(capsys, "rl.toml", *options, code=2)
    assert any(line.startswith("not here gpus") for line in said.splitlines()), said
    assert "a training gpu needs about" in re.sub(r"\s+", " ", said)
    start, is_here = start_of(load_config(RlConfig, "rl.toml", [options[1]]), None, False)
    assert (start.world_size, is_here) == (4, False)
    start, is_here = start_of(load_config(RlConfig, "rl.toml", [options[1]]), 3, False)
    assert (start.world_size, is_here) == (3, True)


def test_the_room_that_a_run_needs_is_counted_by_parts(here: Path) -> None:
    """Check the disk space by parts. In float32 a parameter takes 16 bytes in a checkpoint and 4 in a model."""
    parameters = load_architecture("model").num_parameters()
    start = Start(config=load_config(RlConfig, "rl.toml", ["train.keep_last=3", "train.save_every=2"]), world_size=1)
    assert thorough.disk_bytes(start) == {
        "checkpoints": 4 * parameters * 16,
        "models": parameters * 4,
        "responses": 4 * 200 * 10,
        "journal": 2 * 200 * 26,
    }
    # With adapters, a checkpoint holds these alone. The exported model is whole.
    adapters = start.config.model_copy(update={"lora": LoraSection(rank=4, targets=["attention"])})
    with_adapters = thorough.disk_bytes(Start(config=adapters, world_size=1))
    one = load_architecture("model")
    q, k = (heads * one.head_dim for heads in (one.num_attention_heads, one.num_key_value_heads))
    factors = one.num_hidden_layers * 4 * (one.hidden_size + q + 2 * k + q + one.hidden_size)
    assert with_adapters == thorough.disk_bytes(start) | {"checkpoints": 4 * factors * 16}


def test_a_package_of_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        requires=lambda _: ["pydantic~=2.14", "numpy>=99", "nothing-like-it~=1.0", "torch==9 ; extra == 'gpu'"],
        version=thorough.importlib.metadata.version,
        PackageNotFoundError=thorough.importlib.metadata.PackageNotFoundError,
    )
    monkeypatch.setattr(thorough.importlib, "metadata", fake)
    found = list(THOROUGH["versions"].find(None))  # type: ignore[arg-type]
    assert len(found) == 2
    assert re.fullmatch(r"package numpy is .*, and this program needs >=99; pip install 'numpy>=99'", found[0])
    assert found[1] == "package nothing-like-it is not installed; pip install 'nothing-like-it~=1.0'"


def test_every_check_fits_into_a_row_of_eighty_columns() -> None:
    for one in (*CHECKS.values(), *THOROUGH.values()):
        assert len(one.name) < 14, one.name
        assert len(one.about) <= 80 - 23, one.about


def test_a_row_of_the_table_wraps_what_was_found_and_says_what_to_do() -> None:
    from megatron_rl.preflight.show import Result

    result = Result(check="disk", about="room", state="problem", told=("too little " * 12 + "room; make; some room",))
    lines = list(as_lines(result, 60))
    assert lines[0] == "problem  disk          room"
    assert lines[-1] == "         -> some room"
    assert max(map(len, lines)) <= 60


def test_faults_that_are_told_together_have_a_line_and_a_remedy_each() -> None:
    from megatron_rl.preflight.show import Result

    told = ("two reasons:\n  a.jsonl:1: no prompt; write one (3 more)\n  a.jsonl:4: no answer\n  inspect shows it",)
    lines = list(as_lines(Result(check="rows", about="rows", state="problem", told=told), 80))
    assert [line.strip() for line in lines[1:]] == [
        "two reasons:",
        "a.jsonl:1: no prompt",
        "-> write one (3 more)",
        "a.jsonl:4: no answer",
        "inspect shows it",
    ]
