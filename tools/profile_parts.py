"""This module finds which part of a model the time of a training step goes to, forward and backward, from
torch.profiler.

Modules are marked by name as their forward runs. An operation belongs to the innermost mark around it; one of the
backward pass to the mark around the forward operation that recorded it, which autograd links by a sequence number.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "part:"
_NODE = "autograd::engine::evaluate_function: "  # around the backward of a node, and the hooks behind it
_BACKWARD_SCOPE = 1  # at::RecordScope::BACKWARD_FUNCTION
OTHER, GRADIENTS = "other", "gradient_accumulation"


def marked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, with its operations marked as part of `part`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + part):
            return function(*args, **kwargs)

    return run


def mark_modules(modules: Iterable[tuple[torch.nn.Module, str]]) -> list[Any]:
    """Mark the forward of each module as its part. Return handles whose `remove` takes the marks off."""
    handles = []
    for module, part in modules:
        open_marks: list[Any] = []

        def enter(*_: Any, marks: list[Any] = open_marks, name: str = part) -> None:
            mark = record_function(_MARK + name)
            mark.__enter__()
            marks.append(mark)

        def leave(*_: Any, marks: list[Any] = open_marks) -> None:
            marks.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    return handles


def seconds_by_part(step: Callable[[], Any], on_cuda: bool) -> Counter[str]:
    """Return the seconds that the device was busy with each part while `step` ran. `step` must end synchronised.

    on_cuda: time of kernels, else of operations on the CPU. Collectives are a part of their own wherever they are, and
    copies between host and device too.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiled:
        step()
    events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CPU]
    seconds: Counter[str] = Counter()
    for event, part in assign(events):
        if not on_cuda:
            seconds[part] += event.self_cpu_time_total / 1e6
        for kernel in event.kernels if on_cuda else ():
            if kernel.name == event.name:  # a mark's own shadow on the device, around the kernels
                continue
            name = kernel.name.lower()
            kind = "collectives" if "nccl" in name else "copies" if name.startswith("memcpy") else part
            seconds[kind] += kernel.duration / 1e6
    return seconds


def assign(events: list[Any]) -> list[tuple[Any, str]]:
    """Return each of a profile's CPU events with its part.

    An event has the number that autograd's next node of its thread will get, so the last event with a number is the
    operation that made the node; the node's own backward has the number too, and the thread of the forward.
    """
    marks: dict[tuple[int, int], str | None] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not _is_node(event):
            marks[event.sequence_nr, event.thread] = _mark_around(event)
    found = []
    for event in events:
        part, node = _mark_around(event), _backward_of(event)
        if part is None and node is not None:
            accumulates = node.name.endswith("AccumulateGrad")
            part = GRADIENTS if accumulates else marks.get((node.sequence_nr, node.fwd_thread))
        found.append((event, part or OTHER))
    return found


def _mark_around(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith(_MARK):
            return event.name.removeprefix(_MARK)
        event = event.cpu_parent
    return None


def _is_node(event: Any) -> bool:
    return event.scope == _BACKWARD_SCOPE or event.name.startswith(_NODE)


def _backward_of(event: Any) -> Any:
    """Return the innermost node of autograd's backward pass that the event is part of."""
    while event is not None:
        if _is_node(event):
            return event
        event = event.cpu_parent
    return None
