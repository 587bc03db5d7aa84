"""Checks which GPUs a process may use, and that no shipped file puts two members of an NCCL group on one GPU."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_model

from megatron_rl import device
from megatron_rl.config.kinds import kind_of
from megatron_rl.config.load import load_config, read_values
from megatron_rl.config.rollout import GenerationSection
from megatron_rl.config.schema import RlConfig
from megatron_rl.families import load_architecture
from megatron_rl.gpus import chosen_backend, expandable_segments, gpu_shares, opened_rank, visible_gpus
from megatron_rl.preflight import checks as preflight
from megatron_rl.preflight.checks import check_seats, check_start
from megatron_rl.preflight.registry import Start
from megatron_rl.rollout import server
from megatron_rl.rollout.ports import is_here

EXAMPLES = Path(__file__).parents[1] / "examples/ring_lite"


def devices(folder: Path, *numbers: int) -> Path:
    """Make the /dev of a machine with an NVIDIA driver and these device nodes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("nvidiactl", "nvidia-uvm", "nvidia-modeset", *(f"nvidia{i}" for i in numbers)):
        (folder / name).touch()
    (folder / "nvidia-caps").mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("nodes", "named", "expected"),
    [
        ((), None, []),
        ((), "0,1", []),  # left over from another machine
        ((0, 1, 2), None, ["0", "1", "2"]),
        ((3,), None, ["0"]),  # a container: CUDA counts what it can open
        ((3,), "0", ["0"]),
        ((3,), "3", []),
        ((0, 1, 2, 3), "2,0", ["2", "0"]),
        ((0, 1), "", []),
        ((0, 1), "-1", []),
        ((0, 1, 2), "1,-1,2", ["1"]),
        ((0, 1, 2), "1,7,2", ["1"]),
        ((0, 1, 2), "1,,2", ["1"]),
        ((0, 1, 2), "0,1,0", []),
        ((0, 1, 2), " 1, 2", ["1", "2"]),
        ((0, 1, 2), "NoDevFiles", []),  # of Slurm, for a step without GPUs
        ((0, 1), "GPU-8932f937,GPU-1a", ["GPU-8932f937", "GPU-1a"]),
        ((0, 1), "GPU-8932f937,1", ["GPU-8932f937"]),
        ((0, 1), "GPU-8932f937,GPU-8932f937", []),
        ((0,), "MIG-5c/1/0,MIG-5c/2/0", ["MIG-5c/1/0", "MIG-5c/2/0"]),  # two devices of one GPU
    ],
)
def test_what_a_process_may_use(nodes: tuple[int, ...], named: str | None, expected: list[str], tmp_path: Path) -> None:
    environment = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    assert visible_gpus(environment, devices(tmp_path, *nodes)) == expected
    assert visible_gpus(environment | {"MEGATRON_RL_DEVICE": "cpu"}, devices(tmp_path, *nodes)) == []


def test_a_device_node_that_may_not_be_opened_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = devices(tmp_path, 0, 1, 2) / "nvidia1"  # as a cgroup of Slurm's leaves it
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed)
    assert visible_gpus({}, tmp_path) == ["0", "1"]


entry = st.one_of(
    st.integers(-2, 9).map(str),
    st.sampled_from(["", " ", " 3", "2 ", "+1", "1gpu", "gpu1", "0x1", "GPU-a", "GPU-b", "MIG-a", "MIG-b", "none"]),
)


@given(st.lists(entry, min_size=1, max_size=5).map(",".join), st.integers(1, 8))
def test_the_variable_is_read_as_torch_reads_it(tmp_path_factory: pytest.TempPathFactory, text: str, num: int) -> None:
    folder = tmp_path_factory.getbasetemp() / f"devices{num}"
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": text}):
        expected = torch.cuda._parse_visible_devices()
    known = [i for i, one in enumerate(expected) if isinstance(one, int) and one >= num]
    expected = expected[: known[0]] if known else expected  # torch counts with the driver's help, up to what is none
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": text}, devices(folder, *range(num))) == [str(one) for one in expected]


