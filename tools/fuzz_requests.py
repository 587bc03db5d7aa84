"""This module makes the requests of tools/fuzz_server.py: valid ones of every route, and mutations of them."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Holds what a valid request has to name: paths, a tensor, and a port where a trainer waits."""

    model: Path
    other: Path  # a copy of the model
    fifo: Path  # a directory with a FIFO instead of a file
    vocab: int
    context: int
    tensors: dict[str, list[int]]  # name -> shape
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Holds one request as bytes. is_complete: when True it must be answered. leave_after: seconds until the client
    hangs up."""

    kind: str
    path: str
    content: bytes
    is_complete: bool = True
    leave_after: float | None = None


class Raw(str):
    """Holds JSON that is written as it stands, whatever it is."""


NUMBERS = [
    0, 1, -1, 2, 15, 16, 17, 255, 257, 1000, 16384, 16385, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32,
    2**53, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**400, -(10**400), 10**4000, 0.5, -0.5, 1e-320, 1e308, -0.0,
    *(Raw(one) for one in ("NaN", "Infinity", "-Infinity", "1e999", "1e-999", "-0", "01", "9" * 5000, "1.", "0x10")),
]  # fmt: skip
TEXTS = [
    "", "x", "0", "true", "null", "\0", "a\0b", "é", "😀", "a" * 300, "a" * 1025, "a" * 5000, "/" * 5000, "é" * 2000,
    "../../../etc", "/etc", "/dev/zero", "/proc/self/fd", "/proc/self/mem", "/", ".", "~", "\n\r\t", "%s%n", "{}",
    "float32", "bfloat16", "int32", "complex64", "quint8", "bits8", "Tensor", "nn", "__class__", "127.0.0.1",
    Raw(r'"\ud800"'), Raw(r'"\udc80x"'), Raw(r'"\ud83d\ude00"'), Raw(r'"\u0000"'), Raw('"\n"'), Raw('"open'),
]  # fmt: skip
SHAPES = [
    [], {}, [[]], [[[]]], [0], [None], [True], ["a"], [5, [6]], [[5], 6], {"a": 1}, {"": {"": {}}}, [1] * 5000,
    *(Raw("[" * depth + "]" * depth) for depth in (5, 200, 990, 5000, 100000)),
    *(Raw('{"a":' * depth + "1" + "}" * depth) for depth in (5, 900, 5000)),
    Raw("[" + ",".join(["0"] * 70000) + "]"), Raw('{"n": 1, "n": 2}'), Raw("[1,]"), Raw("[" * 1000), Raw(""),
    Raw("{" + ",".join(f'"{i}": {i}' for i in range(2000)) + "}"),
]  # fmt: skip
SINGLES = [None, True, False, Raw("nul"), Raw("//"), Raw("'a'"), Raw("\ufeff1")]
HOSTILE: list[Any] = [*NUMBERS, *TEXTS, *SHAPES, *SINGLES]
GET_ROUTES = [
    "/flush_cache",
    "/health",
    "/ready",
    "/ping",
    "/health_generate",
    "/server_info",
    "/get_server_info",
    "/model_info",
    "/get_model_info",
    "/v1/models",
    "/weights_checker",
]


def text_of(tree: Any) -> str:
    """Write the JSON of a tree in which Raw may stand."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {text_of(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(text_of, tree)) + "]"
    return json.dumps(tree)


