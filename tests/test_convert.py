"""Tests conversions of Hugging Face directories and Megatron checkpoints, there and back, and messages for broken
ones."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parallel import make_spec, run_ranks
from safetensors.torch import load_file, save_file
from tiny_model import TINY_CONFIG, tensors_of, write_tiny_model

import megatron_rl.checkpoint.convert as module
from megatron_rl.checkpoint.compare import compare
from megatron_rl.checkpoint.convert import Job, convert
from megatron_rl.checkpoint.read import open_checkpoint
from megatron_rl.checkpoint.show import parse_size
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.families import load_architecture
from megatron_rl.files import open_model_file

TOOLS = Path(__file__).parents[1] / "tools"
MODEL = "model.safetensors"


def assert_same(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors_of(directory)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def there_and_back(model: Path, folder: Path, **options: object) -> Path:
    convert(Job(source=model, destination=folder / "megatron-dir", to_megatron=True))
    convert(Job(source=folder / "megatron-dir", destination=folder / "back", to_megatron=False, verify=True, **options))
    return folder / "back"


def write_bf16(model: Path) -> None:
    save_file({name: t.bfloat16() for name, t in load_file(model / MODEL).items()}, model / MODEL)


# Query heads 4; a vocabulary of 97 divides by nothing.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_head": True},
        {"tie_word_embeddings": True, "vocab_size": 97},
        {"first_k_dense_replace": 0, "num_shared_experts": 0},
        {"num_shared_experts": 2, "num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 97},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "plain",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_bit_exact(changes: dict, dtype: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "hf", **changes, torch_dtype=dtype)
    if dtype == "bfloat16":
        write_bf16(model)
    expected = tensors_of(model)
    back = there_and_back(model, tmp_path, max_shard_bytes=100_000)
    assert_same(back, expected)
    assert len(list(back.glob("*.safetensors"))) > 1
    assert (back / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert compare(model, tmp_path / "megatron-dir") == ([], len(expected))


LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2-ETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "EP2": (2, {"expert": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP3": (3, {"pipeline": 3}),
    "PP3-VPP2": (3, {"pipeline": 3, "virtual_pipeline": 2}),
    "TP2xPP2-EP2": (4, {"tensor": 2, "pipeline": 2, "expert": 2}),
}


@settings(
    deadline=None,
    max_examples=2,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(saved=st.sampled_from(sorted(LAYOUTS)), loaded=st.sampled_from(sorted(LAYOUTS)), norm_head=st.booleans())
def test_any_layout_opens_a_converted_checkpoint_and_what_another_layout_trained(
    saved: str, loaded: str, norm_head: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    changes = {"vocab_size": 97, "num_hidden_layers": 6, "norm_head": norm_head}
    model = write_tiny_model(folder / "hf", **changes)
    convert(Job(source=model, destination=folder / "converted", to_megatron=True))

    # By megatron's own loader the log-probs are those of the Hugging Face directory, in one layout.
    num_ranks, parallel = LAYOUTS[saved]
    spec = make_spec(model, parallel=parallel, whole_gradients=False)
    expected = run_ranks(num_ranks, spec, folder / "from-hf")
    spec |= {"load_by_megatron": str(folder / "converted"), "save_to": str(folder / "checkpoints")}
    trained = run_ranks(num_ranks, spec, folder / "from-converted")
    for name in expected:
        assert torch.equal(trained[name], expected[name]), name

    # An export without ranks gives the weights that this layout trained, and another layout starts from them.
    step = folder / "checkpoints" / "step_1"
    convert(Job(source=step, destination=folder / "exported", to_megatron=False))
    weights = {name.removeprefix("weight/"): t for name, t in trained.items() if name.startswith("weight/")}
    assert_same(folder / "exported", weights)
    assert not (folder / "exported/checksums.json").exists()  # those of the checkpoint
    num_ranks, parallel = LAYOUTS[loaded]
    run_ranks(num_ranks, make_spec(step, parallel=parallel, whole_gradients=False, export=True), folder / "again")
    assert_same(folder / "again" / "hf", weights)


def test_a_conversion_keeps_the_companion_files_and_changes_what_it_is_asked_to(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "hf", norm_head=True)
    companions = {
        "tokenizer.json": b"{}\n",
        "chat_template.jinja": b"{{ x }}",
        "configuration_bailing_moe.py": b"# code\n",
    }
    for name, content in companions.items():
        (model / name).write_bytes(content)
    back = there_and_back(model, tmp_path, dtype=torch.bfloat16, fold_norm_head=True)
    for name, content in companions.items():
        assert (back / name).read_bytes() == content
    config = json.loads((back / "config.json").read_text())
    assert config == json.loads((model / "config.json").read_text()) | {"norm_head": False, "torch_dtype": "bfloat16"}
    original = tensors_of(model)
    head = original["lm_head.weight"].double()
    folded = head / (head.square().sum(0, keepdim=True).sqrt() + 1e-7)
    found = tensors_of(back)
    assert torch.equal(found.pop("lm_head.weight"), folded.float().bfloat16())
    for name, tensor in found.items():
        assert torch.equal(tensor, original[name].bfloat16()), name


def test_the_commands_convert_compare_and_say_what_they_would_do(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "hf")

    def run(tool: str, *arguments: object) -> tuple[int, str, str]:
        done = forked.run([sys.executable, TOOLS / tool, *arguments])
        return done.returncode, done.stdout, done.stderr

    code, out, _ = run("convert_hf_to_megatron.py", model, tmp_path / "m", "--dry-run")
    assert code == 0
    assert not (tmp_path / "m").exists()
    assert "12 x model.layers.*.mlp.experts.*.gate_proj.weight [32, 64] float32" in out
    assert run("convert_hf_to_megatron.py", model, tmp_path / "m", "--verify")[0] == 0
    assert run("convert_megatron_to_hf.py", tmp_path / "m", tmp_path / "back", "--max-shard-size", "0.1MB")[0] == 0
    code, out, _ = run("verify_checkpoint.py", tmp_path / "m", tmp_path / "back")
    assert (code, out) == (0, "all 62 tensors are equal\n")

    spoiled = tensors_of(tmp_path / "back")
    spoiled["model.layers.1.mlp.gate.weight"][2, 3] += 0.5
    spoiled["lm_head.weight"][0, 0] += 0.25
    shutil.copytree(model, tmp_path / "spoiled")
    save_file(spoiled, tmp_path / "spoiled" / MODEL)
    code, out, _ = run("verify_checkpoint.py", model, tmp_path / "spoiled", "--tolerance", "0.4")
    assert code == 1
    assert (
        "2 of 62 tensors differ, 1 by more than 0.4\nfirst: model.layers.1.mlp.gate.weight, 1 values, by up to 0.5"
        in out
    )
    code, _, err = run("convert_megatron_to_hf.py", model, tmp_path / "x")
    assert (code, "is a Hugging Face directory already; convert in the other direction" in err) == (2, True)


def test_log_probs_of_a_text_are_compared_through_both_models(tmp_path: Path) -> None:
    done = forked.run([sys.executable, TOOLS / "make_tiny_model.py", tmp_path / "hf"])
    assert done.returncode == 0, done.stderr
    convert(Job(source=tmp_path / "hf", destination=tmp_path / "m", to_megatron=True))
    done = forked.run(
        [sys.executable, TOOLS / "verify_checkpoint.py", tmp_path / "hf", tmp_path / "m", "--text", "Sdcba?"]
    )
    assert done.returncode == 0, done.stderr
    assert "log-probs of 5 tokens differ by up to 0\n" in done.stdout


# -- broken input --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "hf")


def refused(source: Path, tmp_path: Path, to_megatron: bool = True, **options: object) -> str:
    """Return the message of a refused conversion. Check that it leaves nothing behind and does not change the
    source."""
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    others = set(tmp_path.iterdir())
    with pytest.raises(ValueError) as caught:
        convert(Job(source=source, destination=tmp_path / "out", to_megatron=to_megatron, **options))
    assert set(tmp_path.iterdir()) == others
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    return str(caught.value)


def test_a_truncated_file_is_named(model: Path, tmp_path: Path) -> None:
    content = (model / MODEL).read_bytes()
    (model / MODEL).write_bytes(content[: len(content) - 100])
    assert f"{model / MODEL} cannot be read as safetensors" in refused(model, tmp_path)


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_read_as_it_was(
    position: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    model = write_tiny_model(folder / "hf", num_hidden_layers=1, first_k_dense_replace=1)
    content = bytearray((model / MODEL).read_bytes())
    content[position] = byte
    (model / MODEL).write_bytes(bytes(content))
    try:
        convert(Job(source=model, destination=folder / "out", to_megatron=True))
    except ValueError as error:
        assert str(model) in str(error) or "tensor" in str(error)
        assert not (folder / "out").exists()
        assert not (folder / ".out.partial").exists()


def test_an_index_that_names_a_missing_file_is_refused(model: Path, tmp_path: Path) -> None:
    weight_map = dict.fromkeys(tensors_of(model), "model-00007.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "names model-00007.safetensors, which is missing; fetch it again" in refused(model, tmp_path)
    (model / "model.safetensors.index.json").write_text("{")
    assert "is not an index of safetensors" in refused(model, tmp_path)


def test_a_tensor_in_two_files_is_refused(model: Path, tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, model / "other.safetensors")
    assert f"tensor model.norm.weight is in {MODEL} and in other.safetensors" in refused(model, tmp_path)


def test_wrong_names_shapes_and_types_are_refused(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / MODEL)
    renamed = dict(tensors)
    renamed["model.layers.9.mlp.gate.weight"] = renamed.pop("model.layers.1.mlp.gate.weight")
    save_file(renamed, model / MODEL)
    message = refused(model, tmp_path)
    assert "1 missing (model.layers.1.mlp.gate.weight); 1 unexpected (model.layers.9.mlp.gate.weight)" in message
    save_file(tensors | {"model.norm.weight": torch.ones(63)}, model / MODEL)
    assert "tensor model.norm.weight has shape (63,); config.json says (64,)" in refused(model, tmp_path)
    save_file(tensors | {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, model / MODEL)
    assert "tensor model.norm.weight is I8; it must be one of F32, BF16, F16" in refused(model, tmp_path)


def test_values_that_are_not_finite_are_counted_and_kept(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(model / MODEL)
    tensors["model.norm.weight"][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    save_file(tensors, model / MODEL)
    report = convert(Job(source=model, destination=tmp_path / "m", to_megatron=True, verify=True))
    assert report.num_not_finite == 3
    assert "3 of the 64 values of model.norm.weight are NaN or infinite" in caplog.text
    assert compare(model, tmp_path / "m") == ([], 62)


def test_another_architecture_is_refused(model: Path, tmp_path: Path) -> None:
    for name, value, message in (
        ("model_type", "llama", "contradict each other"),
        ("rope_scaling", {"type": "yarn"}, "of rope_type 'yarn' lacks factor"),
    ):
        (model / "config.json").write_text(json.dumps(TINY_CONFIG | {name: value}))
        told = refused(model, tmp_path)
        assert name in told
        assert message in told


def test_a_place_that_cannot_take_the_result_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "out exists already; remove it or choose another destination" in refused(model, tmp_path)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match="inside the source"):
        convert(Job(source=model, destination=model / "out", to_megatron=True))
    with pytest.raises(ValueError, match=r"/proc cannot be written to \("):
        convert(Job(source=model, destination=Path("/proc/out"), to_megatron=True))
    usage = shutil._ntuple_diskusage(10**6, 10**6, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "GB are free there; make room or choose another disk" in refused(model, tmp_path)


def test_a_disk_that_fills_up_leaves_nothing_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "writing " in (message := refused(model, tmp_path))
    assert "out failed: No space left on device; nothing was kept" in message


def test_what_a_killed_conversion_left_is_no_hindrance(model: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "megatron").mkdir(parents=True)
    convert(Job(source=model, destination=tmp_path / "out", to_megatron=True))
    assert not (tmp_path / ".out.partial").exists()


def test_a_hub_snapshot_of_links_is_read_and_a_dangling_link_is_named(model: Path, tmp_path: Path) -> None:
    snapshot = make_snapshot(model, tmp_path / "models--a--b")
    convert(Job(source=snapshot, destination=tmp_path / "m", to_megatron=True))
    assert compare(model, tmp_path / "m") == ([], 62)
    (tmp_path / "models--a--b/blobs" / f"hash of {MODEL}").unlink()
    message = refused(snapshot, tmp_path)
    assert f"{snapshot / MODEL} leads to {tmp_path / 'models--a--b/blobs'}/hash of {MODEL}, where there is" in message


def make_snapshot(model: Path, home: Path) -> Path:
    """Copy the model as Hugging Face's cache keeps it: links to files that are named after their content."""
    snapshot = home / "snapshots/5f3a"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for file in model.iterdir():
        shutil.copy(file, home / "blobs" / f"hash of {file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash of {file.name}")
    return snapshot


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "code.py", MODEL])
def test_a_link_out_of_a_model_directory_is_named_and_nothing_is_copied(name: str, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (model / name).rename(secret) if (model / name).exists() else secret.write_text("root:$6$...")
    (model / name).symlink_to("../secret")
    assert refused(model, tmp_path).startswith(f"{model / name} is a link to {secret}, outside of the model directory")


def test_links_to_a_parent_another_model_and_blobs_elsewhere_are_refused(model: Path, tmp_path: Path) -> None:
    snapshot = make_snapshot(model, tmp_path / "models--a--b")
    other = make_snapshot(model, tmp_path / "models--c--d")
    for target in ("..", "../other/tokenizer.json", str(other / "config.json"), "../../../models--c--d/blobs/secret"):
        (snapshot / "tokenizer.json").symlink_to(target)
        assert f"{snapshot / 'tokenizer.json'} is a link to" in refused(snapshot, tmp_path)
        (snapshot / "tokenizer.json").unlink()
    # Blobs count for a snapshot only, and not when they are elsewhere themselves.
    shutil.copytree(snapshot, tmp_path / "x/y/plain", symlinks=True)
    (tmp_path / "x/blobs").symlink_to(tmp_path / "models--a--b/blobs")
    assert "is a link to" in refused(tmp_path / "x/y/plain", tmp_path)
    (tmp_path / "models--a--b/blobs").rename(tmp_path / "moved")
    (tmp_path / "models--a--b/blobs").symlink_to(tmp_path / "moved")
    assert f"is a link to {tmp_path / 'moved'}" in refused(snapshot, tmp_path)


def test_a_link_within_the_model_directory_is_followed(model: Path, tmp_path: Path) -> None:
    (model / "real.txt").write_text("words")
    (model / "vocabulary.txt").symlink_to("real.txt")
    convert(Job(source=model, destination=tmp_path / "m", to_megatron=True))
    assert (tmp_path / "m/vocabulary.txt").read_text() == "words"
    assert not (tmp_path / "m/vocabulary.txt").is_symlink()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "a.safetensors"])
