"""Tests `megatron-rl select` on models of known entropy: their next token depends on the last one alone."""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_rl.config.kinds import kind_of
from megatron_rl.config.load import load_config, read_values
from megatron_rl.config.selection import SelectConfig
from megatron_rl.evaluation.statistics import Estimate, estimate, student_95
from megatron_rl.locks import sole_writer
from megatron_rl.preflight.checks import check_start
from megatron_rl.preflight.registry import Start
from megatron_rl.selection.candidates import Candidate, SftRecord, find_candidates
from megatron_rl.selection.choice import Measured, check_preference, choose, straddled_ends
from megatron_rl.selection.entropy import token_entropy
from megatron_rl.selection.select import run_selection

ROOT = Path(__file__).parents[2]
CONFIG = """
run_dir = "{folder}/select"
candidates = "{folder}/epochs"
prompts = 12
[data]
train = "{folder}/prompts.jsonl"
[rollout]
samples_per_prompt = 4
max_prompt_tokens = 16
max_response_tokens = 12
servers = 1
[reward]
timeout_seconds = 300
"""


# -- statistics ----------------------------------------------------------------------------------------------------


def test_token_entropy_by_hand() -> None:
    found = token_entropy([3.0, 1.0], [4, 4])
    # The residuals are 1 and -1, so the logarithm's variance is 2 / 1 * 2 / 16. Student's t has one degree of freedom.
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx(
        (0.5 / math.exp(student_95(1) / 2), 0.5 * math.exp(student_95(1) / 2))
    )
    assert token_entropy([0.0, 0.0], [4, 7]) == Estimate(value=0.0, low=0.0, high=0.0)
    same = token_entropy([2.0, 4.0, 6.0], [4, 8, 12])  # a long response counts for more; here all say the same
    assert (same.low, same.high) == pytest.approx((0.5, 0.5))


def test_student_95_is_that_of_the_tables() -> None:
    for degrees, value in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (127, 1.9788)):
        assert student_95(degrees) == pytest.approx(value, abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 10**5)), min_size=2, max_size=20), st.floats(0.1, 10))
def test_an_interval_holds_its_value_and_scales_with_the_unit(rows: list[tuple[float, int]], unit: float) -> None:
    surprisals, tokens = [row[0] for row in rows], [row[1] for row in rows]
    found = token_entropy(surprisals, tokens)
    assert 0 <= found.low <= found.value <= found.high < math.inf
    other = token_entropy([unit * s for s in surprisals], tokens)
    assert (other.low, other.high) == pytest.approx((unit * found.low, unit * found.high), rel=1e-6)


@pytest.mark.parametrize(
    ("num_prompts", "size", "spread", "coupling"), [(16, 4, 0.3, 0.1), (64, 8, 0.4, 0.1), (128, 1, 0.5, 0.2)]
)
def test_19_of_20_samples_have_the_true_entropy_in_their_interval(
    num_prompts: int, size: int, spread: float, coupling: float
) -> None:
    # Prompts differ in length and entropy, hard ones have more of both; tokens are mostly certain (gamma of shape 0.3).
    rng = np.random.default_rng(0)

    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        hard = rng.normal(size=count)
        lengths = np.minimum(1 + rng.poisson(np.exp(3 + spread * hard)[:, None], (count, size)), 60)
        level = np.exp(-1 + coupling * hard + 0.2 * rng.normal(size=count))
        surprisals = rng.gamma(0.3 * lengths, level[:, None] / 0.3)
        return surprisals.sum(1), lengths.sum(1)

    everything = sample(200_000)
    truth = everything[0].sum() / everything[1].sum()
    held = []
    for _ in range(1500):
        found = token_entropy(*(part.tolist() for part in sample(num_prompts)))
        held.append(found.low <= truth <= found.high)
    assert 0.92 < fmean(held) < 0.97


# -- the rule ------------------------------------------------------------------------------------------------------


def measured(name: str, entropy: float, accuracy: float = 0.5, validation_loss: float | None = None) -> Measured:
    return Measured(
        candidate=Candidate(name=name, path=Path(name), sft=SftRecord(validation_loss=validation_loss)),
        num_prompts=2, samples_per_prompt=2, num_tokens=40,
        entropy=Estimate(value=entropy, low=entropy - 0.02, high=entropy + 0.02),
        accuracy=Estimate(value=accuracy, low=0, high=1), truncated_share=0.0, error_share=0.0,
    )  # fmt: skip


