"""Tests that foreign files are read within limits, and that each breach gives one message."""

import gzip
import json
import os
import resource
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tiny_model import TINY_CONFIG

from megatron_rl.checkpoint.hf import HfCheckpoint
from megatron_rl.config.load import load_config, read_values
from megatron_rl.config.schema import RlConfig
from megatron_rl.data.curation import sources
from megatron_rl.data.curation.config import Input
from megatron_rl.data.curation.difficulty import _rates
from megatron_rl.data.curation.sources import numbered_lines, read_pieces
from megatron_rl.data.prompts import read_chats, read_prompts
from megatron_rl.data.scored import lines_of, read_scored
from megatron_rl.evaluation.responses import read_verdicts
from megatron_rl.families import architecture_of, load_architecture, read_architecture
from megatron_rl.parsing import MAX_LINE_BYTES, parse_json, parse_toml, read_text
from megatron_rl.reward.code import CodeSettings, judge_response
from megatron_rl.reward.code_tests import problem_of_tests
from megatron_rl.rollout.append_log import find_groups
from megatron_rl.rollout.rollout_file import RowLimits, check_rows, read_groups
from megatron_rl.train.run.metrics import read_metrics

DEEP = "[" * 100_000 + "]" * 100_000
TOO_DEEP = "it is nested more than 100 deep"


# -- nesting -------------------------------------------------------------------------------------------------------


def test_a_hundred_levels_are_read_and_one_more_is_refused_in_json_and_toml() -> None:
    for opening, closing in ("[]", ('{"a":', "}")):
        text = opening * 99 + "[]" + closing * 99
        assert json.dumps(parse_json(text), separators=(",", ":")) == text
        assert parse_json(text.encode()) == parse_json(text)
        with pytest.raises(ValueError, match=TOO_DEEP):
            parse_json(opening * 100 + "[]" + closing * 100)
    assert parse_json(json.dumps(["[[{{" * 1000])) == ["[[{{" * 1000]
    assert parse_toml("v = " + "[" * 99 + "]" * 99)
    for text in ("v = " + "[" * 100 + "]" * 100, ".".join("a" * 101) + " = 1", "[" + " . ".join("a" * 101) + "]"):
        with pytest.raises(ValueError, match=TOO_DEEP):
            parse_toml(text)


@pytest.mark.parametrize("text", [f"v = {DEEP}", "v = " + "{a=" * 100_000, ".".join("a" * 100_000) + " = 1"])
def test_a_deep_configuration_is_refused_with_its_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path} is not valid TOML: {TOO_DEEP}$"):
        load_config(RlConfig, path)


def test_a_deep_override_is_refused_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(ValueError, match=rf"^--set train.steps: the value cannot be read: {TOO_DEEP}$"):
        read_values(tmp_path / "config.toml", [f"train.steps={DEEP}"])
    with pytest.raises(ValueError, match=r"^--set a\.a.*: the key has 20000 parts; no section is that deep$"):
        read_values(tmp_path / "config.toml", [".".join("a" * 20_000) + "=1"])


def test_deep_files_of_a_model_are_refused_with_their_names(tmp_path: Path) -> None:
    config, index = tmp_path / "config.json", tmp_path / "model.safetensors.index.json"
    config.write_text(DEEP)
    with pytest.raises(ValueError, match=rf"^{config} is not valid JSON: {TOO_DEEP}$"):
        load_architecture(tmp_path)
    model = architecture_of(TINY_CONFIG)
    index.write_text('{"weight_map": ' + DEEP + "}")
    with pytest.raises(ValueError, match=rf"^{index} is not an index of safetensors: .*{TOO_DEEP}"):
        HfCheckpoint(tmp_path, model)
    index.unlink()
    header = f'{{"a": {DEEP}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"a.safetensors cannot be read as safetensors: .*recursion limit"):
        HfCheckpoint(tmp_path, model)


READERS = {
    "prompts": read_prompts,
    "chats": read_chats,
    "scored": lambda path: [read_scored(line, where, {}) for _, line, where in lines_of(path)],
    "judged": read_verdicts,
    "rollouts to train from": lambda path: read_groups(path, lambda responses, rewards: rewards),
    "all rows of them": lambda path: check_rows(path, RowLimits()),
    "responses to go on with": lambda path: find_groups(path, 1, "remedy"),
    "difficulty": lambda path: _rates([str(path)], 1.0),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_deep_line_is_refused_with_its_place(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"meta": {DEEP}}}\n')
    with pytest.raises(ValueError, match=rf"^{path}(:1| line 1|: a line after byte 0)\b"):
        READERS[reader](path)


def test_deep_tests_of_a_program_cannot_be_read() -> None:
    assert TOO_DEEP in (problem_of_tests(DEEP) or "")
    judgement = judge_response("```python\nprint(1)\n```", DEEP, CodeSettings())
    assert (judgement.reason, TOO_DEEP in judgement.details) == ("error", True)


