"""Tells the person at the terminal in a few lines what runs where, and what to do when it has ended."""

from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import RlConfig, RunConfig
from megatron_rl.errors import EXIT_DONE
from megatron_rl.families import Architecture
from megatron_rl.place import Place
from megatron_rl.terminal import table

_SIZES = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context", "data")
_URLS = 4


def overview(
    config: RunConfig,
    architecture: Architecture,
    layout: Layout,
    place: Place,
    device: str,
    steps: tuple[int, int],
    urls: Sequence[str] | None = None,
) -> str:
    """Return the table of what runs where. device: what a rank trains on. steps: the first, and how many the run has.
    urls: of the servers; None without any."""
    total, active = architecture.num_parameters(), architecture.num_active_parameters()
    sizes = ", ".join(f"{name.replace('_', ' ')} {getattr(layout, name)}" for name in _SIZES if _counts(layout, name))
    ranks = f"{layout.world_size} {'rank' if layout.world_size == 1 else 'ranks'} on {device}"
    machines = f" of {place.num_nodes} machines" if place.num_nodes > 1 else ""
    rows = [
        (
            "model",
            f"{config.model.path}, {_count(total)} parameters" + f" ({_count(active)} active)" * (active < total),
        ),
        ("training", f"{ranks}{machines}{f': {sizes}' if sizes else ''}; {config.model.dtype}"),
    ]
    if (lora := config.lora) is not None:
        trained = f"{_count(lora.num_parameters(architecture))} parameters beside frozen weights"
        rows.append(("adapters", f"{trained}, rank {lora.rank}, {', '.join(lora.targets_of(architecture))}"))
    if isinstance(config, RlConfig):
        rows.append(("servers", _servers(config, urls)))
        if urls is not None:
            rows.append(("weights", f"to the servers by {config.sync.transport}"))
    first, last = steps
    rows.append(("run", f"{config.run_dir}, steps {first} to {last - 1}" if first < last else str(config.run_dir)))
    return table(rows)


def ending(config: RunConfig, command: str, code: int, checkpoint: Path | None, num_done: int) -> str:
    """Return the lines at the end of a run: where its model is, and what can be done next. checkpoint: the newest
    one."""
    if code == EXIT_DONE:
        model = config.run_dir / "hf"
        evaluate = f"megatron-rl evaluate BENCHMARKS.toml --model {model} --output {config.run_dir}/evaluation"
        lines = [f"done: {num_done} steps; the model is in {model}", "next:"]
        return "\n".join([*lines, f"  megatron-rl report {config.run_dir}", f"  {evaluate}"])
    if checkpoint is None:
        return "stopped before the first checkpoint, so there is nothing to resume"
    return f"stopped; the checkpoint is {checkpoint}\nnext: the same `megatron-rl {command}` with --resume"


def _counts(layout: Layout, name: str) -> bool:
    return int(getattr(layout, name)) > 1


def _servers(config: RlConfig, urls: Sequence[str] | None) -> str:
    if urls is None:
        return "none; responses come from a file"
    more = f" and {len(urls) - _URLS} more" if len(urls) > _URLS else ""
    whose = " of others" if config.rollout.urls else ""
    return f"{len(urls)} {config.rollout.engine}{whose} at {', '.join(urls[:_URLS])}{more}"


def _count(number: float) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"
