"""Makes the token ids of prompts: many at a time, held in one array, and kept in a file for the next start of a run.

The file: [digest of all that the ids depend on, 32 bytes][digest of what follows, 32 bytes][tokens of each prompt,
int32][ids of all prompts one after the other, int32]. What another run, template or library left there has another
digest and is made anew, and so is what was damaged; nothing in it is more than numbers.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rl import __version__
from megatron_rl.data.chat import TEMPLATES, render_prompts
from megatron_rl.data.messages import Conversation
from megatron_rl.files import model_files, whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIGEST_BYTES = 32
_INT = np.dtype("<i4")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_LIBRARIES = ("transformers", "tokenizers", "jinja2")

log = logging.getLogger(__name__)


class PromptTokens(Mapping[str, tuple[int, ...]]):
    """Holds token ids by id of the prompt. In one array they take a tenth of what tuples of Python's numbers do."""

    def __init__(self, ids: Sequence[str], lengths: np.ndarray, tokens: np.ndarray) -> None:
        """Find where the ids of each prompt begin. lengths: int [prompts], how many of the tokens, int32, each prompt
        has."""
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        self._places = dict(zip(ids, zip([0, *ends[:-1]], ends, strict=True), strict=True)) if ids else {}
        self._tokens = tokens

    def __getitem__(self, identity: str) -> tuple[int, ...]:
        start, end = self._places[identity]
        return tuple(self._tokens[start:end].tolist())

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, identity: object) -> bool:
        return identity in self._places

    def num_tokens(self, identity: str) -> int:
        start, end = self._places[identity]
        return end - start

    @property
    def largest(self) -> int:
        """Return the largest token id of all prompts."""
        return int(self._tokens.max(initial=0))

    def drop(self, identity: str) -> None:
        """Leave a prompt out."""
        self._places.pop(identity, None)


def prompt_tokens(
    ids: Sequence[str],
    prompts: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    special_tokens: str,
    kept: Path | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> PromptTokens:
    """Return the token ids of every prompt as `render_prompt` makes them. special_tokens, arguments: as
    data.special_tokens and template_arguments. kept: the file that has them from the last start, or will have them for
    the next one; None: without."""
    arguments = arguments or {}
    if kept is None:
        return PromptTokens(ids, *_rendered(prompts, tokenizer, special_tokens, arguments))
    digest = _digest(prompts, tokenizer, special_tokens, arguments)
    found = _read(kept, digest, len(prompts))
    if found is None:
        found = _rendered(prompts, tokenizer, special_tokens, arguments)
        try:
            _write(kept, digest, *found)
        except OSError as error:
            log.warning("%s is not written (%s); the next start makes the prompts' tokens again", kept, error.strerror)
    return PromptTokens(ids, *found)


def _rendered(
    prompts: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    special_tokens: str,
    arguments: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    parts = [np.array(ids, _INT) for ids in render_prompts(tokenizer, prompts, special_tokens, arguments)]
    lengths = np.array([len(part) for part in parts], _INT)
    return lengths, np.concatenate(parts) if parts else np.zeros(0, _INT)


def _digest(
    prompts: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    special_tokens: str,
    arguments: Mapping[str, Any],
) -> bytes:
    """Digest all that token ids are a function of: a tokenizer is loaded from the files of its directory alone, none of
    which is code, and from libraries of these versions."""
    versions = [__version__, *map(version, _LIBRARIES)]
    settings = [versions, special_tokens, arguments, tokenizer.chat_template]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    directory = Path(tokenizer.name_or_path)
    for folder in ("", TEMPLATES):
        files = model_files(directory, folder) if (directory / folder).is_dir() else []
        for file in files:
            if file.suffix not in _WEIGHTS:
                _add(digest, file.name.encode())
                _add(digest, file.read_bytes())
    for prompt in prompts:
        # JSON where there is more than a text: two prompts that differ are never the same list of contents.
        _add(digest, prompt.messages[0].content.encode())
        _add(digest, b"" if prompt.is_plain else json.dumps(prompt.parts()).encode())
    return digest.digest()


def _add(digest: "hashlib._Hash", content: bytes) -> None:
    """Add the content with its length, so that no two lists of contents are the same bytes."""
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)


def _read(path: Path, digest: bytes, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Read lengths and ids of `count` prompts; None where the file is not there, not of these, or not whole."""
    try:
        data = memoryview(path.read_bytes())
    except OSError:
        return None
    content = data[2 * _DIGEST_BYTES :]
    if data[: 2 * _DIGEST_BYTES] != digest + hashlib.sha256(content).digest():
        return None
    numbers = np.frombuffer(content, _INT)
    return numbers[:count], numbers[count:]


def _write(path: Path, digest: bytes, lengths: np.ndarray, tokens: np.ndarray) -> None:
    content = lengths.tobytes() + tokens.tobytes()
    with whole_file(path) as file:
        for part in (digest, hashlib.sha256(content).digest(), content):
            file.buffer.write(part)