@given(st.integers(0, 16), st.integers(1, 6), st.integers(1, 4))
def test_shares_are_whole_equal_and_apart_and_each_rank_finds_the_trainer_on_its_gpu(
    num_gpus: int, num_servers: int, gpus_each: int
) -> None:
    gpus = [f"GPU-{i}" for i in range(num_gpus)]
    if 0 < num_gpus < num_servers * gpus_each:
        with pytest.raises(ValueError, match=rf"rollout.servers = {num_servers} on a machine with {num_gpus} GPUs"):
            gpu_shares(gpus, num_servers, gpus_each)
        return
    shares = gpu_shares(gpus, num_servers, gpus_each)
    assert len(shares) == num_servers
    assert {len(share) for share in shares} == {num_gpus // num_servers}
    together = [gpu for share in shares for gpu in share]
    assert together == gpus[: len(together)]
    for i, share in enumerate(shares):
        for rank, gpu in enumerate(share):
            assert gpus[opened_rank(i, rank, num_servers, num_gpus)] == gpu
    assert opened_rank(1, 3, 2, 0) == 0, "on a CPU the first rank's"


@pytest.mark.parametrize(
    ("arguments", "gpus_each", "servers"),
    [
        ((), 1, 8),
        (("--tp-size", "4"), 4, 2),
        (("--tp=2", "--mem-fraction-static 0.4"), 2, 4),
        (("--tensor-parallel-size", "3"), 3, 2),
        (("--tp-size 2", "--pp-size 2", "--dp-size 2"), 8, 1),
        (("--tp-size 4", "--dp-size 4", "--enable-dp-attention"), 4, 2),  # its replicas share the GPUs
        (("--tp-size 16",), 16, 1),
    ],
)
def test_sglang_servers_cover_a_machine_by_default(arguments: tuple[str, ...], gpus_each: int, servers: int) -> None:
    rollout = GenerationSection(engine="sglang", sglang_arguments=arguments, max_response_tokens=64)
    assert (rollout.sglang_gpus, rollout.servers_on(8), rollout.servers_on(0)) == (gpus_each, servers, 1)
    assert rollout.model_copy(update={"servers": 3}).servers_on(8) == 3, "what is asked for stays"


# Seats of ranks and servers ------------------------------------------------------------------------------------------

Seat = tuple[int, str]  # node and GPU


@contextmanager
def machine(gpus: list[str]) -> Iterator[None]:
    """Make every machine of a run have these GPUs."""
    with ExitStack() as patched:
        for module in (device, preflight, server):
            patched.enter_context(patch.object(module, "visible_gpus", lambda: gpus))
        yield


def crowded(seats: list[Seat]) -> list[Seat]:
    return [seat for seat, members in Counter(seats).items() if members > 1]


def nccl_groups(config: RlConfig, gpus: list[str], nodes: int, ranks: int, serving_nodes: int) -> list[list[Seat]]:
    """Return the NCCL groups by which weights travel.

    Training ranks are on the first nodes. Servers are on all nodes, or on the last `serving_nodes` alone.
    """
    with machine(gpus):
        shares = server.server_gpus(config.rollout)
    places = range(nodes - serving_nodes, nodes) if serving_nodes else range(nodes)
    served = [(node, gpu) for node in places for share in shares for gpu in share[: config.rollout.sglang_tensor_size]]
    trained = [[(node, gpu) for gpu in gpus[:ranks]] for node in range(nodes - serving_nodes)]
    if config.sync.transport == "ipc":  # every rank of a server opens memory of its own GPU; NCCL joins the trainers
        for i, share in enumerate(shares):
            for rank, gpu in enumerate(share[: config.rollout.sglang_tensor_size]):
                assert gpus[:ranks][opened_rank(i, rank, len(shares), len(gpus))] == gpu
        return trained
    if config.sync.transport == "disk":
        return []
    beside = not serving_nodes and is_here("127.0.0.1")
    if chosen_backend(config.sync.backend, config.rollout.engine, True, beside) == "gloo":
        return []
    return [[trained[0][0], *served]]


def shipped() -> list[Path]:
    """Return the shipped files of `megatron-rl train` that say what cluster they are for."""
    files = [path for path in EXAMPLES.rglob("*.toml") if path.parent.name != "rates"]
    runs = [path for path in files if kind_of(read_values(path, [])) is RlConfig]
    found = [path for path in runs if load_config(RlConfig, path).cluster is not None]
    assert {path.name for path in found} >= {"stage1_math.toml", "stage2_code_science.toml", "one_node_8gpu.toml"}
    return found


@pytest.mark.parametrize("path", shipped(), ids=lambda path: str(path.relative_to(EXAMPLES)))
@pytest.mark.parametrize("overrides", [[], ["sync.transport=distributed"], ["rollout.servers=0"]])
def test_no_shipped_run_has_two_members_of_an_nccl_group_on_one_gpu(path: Path, overrides: list[str]) -> None:
    config = load_config(RlConfig, path, overrides)
    cluster = config.cluster
    assert cluster is not None
    gpus = [str(i) for i in range(cluster.gpus_per_node)]
    with machine(gpus):
        check_seats(config, cluster.gpus_per_node, trains_on_gpu=True)  # as train.sbatch and --nproc start it
    assert config.rollout.servers_on(len(gpus)) * config.rollout.sglang_gpus == len(gpus), "all GPUs generate"
    for group in nccl_groups(config, gpus, cluster.nodes, len(gpus), 0):
        assert not crowded(group)
    if "sync.transport=distributed" in overrides:  # as separate.sbatch starts it
        (group,) = nccl_groups(config, gpus, cluster.nodes + 2, len(gpus), 2)
        assert len(group) == 1 + 2 * len(gpus)
        assert not crowded(group)


runs = st.fixed_dictionaries(
    {
        "num_gpus": st.integers(1, 8),
        "ranks": st.integers(1, 8),
        "servers": st.integers(0, 4),
        "tensor": st.integers(1, 4),
        "transport": st.sampled_from(["disk", "distributed", "ipc"]),
        "backend": st.sampled_from(["auto", "gloo", "nccl"]),
    }
)


@given(runs)
def test_what_may_start_never_has_two_members_of_an_nccl_group_on_one_gpu(run: dict[str, int | str]) -> None:
    base = load_config(RlConfig, EXAMPLES / "one_node_8gpu.toml")
    rollout = {"servers": run["servers"], "sglang_arguments": ("--tp-size", str(run["tensor"]))}
    sync = {"transport": run["transport"], "backend": run["backend"]}
    changed = {"rollout": base.rollout.model_copy(update=rollout), "sync": base.sync.model_copy(update=sync)}
    config, gpus = base.model_copy(update=changed), [str(i) for i in range(int(run["num_gpus"]))]
    ranks = min(int(run["ranks"]), len(gpus))
    with machine(gpus):
        try:
            check_seats(config, ranks, trains_on_gpu=True)
        except ValueError:
            return
    for group in nccl_groups(config, gpus, 2, ranks, 0):
        assert not crowded(group)


def one_node(**sync: str) -> RlConfig:
    return load_config(
        RlConfig, EXAMPLES / "one_node_8gpu.toml", [f"sync.{name}={value}" for name, value in sync.items()]
    )


EIGHT = [str(i) for i in range(8)]


@pytest.mark.parametrize(
    ("sync", "gpus", "ranks", "message"),
    [
        (
            {"transport": "distributed", "backend": "nccl"},
            EIGHT,
            8,
            r"NCCL refuses a group .* set sync.transport = 'ipc'",
        ),
        ({"transport": "ipc"}, EIGHT, 4, r"a training rank on every GPU, and 4 ranks share this machine's 8"),
        (
            {"transport": "disk"},
            EIGHT[:4],
            4,
            r"rollout.servers = 2 on a machine with 4 GPUs; each needs 4 \(--tp-size",
        ),
        ({"transport": "distributed", "backend": "gloo"}, EIGHT, 8, None),
        ({"transport": "ipc"}, EIGHT, 8, None),
        ({"transport": "ipc"}, [], 2, None),  # shared memory on a CPU
    ],
)
def test_what_cannot_share_gpus_is_refused(
    sync: dict[str, str], gpus: list[str], ranks: int, message: str | None
) -> None:
    with machine(gpus):
        if message is None:
            check_seats(one_node(**sync), ranks, trains_on_gpu=bool(gpus))
        else:
            with pytest.raises(ValueError, match=message):
                check_seats(one_node(**sync), ranks, trains_on_gpu=True)


def test_a_run_has_a_gpu_for_every_rank_and_host_memory_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text('{"prompt": "p", "answer": "a"}\n')
    file = tmp_path / "config.toml"
    file.write_text(
        f'run_dir = "{tmp_path}/run"\nmodel.path = "{tmp_path}/model"\ndata.train = "{tmp_path}/train.jsonl"\n'
        "budget.tokens = 64\n"
        "rollout = {prompts_per_step = 1, samples_per_prompt = 2, max_response_tokens = 64, servers = 1}\n"
        "train = {steps = 1, micro_batch_tokens = 128}\n"
    )
    config = load_config(RlConfig, file)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # of a launcher, on a machine without GPUs
    with machine([]):
        check_start(Start(config=config, world_size=2))
        monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**10))
        with pytest.raises(ValueError, match=r"needs about .* GiB of host memory and 0.0 GiB are free"):
            check_start(Start(config=config, world_size=2))
        monkeypatch.undo()
        on_cpu = preflight.required_bytes(config, load_architecture(config.model.path), 2, serves=True)
    with machine(["0", "1"]):
        check_start(Start(config=config, world_size=2))
        on_gpu = preflight.required_bytes(config, load_architecture(config.model.path), 2, serves=True)
        with pytest.raises(ValueError, match="4 training ranks on a machine with 2 GPUs, and each needs one"):
            check_start(Start(config=config, world_size=4))
    # Without servers it does not matter what these could not do.
    slow = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"token_deadline_seconds": 1e-9, "max_response_tokens": 8})}
    )
    with machine([]), pytest.raises(ValueError, match="rollout.engine 'embedded' generates on the CPU"):
        check_start(Start(config=slow, world_size=1))
    assert not list(preflight.problems(slow, load_architecture(config.model.path), 1, serves=False))
    assert 0 < on_gpu < on_cpu, "embedded servers and copies stay in host memory, the ranks' state does not"


