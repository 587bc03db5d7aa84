"""Runs one rank of a parallel test: trains one step of a given plan and writes gradients, weights and log-probs.

Run by tests/parallel.py. The spec names a model directory, a layout, sequences and how to train them.
"""

import dataclasses
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import kernel_stand_ins
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from host_waits import host_waits
from reference import loss_positions, rows_by_sample
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.c3po.algorithms import chosen_algorithm, normalise
from megatron_rl.c3po.packing import cost_model, pack_micro_batches
from megatron_rl.checkpoint.distributed import MEGATRON
from megatron_rl.checkpoint.names import adapter_table
from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.config.model import ModelSection
from megatron_rl.config.schema import SftConfig
from megatron_rl.model import build, zigzag
from megatron_rl.model.backends import Installed
from megatron_rl.model.build import load_sharded_state, load_weights, local_shard, mpu, sharded_state
from megatron_rl.model.layers import FlashAttention
from megatron_rl.records import Response, Sample, Segment
from megatron_rl.sync.export import export_tensors, gathered
from megatron_rl.train.checkpointing import state
from megatron_rl.train.checkpointing.checkpoints import Checkpoints
from megatron_rl.train.run.context import TrainContext
from megatron_rl.train.step.batch import TrainSequence
from megatron_rl.train.step.objective import CrossEntropy, PolicyObjective
from megatron_rl.train.step.offload import trained_parts
from megatron_rl.train.step.prefetch import Prefetch

from megatron.core import optimizer as megatron_optimizer  # isort: skip
from megatron.core.optimizer import distrib_optimizer  # isort: skip

TRACED_AS = 100  # the first sequence, and so on


def sequences_from(spec: dict) -> list[TrainSequence]:
    samples = {row: rows for rows in rows_by_sample(spec).values() for row in rows}
    counts = [len(loss_positions(row)) for row in spec["sequences"]]
    return [
        TrainSequence(
            token_ids=np.array(row["token_ids"], np.int32),
            loss_positions=np.array(loss_positions(row), np.int32),
            weight=1.0,
            advantages=token_advantages(row),
            rollout_logprobs=np.array(row["rollout_logprobs"], np.float32),
            num_stale_tokens=row["num_stale_tokens"],
            routed_experts=np.array(row["routed_experts"], np.uint8) if "routed_experts" in row else None,
            traced_as=TRACED_AS + samples[i][0] if samples[i][0] in spec.get("traced", ()) else None,
            traced_from=sum(counts[other] for other in samples[i] if other < i),
        )
        for i, row in enumerate(spec["sequences"])
    ]


def token_advantages(row: dict) -> np.ndarray:
    """Return the advantages of a row's tokens, computed as rank 0 does."""
    recorded, teacher = np.array(row["rollout_logprobs"], np.float32), row.get("teacher_logprobs")
    segment = Segment(
        prompt_ids=np.zeros(1, np.int32),
        output_ids=np.zeros(len(recorded), np.int32),
        rollout_logprobs=recorded,
        policy_versions=np.zeros(len(recorded), np.int32),
        teacher_logprobs=None if teacher is None else np.array(teacher, np.float32),
    )
    response = Response(prompt_id=0, sample_index=0, segments=(segment,), finish_reason="stop")
    beta = row.get("teacher_coefficient", 0.0)
    sample = Sample(response=response, reward=0.0, reason="", advantage=row["advantage"], teacher_coefficient=beta)
    return sample.token_advantages(0)


def whole_logprobs(
    logprobs: list[torch.Tensor], placed: Sequence[Sequence[int]], sequences: list[TrainSequence], context: TrainContext
) -> dict[str, torch.Tensor]:
    """Return the log-probs of every sequence of this data rank on its first context-parallel rank; {} on others."""
    rank, size = mpu.get_context_parallel_rank(), context.layout.context
    out = {}
    for part, bin_ in zip(logprobs, placed, strict=True):
        start = 0
        for i in bin_:
            predicting = sequences[i].loss_positions - 1
            held = zigzag.held_positions(zigzag.padded_length(len(sequences[i].token_ids), size), size)[rank]
            mine = torch.from_numpy(np.isin(predicting, held))
            whole = part.new_zeros(len(predicting))
            whole[mine] = part[start : start + int(mine.sum())]
            start += int(mine.sum())
            dist.all_reduce(whole, group=mpu.get_context_parallel_group())
            out[f"logprobs/{i}"] = whole
        assert start == len(part)
    return out if rank == 0 else {}