def test_a_fifo_in_a_model_directory_is_named_and_nobody_waits_for_it(name: str, model: Path, tmp_path: Path) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(ValueError, match=rf"{model / name} is a FIFO and not a regular file; remove it"):
        convert(Job(source=model, destination=tmp_path / "out", to_megatron=True))
    with pytest.raises(ValueError, match=rf"{model / name} is a FIFO"):
        load_tokenizer(model)


def test_a_megatron_checkpoint_does_not_lead_out_of_its_directory(model: Path, tmp_path: Path) -> None:
    convert(Job(source=model, destination=tmp_path / "m", to_megatron=True))
    data = tmp_path / "m/megatron/__0_0.distcp"
    data.rename(tmp_path / "secret")
    data.symlink_to(tmp_path / "secret")
    assert f"{data} is a link to {tmp_path / 'secret'}" in refused(tmp_path / "m", tmp_path, False)
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(ValueError, match=rf"{data} is a FIFO"):
        open_checkpoint(tmp_path / "m")


def test_a_link_that_is_put_in_while_files_are_copied_is_refused(model: Path, tmp_path: Path) -> None:
    """Check that a link is refused even if it appears after the directory was checked and before the copy."""
    (tmp_path / "secret").write_text("root:$6$...")
    (model / "tokenizer.json").symlink_to(tmp_path / "secret")
    with (
        pytest.raises(ValueError, match=rf"tokenizer.json is a link to {tmp_path / 'secret'}"),
        open_model_file(model, "tokenizer.json"),
    ):
        pass