def test_nccl_and_ipc_need_a_trainer_on_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    attached = one_node(transport="distributed", backend="nccl")
    attached = attached.model_copy(update={"rollout": attached.rollout.model_copy(update={"urls": ("http://a:1",)})})
    with machine(EIGHT):
        check_seats(attached, 8, trains_on_gpu=True)
        with pytest.raises(ValueError, match="sync.backend 'nccl' needs a run that trains on GPUs"):
            check_seats(attached, 8, trains_on_gpu=False)
        with pytest.raises(ValueError, match="this torch finds none while the machine has 8"):
            check_seats(one_node(transport="ipc"), 8, trains_on_gpu=False)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_memory_that_others_open_is_not_in_expandable_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in [
        ("expandable_segments:True", name),
        ("max_split_size_mb:64, expandable_segments:True", name),
        ("expandable_segments:False", None),
        ("max_split_size_mb:64", None),
        ("", None),
    ]:
        assert expandable_segments({name: text}) == expected
    monkeypatch.setenv(name, "expandable_segments:True")
    with machine(EIGHT):
        check_seats(one_node(transport="disk"), 8, trains_on_gpu=True)
        with pytest.raises(ValueError, match=f"{name} asks for expandable segments, and sync.transport 'ipc'"):
            check_seats(one_node(transport="ipc"), 8, trains_on_gpu=True)


