"""This module writes a plan in words."""

import json
from collections.abc import Iterator
from typing import Any

from megatron_rl.plan.servers import GIB
from megatron_rl.simulation.forecast import PARTS


def as_text(plan: dict[str, Any]) -> str:
    lines: list[str] = []
    for title, part in (
        ("model", _model(plan)),
        ("topology", _topology(plan)),
        ("layout", _layout(plan)),
        ("training", _training(plan)),
        ("budget", _budget(plan)),
        ("replay", _replay(plan)),
        ("responses", _responses(plan)),
        ("servers", _servers(plan)),
        *(("memory", _memory(name, parts, plan)) for name, parts in plan.get("memory", {}).items()),
        ("step", _step(plan)),
        ("launch", iter(plan["launch"])),
        ("as it is", _as_it_is(plan)),
        *(("suggested" if i == 0 else "or", _suggestion(one)) for i, one in enumerate(plan.get("suggestions", ()))),
    ):
        lines += [f"{title if number == 0 else '':<10}{line}" for number, line in enumerate(part)]
    return "\n".join(lines) + "\n"


def _model(plan: dict[str, Any]) -> Iterator[str]:
    if "model" not in plan:
        yield "a teacher's, at an endpoint; nothing is served here"
        return
    model = plan["model"]
    yield f"{model['parameters']:,} parameters, {model['active_parameters']:,} of them active"
    if "shape" in plan:
        yield f"by {plan['shape']}, since the model is not there yet"
    if "lora" in plan:
        lora = plan["lora"]
        where = ", ".join(lora["targets"])
        yield f"all of them frozen, beside {lora['parameters']:,} in adapters of rank {lora['rank']} ({where})"


def _topology(plan: dict[str, Any]) -> Iterator[str]:
    cluster = plan["cluster"]
    nodes, gpus, serving = cluster["nodes"], cluster["gpus_per_node"], cluster["serving_nodes"]
    several = f"{nodes} nodes of {gpus} GPUs" if nodes > 1 else f"1 node of {gpus} GPU{'' if gpus == 1 else 's'}"
    if "model" not in plan:
        yield "one machine without a GPU"
    elif "layout" not in plan:
        yield f"{several}, which serve"
    elif serving:
        yield f"{several}: {serving * gpus} GPUs serve, {(nodes - serving) * gpus} train"
    elif "servers" in plan:
        yield f"{several}, which train and serve in turn"
    else:
        yield f"{several}, which train"


def _layout(plan: dict[str, Any]) -> Iterator[str]:
    if "layout" not in plan:
        return
    layout = plan["layout"]
    yield ", ".join(f"{name} {size}" for name, size in layout.items() if name != "layers_per_stage")
    if "layers_per_stage" in layout:
        yield f"layers per stage {', '.join(map(str, layout['layers_per_stage']))}"


def _training(plan: dict[str, Any]) -> Iterator[str]:
    if "training" not in plan:
        return
    training = plan["training"]
    if training["optimizer_steps"]:
        yield f"{training['optimizer_steps']:,} optimizer steps"
        yield f"{training['warmup_steps']:,} of them warm-up"
    else:
        epochs = training["epochs"]
        yield f"{epochs} epoch{'' if epochs == 1 else 's'}; the number of optimizer steps follows from the data"
        share = training["warmup_share"]
        yield f"warm-up over {share:.2%} of them" if share is not None else "warm-up as optimizer.warmup_steps says"
    yield f"{training['step_tokens']:,} tokens at most per optimizer step"
    yield _per_rank(training)
    yield "data " + ", ".join(f"{path} {share:.1%}" for path, share in training["weights"].items())


def _budget(plan: dict[str, Any]) -> Iterator[str]:
    budget = plan.get("budget")
    if budget is None:
        return
    if "tokens" not in budget:
        yield f"none; {budget['responses_of_first_phase']:,} responses per phase"
        return
    world = plan["layout"]["world_size"]
    product = f" x {world} = {budget['step_tokens']:,}" if budget["scope"] == "per_gpu" else ""
    yield f"{budget['tokens']:,}{product} tokens per optimizer step"
    yield from (f"of them {count:,} of {domain}" for domain, count in budget.get("domain_tokens", {}).items())
    steps = budget["optimizer_steps"]
    yield f"{steps} optimizer step{'' if steps == 1 else 's'} in each rollout phase"
    yield _per_rank(budget)
    yield f"the first phase samples {budget['responses_of_first_phase']:,} responses"
    yield f"they fill the budget if they have {budget['filling_mean_tokens']:,.1f} tokens in the mean"
    yield f"{budget['min_responses']:,} responses of the longest length allowed would fill it"


def _per_rank(numbers: dict[str, int]) -> str:
    count = numbers["min_micro_batches"]
    batches = f"{count} micro-batch{'' if count == 1 else 'es'}"
    return f"each data-parallel rank trains {numbers['tokens_per_data_rank']:,} of them, in at least {batches}"


def _replay(plan: dict[str, Any]) -> Iterator[str]:
    if "router_replay" not in plan:
        return
    replay = plan["router_replay"]
    yield (
        f"{replay['wire_bytes'] / 1e9:,.1f} GB of routed experts through rank 0 in a step, of which it keeps "
        f"{replay['kept_bytes'] / 1e9:,.1f} GB in memory and in the journal of every step since the last checkpoint"
    )


