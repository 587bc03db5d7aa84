"""Tests supervised fine-tuning: the chats of a step, the ends of epochs, the files of a run, and resuming."""

import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import make_inputs

from megatron_rl.checkpoint.epochs import refuse_other_epochs
from megatron_rl.checkpoint.hf import copy_companions
from megatron_rl.config.load import load_config
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.schema import SftConfig
from megatron_rl.data.batches import batch_ends, epochs_ended
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.mixture import ChatStream, Source, Stage
from megatron_rl.data.prompts import Chat, Message
from megatron_rl.files import link_directory, replace_directory
from megatron_rl.metric_names import unknown
from megatron_rl.preflight.checks import check_start
from megatron_rl.preflight.registry import Start
from megatron_rl.train.run.starts import record_start
from megatron_rl.train.sft.chats import ChatBatches, validation_parts
from megatron_rl.train.sft.epochs import EpochLoss
from megatron_rl.train.step.trainer import StepResult

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
CONFIG = """
run_dir = "run"
threads = 1
seed = 3
[model]
path = "model"
[data]
train = {"a.jsonl" = 2, "b.jsonl" = 1}
validation = "v.jsonl"
batch_tokens = 400
[optimizer]
learning_rate = 3e-3
min_learning_rate = 1e-4
schedule = "cosine"
warmup_share = 0.2
[train]
epochs = 3
validate_every = 4
save_every = 2
keep_last = 20
micro_batch_tokens = 200
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a model and three files of chats: 30 and 10 to train on, 9 to validate on."""
    folder = tmp_path_factory.mktemp("sft")
    make_inputs(folder, 49, 1, 1)
    rows = (folder / "data/sft.jsonl").read_text().splitlines(keepends=True)
    for name, part in {"a": rows[:30], "b": rows[30:40], "v": rows[40:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(part))
    (folder / "sft.toml").write_text(CONFIG)
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def config_of(*changes: str) -> SftConfig:
    return load_config(SftConfig, "sft.toml", changes)


def ids_of(name: str) -> list[str]:
    return [json.loads(line)["id"] for line in Path(f"{name}.jsonl").read_text().splitlines()]


# -- which chats a step holds --------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=12),
    batch_tokens=st.integers(10, 60),
    epochs=st.integers(1, 5),
)
def test_batches_and_epochs_end_where_counting_says(lengths: list[int], batch_tokens: int, epochs: int) -> None:
    batches: list[list[tuple[int, int]]] = [[]]  # of (epoch, length)
    for epoch in range(1, epochs + 1):
        for length in lengths:
            if sum(n for _, n in batches[-1]) + length > batch_tokens:
                batches.append([])
            batches[-1].append((epoch, length))
    ends = list(batch_ends(lengths * epochs, batch_tokens))
    assert ends == [sum(map(len, batches[: i + 1])) for i in range(len(batches))]
    last_seen = {epoch: max(i for i, b in enumerate(batches) if epoch in dict(b)) for epoch in range(1, epochs + 1)}
    for step, (before, after) in enumerate(zip([0, *ends], ends, strict=False)):
        expected = [epoch for epoch, last in last_seen.items() if last == step]
        assert list(epochs_ended(before, after, len(lengths))) == expected