# -- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
def test_an_endless_line_is_refused_with_its_place_before_it_is_read(reader: str, tmp_path: Path) -> None:
    """Check a file of ten gigabytes of zeros, which takes no disk space."""
    path = tmp_path / "rows.jsonl"
    path.touch()
    os.truncate(path, 10 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"^{path}:1: the line has more than 67,108,864 bytes; write one JSON object"):
        READERS[reader](path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * MAX_LINE_BYTES / 1024


def test_metrics_of_an_endless_line_are_refused_as_well(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    assert read_metrics(path) == [{"step": 0}]
    os.truncate(path, 2**30)
    with pytest.raises(ValueError, match=rf"^{path}:2: the line has more than"):
        read_metrics(path)


def test_a_document_of_gigabytes_or_that_is_no_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 10 * 2**30)
    with pytest.raises(ValueError, match=rf"^{path} is not valid JSON: it has more than 268,435,456 bytes$"):
        read_architecture(path)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ValueError, match="^it is not a regular file$"):
            read_text(path)


def test_a_gzip_bomb_is_refused_and_a_real_file_is_read(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "What is 1+1?", "answer": "2"}).encode() + b"\n"
    real, bomb = tmp_path / "real.jsonl.gz", tmp_path / "bomb.jsonl.gz"
    real.write_bytes(gzip.compress(row * 100_000))  # 4 MB, 250 times its size: too little to harm
    assert sum(1 for _ in numbered_lines(real)) == 100_000
    bomb.write_bytes(gzip.compress((b" " * 2**20 + b"\n") * 65, 1))
    size = bomb.stat().st_size
    expected = rf"^{bomb} has {size:,} bytes and unpacks to more than 67,108,864, .* unpack it with gunzip"
    with pytest.raises(ValueError, match=expected):
        list(numbered_lines(bomb))
    bomb.write_bytes(gzip.compress(bytes(65 * 2**20), 1))
    with pytest.raises(ValueError, match=rf"^{bomb}:1: the line has more than"):
        list(numbered_lines(bomb))


def test_a_row_group_of_parquet_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": [f"{i:0100}" for i in range(3000)]})
    parquet.write_table(table, path, row_group_size=1000)
    given = Input(path=str(path))
    assert sum(len(piece.rows) for piece in read_pieces(given)) == 3000
    sizes = [parquet.read_metadata(path).row_group(i).total_byte_size for i in range(3)]
    monkeypatch.setattr(sources, "MAX_ROW_GROUP_BYTES", min(sizes) - 1)
    with pytest.raises(
        ValueError, match=rf"^{path}: row group 0 has {sizes[0]:,} bytes of data, .*row_group_size=10000"
    ):
        list(read_pieces(given))


# -- numbers of config.json ----------------------------------------------------------------------------------------

WRONG = [
    ("num_hidden_layers", "1000000000", "must be a whole number from 1 to 4096, got 1000000000"),
    ("num_hidden_layers", "Infinity", "must be a whole number from 1 to 4096, got inf"),
    ("num_hidden_layers", "true", "must be a whole number from 1 to 4096, got True"),
    ("num_hidden_layers", '"3"', "must be a whole number from 1 to 4096, got '3'"),
    ("num_hidden_layers", "3.0", "must be a whole number from 1 to 4096, got 3.0"),
    ("hidden_size", "-64", "must be a whole number from 1 to 1048576, got -64"),
    ("vocab_size", "1" + "0" * 400, "must be a whole number from 1 to 16777216, got 1" + "0" * 76 + "..."),
    ("num_experts", "[" * 40 + "]" * 40, "must be a whole number from 1 to 65536, got " + "[" * 40),
    ("max_position_embeddings", "1e12", "must be a whole number from 1 to 1073741824, got 1000000000000.0"),
    ("eos_token_id", "-1", "must be a whole number from 0 to 16777216, got -1"),
    ("rope_theta", "NaN", r"must be a number above 0 and up to 1e+15, got nan"),
    ("rope_theta", "1e400", r"must be a number above 0 and up to 1e+15, got inf"),
    ("rope_theta", "0", r"must be a number above 0 and up to 1e+15, got 0"),
    ("rms_norm_eps", "-Infinity", "must be a number above 0 and up to 1, got -inf"),
    ("rms_norm_eps", "true", "must be a number above 0 and up to 1, got True"),
    ("norm_head", "1", "must be true or false, got 1"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=[f"{key}={value[:12]}" for key, value, _ in WRONG])
def test_a_wrong_number_of_config_json_is_refused_with_its_range(
    key: str, value: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    whole = json.dumps({name: content for name, content in TINY_CONFIG.items() if name != key})
    path.write_text(f'{whole[:-1]}, "{key}": {value}}}')
    with pytest.raises(ValueError) as caught:
        read_architecture(path)
    assert str(caught.value).startswith(f"{path}: {key} {message}")


def test_layers_and_experts_that_are_too_many_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY_CONFIG | {"num_hidden_layers": 4096, "num_experts": 65536}))
    with pytest.raises(ValueError, match="num_hidden_layers 4096 times num_experts 65536 must be at most 262144"):
        read_architecture(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=rf"^{path} must hold a JSON object, got \[\]$"):
        read_architecture(path)
    path.write_text('{"vocab_size": ' + "1" * 5000 + "}")
    with pytest.raises(ValueError, match=rf"^{path} is not valid JSON: .*4300 digits"):
        read_architecture(path)