def _responses(plan: dict[str, Any]) -> Iterator[str]:
    responses = plan.get("responses")
    if responses is None:
        return
    if "benchmarks" not in responses:
        told = f"{responses['prompts']:,} prompts x {responses['samples']} samples = {responses['total']:,}"
        yield f"{told} of {responses['of']}" if "of" in responses else told
        return
    unknown = []
    for name, one in responses["benchmarks"].items():
        if one["prompts"] is None:
            unknown.append(f"{name} x {one['samples']}")
        else:
            yield f"{name}: {one['prompts']:,} prompts x {one['samples']} samples = {one['total']:,}"
    if responses["total"]:
        yield f"{responses['total']:,} in all" + (", without the next" if unknown else "")
    if unknown:
        yield f"data that are not here yet, so prompts are not counted, x samples: {', '.join(unknown)}"


def _servers(plan: dict[str, Any]) -> Iterator[str]:
    if "servers" not in plan:
        return
    servers = plan["servers"]
    gpus = servers["gpus_each"]
    where = f"over {gpus} GPU{'' if gpus == 1 else 's'}" if gpus else "on the CPU"
    yield f"{servers['per_node']} per node, each {where}"
    if servers["idle_gpus"]:
        told = f"{servers['idle_gpus']} of a node's {plan['cluster']['gpus_per_node']} GPUs do not generate"
        yield f"{told}: raise rollout.servers, or --tp-size in rollout.sglang_arguments"
    yield f"each answers up to {servers['slots']} requests at a time"
    held = servers["full_length_responses"]
    longest = f"{servers['max_sequence_tokens']:,} tokens with the prompt"
    yield f"its cache holds {held:,} responses of full length ({longest})"
    if held < servers["slots"] and "step" in plan:
        yield f"`step` is predicted as if it held {servers['slots']:,}; `--suggest` counts what it holds"


def _memory(name: str, parts: dict[str, int], plan: dict[str, Any]) -> Iterator[str]:
    limit = plan["cluster"]["gpu_memory_gb"]
    of_limit = f" of {limit:g}" if limit else ""
    where = f"{of_limit} on the fullest {name.replace('_', ' ')}" if name != "host" else " of a node's host memory"
    yield f"{parts['total'] / GIB:.1f} GiB{where}, estimated:"
    yield ", ".join(f"{part.replace('_', ' ')} {n / GIB:.2f}" for part, n in parts.items() if part != "total")


def _step(plan: dict[str, Any]) -> Iterator[str]:
    step = plan.get("step")
    if step is None:
        return
    if "unknown" in step:
        yield f"time not predicted: {step['unknown']}"
        return
    seconds = {part: step[f"{part}_seconds"]["mean"] for part in PARTS}
    whole, speed = step["step_seconds"]["mean"], step["tokens_per_second"]
    told = ", ".join(f"{part} {_short(value)}" for part, value in seconds.items() if value)
    hours = whole * step["run_steps"] / 3600
    yield f"{_short(whole)} s predicted: {told}; {step['run_steps']:,} steps take {hours:,.1f} h"
    yield (
        f"{speed['mean']:,.0f} trained tokens/s, {step['tokens_per_second_per_gpu']:,.0f} per GPU, varying "
        f"{speed['variation']:.1%} over steps"
    )
    if step["host"]:
        waits = sorted(step["host"].items(), key=lambda item: -item[1])
        told = ", ".join(f"{part.replace('_', ' ')} {_short(value)}" for part, value in waits if value >= 0.005)
        yield f"GPUs wait for rank 0's processor: {told or 'not at all'}"
    causes = sorted(step["idle"].items(), key=lambda item: -item[1])
    idle = ", ".join(f"{cause.replace('_', ' ')} {share:.0%}" for cause, share in causes if share >= 0.005)
    yield f"GPUs idle {1 - step['busy']:.0%} of the time: {idle}"
    yield f"by the rates of {step['rates']}; lengths {step['lengths']}"
    if "without_teacher" in step:
        yield "the teacher's seconds are not counted, since these rates have no [host.teacher] (docs/simulator.md)"
    if "engine_gpus" in step:
        yield (
            f"these rates are of engines of {step['rates_of_gpus']} GPUs; here one has {step['engine_gpus']}: "
            "`--suggest` scales them, this line does not"
        )


def _as_it_is(plan: dict[str, Any]) -> Iterator[str]:
    """Yield what the suggestions compare with. Their estimate is another one than that of `step`."""
    if "as_it_is" in plan:
        yield from _suggestion(plan["as_it_is"])
        yield "by the estimate of the suggestions, which counts what caches hold and ranks exchange; `step` does not"


def _suggestion(found: dict[str, Any]) -> Iterator[str]:
    parts = ", ".join(f"{name} {_short(value)}" for name, value in found["seconds"].items() if value)
    yield f"{_short(found['step_seconds'])} s a step predicted: {parts}"
    memory = {**found["memory"], "host": found["host_memory"]}
    yield ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f} GiB" for name, size in memory.items())
    for key, value in found["set"].items():
        yield f"--set '{key}={json.dumps(value)}'"


def _short(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"