def whole_batches(lengths: list[int], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Yield the batches of one file, in the order that the first runs of this project had."""
    batch: list[int] = []
    for epoch in range(10):
        order = list(range(len(lengths)))
        random.Random(f"sft order {seed} {epoch}").shuffle(order)
        while order:
            row = order.pop()
            if sum(lengths[i] for i in batch) + lengths[row] > batch_tokens:
                yield batch
                batch = []
            batch.append(row)


def test_one_file_has_the_batches_that_it_always_had(here: Path) -> None:
    config = config_of("data.train=a.jsonl", "train={steps=20,micro_batch_tokens=200}")
    tokenizer = load_tokenizer("model")
    found = ChatBatches(config, tokenizer)
    rows = [json.loads(line)["messages"] for line in Path("a.jsonl").read_text().splitlines()]
    eos = tokenizer.eos_token_id
    ids = [tokenizer.apply_chat_template(row, return_dict=False) for row in rows]
    ids = [x if x[-1] == eos else [*x, eos] for x in ids]
    expected = whole_batches([len(x) for x in ids], 400, config.seed)
    assert found.num_steps == 20
    for step in range(20):
        assert [s.token_ids.tolist() for s in found[step]] == [ids[i] for i in next(expected)]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_files_of_chats_take_turns_by_weight_and_go_through_whole_epochs(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    weights = [data.draw(st.floats(0.1, 9)) for _ in sizes]
    sources = [
        Source(path=Path(str(f)), rows=tuple(chat(f"{f} {i}") for i in range(size)), weight=weight)
        for f, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    stream = ChatStream([Stage(sources=tuple(sources))], seed)
    assert stream.num_rows == sum(sizes)
    taken = [row.id.split() for row in stream.take(0, 60)[0]]
    for f, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        own = [i for name, i in taken if name == str(f)]
        assert abs(len(own) - 60 * weight / sum(weights)) < max(1, len(sizes) - 1) + 1e-6
        for first in range(0, len(own) - size + 1, size):
            assert len(set(own[first : first + size])) == size


def chat(name: str) -> Chat:
    return Chat(id=name, messages=(Message(role="user", content=name), Message(role="assistant", content="yes")))


def test_a_run_of_epochs_sees_as_many_chats_as_its_files_hold_and_ends(here: Path) -> None:
    batches = ChatBatches(config_of(), load_tokenizer("model"))
    assert batches.num_chats == 40
    assert batches.num_seen(batches.num_steps) == 3 * 40
    ends = [step for step in range(batches.num_steps) if batches.epochs_ended(step)]
    assert [epoch for step in ends for epoch in batches.epochs_ended(step)] == [1, 2, 3]
    assert [batches.num_seen(step) < 40 * n <= batches.num_seen(step + 1) for n, step in enumerate(ends, 1)] == [
        True
    ] * 3
    sequences = [s for step in range(batches.num_steps) for s in batches[step]]
    assert len(sequences) == 120
    # Weights 2 and 1: of 120 turns the file of 30 has 80, so some of its rows come three times and others twice.
    counts = sorted(sum(s is t for t in sequences) for s in {id(s): s for s in sequences}.values())
    assert counts == [2] * 10 + [3] * 20 + [4] * 10
    # One batch may hold several epochs.
    few = ChatBatches(config_of("data.batch_tokens=100000"), load_tokenizer("model"))
    assert (few.num_steps, list(few.epochs_ended(0))) == (1, [1, 2, 3])


def test_a_run_goes_on_with_the_data_and_the_batches_that_it_began_with(here: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("model")
    batches = ChatBatches(config_of(), tokenizer)
    middle, end = batches.state(4), batches.state(batches.num_steps)
    batches.check(middle)
    ChatBatches(config_of("train.epochs=4"), tokenizer).check(middle)
    run = f"run_dir={tmp_path}"
    record_start(config_of(run), 0, resume=False)
    for change, said in (
        ("seed=4", "seed is 4 and was 3"),
        ('data.train={"a.jsonl"=1,"b.jsonl"=1}', r"data.train is .*\"a.jsonl\": 1.* and was .*\"a.jsonl\": 2"),
        ("data.train=a.jsonl", 'data.train is {"a.jsonl": 1.0} and was'),
    ):
        with pytest.raises(ValueError, match=rf"not those that this run began with: {said}"):
            ChatBatches(config_of(run, change), tokenizer).check(middle)
    with pytest.raises(ValueError, match=r"had seen \d+ chats; .* \(data.batch_tokens is 300 and was 400\): put"):
        ChatBatches(config_of(run, "data.batch_tokens=300"), tokenizer).check(middle)
    with pytest.raises(ValueError, match=r"had seen 120 chats; .*the last batch of an ended run cannot be filled up"):
        ChatBatches(config_of("train.epochs=4"), tokenizer).check(end)
    with pytest.raises(
        ValueError, match=rf"the checkpoint is of step {batches.num_steps}, and this configuration ends"
    ):
        ChatBatches(config_of("train.epochs=1"), tokenizer).check(end)


def test_validation_chats_are_others_than_those_trained_on_and_fit(here: Path) -> None:
    config, tokenizer = config_of("data.batch_tokens=100"), load_tokenizer("model")
    parts = validation_parts(config, tokenizer, set())
    assert len(parts) > 1
    assert all(sum(len(s.token_ids) for s in part) <= 100 for part in parts)
    assert sum(map(len, parts)) == 9
    mixed = here / "mixed.jsonl"
    row = json.loads(Path("b.jsonl").read_text().splitlines()[4])
    mixed.write_text(Path("v.jsonl").read_text() + json.dumps(row | {"id": "another"}) + "\n")
    config = config_of("data.validation=mixed.jsonl")
    with pytest.raises(
        ValueError, match=r"1 of 10 chats of data.validation are in data.train too, the first is another"
    ):
        validation_parts(config, tokenizer, ChatBatches(config, tokenizer).messages)
    with pytest.raises(
        ValueError, match=r"9 of 9 chats have more tokens than data.batch_tokens = 12: v.jsonl:1 with \d+, .* raise it"
    ):
        validation_parts(config_of("data.batch_tokens=12"), tokenizer, set())
    with pytest.raises(ValueError, match=r"chats have more tokens than train.micro_batch_tokens = 12"):
        ChatBatches(config_of("train.micro_batch_tokens=12"), tokenizer)


def test_chats_of_tokens_that_the_model_has_no_embedding_for_are_refused(here: Path, tmp_path: Path) -> None:
    shutil.copytree("model", tmp_path / "model")
    config = config_of(f"model.path={tmp_path / 'model'}")
    batches = ChatBatches(config, load_tokenizer(config.model.path))
    ids = [int(max(sequence.token_ids)) for step in range(batches.num_steps) for sequence in batches[step]]
    largest = max(ids)
    values = json.loads(Path("model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(values | {"vocab_size": largest}))
    with pytest.raises(ValueError, match=rf"[ab]\.jsonl:\d+: the tokenizer of .* makes token {largest} \("):
        ChatBatches(config, load_tokenizer(config.model.path))


def test_files_that_are_not_there_are_named_before_anything_starts(here: Path) -> None:
    check_start(Start(config=config_of(f"run_dir={here}/other"), world_size=1))
    for change in ("data.validation=none.jsonl", 'data.train={"a.jsonl"=1,"none.jsonl"=1}'):
        with pytest.raises(ValueError, match=r"data file none.jsonl does not exist"):
            check_start(Start(config=config_of(f"run_dir={here}/other", change), world_size=1))


# -- what an epoch leaves ------------------------------------------------------------------------------------------


def result(loss: float, num_tokens: int, skipped: bool = False) -> StepResult:
    return StepResult(
        skipped=skipped, grad_norm=1.0, learning_rate=1.0, num_loss_tokens=num_tokens, num_forward_tokens=1,
        num_padding_tokens=0, metrics={"loss": loss},
    )  # fmt: skip


def test_the_training_loss_of_an_epoch_is_per_token_of_the_steps_that_hold_its_chats() -> None:
    loss = EpochLoss()
    assert loss.add(result(2.0, 10), range(1, 1), 5) == []
    assert loss.add(result(math.nan, 10, skipped=True), range(1, 1), 8) == []
    loss = EpochLoss(json.loads(json.dumps(loss.state)))
    assert loss.add(result(5.0, 20), range(1, 2), 1) == [120 / 30]  # across the border: it counts for both
    assert loss.add(result(1.0, 20), range(2, 3), 0) == [120 / 40]
    assert loss.add(result(7.0, 3), range(3, 6), 2) == [7.0, 7.0, 7.0]
    assert loss.add(result(1.0, 3), range(6, 7), 0) == [4.0]
    assert loss.add(result(math.inf, 3, skipped=True), range(7, 8), 0) == [None]


def test_epochs_of_another_run_are_refused(tmp_path: Path) -> None:
    refuse_other_epochs(tmp_path, 2, resume=False)
    (tmp_path / "epochs/epoch_2").mkdir(parents=True)
    refuse_other_epochs(tmp_path, 2, resume=True)
    for num_epochs, resume in ((2, False), (1, True), (0, True)):
        with pytest.raises(ValueError, match=r"epochs has epoch_2 of another run; delete the folder"):
            refuse_other_epochs(tmp_path, num_epochs, resume)


def test_a_directory_becomes_a_link_and_a_link_a_directory(tmp_path: Path) -> None:
    for name in ("epochs/one", "epochs/two", "hf", "new"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "name").write_text(name)
    for name in ("epochs/one", "epochs/two"):
        link_directory(tmp_path / name, tmp_path / "hf")
        assert os.readlink(tmp_path / "hf") == name
        assert (tmp_path / "hf/name").read_text() == name
    replace_directory(tmp_path / "new", tmp_path / "hf")
    assert not (tmp_path / "hf").is_symlink()
    assert (tmp_path / "epochs/two/name").read_text() == "epochs/two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs", "hf"]


def test_what_was_measured_of_an_epoch_is_not_said_of_models_that_are_made_of_it(tmp_path: Path) -> None:
    for name in ("epoch_1", "next"):
        (tmp_path / name).mkdir()
    for name in ("config.json", "sft.json", "tokenizer.json"):
        (tmp_path / "epoch_1" / name).write_text("{}")
    copy_companions(tmp_path / "epoch_1", tmp_path / "next")
    assert {path.name for path in (tmp_path / "next").iterdir()} == {"config.json", "tokenizer.json"}


def test_a_share_of_the_steps_warms_up() -> None:
    section = OptimizerSection(warmup_share=0.01)
    assert [section.num_warmup_steps(n) for n in (1, 49, 51, 149, 10_000)] == [0, 0, 1, 1, 100]
    assert OptimizerSection(warmup_share=0.9).num_warmup_steps(1) == 0
    assert OptimizerSection(warmup_steps=7).num_warmup_steps(5) == 7


# -- a whole run ---------------------------------------------------------------------------------------------------


def rows_of(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert unknown(name for row in rows for name in row) == []
    return [{k: v for k, v in row.items() if "second" not in k and k != "num_starts"} for row in rows]


def test_a_run_that_was_killed_within_an_epoch_gives_the_same_epochs_and_numbers(here: Path) -> None:
    arguments = [PYTHON, "-m", "megatron_rl.cli", "sft", "sft.toml"]
    forked.run(arguments).check_returncode()
    run, whole = here / "run", here / "whole"
    rows, n = rows_of(run), len(rows_of(run))
    validated = [row["step"] + 1 for row in rows if "validation_loss" in row]
    notes = [json.loads((run / f"epochs/epoch_{e}/sft.json").read_text()) for e in (1, 2, 3)]
    assert validated == sorted({note["step"] for note in notes} | set(range(4, n + 1, 4)))
    assert notes[-1]["step"] == n
    for note in notes:
        row = rows[note["step"] - 1]
        assert (note["validation_loss"], note["validation_entropy"]) == (
            row["validation_loss"],
            row["validation_entropy"],
        )
    saved = {int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")}
    assert saved == {note["step"] for note in notes} | set(range(2, n + 1, 2))
    assert notes[2]["validation_loss"] < notes[0]["validation_loss"]
    # The first epoch has the steps up to its last chat.
    first = rows[: notes[0]["step"]]
    tokens = sum(row["num_loss_tokens"] for row in first)
    mean = sum(row["loss"] * row["num_loss_tokens"] for row in first) / tokens
    assert notes[0]["train_loss"] == pytest.approx(mean, rel=1e-12)
    warm = round(0.2 * n)
    for step, row in enumerate(rows):
        part = step / warm if step <= warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (n - warm)))
        lowest = 0.0 if step <= warm else 1e-4
        assert row["learning_rate"] == pytest.approx(lowest + (3e-3 - lowest) * part, rel=1e-9)

    # Make what a kill leaves between the end of the second epoch's directory and the end of its checkpoint.
    shutil.copytree(run, whole, symlinks=True)
    step = max(one for one in saved if one < notes[1]["step"])
    assert step > notes[0]["step"]
    for later in (one for one in saved if one > step):
        shutil.rmtree(run / f"checkpoints/step_{later}")
    (run / "checkpoints/latest").write_text(f"step_{step}")
    shutil.rmtree(run / "epochs/epoch_3")
    (run / "hf").unlink()
    kept = {e: (run / f"epochs/epoch_{e}").stat().st_ino for e in (1, 2)}
    forked.run([*arguments, "--resume"]).check_returncode()
    assert rows_of(run) == rows
    for path in sorted(path.relative_to(whole) for path in whole.glob("epochs/*/*")):
        assert (run / path).read_bytes() == (whole / path).read_bytes(), path
    assert kept == {e: (run / f"epochs/epoch_{e}").stat().st_ino for e in (1, 2)}
    assert os.readlink(run / "hf") == "epochs/epoch_3"