def test_the_newest_checkpoint_of_a_run_lies_in_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name in ("../../hf", str(model), "..", ""):
        (tmp_path / "run/checkpoints/latest").write_text(name)
        with pytest.raises(ValueError, match="latest must hold the name of a checkpoint beside it, such as step_8"):
            open_checkpoint(tmp_path / "run")


def test_damaged_megatron_checkpoints_are_named(model: Path, tmp_path: Path) -> None:
    convert(Job(source=model, destination=tmp_path / "m", to_megatron=True))
    data, metadata = tmp_path / "m/megatron/__0_0.distcp", tmp_path / "m/megatron/.metadata"
    whole, described = data.read_bytes(), metadata.read_bytes()
    data.write_bytes(whole[:-10])
    assert f"{data} has {len(whole) - 10} bytes of at least {len(whole)}" in refused(tmp_path / "m", tmp_path, False)
    data.unlink()
    assert f"{data} is missing" in refused(tmp_path / "m", tmp_path, False)
    data.write_bytes(bytes(len(whole)))
    assert f"{data}: " in refused(tmp_path / "m", tmp_path, False)
    data.write_bytes(whole)
    metadata.write_bytes(described[:-50])
    assert "is damaged" in refused(tmp_path / "m", tmp_path, False)
    metadata.unlink()
    assert "holds no .metadata" in refused(tmp_path / "m", tmp_path, False)