def test_the_rule() -> None:
    band = (0.3, 0.5)
    paper = [measured("1", 0.489, 0.2, 0.4), measured("5", 0.351, 0.4, 0.6), measured("9", 0.275, 0.6, 0.3)]
    for prefer, expected in (("lowest", "5"), ("highest", "1"), ("accuracy", "5"), ("validation_loss", "1")):
        best, in_band = choose(paper, band, prefer)
        assert (best.candidate.name, in_band) == (expected, True)
    for prefer in ("lowest", "highest", "accuracy"):  # nobody is in: the nearest, whatever is preferred
        best, in_band = choose([measured("far", 0.9), measured("near", 0.52), measured("low", 0.27, 0.9)], band, prefer)
        assert (best.candidate.name, in_band) == ("near", False)
    assert choose([measured("a", 0.4), measured("b", 0.4)], band, "accuracy")[0].candidate.name == "a"
    assert choose([measured("edge", 0.3), measured("in", 0.4)], band, "lowest")[0].candidate.name == "edge"
    assert [straddled_ends(one.entropy, band) for one in paper] == [[0.5], [], []]
    assert straddled_ends(Estimate(value=0.4, low=0.2, high=0.6), band) == [0.3, 0.5]
    with pytest.raises(
        ValueError, match=r"needs a validation_loss in 2/sft.json; run SFT with validation data, or set"
    ):
        check_preference([measured("1", 0.4, 0.5, 1.0).candidate, measured("2", 0.4).candidate], "validation_loss")


# -- whole selections ----------------------------------------------------------------------------------------------

CHARACTERS = ("\n", *map(chr, range(32, 127)))
BOXED, ASSISTANT, EOS = len(CHARACTERS), len(CHARACTERS) + 4, len(CHARACTERS) + 5
Chain = dict[int, dict[int, float]]


def chain(more: float, answers: Sequence[float]) -> Chain:
    """Make a model that writes any number of "a" and then a box with 1, 2 or 3. more: the chance of another "a"."""
    a, close = CHARACTERS.index("a"), CHARACTERS.index("}")
    digits = [CHARACTERS.index(digit) for digit in "123"]
    begin = {a: more, BOXED: 1 - more}
    box = dict(zip(digits, answers, strict=True))
    return {ASSISTANT: begin, a: begin, BOXED: box, **{d: {close: 1.0} for d in digits}, close: {EOS: 1.0}}


CHAINS = {"epoch_2": chain(0.3, (0.5, 0.3, 0.2)), "epoch_10": chain(0.7, (0.9, 0.05, 0.05))}


def state_entropy(probabilities: dict[int, float]) -> float:
    return -sum(p * math.log(p) for p in probabilities.values())


