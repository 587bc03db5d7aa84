"""This module alone knows which device this run uses. It lets unmodified megatron-core run without CUDA.

`torch_device()`, `backend()`, `set_local_device()` and the small functions below them are what the rest of the
package calls; no other module says "cuda". `import_megatron()` must run before anything imports `megatron.core`; with
CUDA it does nothing, without CUDA it adapts the following, each because megatron-core 0.19.2 names CUDA
unconditionally there:

1.  `torch.cuda.current_device()` answers `torch.device("cpu")`: megatron passes it as `device=` everywhere.
2.  `Tensor.cuda()` returns the tensor and `Tensor.record_stream()` does nothing: there is one memory and one stream.
3.  `torch.cuda.synchronize, Stream, Event, stream, current_stream, default_stream` become inert: the token dispatcher,
    the DDP buckets and the pipeline schedules order work by streams that a CPU does not have.
4.  `torch.cuda.get_rng_state, set_rng_state, manual_seed` and megatron's own pair of RNG accessors use the CPU
    generator: the RNG tracker and activation recomputation save and restore through them.
5.  `maybe_move_tensor_to_cpu(as_numpy=True)` converts to numpy: gloo's all-to-all takes lists as split sizes, and the
    original converts CUDA tensors only.
6.  `torch.cuda.FloatTensor` and its kin are the CPU types, and `Tensor.type()` without arguments answers
    `torch.cuda.X`: the optimizer groups parameters and asserts by these strings.
7.  Tensor factories called with `device="cuda"` inside `megatron.core` make CPU tensors, through a proxy for the name
    `torch` in those modules alone. A global TorchFunctionMode would reach everybody's code and costs more.
8.  `megatron.core.transformer.moe.ops.paged_stash` is an empty stand-in when triton is missing: it is imported
    unconditionally and used on CUDA alone.
9.  Uneven all-gather and reduce-scatter (expert-tensor with expert parallelism) go through padded equal-sized
    collectives: gloo refuses uneven ones.
10. `torch.compile` is the identity while megatron is imported: its `jit_fuser` decorators would start a C++ compiler at
    the first step.
"""

import functools
import importlib
import importlib.util
import logging
import mmap
import os
import platform
import resource
import sys
import time
import types
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch

from megatron_rl.errors import Fault
from megatron_rl.gpus import visible_gpus
from megatron_rl.unloadable import unloadable_counts_as_absent
from megatron_rl.versions import missing_megatron

log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "as_tensor", "randint", "linspace")
_FREE_EVERY_SECONDS = 0.1


def on_cuda() -> bool:
    """Tell whether this process trains on a CUDA device. `MEGATRON_RL_DEVICE=cpu` forces the CPU path."""
    return os.environ.get("MEGATRON_RL_DEVICE") != "cpu" and torch.cuda.is_available()


def compute_capability() -> tuple[int, int] | None:
    """Return the compute capability of the CUDA device that this process uses; None on a CPU."""
    return torch.cuda.get_device_capability() if on_cuda() else None


def torch_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else torch.device("cpu")


def backend() -> str:
    """Name the collective backend of the training process groups."""
    return "nccl" if on_cuda() else "gloo"


def set_local_device(local_rank: int) -> None:
    """Take the GPU of this rank's number on its machine; nothing on a CPU, which the log tells where there are GPUs.
    ValueError when there are not so many."""
    if not on_cuda():
        if local_rank == 0 and (gpus := visible_gpus()):
            log.warning(
                "this run trains on the CPU: the machine has %d GPUs, and torch %s cannot use them; install torch for "
                "CUDA (docs/gpu.md), or set MEGATRON_RL_DEVICE=cpu",
                len(gpus),
                torch.__version__,
            )
        return
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {local_rank} of this machine finds {torch.cuda.device_count()} GPUs, and each rank needs one; start "
            "fewer (--nproc, torchrun --nproc_per_node), or name more in CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)


def use_in_thread(where: torch.device) -> None:
    """Choose the device of a new thread, at its start. Without this a thread has the first device, and pinned memory
    would make a context there."""
    if where.type == "cuda":
        torch.cuda.set_device(where)