class RouterCalls:
    """Records the experts that the routers of this rank used.

    by_layer: for each layer [calls][tokens, topk], with a token's experts in ascending order.
    """

    def __init__(self, context: TrainContext) -> None:
        self.by_layer: dict[int, list[torch.Tensor]] = {}
        for router in context.model.routers:
            router.register_forward_hook(lambda module, _, output: self._note(module.layer_number - 1, output[1]))

    def _note(self, layer: int, routing_map: torch.Tensor) -> None:
        self.by_layer.setdefault(layer, []).append(routing_map.nonzero()[:, 1].view(len(routing_map), -1))

    def check(self, placed: Sequence[Sequence[int]], sequences: list[TrainSequence], context: TrainContext) -> int:
        """Check that every call used the experts that came with a micro-batch, and return how often each came.

        All micro-batches come equally often, and in their order as long as nothing goes backward.
        """
        size, tensor = context.layout.context, context.layout.tensor
        times = set()
        for layer, calls in self.by_layer.items():
            expected = []
            for bin_ in placed:
                rows = []
                for i in bin_:
                    record = sequences[i].routed_experts
                    held = zigzag.held_positions(zigzag.padded_length(len(record) + 1, size), size)
                    for position in held[mpu.get_context_parallel_rank()]:
                        rows.append(sorted(record[position, layer].tolist()) if position < len(record) else None)
                rows += [None] * (-len(rows) % tensor)
                share = len(rows) // tensor
                expected.append(rows[mpu.get_tensor_model_parallel_rank() * share :][:share])

            def fits(call: torch.Tensor, rows: list[list[int] | None]) -> bool:
                return len(call) >= len(rows) and all(
                    row is None or row == own for row, own in zip(rows, call.tolist(), strict=False)
                )

            assert all(map(fits, calls, expected)), f"layer {layer}: another order in the log-prob pass"
            times |= {sum(fits(call, rows) for call in calls) for rows in expected if any(rows)}
        assert len(times) == 1, times
        return times.pop()


def own_routing(context: TrainContext, sequences: list[TrainSequence], calls: RouterCalls) -> dict[str, torch.Tensor]:
    """Return log-probs of each sequence with experts that the routers choose, and with the same experts given.

    It needs a layout of one process.
    """
    out = {}
    for i, sequence in enumerate(sequences):
        calls.by_layer.clear()
        plain = dataclasses.replace(sequence, routed_experts=None)
        (out[f"free/{i}"],) = context.trainer.logprobs([context.trainer.micro_batch([plain])])
        record = np.zeros_like(sequence.routed_experts)
        for layer, (call,) in calls.by_layer.items():
            record[:, layer] = call[: len(record)].cpu().numpy()
        given = dataclasses.replace(sequence, routed_experts=record)
        (out[f"given/{i}"],) = context.trainer.logprobs([context.trainer.micro_batch([given])])
    calls.by_layer.clear()
    return out


def fill_factors(context: TrainContext) -> None:
    """Fill each factor by its name, so that it is the same in every layout: B begins as zeros, and A would have no
    gradient."""
    table = adapter_table(context.architecture, context.config.lora)
    with torch.no_grad(), context.trainer.offloader.for_loading():
        for name, p in context.model.parameters_by_canonical_name().items():
            if name in table:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                p.copy_(local_shard(table[name], 0.05 * torch.randn(table[name].shape, generator=generator)))
        context.trainer.optimizer.reload_model_params()