def generate(source: random.Random, world: World) -> dict[str, Any]:
    def prompt() -> list[int]:
        length = source.choice([1, 2, 5, 40, 64, 65, world.context - 30, world.context])
        return [source.randrange(world.vocab) for _ in range(length)]

    batched = source.random() < 0.4
    prompts = [prompt() for _ in range(source.choice([1, 2, 5]) if batched else 1)]
    room = world.context - max(map(len, prompts))
    params = {
        "max_new_tokens": source.randrange(min(room, 20) + 1),
        "temperature": source.choice([0, 0.3, 1, 1.0, 1e-6, 1e6]),
        "top_p": source.choice([1, 1.0, 0.9, 1e-9]),
        "top_k": source.choice([-1, 1, 5, world.vocab, 2**31 - 1]),
        "n": source.choice([1, 1, 1, 2, 8]),
        "stop": source.choice([[], "a", ["never there", "zz"]]),
        "stop_token_ids": [source.randrange(2 * world.vocab) for _ in range(source.choice([0, 1, 15]))],
        "ignore_eos": source.random() < 0.5,
        "sampling_seed": source.choice([0, 1, -(2**63), 2**64 - 1, source.getrandbits(63)]),
        "skip_special_tokens": True,
        "no_stop_trim": False,
        "min_p": 0,
        "repetition_penalty": 1.0,
    }
    body: dict[str, Any] = {
        "input_ids": prompts if batched else prompts[0],
        "sampling_params": {key: value for key, value in params.items() if source.random() < 0.7},
        "return_logprob": source.random() < 0.5,
        "logprob_start_len": source.choice([-1, 0]),
        "return_routed_experts": source.random() < 0.2,
        "rid": f"r{source.getrandbits(60)}",
        "stream": source.random() < 0.2,
    }
    body["sampling_params"].setdefault("max_new_tokens", params["max_new_tokens"])
    return {key: value for key, value in body.items() if key[0] in "is" or source.random() < 0.6}


def join(source: random.Random, world: World) -> dict[str, Any]:
    return {
        "master_address": "127.0.0.1",
        "master_port": world.port,
        "rank_offset": 1,
        "world_size": 2,
        "group_name": source.choice(["fuzz", f"g{source.getrandbits(20)}"]),
        "backend": "gloo",
    }


def bucket(source: random.Random, world: World) -> dict[str, Any]:
    names = source.sample(list(world.tensors), source.choice([1, 3]))
    return {
        "names": names,
        "dtypes": ["float32"] * len(names),
        "shapes": [world.tensors[name] for name in names],
        "group_name": "fuzz",
        "load_format": source.choice([None, "flattened_bucket"]),
        "flush_cache": False,
        "abort_all_requests": False,
        "weight_version": source.choice([None, "v1"]),
    }


def from_disk(source: random.Random, world: World) -> dict[str, Any]:
    return {
        "model_path": str(source.choice([world.model, world.other, world.other, world.fifo, world.model / "absent"])),
        "weight_version": source.choice([None, "v", f"v{source.random()}"]),
        "flush_cache": source.random() < 0.3,
        "abort_all_requests": source.random() < 0.05,
    }


BODIES: dict[str, Callable[[random.Random, World], dict[str, Any]]] = {
    "/generate": generate,
    "/update_weights_from_disk": from_disk,
    "/init_weights_update_group": join,
    "/destroy_weights_update_group": lambda source, world: {"group_name": "fuzz"},
    "/begin_weight_update": lambda source, world: {},
    "/update_weights_from_distributed": bucket,
    "/end_weight_update": lambda source, world: {},
    "/update_weights_from_tensor": lambda source, world: {"serialized_named_tensors": ["gASV"], "load_format": None},
    "/update_weight_version": lambda source, world: {
        "new_version": f"v{source.random()}",
        "abort_all_requests": source.random() < 0.1,
    },
    "/weights_checker": lambda source, world: {"action": "checksum"},
    "/release_memory_occupation": lambda source, world: {"tags": source.choice([["weights"], ["kv_cache"], None])},
    "/resume_memory_occupation": lambda source, world: {"tags": source.choice([["weights"], ["kv_cache"], None])},
    "/pause_generation": lambda source, world: {"mode": source.choice(["abort", "retract", "in_place"])},
    "/continue_generation": lambda source, world: {},
    "/abort_request": lambda source, world: {"rid": f"r{source.randrange(10)}", "abort_all": source.random() < 0.1},
}


def mutate(tree: Any, source: random.Random) -> Any:
    """Return the tree with one place in it replaced, left out, doubled or added."""
    if isinstance(tree, dict) and tree and source.random() < 0.9:
        key = source.choice(list(tree))
        way = source.random()
        if way < 0.1:
            return {name: value for name, value in tree.items() if name != key}
        if way < 0.15:
            return Raw(text_of(tree)[:-1] + f", {json.dumps(key)}: {text_of(source.choice(HOSTILE))}}}")
        if way < 0.2:
            return tree | {source.choice(["x", "stop", "text", "a" * 3000, "\ud800"]): source.choice(HOSTILE)}
        return tree | {key: mutate(tree[key], source)}
    if isinstance(tree, list) and tree and source.random() < 0.6:
        index, way = source.randrange(len(tree)), source.random()
        if way < 0.2:
            return tree * source.choice([0, 2, 100])
        return [*tree[:index], mutate(tree[index], source), *tree[index + 1 :]]
    return source.choice(HOSTILE)