def write_chain(directory: Path, rows: Chain) -> None:
    """Turn a random model into the chain: layers add nothing, embeddings are unit vectors, and the head holds the
    log-probs, divided by the length that RMSNorm gives to a unit vector."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("attention.dense.weight", "down_proj.weight")):
            tensor.zero_()
    size = tensors["lm_head.weight"].shape[0]
    head = torch.full((size, size), -40.0)
    for state, probabilities in rows.items():
        for token, p in probabilities.items():
            head[token, state] = math.log(p)
    tensors["model.word_embeddings.weight"] = torch.eye(size)
    tensors["lm_head.weight"] = head * math.sqrt(1 / size + 1e-6)  # rms_norm_eps
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    sizes = ["--hidden-size", "128", "--layers", "1", "--experts", "2", "--moe-intermediate-size", "16"]
    forked.run(
        [sys.executable, ROOT / "tools/make_tiny_model.py", folder / "epochs/epoch_2", *sizes]
    ).check_returncode()
    shutil.copytree(folder / "epochs/epoch_2", folder / "epochs/epoch_10")
    for (name, rows), loss in zip(CHAINS.items(), (0.5, 0.7), strict=True):
        write_chain(folder / "epochs" / name, rows)
        record = {"epoch": 1, "step": 10, "validation_loss": loss, "validation_entropy": None, "train_loss": 0.1}
        (folder / "epochs" / name / "sft.json").write_text(json.dumps(record))
    (folder / "epochs/.epoch_3.old").mkdir()
    rows = [{"domain": "d", "prompt": f"q{i}", "answer": "12"[i % 2]} for i in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "select.toml").write_text(CONFIG.format(folder=folder))
    return folder


def config_of(inputs: Path, *changes: str) -> SelectConfig:
    return load_config(SelectConfig, inputs / "select.toml", changes)


def test_selection_from_end_to_end(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "megatron_rl.cli", "select", inputs / "select.toml"]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = inputs / "select"
    found = json.loads((run_dir / "results.json").read_text())
    assert list(found["candidates"]) == ["epoch_2", "epoch_10"]
    exact, rows_of = {}, {}
    for name, rows_of_chain in CHAINS.items():
        lines = [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
        rows_of[name] = sorted(lines, key=lambda row: (row["position"], row["sample_index"]))
        entropies, surprisals = [], []
        for row in lines:
            states = [row["prompt_token_ids"][-1], *row["output_ids"][:-1]]
            assert states[0] == ASSISTANT
            entropies += [state_entropy(rows_of_chain[state]) for state in states]
            chances = [rows_of_chain[s][y] for s, y in zip(states, row["output_ids"], strict=True)]
            assert row["rollout_logprobs"] == pytest.approx(np.log(chances).tolist(), abs=1e-5)
            surprisals += [-math.log(p) for p in chances]
        told, exact[name] = found["candidates"][name], fmean(entropies)
        assert told["entropy"]["value"] == pytest.approx(fmean(surprisals), abs=1e-5)
        # The sampled tokens' surprise is another number than the entropy of the states, but the same within noise.
        assert abs(fmean(surprisals) - exact[name]) > 1e-3
        assert told["entropy"]["low"] < exact[name] < told["entropy"]["high"]
        right = [row["reward"] for row in lines]
        answers = {f"q{i}": "12"[i % 2] for i in range(20)}
        assert right == [float(f"\\boxed{{{answers[row['prompt']]}}}" in row["response"]) for row in lines]
        groups = [fmean(row["reward"] for row in rows_of[name][i : i + 4]) for i in range(0, 48, 4)]
        assert Estimate(**told["accuracy"]) == estimate(groups, 4)
        assert told["accuracy"]["value"] == pytest.approx(fmean(right))
        cut = [row["output_ids"][-1] != EOS for row in lines]
        assert told["truncated_share"] == pytest.approx(fmean(cut))
        assert told["response_tokens_mean"] == pytest.approx(len(entropies) / 48)
    assert found["candidates"]["epoch_10"]["truncated_share"] > 0
    # Responses of epoch_2 are hardly ever cut, so the policy's own entropy is known: 1 / (1 - 0.3) states have that of
    # another "a" or the box, one that of the answer, and three tokens follow the "a".
    policy = (state_entropy({0: 0.3, 1: 0.7}) / 0.7 + state_entropy({0: 0.5, 1: 0.3, 2: 0.2})) / (1 / 0.7 + 3)
    assert found["candidates"]["epoch_2"]["entropy"]["low"] < policy < found["candidates"]["epoch_2"]["entropy"]["high"]
    # Every candidate answered the same prompts, each once.
    assert [r["prompt"] for r in rows_of["epoch_2"]] == [r["prompt"] for r in rows_of["epoch_10"]]
    assert len({row["prompt"] for row in rows_of["epoch_2"]}) == 12

    lowest = min(found["candidates"], key=lambda name: found["candidates"][name]["entropy"]["value"])
    assert (found["chosen"], found["in_band"]) == (lowest, True)
    link = run_dir / "chosen"
    assert link.readlink() == Path("../epochs") / lowest
    assert (link / "model.safetensors").samefile(inputs / "epochs" / lowest / "model.safetensors")
    assert f"{lowest} *" in done.stdout
    assert f"{lowest} \\* |" in (run_dir / "results.md").read_text()
    table = done.stdout[done.stdout.index("candidate  ") : done.stdout.index("is chosen")]
    assert max(map(len, table.splitlines())) <= 80

    # All is there: again without a server, by another rule.
    before = {path.name: path.stat().st_mtime_ns for path in run_dir.glob("*.log")}
    assert run_selection(config_of(inputs, "prefer=validation_loss"), resume=False) == 0
    assert link.readlink() == Path("../epochs/epoch_2")
    value = json.loads((run_dir / "results.json").read_text())["candidates"]["epoch_10"]["entropy"]["value"]
    assert run_selection(config_of(inputs, f"band=[0.0, {value - 0.001}]", "prompts=8"), resume=False) == 0
    assert "band" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no candidate is within band = \[0, 0.1\] and require_band is set"):
        run_selection(config_of(inputs, "band=[0.0, 0.1]", "require_band=true"), resume=False)
    said = capsys.readouterr().out
    assert "NO CANDIDATE IS WITHIN THE BAND [0, 0.1]. The nearest is" in said
    assert "none is chosen (require_band)" in said
    assert not link.is_symlink()
    assert json.loads((run_dir / "results.json").read_text())["chosen"] is None
    assert {path.name: path.stat().st_mtime_ns for path in run_dir.glob("*.log")} == before

    # A kill: what is missing is sampled again, to the same responses.
    whole = (run_dir / "epoch_10.jsonl").read_text()
    (run_dir / "epoch_10.jsonl").write_text(whole[: len(whole) // 2])
    with (
        sole_writer(run_dir, "wait"),
        pytest.raises(ValueError, match="another process is writing .*set run_dir to"),
    ):
        run_selection(config_of(inputs), resume=True)
    with pytest.raises(
        ValueError, match="those of 1 of 2 candidates are not complete; add --resume to go on with them"
    ):
        run_selection(config_of(inputs), resume=False)
    assert (run_dir / "epoch_10.jsonl").read_text() == whole[: len(whole) // 2]
    assert run_selection(config_of(inputs), resume=True) == 0
    assert sorted((run_dir / "epoch_10.jsonl").read_text().splitlines()) == sorted(whole.splitlines())
    assert json.loads((run_dir / "results.json").read_text()) == found
    with pytest.raises(
        ValueError, match=r"rollout.samples_per_prompt was 4, now 5; .*, or set run_dir to a new folder"
    ):
        run_selection(config_of(inputs, "rollout.samples_per_prompt=5"), resume=True)


def test_what_cannot_be_chosen_from_is_refused_before_anything_starts(inputs: Path, tmp_path: Path) -> None:
    def refused(message: str, *changes: str) -> None:
        with pytest.raises(ValueError, match=message):
            config = config_of(inputs, f'run_dir="{tmp_path}/run"', *changes)
            check_start(Start(config=config))
            run_selection(config, resume=False)

    good = inputs / "epochs/epoch_2"
    other = tmp_path / "epoch_2"
    shutil.copytree(good, other)
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_weights").mkdir()
    shutil.copy(good / "config.json", tmp_path / "no_weights")
    (tmp_path / "same").symlink_to(good)
    assert kind_of(read_values(inputs / "select.toml")) is SelectConfig
    refused("rollout.temperature must be 1, got 0.7: .*; leave it out", "rollout.temperature=0.7")
    refused("leave rollout.urls empty", 'rollout.urls=["http://h:1"]')
    refused(r"band must be \[lowest, highest\].*got \[0.5, 0.3\]", "band=[0.5, 0.3]")
    refused("candidates .*nowhere is not a folder", f"candidates={tmp_path}/nowhere")
    refused("candidates .*empty holds no model directory", f"candidates={tmp_path}/empty")
    refused("candidates is an empty list", "candidates=[]")
    refused("empty is no model directory: .* holds no config.json", f'candidates=["{good}", "{tmp_path}/empty"]')
    refused(r"no_weights holds no \*.safetensors.*convert --to hf", f'candidates=["{tmp_path}/no_weights"]')
    refused("2 candidates are called 'epoch_2'", f'candidates=["{good}", "{other}"]')
    refused("epoch_2 more than once", f'candidates=["{good}", "{tmp_path}/same"]')
    refused("the first 21 prompts .* are 20 different ones, of 20 in all; lower prompts", "prompts=21")
    refused("candidate .*: rollout.max_prompt_tokens .* = 100012 is over", "rollout.max_prompt_tokens=100000")
    many = "rollout.max_running_requests=900000000"
    refused("rollout.engine 'embedded' generates on the CPU", many)
    refused("GiB are free", many, "rollout.token_deadline_seconds=1e6")
    renamed = other.rename(tmp_path / "epoch_3")
    shutil.copytree(renamed, tmp_path / "bare", ignore=shutil.ignore_patterns("sft.json"))
    refused("prefer = 'validation_loss' needs", f'candidates=["{tmp_path}/bare"]', "prefer=validation_loss")
    tokenizer = json.loads((renamed / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "Q: " + tokenizer["chat_template"]
    (renamed / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    refused("epoch_3 have different tokenizers or chat templates", f'candidates=["{good}", "{renamed}"]')
    (renamed / "sft.json").write_text('{"validation_loss": "low"}')
    refused("sft.json is no record of an SFT run", f'candidates=["{renamed}"]')
    (tmp_path / "run/chosen").mkdir()
    refused("run/chosen is where the link to the chosen candidate goes; remove it")
    assert not list((tmp_path / "run").glob("*.log"))


def test_candidates_come_in_natural_order_or_as_listed(inputs: Path) -> None:
    found = find_candidates(inputs / "epochs")
    assert [candidate.name for candidate in found] == ["epoch_2", "epoch_10"]
    assert found[0].sft == SftRecord(epoch=1, step=10, validation_loss=0.5, train_loss=0.1)
    paths = (inputs / "epochs/epoch_10", inputs / "epochs/epoch_2")
    assert [candidate.path for candidate in find_candidates(paths)] == list(paths)
