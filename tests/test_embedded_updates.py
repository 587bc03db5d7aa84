"""Tests sessions of weight updates and their groups, without HTTP."""

import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_model import tensors_of, write_tiny_model

from megatron_rl.families import load_architecture
from megatron_rl.rollout.embedded.packing import pack, places
from megatron_rl.rollout.embedded.updates import UpdateError, WeightUpdates
from megatron_rl.rollout.embedded.weight_requests import BucketLimits, parse_bucket, parse_join
from megatron_rl.rollout.update_group import broadcast, flatten, join, leave
from megatron_rl.stores import host_store
from megatron_rl.tensor_bytes import checksum

LIMITS = BucketLimits(tensors=1000, values=10**7)


class Pair:
    """Joins a trainer and the update side of a server in one group, in one process."""

    def __init__(self, config, dtype=torch.float32, timeout_seconds=240.0):
        self.updates = WeightUpdates(config, dtype, timeout_seconds)
        store = host_store("127.0.0.1", 2, 240)
        where = {"master_address": "127.0.0.1", "master_port": store.port, "rank_offset": 1, "world_size": 2}
        self.pool = ThreadPoolExecutor(1)
        joined = self.pool.submit(self.updates.join_group, parse_join({**where, "backend": "gloo", "group_name": "g"}))
        self.group = join("127.0.0.1", store.port, 0, 2, "g", "gloo", timeout_seconds, store=store)
        joined.result()

    def close(self):
        self.pool.shutdown()
        leave(self.group)
        del self.group
        self.updates.leave_group("g")

    def announce(self, tensors, flat=True, **more):
        body = {
            "names": list(tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "load_format": "flattened_bucket" if flat else None,
            "group_name": "g",
        }
        return self.pool.submit(self.updates.receive, parse_bucket(body | more, LIMITS))

    def send(self, tensors, flat=True, **more):
        answer = self.announce(tensors, flat, **more)
        for payload in [flatten(list(tensors.values()))] if flat else tensors.values():
            broadcast(self.group, payload).wait()
        return answer.result()


@pytest.fixture
def pair_for():
    """Makes pairs and closes them."""
    pairs = []

    def make(*args, **kwargs):
        pairs.append(Pair(*args, **kwargs))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
def tiny(tmp_path):
    path = write_tiny_model(tmp_path)
    return load_architecture(path), tensors_of(path)


SHAPES = {
    "plain": {},
    "norm_head": {"norm_head": True},
    "tied": {"tie_word_embeddings": True},
    "no shared expert": {"num_shared_experts": 0},
}


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_tell_the_raw_tensors_they_were_made_of(tmp_path, overrides, dtype):
    path = write_tiny_model(tmp_path, **overrides)
    config, tensors = load_architecture(path), tensors_of(path)
    found = places(pack(tensors, config, dtype), config)
    lost = {"lm_head.weight"} if config.norm_head else set()
    assert found.keys() == tensors.keys() - lost
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name
        assert checksum(tensor) == checksum(tensors[name].to(tensor.dtype))


@pytest.mark.parametrize("flat", [True, False])
def test_a_session_makes_the_weights_that_a_file_would(tiny, flat, pair_for):
    config, tensors = tiny
    pair = pair_for(config)
    names = list(tensors)
    pair.updates.begin()
    pair.send({name: tensors[name] for name in names[:20]}, flat)
    rest = {"model.norm.weight": tensors["model.norm.weight"].half()}
    rest |= {name: tensors[name] for name in names[20:] if name not in rest}
    pair.send(rest, flat, weight_version="v1")
    weights, version = pair.updates.finish()
    assert version == "v1"
    found = places(weights, config)
    for name, tensor in tensors.items():
        expected = tensor.half().float() if name == "model.norm.weight" else tensor
        assert torch.equal(found[name], expected), name


def test_a_bucket_may_mix_dtypes_at_odd_places_and_what_is_unknown_fails_it_alone(tmp_path, pair_for):
    path = write_tiny_model(tmp_path, vocab_size=97, hidden_size=60, num_attention_heads=3, num_key_value_heads=1)
    config, tensors = load_architecture(path), tensors_of(path)
    pair = pair_for(config)
    pair.updates.begin()
    strange = {"unknown.weight": torch.ones(3, dtype=torch.bfloat16)}
    with pytest.raises(UpdateError, match=r"unknown.weight is unknown"):
        pair.send(strange | tensors)
    assert pair.updates.open
    with pytest.raises(UpdateError, match=r"^weights are unchanged: tensor unknown.weight is unknown"):
        pair.updates.finish()


PROBLEMS = {
    "shape": ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight must have shape \(64,\), got \(3,\)"),
    "dtype": ({"model.norm.weight": torch.ones(64, dtype=torch.int32)}, "model.norm.weight must be .*int32"),
    "not finite": ({"model.norm.weight": torch.full((64,), float("nan"))}, "model.norm.weight holds values"),
    "unknown": ({"model.extra": torch.ones(3)}, "model.extra is unknown"),
}


@pytest.mark.parametrize(("wrong", "message"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_a_tensor_that_does_not_fit_fails_its_bucket_and_its_session_but_not_the_next(tiny, wrong, message, pair_for):
    config, tensors = tiny
    pair = pair_for(config)
    pair.updates.begin()
    with pytest.raises(UpdateError, match=message):
        pair.send(wrong, weight_version="bad")
    pair.send({name: tensor for name, tensor in tensors.items() if name not in wrong})
    with pytest.raises(UpdateError, match=f"weights are unchanged: .*{message}"):
        pair.updates.finish()
    pair.updates.begin()
    pair.send(tensors, weight_version="v1")
    assert pair.updates.finish()[1] == "v1"


def test_a_tensor_that_comes_twice_or_not_at_all_fails_the_session(tiny, pair_for):
    config, tensors = tiny
    pair = pair_for(config)
    pair.updates.begin()
    first = dict(list(tensors.items())[:1])
    pair.send(first)
    with pytest.raises(UpdateError, match="came more than once"):
        pair.send(first)
    with pytest.raises(
        UpdateError, match=rf"{len(tensors) - 1} of {len(tensors)} tensors are missing: .*, .*, .*\.\.\."
    ):
        pair.updates.finish()


def test_a_trainer_that_says_nothing_is_given_up(tiny, pair_for):
    config, tensors = tiny
    for seconds in (1.0, 10.0, 100.0):  # until it is one in which this machine joins the group
        with contextlib.suppress(RuntimeError, UpdateError):
            pair = pair_for(config, timeout_seconds=seconds)
            break
    pair.updates.begin()
    with pytest.raises(UpdateError, match="receiving .* failed: .*[Tt]imed out"):
        pair.announce(tensors).result()
    with pytest.raises(UpdateError, match="weights are unchanged"):
        pair.updates.finish()


def test_a_group_that_nobody_makes_is_given_up(tiny):
    updates = WeightUpdates(tiny[0], torch.float32, 0.5)
    store = host_store("127.0.0.1", 2, 240)
    where = {"master_address": "127.0.0.1", "master_port": store.port, "rank_offset": 1, "world_size": 2}
    with pytest.raises(UpdateError, match="group 'g' could not be joined at 127.0.0.1"):
        updates.join_group(parse_join({**where, "backend": "gloo", "group_name": "g"}))
    with pytest.raises(UpdateError, match="group 'g' does not exist"):
        updates.leave_group("g")


def test_checksums_tell_values_shapes_and_dtypes_apart_but_not_strides():
    a = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert checksum(a) == checksum(a.t().contiguous().t())
    assert len({checksum(t) for t in (a, a.view(3, 2), a.flatten(), a.double(), a + 1, a.flip(0))}) == 6


def test_a_group_stands_beside_a_default_group():
    script = (
        "import threading, torch, torch.distributed as dist\n"
        "from megatron_rl.rollout.update_group import broadcast, join, leave\n"
        "from megatron_rl.stores import host_store\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "store = host_store('127.0.0.1', 2, 240)\n"
        "made = []\n"
        "other = threading.Thread(target=lambda: made.append(join('127.0.0.1', store.port, 1, 2, 'g', 'gloo', 240)))\n"
        "other.start()\n"
        "group = join('127.0.0.1', store.port, 0, 2, 'g', 'gloo', 240, store=store)\n"
        "other.join()\n"
        "x, y = torch.arange(5.0), torch.zeros(5)\n"
        "sent, got = broadcast(group, x), broadcast(made[0], y)\n"
        "sent.wait(), got.wait()\n"
        "assert torch.equal(x, y)\n"
        "leave(group), leave(made.pop())\n"
        "del group\n"
        "dist.all_reduce(x)\n"
        "dist.destroy_process_group()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_name": ""}, "group_name"),
        ({"backend": "mpi"}, "backend.*gloo, nccl.*'mpi'"),
        ({"rank": 2}, "rank.*2 of 2"),
        ({"master_port": 0}, "master_port.*0"),
        ({"backend": "nccl"}, "device"),
    ],
)
def test_a_group_that_cannot_be_is_refused(change, message):
    given = {"master_address": "127.0.0.1", "master_port": 1, "rank": 1, "world_size": 2, "group_name": "g"}
    with pytest.raises(ValueError, match=message):
        join(**{**given, "backend": "gloo", "timeout_seconds": 1} | change)
