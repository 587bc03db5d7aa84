"""Makes pickles that create the file `marker` if a program trusts them, and checkpoints with one of them inside."""

import io
import operator
import os
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

COMMON = "common_state/shard_0_1"
EMBEDDING = "embedding.word_embeddings.weight"


class Call:
    """Makes pickle write a call of `function`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> object:
        return self._call


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    """Return hostile pickles, by the name that each asks for first and the opcode by which it calls."""
    touch = f"touch {marker}"
    system, line = Call(os.system, touch), touch.encode()
    dotted = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93"
    return {
        "posix.system by REDUCE": pickle.dumps(system),
        "builtins.eval by REDUCE": pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')")),
        "posix.system in protocol 2": pickle.dumps(system, 2),
        "os.system by INST": b"(S'" + line + b"'\nios\nsystem\n.",
        "os.system by OBJ": b"(cos\nsystem\nS'" + line + b"'\no.",
        "torch.distributed.checkpoint.metadata.os.system by its dots": (
            b"\x80\x04" + dotted + b"(V" + line + b"\nt" + b"R."
        ),
        "operator.methodcaller by REDUCE": pickle.dumps(Call(operator.methodcaller, "close")),
        "posix.system inside": pickle.dumps(Metadata({}, planner_data=[system])),
        "posix.system as a key": pickle.dumps(Metadata({}, storage_data={system: None})),
    }


def saved(value: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def plant(folder: Path, key: str, data: bytes) -> None:
    """Put `data` in the place of an object, or of the one chunk of a tensor, in a checkpoint."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index == MetadataIndex(key) or index.fqn == key)
    with (folder / metadata.storage_data[index].relative_path).open("ab") as file:
        metadata.storage_data[index] = _StorageInfo(Path(file.name).name, file.tell(), len(data))
        file.write(data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