def test_servers_open_the_memory_of_a_trainer_with_the_same_torch_only(tmp_path: Path) -> None:
    own = torch.__version__.partition("+")[0]
    rollout = one_node().rollout
    python = tmp_path / "python"
    config = rollout.model_copy(update={"sglang_python": python})
    for version, refused in [(f"{own}+cu130", False), (own, False), ("1.2.3+cu130", True), ("", True)]:
        python.write_text(f"#!/bin/sh\necho {version}\n")
        python.chmod(0o755)
        with machine(EIGHT):
            if refused:
                with pytest.raises(ValueError, match=rf"has torch \(?{version[:5] or 'none'}\)?, this process {own}"):
                    server.check_same_torch(config)
            else:
                server.check_same_torch(config)
        with machine([]):
            server.check_same_torch(config)
    assert server.torch_version(Path(sys.executable)) == own


@pytest.mark.parametrize(
    ("servers", "arguments", "idle"),
    [(8, (), 0), (3, (), 5), (3, ("--tp-size", "2"), 2), (1, ("--tp-size", "8"), 0), (0, (), 0)],
)
def test_gpus_that_do_not_generate_are_counted(servers: int, arguments: tuple[str, ...], idle: int) -> None:
    rollout = GenerationSection(engine="sglang", servers=servers, sglang_arguments=arguments, max_response_tokens=64)
    with machine(EIGHT):
        assert server.idle_gpus(rollout) == idle
        assert server.idle_gpus(rollout.model_copy(update={"engine": "embedded"})) <= 0
    with machine([]):
        assert server.idle_gpus(rollout) <= 0


# The trainer's own --------------------------------------------------------------------------------------------------


def test_a_rank_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    device.set_local_device(1)
    with pytest.raises(ValueError, match="rank 2 of this machine finds 2 GPUs, and each rank needs one"):
        device.set_local_device(2)
    assert taken == [1]


def test_gpus_that_torch_cannot_use_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for rank in (0, 1):
        with machine(EIGHT):
            device.set_local_device(rank)
        with machine([]):
            device.set_local_device(rank)
    (message,) = caplog.messages
    assert f"trains on the CPU: the machine has 8 GPUs, and torch {torch.__version__} cannot use them" in message


class Driver:
    """Stands in for torch.cuda.cudart()."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.code:
            self.locked[address] = num_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_locked_memory_is_as_large_as_asked_for_and_unlocked_with_its_last_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver()
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    flat = device.host_empty(4100)
    assert (flat.dtype, flat.shape) == (torch.uint8, (4100,))
    assert driver.locked == {flat.data_ptr(): 4100}, "not 8192"
    view = flat.view(torch.float32)[1:].view(-1, 2)
    del flat
    view.fill_(1.5)
    assert list(driver.locked.values()) == [4100]
    assert float(view.sum()) == 1024 * 1.5
    del view
    assert driver.locked == {}
    assert device.host_empty(0).shape == (0,)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(code=2))
    with pytest.raises(device.Fault, match=r"CUDA cannot lock 0.00 GiB of host memory \(error 2\)"):
        device.host_empty(4100)