def http(path: str, body: bytes, *headers: str, method: str = "POST", length: int | None = None) -> bytes:
    """Write a request as it goes over the wire. length: the length of its body that it claims, if that is not the real
    one."""
    lines = [f"{method} {path} HTTP/1.1", "Host: HOST", "Content-Type: application/json", *headers]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body


def chunked(path: str, body: bytes, source: random.Random) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: HOST\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    size = source.choice([1, 7, 1000, 70000])
    parts = [body[i : i + size] for i in range(0, min(len(body), 200 * size), size)]
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def scrambled(content: bytes, source: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(source.randrange(1, 5)):
        place = source.randrange(len(data) + 1)
        data[place : place + source.choice([0, 1, 8])] = source.randbytes(source.choice([0, 1, 4]))
    return bytes(data)


def case(seed: str, world: World) -> Case:
    """Return the case of this seed."""
    source = random.Random(seed)
    path = "/generate" if source.random() < 0.5 else source.choice([*BODIES, *GET_ROUTES])
    if path not in BODIES:
        return Case(kind="get", path=path, content=http(path, b"", method=source.choice(["GET", "GET", "HEAD"])))
    tree: Any = BODIES[path](source, world)
    way = source.random()
    if way < 0.15:
        return Case(kind="valid", path=path, content=http(path, text_of(tree).encode()))
    if way < 0.22:
        giant = path == "/generate" and source.random() < 0.3
        if giant:
            tree |= {"sampling_params": {"n": source.choice([500, 16384]), "max_new_tokens": 16}, "input_ids": [5, 6]}
        content = http(path, text_of(tree).encode())
        if source.random() < 0.3 and not giant:
            return Case(kind="cut", path=path, content=content[: source.randrange(1, len(content))], is_complete=False)
        return Case(kind="left", path=path, content=content, leave_after=source.choice([0, 0.02, 0.3]))
    if way < 0.3:
        return Case(kind="scrambled", path=path, content=http(path, scrambled(text_of(tree).encode(), source)))
    if way < 0.33:
        return Case(kind="random", path=path, content=http(path, source.randbytes(source.choice([0, 1, 30, 3000]))))
    if way < 0.36:
        raw = scrambled(http(path, text_of(tree).encode()), source)
        raw = source.choice([raw, source.randbytes(500), b"GET /" + b"a" * source.choice([5000, 70000]) + b"\r\n\r\n"])
        return Case(kind="no http", path=path, content=raw, is_complete=False)
    if way < 0.37:
        piece = source.choice([b"7,", b"95,", b"null,", b"[],", b'"",', b"{},", b"1e5,"])
        large = b'{"input_ids": [' + piece * (source.choice([400_000, 5_000_000]) // len(piece)) + b"1]}"
        return Case(kind="large", path=path, content=http(path, large))
    if way < 0.4:
        odd = [
            "Content-Encoding: gzip",
            "Expect: 100-continue",
            "Upgrade: h2c\r\nConnection: upgrade",
            "X: " + "a" * 9000,
        ]
        return Case(kind="headers", path=path, content=http(path, text_of(tree).encode(), source.choice(odd)))
    if way < 0.43:
        return Case(kind="chunked", path=path, content=chunked(path, text_of(tree).encode(), source))
    if way < 0.46:
        odd_path = source.choice(
            [path + "/", "//" + path, path + "?a=%00", "/%ff%00", "/" + "a" * 5000, "*", path * 40]
        )
        method = source.choice(["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "FOO", "POST"])
        return Case(kind="path", path=path, content=http(odd_path, text_of(tree).encode(), method=method))
    for _ in range(source.choice([1, 1, 2, 3])):
        tree = mutate(copy.copy(tree), source)
    return Case(kind="mutated", path=path, content=http(path, text_of(tree).encode("utf-8", "surrogatepass")))
