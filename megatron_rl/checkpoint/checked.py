"""This module is Megatron's way to read a distributed checkpoint, but every pickle goes through the gate
(checkpoint/pickles.py).

Torch's own reader unpickles `.metadata` and every stored object, and runs what they say.
"""

import io
import os
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_rl.checkpoint.metadata import read_metadata
from megatron_rl.checkpoint.pickles import load_saved, load_tensor, open_regular
from megatron_rl.errors import Fault


class CheckedReader(dcp.FileSystemReader):
    """Hands tensors and objects to torch's planner. What the planner unpickles are bytes that were written here."""

    def __init__(self, folder: str | os.PathLike[str], **_: Any) -> None:
        """Open the checkpoint. It raises ValueError or Fault as `read_metadata` does. Megatron's further options are
        about its own readers."""
        super().__init__(folder)
        self._folder = Path(folder)
        self._metadata = read_metadata(self._folder)

    def read_metadata(self) -> Metadata:
        # It takes no `kwargs`: with them, torch would go on to other files.
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the tensors of a plan. Fault names a file that cannot be read: this may be the only rank that reads
        it."""
        items = sorted(plan.items, key=lambda item: (self._file(item), self.storage_data[item.storage_index].offset))
        for path, of_file in groupby(items, key=self._file):
            try:
                with open_regular(path) as file:
                    for item in of_file:
                        self._read(file, item, planner)
            except ValueError as error:
                raise Fault(str(error)) from None
            except RecursionError:
                raise Fault(f"{path} holds an object that is nested too deeply") from None
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _file(self, item: ReadItem) -> Path:
        return self._folder / self.storage_data[item.storage_index].relative_path

    def _read(self, file: BinaryIO, item: ReadItem, planner: LoadPlanner) -> None:
        index, where = item.storage_index, f"{file.name}: {item.storage_index.fqn}"
        info = self.storage_data[index]
        file.seek(info.offset)
        saved = file.read(info.length)
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, _saved(load_saved(saved, where)))
            return
        stored = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(stored, TensorStorageMetadata) and index.index is not None, index
        tensor = load_tensor(saved, stored.chunks[index.index].sizes, where)
        target = planner.resolve_tensor(item).detach()
        target.copy_(narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))
        planner.commit_tensor(item, target)


def load_common(folder: str) -> Any:
    """Read `common.pt`, where older versions of Megatron keep all that is no tensor."""
    path = Path(folder) / "common.pt"
    with open_regular(path) as file:
        return load_saved(file.read(), str(path))


def _saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file