def compiled(function: Function) -> Function:
    """Compile a function of a tensor and more with torch.compile, which makes a kernel or two of its operations. A call
    whose tensor is not on a GPU runs the function as it is."""
    fast = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def call(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return fast()(first, *args, **kwargs) if first.is_cuda else function(first, *args, **kwargs)

    return call  # type: ignore[return-value]


def device_name() -> str:
    """Return the driver's name of this process's device, such as "NVIDIA H200"; on a CPU its architecture."""
    return torch.cuda.get_device_name() if on_cuda() else f"CPU ({platform.machine()})"


def memory_bytes() -> int:
    """Return the size of the device's memory, free or not; on a CPU that of the machine."""
    if on_cuda():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def synchronize() -> None:
    """Wait until the device has done all that it was given."""
    if on_cuda():
        torch.cuda.synchronize()


def host_empty(num_bytes: int) -> torch.Tensor:
    """Allocate uint8 [num_bytes] in host memory, from and to which a device copies while the host goes on.

    Each call locks memory anew: keep what is used again. Raise Fault where the driver cannot lock so much.
    """
    if not on_cuda() or not num_bytes:
        return torch.empty(num_bytes, dtype=torch.uint8)
    return torch.frombuffer(_LockedMemory(num_bytes), dtype=torch.uint8)


class _LockedMemory(mmap.mmap):
    """Holds host memory that CUDA has locked, to the page. What torch locks itself it rounds up to a power of two."""

    _address = 0

    def __new__(cls, num_bytes: int) -> Self:
        self = super().__new__(cls, -1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.madvise(mmap.MADV_DONTFORK)  # a child's copy would have the parent write elsewhere than the device reads
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
        if code:
            raise Fault(
                f"CUDA cannot lock {num_bytes / 2**30:.2f} GiB of host memory (error {code}); see what the machine has "
                "free, and the limits of the container"
            )
        self._address = address
        return self

    def __del__(self) -> None:  # with the last tensor on it
        if self._address:
            torch.cuda.cudart().cudaHostUnregister(self._address)


def send(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to `where`. The host does not wait for the copy; what follows on the device does."""
    return tensor.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else tensor.to(where)


def peak_memory_bytes() -> int:
    """Return the most that tensors took on the device since `reset_peak_memory`, without what the allocator holds in
    reserve and the CUDA context. On a CPU return the most that this process ever had resident."""
    if on_cuda():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Start the peak again from what is allocated now. On a CPU it cannot be reset and stays."""
    if on_cuda():
        torch.cuda.reset_peak_memory_stats()


def give_back_memory() -> None:
    """Return memory that tensors no longer use to the driver, so that other processes can have it."""
    if on_cuda():
        torch.cuda.empty_cache()


def free_bytes() -> int | None:
    """Return how much memory of this rank's GPU nobody holds; None on a CPU."""
    return torch.cuda.mem_get_info()[0] if on_cuda() else None


def wait_until_free(needed_bytes: int, seconds: float, free: Callable[[], int | None] = free_bytes) -> None:
    """Wait until so much memory of this rank's GPU is free and no more becomes free. Return at once on a CPU. Raise
    Fault after `seconds`.

    A server's answer to a release may come before the driver has its memory.
    """
    give_up = time.monotonic() + seconds
    before = free()
    while before is not None:
        time.sleep(_FREE_EVERY_SECONDS)
        found = free()
        assert found is not None
        if before >= found >= needed_bytes:
            return
        if time.monotonic() > give_up:
            raise Fault(
                f"{found / 2**30:.1f} GiB of the GPU are free {seconds:g} s after servers released their memory"
                f"{_holders()}, and training needs {needed_bytes / 2**30:.1f}; see what else runs there, or divide the "
                "model over more ranks"
            )
        before = found


def _holders() -> str:
    """Say for a message who has this GPU's memory, as far as can be told; "" on a CPU."""
    if not on_cuda():
        return ""
    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved()
    return f" (of {total / 2**30:.1f}, this rank holds {own / 2**30:.1f}, others {(total - free - own) / 2**30:.1f})"


def device_id(tensor: torch.Tensor) -> str | None:
    """Return the UUID of the GPU that the tensor is on; None on a CPU. A process that numbers the GPUs otherwise finds
    it by that."""
    return str(torch.cuda.get_device_properties(tensor.device).uuid) if tensor.is_cuda else None


def forget_shared() -> None:
    """Take back memory that other processes had opened and have closed since."""
    if on_cuda():
        torch.cuda.ipc_collect()


def import_megatron() -> None:
    """Import megatron-core, adapted to this device. Idempotent. ValueError tells how to install it."""
    with warnings.catch_warnings(), unloadable_counts_as_absent():
        warnings.simplefilter("ignore")  # "Apex is not installed" and the like: the CPU stack is meant to be without
        try:
            if on_cuda():
                importlib.import_module("megatron.core")
            elif not getattr(torch.cuda, "_megatron_rl_adapted", False):
                _adapt_torch()
                _adapt_megatron()
                torch.cuda._megatron_rl_adapted = True
        except ModuleNotFoundError:
            if missing := missing_megatron():
                raise ValueError(missing) from None
            raise
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


# -- torch ---------------------------------------------------------------------------------------------------------


class _InertStream:
    """This stands in for a CUDA stream or event: everything is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "_InertStream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> "_InertStream":
        return self

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _InertStream)

    __hash__ = None  # type: ignore[assignment]


def _adapt_torch() -> None:
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    stream = _InertStream()
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *_, **__: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = _InertStream
    cuda.current_stream = cuda.default_stream = lambda *_, **__: stream
    cuda.stream = lambda *_, **__: stream
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # torch.manual_seed calls this one
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    for name in ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Short", "Byte", "Bool", "Char"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))

    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.record_stream = lambda self, *_: None
    cpu_type = tensor.type

    @functools.wraps(cpu_type)
    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return cpu_type(self, *args, **kwargs)
        return cpu_type(self).replace("torch.", "torch.cuda.", 1)

    tensor.type = type_as_on_cuda


# -- megatron ------------------------------------------------------------------------------------------------------


class _CpuTorch(types.ModuleType):
    """This is `torch` as megatron's modules see it: every attribute is torch's, the tensor factories turn cuda into
    cpu."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    @staticmethod
    def _on_cpu(factory: Any) -> Any:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if "cuda" in str(kwargs.get("device")):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return make

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def _without_compile() -> Any:
    compile_ = torch.compile

    def eager(model: Any = None, **_: Any) -> Any:
        return model if model is not None else eager

    torch.compile = eager
    try:
        yield
    finally:
        torch.compile = compile_


def _adapt_megatron() -> None:
    if importlib.util.find_spec("triton") is None:
        stand_in = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        stand_in.__getattr__ = lambda name: None  # type: ignore[method-assign]
        sys.modules[stand_in.__name__] = stand_in

    with _without_compile():
        for name in (
            "distributed",
            "dist_checkpointing",
            "dist_checkpointing.serialization",
            "distributed.finalize_model_grads",
            "models.gpt.gpt_layer_specs",
            "models.gpt.gpt_model",
            "optimizer",
            "parallel_state",
            "pipeline_parallel",
            "tensor_parallel.mappings",
            "tensor_parallel.random",
            "transformer.moe.moe_logging",
            "transformer.moe.token_dispatcher",
            "transformer.moe.router_replay",
        ):
            importlib.import_module(f"megatron.core.{name}")

    proxy = _CpuTorch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = proxy  # type: ignore[attr-defined]

    random = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher = sys.modules["megatron.core.transformer.moe.token_dispatcher"]
    dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # type: ignore[attr-defined]

    mappings = sys.modules["megatron.core.tensor_parallel.mappings"]
    mappings._gather_along_first_dim = _padded_gather(mappings._gather_along_first_dim)  # type: ignore[attr-defined]
    mappings._reduce_scatter_along_first_dim = _sliced_reduce_scatter(  # type: ignore[attr-defined]
        mappings._reduce_scatter_along_first_dim
    )


def _padded_gather(even: Any) -> Any:
    """All-gather tensors of unequal first dimensions by padding to the longest, for gloo."""

    def gather(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return even(input_, group, None, use_global_buffer)
        sizes = [int(n) for n in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    return gather


def _sliced_reduce_scatter(even: Any) -> Any:
    """Reduce and scatter into unequal first dimensions as all-reduce and slice, for gloo."""

    def reduce_scatter(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return even(input_, group, None, use_global_buffer)
        total = input_.contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        return torch.split(total, [int(n) for n in input_split_sizes])[group.rank()]

    return reduce_scatter
