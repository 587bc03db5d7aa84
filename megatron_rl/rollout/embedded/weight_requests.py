"""Reads the JSON bodies of the weight-update routes into validated records. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_rl.rollout.embedded.fields import RequestError, cut, flag, integer, string, text

DEFAULT_GROUP = "weight_update_group"
FLATTENED = "flattened_bucket"
MAX_WORLD_SIZE = 4096
MAX_DIMENSIONS = 8
MAX_GROUP_NAME = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRequest:
    """Holds a request to /init_weights_update_group. This server is one rank, `rank`."""

    master_address: str
    master_port: int
    rank: int
    world_size: int
    group_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHead:
    """Describes a tensor that is about to come: name and dtype as the sender wrote them, shape checked to be sizes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRequest:
    """Holds a request to /update_weights_from_distributed."""

    heads: tuple[TensorHead, ...]
    group_name: str
    flattened: bool  # one broadcast of all bytes end to end; else one broadcast per tensor
    flush_cache: bool
    abort_all: bool
    weight_version: str | None  # None: the session's version stays what it is


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketLimits:
    """Limits what one bucket may hold: twice the model, so that a sender that does not know better is told by tensor
    what is wrong."""

    tensors: int
    values: int

    @property
    def body_bytes(self) -> int:
        """The number of bytes of a body with name, dtype and shape of each tensor."""
        return 2**20 + 512 * self.tensors


def parse_join(body: dict[str, Any]) -> JoinRequest:
    backend = text(body, "backend", "nccl")
    if backend != "gloo":
        raise RequestError(f"backend must be 'gloo' here, got {backend!r}: the embedded server has no GPU")
    world_size = integer("world_size", body.get("world_size"), 2, MAX_WORLD_SIZE)
    rank = integer("rank_offset", body.get("rank_offset"), 1, MAX_WORLD_SIZE)
    if rank >= world_size:
        raise RequestError(f"rank_offset must be below world_size ({world_size}), got {rank}")
    port = integer("master_port", body.get("master_port"), 1, 65535)
    return JoinRequest(
        master_address=text(body, "master_address", maximum=253),  # of a host name
        master_port=port,
        rank=rank,
        world_size=world_size,
        group_name=text(body, "group_name", DEFAULT_GROUP, MAX_GROUP_NAME),
    )


def parse_bucket(body: dict[str, Any], limits: BucketLimits) -> BucketRequest:
    names, dtypes, shapes = (body.get(key) for key in ("names", "dtypes", "shapes"))
    for key, value in (("names", names), ("dtypes", dtypes), ("shapes", shapes)):
        if not isinstance(value, list) or not value:
            raise RequestError(f"{key} must be a list, not empty, got {cut(value)}")
    assert names is not None and dtypes is not None and shapes is not None
    if not len(names) == len(dtypes) == len(shapes):
        raise RequestError(
            f"names, dtypes and shapes must be equally long, got {len(names)}, {len(dtypes)} and {len(shapes)}"
        )
    if len(names) > limits.tensors:
        raise RequestError(f"names must hold at most {limits.tensors} names for this model, got {len(names)}")
    for name in names:
        string("a name in names", name)
    for dtype in dtypes:
        string("a dtype in dtypes", dtype, 64)
    values = sum(_size(shape, limits.values) for shape in shapes)
    if values > limits.values:
        raise RequestError(
            f"shapes must come to at most {limits.values} values for this model, got {values}; send several buckets"
        )
    load_format = body.get("load_format")
    if load_format not in (None, FLATTENED):
        raise RequestError(f"load_format must be null or {FLATTENED!r}, got {cut(load_format)}")
    return BucketRequest(
        heads=tuple(
            TensorHead(name=name, dtype=dtype, shape=tuple(shape))
            for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
        ),
        group_name=text(body, "group_name", DEFAULT_GROUP, MAX_GROUP_NAME),
        flattened=load_format == FLATTENED,
        flush_cache=flag(body, "flush_cache", True),
        abort_all=flag(body, "abort_all_requests", False),
        weight_version=None if body.get("weight_version") is None else text(body, "weight_version"),
    )


def _size(shape: Any, maximum: int) -> int:
    """Count the values of a tensor of this shape."""
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise RequestError(f"shapes must hold lists of at most {MAX_DIMENSIONS} sizes, got {cut(shape)}")
    return math.prod(integer("a size in shapes", size, 0, maximum) for size in shape)