def factors(context: TrainContext, read: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this rank's share of the adapters by the names that peft has."""
    parameters = context.model.parameters_by_canonical_name()
    for entry, tensors in gathered(adapter_table(context.architecture, context.config.lora).values(), parameters, read):
        yield from zip(entry.hf, tensors, strict=True)


def without_loss(sequences: list[TrainSequence], mine: Sequence[Sequence[int]], context: TrainContext) -> Prefetch:
    """Return this rank's micro-batches of the same sequences, none of whose tokens carries loss."""
    no = {
        "loss_positions": np.zeros(0, np.int32),
        "advantages": np.zeros(0),
        "rollout_logprobs": np.zeros(0, np.float32),
    }
    bare = [dataclasses.replace(one, **no, num_stale_tokens=0, traced_as=None) for one in sequences]
    return context.trainer.prefetch([[bare[i] for i in bin_] for bin_ in mine])


def poison_next_gradient(context: TrainContext) -> None:
    """Make the next gradient of one parameter of this rank NaN, once."""
    parameter = trained(context)[-1]

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        hook.remove()
        return gradient * torch.nan

    hook = parameter.register_hook(poison)


def die_in_the_backward_pass(context: TrainContext, folder: Path) -> None:
    """Kill this rank by SIGKILL in its next backward pass, while the other ranks are in it or in a later collective."""
    parameter = trained(context)[-1]

    def die(gradient: torch.Tensor) -> torch.Tensor:
        (folder / "killed_at").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
        return gradient

    parameter.register_hook(die)


def trained(context: TrainContext) -> list[torch.nn.Parameter]:
    return [p for p in context.model.parameters() if p.requires_grad]


def masters(context: TrainContext) -> dict[str, torch.Tensor]:
    """Compare the model's weights with the optimizer's fp32 weights of this rank.

    Return the share of weights that are their rounding, and the share of fp32 weights that bf16 holds exactly.
    """
    read = context.trainer.offloader.read
    pairs = [
        (weight, read(master.detach()))
        for part in trained_parts(context.trainer.optimizer)
        for weights, kept in zip(part.shard_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
        for weight, master in zip(weights, kept, strict=True)
    ]
    weights, kept = (torch.cat([tensor.detach().flatten() for tensor in side]) for side in zip(*pairs, strict=True))
    assert kept.dtype == torch.float32
    assert {p.main_grad.dtype for p in trained(context)} == {torch.float32}
    return {
        f"share_of_exact_masters/{context.rank}": (kept.bfloat16() == weights).double().mean(),
        f"share_of_masters_in_bf16/{context.rank}": (kept.bfloat16() == kept).double().mean(),
    }


def leave_and_come_back(context: TrainContext) -> None:
    """Check that gradients and states leave the device and come back in the same tensors.

    Parts that live in host memory do not come back. fp32 weights stay; the fp32 copies of bf16 ones leave.
    """
    parts = trained_parts(context.trainer.optimizer)
    mains = [p for part in parts for group in part.optimizer.param_groups for p in group["params"]]
    leaving = [p.main_grad for p in trained(context)] + (mains if context.model.dtype == torch.bfloat16 else [])
    context.trainer.offloader.offload()
    assert not any(x.untyped_storage().nbytes() for x in leaving), "something stayed"
    context.trainer.offloader.reload()
    assert all(p.main_grad.count_nonzero() == 0 for p in trained(context))
    away = sum(p.numel() for p in mains if not p.untyped_storage().nbytes())
    if context.model.dtype == torch.bfloat16:
        fraction = context.config.optimizer.offload_fraction
        share = away / sum(p.numel() for p in mains)
        assert fraction <= share <= 1 and (share < 1 or fraction == 1), share


def assert_a_pass_waits_for_all_weights(context: TrainContext, batches: Prefetch) -> None:
    """Check after a step that a pass waits for all weights, also for those whose module has no forward hook of
    megatron's."""
    context.trainer.logprobs(batches)
    for chunk in context.model.chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            assert group.param_gather_dispatched
            assert group.param_gather_handle is None


def watch_host(context: TrainContext) -> list[str]:
    """Return a list that gets what the host waits for in the forward and backward passes of the next step."""
    found: list[str] = []
    run = context.trainer._run

    def watched(*args: Any, **kwargs: Any) -> Any:
        with host_waits() as waits:
            result = run(*args, **kwargs)
        found.extend(waits)
        return result

    context.trainer._run = watched
    return found


def dense_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *_: Any, scale: float | None, **__: Any) -> Tensor:
    """Compute on a CPU what flash attention computes of packed sequences. The host reads no values."""
    places = torch.arange(len(q))
    sequence = torch.searchsorted(starts, places, right=True)
    seen = (sequence[:, None] == sequence) & (places[:, None] >= places)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).transpose(0, 1)


