"""Tests Megatron checkpoints from strangers: what their pickles ask for is refused by name and never run."""

import argparse
import io
import os
import pickle
import resource
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile_pickles import COMMON, EMBEDDING, Call, hostile_pickles, plant, saved
from tiny_model import write_tiny_model
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_rl.checkpoint.checked import CheckedReader, load_common
from megatron_rl.checkpoint.compare import compare
from megatron_rl.checkpoint.convert import Job, convert
from megatron_rl.checkpoint.metadata import read_metadata
from megatron_rl.checkpoint.pickles import load_saved
from megatron_rl.cli import command_parser
from megatron_rl.errors import Fault, exit_code

COMMANDS = {
    "convert": "convert {0}/m {0}/out --to hf",
    "dry run": "convert {0}/m {0}/out --to hf --dry-run",
    "compare": "compare {0}/hf {0}/m",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    convert(Job(source=write_tiny_model(folder / "hf"), destination=folder / "m", to_megatron=True))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Return a folder with a model in `hf` and the same model as a Megatron checkpoint in `m`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def run(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run one command and return its exit code and its stderr."""
    arguments = command_parser().parse_args(COMMANDS[command].format(folder).split())
    code = exit_code("megatron-rl", lambda: int(arguments.run(arguments)))
    return code, capsys.readouterr().err


def changed(folder: Path, change: Callable[[Metadata], object]) -> Path:
    path = folder / "m/megatron/.metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return path


def test_the_hostile_pickles_bite_whoever_trusts_them(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name, data in hostile_pickles(marker).items():
        pickle.loads(data)
        assert marker.exists() == (not name.startswith("operator")), name
        marker.unlink(missing_ok=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_index_is_refused_by_name_and_not_run(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in hostile_pickles(folder / "marker").items():
        (folder / "m/megatron/.metadata").write_bytes(data)
        code, said = run(command, folder, capsys)
        assert code == 1, (name, said)
        assert f"{folder}/m/megatron/.metadata asks for '{name.split(' ')[0]}'" in said
        assert said.count("\n") == 1
        assert not (folder / "marker").exists(), name
        assert not (folder / "out").exists()


@pytest.mark.parametrize("command", ["convert", "compare"])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old format"])
def test_a_hostile_chunk_is_refused_and_not_run(
    command: str, options: dict, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(folder / "m/megatron", EMBEDDING, saved(Call(os.system, f"touch {folder}/marker"), **options))
    code, said = run(command, folder, capsys)
    reason = "was not written by torch.save" if options else "asks for 'posix.system'"
    assert f"{folder}/m/megatron/__0_0.distcp: {EMBEDDING}" in said
    assert reason in said
    assert code == (2 if options else 1)
    assert not (folder / "marker").exists()


def test_what_megatron_allows_torch_to_load_is_not_enough() -> None:
    data = saved({"args": argparse.Namespace(steps=3)})
    with torch.serialization.safe_globals([argparse.Namespace]):  # megatron.core does so on import, with 18 more
        assert torch.load(io.BytesIO(data), weights_only=True)["args"].steps == 3
        with pytest.raises(Fault, match=r"file asks for 'argparse\.Namespace'"):
            load_saved(data, "file")


def test_common_pt_is_read_as_plain_data_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    plain = {"step": 3, "rng": torch.get_rng_state(), "names": ["a", (1.5, None)]}
    (tmp_path / "common.pt").write_bytes(saved(plain))
    found = load_common(str(tmp_path))
    assert torch.equal(found.pop("rng"), plain.pop("rng"))
    assert found == plain
    (tmp_path / "common.pt").write_bytes(saved({"step": Call(os.system, f"touch {tmp_path}/marker")}))
    with pytest.raises(Fault, match=r"common\.pt asks for 'posix\.system'"):
        load_common(str(tmp_path))
    assert not (tmp_path / "marker").exists()


def test_torchs_loader_gets_objects_as_plain_data(folder: Path) -> None:
    plant(folder / "m/megatron", COMMON, saved([{"step": 3}]))
    state = {COMMON: None}
    torch.distributed.checkpoint.load(state, storage_reader=CheckedReader(folder / "m/megatron"), no_dist=True)
    assert state == {COMMON: [{"step": 3}]}
    plant(folder / "m/megatron", COMMON, saved([Call(os.system, f"touch {folder}/marker")]))
    with pytest.raises(torch.distributed.checkpoint.CheckpointException) as caught:
        torch.distributed.checkpoint.load(state, storage_reader=CheckedReader(folder / "m/megatron"), no_dist=True)
    assert f"__0_0.distcp: {COMMON} asks for 'posix.system'" in str(caught.value)
    assert not (folder / "marker").exists()


def test_a_pickle_cannot_change_the_classes_that_it_may_name(folder: Path) -> None:
    (folder / "other").mkdir()
    names = ("Metadata", "MetadataIndex", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")
    for name in names:
        # The class; (None, {"__setstate__": torch.Size}), which the default sets as attributes; BUILD.
        build = b"N}V__setstate__\nctorch\nSize\ns\x86b."
        (folder / "other/.metadata").write_bytes(
            b"\x80\x02ctorch.distributed.checkpoint.metadata\n" + name.encode() + b"\n" + build
        )
        with pytest.raises(ValueError, match="is damaged"):
            read_metadata(folder / "other")
    assert MetadataIndex.__dict__.get("__setstate__") is None
    assert compare(folder / "hf", folder / "m")[0] == []


# Opcodes without the PROTO at the begin: 2 doubles what is on top, \x86 makes a tuple of two, s and e fill.
BOMBS = {
    "place 2**29 of the memo": b"Nr\x00\x00\x00\x20.",
    "a tuple of two of itself, fifty times over, as a key": b"}N" + b"2\x86" * 50 + b"Ns.",
    "the same in a set": b"(N" + b"2\x86" * 50 + b"\x91.",
    "the same in a dict at once": b"(N" + b"2\x86" * 50 + b"Nd.",
    "the same in an OrderedDict at once": b"ccollections\nOrderedDict\n](N" + b"2\x86" * 50 + b"Nle\x85R.",
    "a string of 2**62 bytes": b"\x8e" + (2**62).to_bytes(8, "little") + b".",
    "100,000 tuples in each other as a key": b"}N" + b"\x85" * 100_000 + b"Ns.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_do_not_take_memory_or_time_without_end(name: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + BOMBS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises((ValueError, Fault)):
        read_metadata(tmp_path)
    assert time.process_time() - started < 60  # a moment; without end is without end on any machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 500_000 + b"N.")
    with pytest.raises(ValueError, match="would unpack to more than there is"):
        load_saved(file.getvalue(), "file")


def test_an_index_is_read_as_torch_reads_it(folder: Path) -> None:
    metadata = folder / "m/megatron/.metadata"
    torchs = pickle.loads(metadata.read_bytes())
    ours = read_metadata(metadata.parent)
    assert ours.state_dict_metadata == torchs.state_dict_metadata
    assert ours.storage_data == torchs.storage_data


def test_an_index_of_an_older_megatron_is_read(folder: Path) -> None:
    metadata = folder / "m/megatron/.metadata"
    data = pickle.dumps(pickle.loads(metadata.read_bytes()), 2)
    old = b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n"
    metadata.write_bytes(data.replace(b"ctorch.distributed.checkpoint.metadata\nMetadata\n", old))
    assert old in metadata.read_bytes()
    assert compare(folder / "hf", folder / "m")[0] == []


def spoil_place(metadata: Metadata, **fields: object) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == EMBEDDING)
    metadata.storage_data[index] = _StorageInfo(**{"relative_path": "__0_0.distcp", "offset": 0, "length": 1} | fields)


def tensor(metadata: Metadata) -> TensorStorageMetadata:
    return metadata.state_dict_metadata[EMBEDDING]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: spoil_place(m, relative_path="../config.json"), "names the file '../config.json', which is not in"),
        (lambda m: spoil_place(m, relative_path="/dev/zero"), "names the file '/dev/zero', which is not in"),
        (lambda m: spoil_place(m, relative_path=".."), "names the file '..', which is not in"),
        (lambda m: spoil_place(m, offset=-1), "a int where a number of bytes or chunks belongs, 0 or"),
        (lambda m: spoil_place(m, length=1.5), "a float where a number of bytes or chunks belongs"),
        (lambda m: spoil_place(m, transform_descriptors=["stream.zstd"]), "is compressed, which is not supported"),
        (lambda m: setattr(tensor(m), "size", [96, 64]), "a list is no shape"),
        (lambda m: setattr(tensor(m), "size", torch.Size([96])), "of size (96, 64) in 1 dimensions"),
        (lambda m: setattr(tensor(m), "properties", tensor(m)), "a Tensor where a TensorProperties belongs"),
        (lambda m: m.storage_data.pop(MetadataIndex(COMMON)), f"it does not say where {COMMON} lies"),
        (lambda m: m.state_dict_metadata.update({3: tensor(m)}), "a int where a name belongs"),
        (lambda m: m.__dict__.pop("storage_data"), "'storage_data'"),
    ],
)
def test_an_index_that_makes_no_sense_is_damaged(
    change: Callable[[Metadata], object], reason: str, folder: Path
) -> None:
    path = changed(folder, change)
    with pytest.raises(ValueError) as caught:
        read_metadata(path.parent)
    assert str(caught.value).startswith(f"{path} cannot be read (")
    assert reason in str(caught.value)


def test_a_chunk_that_is_no_tensor_or_of_another_shape_is_named(folder: Path) -> None:
    for value, reason in ((torch.zeros(3), "has a chunk of shape (3,); (96, 64) was written"), ([1], "is a list, not")):
        plant(folder / "m/megatron", EMBEDDING, saved(value))
        with pytest.raises(ValueError) as caught:
            compare(folder / "hf", folder / "m")
        assert f"__0_0.distcp: {EMBEDDING} {reason}" in str(caught.value)


def test_a_pipe_in_place_of_a_file_does_not_hold_the_reader(folder: Path) -> None:
    for name in (".metadata", "__0_0.distcp"):
        path = folder / "m/megatron" / name
        data = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ValueError, match=f"{name} is a FIFO and not a regular file; remove it"):
            compare(folder / "hf", folder / "m")
        path.unlink()
        path.write_bytes(data)
