"""Moves a rank's gradients and optimizer states between its device and host memory.

What is moved is a tensor's storage: it is emptied and filled again, so every tensor and view on it stays the object
that it is, and megatron's buffers, their buckets and the parameters in them need not know.

megatron-core 0.19.2 has an optimizer of its own for states in host memory (cpu_offloading/hybrid_optimizer.py). It
steps on the host, keeps its states under other names than checkpoints want, and runs on CUDA alone (on a CPU it finds
nothing to offload, and fails at its first step). Here the device steps, a part of the states after the other; copies
and steps take turns.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rl import device
from megatron_rl.model.build import Model

device.import_megatron()

from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer  # noqa: E402

_STATES = 3  # of a parameter: itself and two moments


@dataclass(frozen=True, slots=True)
class _Away:
    """Records a storage that is off the device. storage: the emptied one. copy: uint8, what was in it; None where that
    is not needed."""

    storage: torch.UntypedStorage
    num_bytes: int
    copy: Tensor | None


class HostMemory:
    """Takes storages of tensors off the device and puts them back. It keeps its own memory until `forget`."""

    def __init__(self) -> None:
        self._known: dict[int, _Away] = {}

    def offload(self, tensors: Iterable[Tensor], contents: bool = True) -> None:
        """Take those of the tensors off the device that are on it. contents: keep them; otherwise the tensors come back
        as zeros.

        On a CPU what numpy has looked at (an export, say) cannot be emptied any more, and stays.
        """
        leaving = [storage for storage in _storages(tensors) if storage.nbytes() and storage.resizable()]
        for storage in leaving:
            known = self._known.get(storage._cdata)
            if known is None:
                copy = device.host_empty(storage.nbytes()) if contents else None
                known = self._known[storage._cdata] = _Away(storage, storage.nbytes(), copy)
            if known.copy is not None:
                known.copy.copy_(_bytes_of(storage), non_blocking=True)
        device.synchronize()
        for storage in leaving:
            storage.resize_(0)

    def reload(self, tensors: Iterable[Tensor]) -> None:
        """Put those of the tensors on the device that are not on it."""
        for away in self._away(tensors):
            away.storage.resize_(away.num_bytes)
            found = _bytes_of(away.storage)
            if away.copy is None:
                found.zero_()
            else:
                found.copy_(away.copy, non_blocking=True)
        device.synchronize()

    def num_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Count the bytes that the device would need for those of the tensors that are not on it."""
        return sum(away.num_bytes for away in self._away(tensors))

    def read(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the same numbers, wherever they are: the tensor itself, or one in host memory."""
        storage = tensor.untyped_storage()
        if storage.nbytes() or not tensor.numel():
            return tensor
        copy = self._known[storage._cdata].copy
        assert copy is not None
        return copy.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def forget(self) -> None:
        """Forget all storages, which may be others from here on. All of them must be on the device."""
        self._known.clear()

    def _away(self, tensors: Iterable[Tensor]) -> list[_Away]:
        found = (self._known.get(storage._cdata) for storage in _storages(tensors) if not storage.nbytes())
        return [away for away in found if away is not None]


class Offloader:
    """Moves a trainer's gradients and optimizer states between device and host memory.

    piece_bytes: of states that live in host memory, so much comes to the device at once.
    """

    piece_bytes = 2**30

    def __init__(self, model: Model, optimizer: Any, offload_fraction: float = 0.0) -> None:
        """Take the states that live in host memory off the device. offload_fraction: of the optimizer's states, at
        least so much is on the device only in a step. It needs megatron's distributed optimizer."""
        self._model, self._host = model, HostMemory()
        self._parts = trained_parts(optimizer)
        self._residents: dict[int, Tensor] = {}  # by id, parameters whose states live in host memory
        if offload_fraction:
            parameters = [p for part in self._parts for p in _parameters(part)]
            missing = offload_fraction * sum(p.numel() for p in parameters)
            for p in parameters:
                if missing > 0:
                    self._residents[id(p)] = p
                    missing -= p.numel()
            for part in self._parts:
                part.step_with_ready_grads = lambda part=part: self._step_in_pieces(part)
            self._settle()

    def offload(self) -> None:
        """Take all states, and gradients without their contents, off the device. Memory goes back to the driver."""
        self._host.offload(self._gradients(), contents=False)
        self._host.offload(self._states())
        device.give_back_memory()

    def reload(self) -> None:
        """Bring back what has left, but for states that live in host memory."""
        self._host.reload(self._missing())

    @property
    def missing_bytes(self) -> int:
        """The bytes that `reload` needs on the device."""
        return self._host.num_bytes(self._missing())

    def read(self, tensor: Tensor) -> Tensor:
        """Return a state's numbers, wherever they are."""
        return self._host.read(tensor)

    @contextmanager
    def for_loading(self) -> Iterator[None]:
        """Keep everything on the device inside the block, where it may be replaced."""
        self._host.reload(self._states())
        self._host.forget()
        yield
        self._settle()

    def _missing(self) -> list[Tensor]:
        stay = {storage._cdata for storage in _storages(self._states(self._residents.values()))}
        return self._gradients() + [x for x in self._states() if x.untyped_storage()._cdata not in stay]

    def _settle(self) -> None:
        self._host.offload(self._states(self._residents.values()))
        device.give_back_memory()

    def _weights(self) -> list[Tensor]:
        return [p.data for gpt in self._model.gpts for p in gpt.parameters()]

    def _gradients(self) -> list[Tensor]:
        return [p.main_grad for gpt in self._model.gpts for p in gpt.parameters() if p.requires_grad]

    def _states(self, parameters: Iterable[Tensor] | None = None) -> list[Tensor]:
        """Return moments, and fp32 weights beside bf16 ones, of these or all of the optimizer's parameters. Where the
        weights are fp32 themselves the optimizer's are views of them."""
        weights = {storage._cdata for storage in _storages(self._weights())}
        chosen = None if parameters is None else {id(p) for p in parameters}
        found = []
        for part in self._parts:
            for p in _parameters(part):
                if chosen is None or id(p) in chosen:
                    found += [p.data] if p.untyped_storage()._cdata not in weights else []
                    states = part.optimizer.state.get(p, {}).values()
                    found += [x for x in states if torch.is_tensor(x) and x.shape == p.shape]
        return found

    def _step_in_pieces(self, part: Any) -> bool:
        """Do megatron's `step_with_ready_grads` piece by piece: for each piece of the parameters it is as if there were
        no others."""
        pieces = list(self._pieces(part))
        counts = [group.get("step") for group in part.optimizer.param_groups]
        for i, piece in enumerate(pieces):
            with _only(part, piece, counts):
                self._host.reload(self._states(piece))
                if i < len(pieces) - 1:
                    MixedPrecisionOptimizer.step_with_ready_grads(part)
                else:
                    type(part).step_with_ready_grads(part)  # which ends with the exchange of weights
            self._host.offload(self._states([p for p in piece if id(p) in self._residents]))
        return True

    def _pieces(self, part: Any) -> Iterator[list[Tensor]]:
        """Yield an optimizer's parameters: first those whose states stay on the device, then the others in pieces."""
        parameters = _parameters(part)
        yield [p for p in parameters if id(p) not in self._residents]
        piece: list[Tensor] = []
        num_bytes = 0
        for p in parameters:
            if id(p) not in self._residents:
                continue
            num_bytes += _STATES * p.nbytes
            if piece and num_bytes > self.piece_bytes:
                yield piece
                piece, num_bytes = [], _STATES * p.nbytes
            piece.append(p)
        if piece:
            yield piece


def trained_parts(optimizer: Any) -> list[Any]:
    """Return those of megatron's chained optimizers that train something on this pipeline stage. With expert
    parallelism there is one for dense and one for expert parameters, and adapters may leave either without any, on all
    stages or on some: then it has no state that could be saved, and is not even whole."""

    def trains(part: Any) -> bool:
        if getattr(part, "is_stub_optimizer", False):
            return False
        buffers = getattr(part, "buffers", None)  # of whole parameters, where ranks share these
        return bool(_parameters(part)) if buffers is None else any(buffer.param_index_map for buffer in buffers)

    return [part for part in optimizer.chained_optimizers if trains(part)]


def _parameters(part: Any) -> list[Tensor]:
    """Return the parameters that an optimizer steps."""
    return [p for group in part.optimizer.param_groups for p in group["params"]]


@contextmanager
def _only(part: Any, piece: Sequence[Tensor], counts: Sequence[Any]) -> Iterator[None]:
    """Make these the only parameters that megatron's distributed optimizer knows of.

    counts: what each group counted before the step. Fused Adams count a group's steps, one with every call.
    """
    chosen = {id(p) for p in piece}
    groups = part.optimizer.param_groups
    whole = [group["params"] for group in groups]
    pairs = (("shard_fp32_from_float16_groups", "model_float16_groups"), ("shard_fp32_groups", "model_fp32_groups"))
    lists = {name: getattr(part, name) for pair in pairs for name in pair}
    for group, parameters, count in zip(groups, whole, counts, strict=True):
        group["params"] = [p for p in parameters if id(p) in chosen]
        if group["params"]:
            group.pop("step", None)
            group |= {} if count is None else {"step": count}
    for mains, models in pairs:
        kept = [
            [(main, model) for main, model in zip(*both, strict=True) if id(main) in chosen]
            for both in zip(lists[mains], lists[models], strict=True)
        ]
        setattr(part, mains, [[main for main, _ in group] for group in kept])
        setattr(part, models, [[model for _, model in group] for group in kept])
    try:
        yield
    finally:
        for group, parameters in zip(groups, whole, strict=True):
            group["params"] = parameters
        for name, groups_of in lists.items():
            setattr(part, name, groups_of)


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Return the storages of the tensors, each once, in their order."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return list({storage._cdata: storage for storage in found}.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """Return all bytes of a storage, uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