def main(folder: Path) -> None:
    spec = json.loads((folder / "spec.json").read_text())
    section = {name: spec[name] for name in ModelSection.model_fields if name in spec and spec[name] != "float64"}
    if spec.get("as_on_a_gpu"):
        build.installed = lambda: Installed(compute_capability=(9, 0), flash_attn_4=True, quack=True)
        FlashAttention.kernel = staticmethod(dense_attention)
        kernel_stand_ins.install()
    if spec.get("has_fused_adam"):  # what megatron's modules then find when they are imported
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    config = SftConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "threads": 1,
            "model": {"path": spec["model"], **section},
            "parallel": spec.get("parallel", {}),
            "moe": spec.get("moe", {"load_balance_coefficient": 0.0, "z_loss_coefficient": 0.0}),
            "optimizer": {"learning_rate": 1e-3, "clip_grad": spec.get("clip_grad", 0.0)} | spec.get("optimizer", {}),
            "train": {"steps": 10, "micro_batch_tokens": spec["token_cap"], "phase_deadline_seconds": 600}
            | spec.get("train", {}),
            "data": {"train": "unused", "batch_tokens": 1},
            **({"lora": spec["lora"]} if "lora" in spec else {}),
        }
    )
    if spec.get("dtype") == "float64":  # users have none; here it tells rounding from mistakes
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float64"})})
    whole_gradients = spec.get("whole_gradients", True)
    context = TrainContext(config, 10, resume=False, distributed_optimizer=not whole_gradients)
    if "load_by_megatron" in spec:  # in place of what the context read by itself
        template = sharded_state(context.model)
        with torch.no_grad():
            for p in context.model.parameters_by_canonical_name().values():
                p.zero_()
        folder_of_weights = Path(spec["load_by_megatron"]) / MEGATRON
        from megatron.core import dist_checkpointing

        load_sharded_state(context.model, dist_checkpointing.load(template, str(folder_of_weights)))
        context.trainer.optimizer.reload_model_params()
    if config.lora is not None and "resume_from" not in spec:
        fill_factors(context)
    if "resume_from" in spec:
        state.load(Path(spec["resume_from"]) / MEGATRON, context.trainer)
    sequences = sequences_from(spec)
    lengths = [len(s.token_ids) for s in sequences]
    layout = context.layout
    placed = spec.get("placed") or pack_micro_batches(
        lengths,
        layout.data,
        config.micro_batch_cap,
        cost_model(context.architecture),
        multiple_of=layout.micro_batch_multiple,
    )
    mine = placed[context.layout.data_rank(context.rank)]
    out: dict[str, torch.Tensor] = {}
    if "reference_scale" in spec:  # the reference policy is that of the directory, the present weights are others
        context.trainer.keep_reference()
        with torch.no_grad():
            for p in context.model.parameters() if config.lora is None else ():
                p.mul_(spec["reference_scale"])

    calls = RouterCalls(context) if sequences[0].routed_experts is not None else None
    if calls and context.layout.world_size == 1:
        out |= own_routing(context, sequences, calls)
    logprobs = context.trainer.logprobs([context.trainer.micro_batch([sequences[i] for i in bin_]) for bin_ in mine])
    if mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0:
        out |= whole_logprobs(logprobs, mine, sequences, context)

    if calls is None:
        half = len(mine) // 2 // layout.micro_batch_multiple * layout.micro_batch_multiple
        parts = [part for part in (mine[:half], mine[half:]) if part]
        passes = [[context.trainer.micro_batch([sequences[i] for i in bin_]) for bin_ in part] for part in parts]
        measured = context.trainer.measure(passes, CrossEntropy())
        if context.rank == 0:
            out["measured"] = torch.tensor([measured["loss"], measured["entropy"]], dtype=torch.float64)

    start = {name: p.detach().clone() for name, p in context.model.parameters_by_canonical_name().items()}
    for number, options in enumerate(spec["algorithms"]):
        section = AlgorithmSection(**options)
        objective = PolicyObjective(section, context.context_parallel_group)
        by_sample, denominator = normalise(
            chosen_algorithm(section).normalisation,
            [[len(sequences[i].loss_positions) for i in rows] for rows in rows_by_sample(spec).values()],
            budget=spec["budget"],
            max_response_tokens=64,
        )
        weights = [weight for of_sample in by_sample for weight in of_sample]  # a sample's sequences are neighbours
        batches = context.trainer.prefetch(
            [[dataclasses.replace(sequences[i], weight=weights[i]) for i in bin_] for bin_ in mine]
        )
        if context.rank == spec.get("poisoned_rank"):
            poison_next_gradient(context)
        if "killed_rank" in spec:
            context.watchdog.enter("train", 0)
            if context.rank == spec["killed_rank"]:
                die_in_the_backward_pass(context, folder)
        for step in range(spec.get("steps", 1)):
            if step in spec.get("offload_before", ()):
                context.trainer.offloader.piece_bytes = 40_000
                leave_and_come_back(context)
            waits = watch_host(context) if spec.get("watch_host") else None
            result = context.trainer.train_step(batches, objective, denominator)
            if waits is not None:
                (folder / "host_waits.json").write_text(json.dumps(waits))
        for _ in range(spec.get("steps_without_tokens", 0)):
            context.trainer.train_step(without_loss(sequences, mine, context), objective, denominator)
        if context.model.chunks[0].ddp_config.overlap_param_gather:
            assert_a_pass_waits_for_all_weights(context, batches)
        if whole_gradients:
            gradients = (
                export_tensors(context.model, lambda p: getattr(p, "main_grad", p))
                if config.lora is None
                else factors(context, lambda p: p.main_grad)
            )
            out |= {f"grad/{section.name}/{n}": t.clone() for n, t in gradients if not n.endswith("expert_bias")}
        if number == 0:
            out |= {f"weight/{n}": t.clone() for n, t in export_tensors(context.model)}
            if config.lora is not None:
                out |= {f"factor/{n}": t.clone() for n, t in factors(context, torch.Tensor.detach)}
            out |= {f"traced/{i - TRACED_AS}": torch.from_numpy(x) for i, x in result.traced_logprobs.items()}
            metrics = dataclasses.replace(result, traced_logprobs={})
        if number + 1 < len(spec["algorithms"]):
            with torch.no_grad():
                for name, p in context.model.parameters_by_canonical_name().items():
                    p.copy_(start[name])
    if context.model.dtype == torch.bfloat16 and not whole_gradients:  # the distributed optimizer's
        out |= masters(context)
    if calls:
        out[f"times/{context.rank}"] = torch.tensor(calls.check(mine, sequences, context))
    if "save_to" in spec:
        target = Path(spec["save_to"])
        checkpoints = Checkpoints(target, config.train, Path(spec["model"]), context.control, context.adapter_note)
        checkpoints.save(1, context.trainer, {"step": 1}, b"")
        checkpoints.settle(wait=True)
    if context.rank == 0:
        out["grad_norm"] = torch.tensor(metrics.grad_norm, dtype=torch.float64)
        (folder / "result.json").write_text(json.dumps(dataclasses.asdict(metrics)))
    save_file({name: t.contiguous() for name, t in out.items()}, folder / f"out-{context.rank}.safetensors")
    if spec.get("export"):
        load_weights(context.model, spec["model"])
        context.export(folder / "hf")
    context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # torch's process groups may take seconds to wind down