def test_the_result_is_read_back_and_a_difference_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(Job(source=model, destination=tmp_path / "m", to_megatron=True))
    from megatron_rl.checkpoint import convert as module

    written = iter(range(10**6))
    monkeypatch.setattr(module, "checksum", lambda tensor: next(written))
    assert "reads back otherwise than it was written" in refused(tmp_path / "m", tmp_path, False, verify=True)


def test_a_run_stands_for_its_newest_checkpoint(model: Path, tmp_path: Path) -> None:
    convert(Job(source=model, destination=tmp_path / "run/checkpoints/step_7", to_megatron=True))
    (tmp_path / "run/checkpoints/latest").write_text("step_7\n")
    with open_checkpoint(tmp_path / "run", load_architecture(model)) as checkpoint:
        assert checkpoint.directory == tmp_path / "run/checkpoints/step_7"
    assert compare(model, tmp_path / "run") == ([], 62)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("1000", 1000)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "5 parsecs", "-1GB", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write it like 5GB"):
        parse_size(text)


def test_ctrl_c_ends_a_conversion_between_two_tensors_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that Ctrl-C waits for the end of a tensor. In the middle of a file that torch writes, it aborted the
    process."""
    before = signal.getsignal(signal.SIGINT)
    original, given = module._Reading.__call__, []

    def read(self: Any, name: str) -> torch.Tensor:
        given.append(name)
        if len(given) == 3:
            signal.raise_signal(signal.SIGINT)  # so that the third tensor is not given out
        return original(self, name)

    monkeypatch.setattr(module._Reading, "__call__", read)
    source = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(Job(source=model, destination=tmp_path / "out", to_megatron=True))
    assert len(given) == 3
    assert set(tmp_path.iterdir()) == source
    assert signal.getsignal(signal.SIGINT) is before
