"""Tests that models of the Hugging Face Hub come from its cache, and that one message tells of a missing one."""

from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from megatron_rl.checkpoint.read import resolve
from megatron_rl.families import load_architecture
from megatron_rl.hub import local_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a cache with one model, as huggingface_hub lays it out, and return the model's snapshot."""
    from huggingface_hub import constants, file_download

    repository = tmp_path / "models--some--tiny"
    write_tiny_model(repository / "snapshots/abc123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(file_download, "HF_HUB_CACHE", str(tmp_path), raising=False)
    return repository / "snapshots/abc123"


def test_a_model_of_the_cache_is_its_snapshot(cache: Path) -> None:
    assert local_model(Path("hub:some/tiny")) == local_model(Path("hub:some/tiny@main")) == cache
    assert load_architecture(local_model(Path("hub:some/tiny"))).num_hidden_layers == 3


def test_a_configuration_is_enough_where_no_weights_are_asked_for(cache: Path) -> None:
    (cache / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="hub:some/tiny is not in the cache"):
        local_model(Path("hub:some/tiny"))
    assert local_model(Path("hub:some/tiny"), with_weights=False) == cache
    (cache / "config.json").unlink()
    with pytest.raises(ValueError, match="hub:some/tiny is not in the cache"):
        local_model(Path("hub:some/tiny"), with_weights=False)


def test_a_command_that_opens_checkpoints_takes_the_name_too(cache: Path) -> None:
    assert resolve(Path("hub:some/tiny")) == cache


def test_a_folder_stays_what_it_is() -> None:
    assert local_model(Path("runs/some/hf")) == Path("runs/some/hf")


@pytest.mark.usefixtures("cache")
def test_what_is_neither_there_nor_can_be_fetched_says_how_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"^hub:other/model is not in the cache .*`hf download other/model`"):
        local_model(Path("hub:other/model"))
    with pytest.raises(ValueError, match="write hub:ORG/NAME or"):
        local_model(Path("hub:model"))


def test_a_snapshot_without_all_of_its_weights_is_not_the_model(cache: Path) -> None:
    weights, index = cache / "model.safetensors", cache / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}')
    with pytest.raises(ValueError, match="hub:some/tiny is not in the cache .* could not be fetched"):
        local_model(Path("hub:some/tiny"))
    weights.rename(cache / "other.safetensors")
    index.write_text('{"weight_map": {"b": "other.safetensors"}}')
    assert local_model(Path("hub:some/tiny")) == cache
    index.unlink()
    (cache / "other.safetensors").unlink()
    with pytest.raises(ValueError, match="hub:some/tiny is not in the cache"):
        local_model(Path("hub:some/tiny"))
