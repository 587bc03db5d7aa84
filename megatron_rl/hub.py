"""This module finds models of the Hugging Face Hub in its cache on this machine, or fetches them into it."""

import re
from contextlib import suppress
from functools import partial
from pathlib import Path

from megatron_rl.files import indexed_names

PREFIX = "hub:"
_CONFIGURATION = ("*.json",)
# Weights, configuration, tokenizer, and files of code, which run only with model.trust_remote_code.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?")


def local_model(path: Path, with_weights: bool = True) -> Path:
    """Return the folder of a model. For `hub:ORG/NAME` and `hub:ORG/NAME@REVISION` it is that of the snapshot, else
    `path` as it is.

    What is in the cache is taken without a network. ValueError when it is neither there nor can be fetched.
    with_weights: when False a folder with its config.json is enough, and nothing but JSON is fetched.
    """
    text = str(path)
    if not text.startswith(PREFIX):
        return path
    found = _NAME.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        raise ValueError(f"{text} names no model of the Hugging Face Hub; write hub:ORG/NAME or hub:ORG/NAME@REVISION")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns, is_whole = (_FILES, _has_weights) if with_weights else (_CONFIGURATION, _has_config)
    snapshot = partial(snapshot_download, found["id"], revision=found["revision"], allow_patterns=list(patterns))
    try:
        with suppress(LocalEntryNotFoundError):
            cached = Path(snapshot(local_files_only=True))
            if is_whole(cached):
                return cached
        fetched = Path(snapshot())
        if not is_whole(fetched):
            raise OSError(f"{fetched} lacks {'some of its *.safetensors' if with_weights else 'config.json'}")
        return fetched
    except Exception as error:  # the library and what it stands on have many kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{text} is not in the cache of the Hugging Face Hub on this machine (HF_HOME) and could not be fetched "
            f"({why}); fetch it where there is a network (`hf download {found['id']}`) and copy that cache, or give "
            "the model's folder"
        ) from None


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _has_weights(folder: Path) -> bool:
    """Tell whether all files of weights are there. Other tools leave a lone config.json or tokenizer there."""
    names = indexed_names(folder)
    return any(folder.glob("*.safetensors")) if names is None else all((folder / name).is_file() for name in names)
