"""Writes a bucket of weights as SGLang's /update_weights_from_tensor takes it: not its bytes, but how to open them.

The payload is SGLang's own format (0.5.21: `MultiprocessingSerializer`, load_format "flattened_bucket"): a pickle of
the flat tensor as torch.multiprocessing hands it over, and where in it each weight lies. We write such pickles and
never read one. SGLang's unpickler knows a short list of names; of plain records it takes types.SimpleNamespace.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_rl.device import device_id
from megatron_rl.sync.buckets import Place

# The argument of rebuild_cuda_tensor that SGLang (utils/patch_torch.py) lets name the device by its id.
_DEVICE_ARGUMENT = 6


def serialized(flat: Tensor, places: Sequence[Place], dtype: torch.dtype) -> str:
    """Return the payload of a bucket, for one process to open, once. flat: uint8 [bytes], which must live until that
    process has copied it; a tensor in host memory moves to shared memory."""
    content = {
        "flattened_tensor": flat,
        "metadata": [
            SimpleNamespace(
                name=place.name,
                shape=torch.Size(place.shape),
                dtype=dtype,
                start_idx=place.start,
                end_idx=place.end,
                numel=place.end - place.start,
            )
            for place in places
        ],
    }
    buffer = io.BytesIO()
    pickler = ForkingPickler(buffer)
    pickler.dispatch_table = {**pickler.dispatch_table, Tensor: _reduced}
    with _shared_by_name():
        pickler.dump(content)
    return base64.b64encode(buffer.getvalue()).decode()


def _reduced(tensor: Tensor) -> Any:
    """Reduce a tensor as torch does. A GPU goes by its id: the server may see other ones, under other numbers."""
    rebuild, arguments = reductions.reduce_tensor(tensor)
    name = device_id(tensor)
    if name is not None:
        arguments = (*arguments[:_DEVICE_ARGUMENT], name, *arguments[_DEVICE_ARGUMENT + 1 :])
    return rebuild, arguments


@contextmanager
def _shared_by_name() -> Iterator[None]:
    """Share host memory by the name of a file in /dev/shm inside the block. torch's default, a file descriptor, can
    only be fetched by a child of this process; a server that tries ends."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
