"""Runs one optimizer step of a megatron-core model: micro-batches in, updated weights and metrics out.

**Gradient scale.** The gradient of an optimizer step is d/dw of (1/D) * sum over all loss tokens of all ranks, with the
constant D = `denominator` (Phi for C3PO). Step by step:

1. The loss function returns `total / D` for its micro-batch, a plain sum over the tokens that this rank holds. A
   context-parallel rank holds its part of each sequence, so the sum runs over data- and context-parallel ranks.
2. With `calculate_per_token_loss` the schedule neither divides by the number of micro-batches or tokens nor multiplies
   by the context-parallel size; gradients add up in `main_grad`.
3. With the same setting DDP scales by 1. Its reduction runs over data- and context-parallel ranks (for expert
   parameters: over all ranks that hold the same experts), so it is the plain sum of step 1.
4. `finalize_model_grads` would divide by the number of tokens; it is called with `num_tokens=None`, so it does not.
5. Auxiliary losses of the experts do not pass through the loss function: a rank attaches them to its router. Of n ranks
   that share a micro-batch (tensor- times context-parallel), one with t tokens and a mean squared logsumexp z attaches
   z/n * t * n = t * z: a sum over tokens. The load-balance loss of a micro-batch of T tokens is T * B over these ranks
   (model/router.py). Router gradients are summed over all ranks that hold the layer, and `moe_grad_scale_func` answers
   1 / (all tokens of the step, without padding). So what is minimised is a_z times the mean of z over tokens, and a_bal
   times the token-weighted mean of B over micro-batches, whatever D and the layout. B is not linear: it depends on
   which sequences share a micro-batch, and on nothing else.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl import device
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.model.build import Model
from megatron_rl.model.head import HeadRequest
from megatron_rl.model.lora import base_only, finish_gradients, rounding_of_merged
from megatron_rl.rotary import frequencies
from megatron_rl.train.step import multi_tensor as clipping
from megatron_rl.train.step.batch import MicroBatch, TrainSequence, make_micro_batch, size_of
from megatron_rl.train.step.objective import Objective
from megatron_rl.train.step.offload import Offloader
from megatron_rl.train.step.prefetch import Prefetch, sizes_of, with_field
from megatron_rl.train.step.step_metrics import MetricAccumulator
from megatron_rl.train.step.token_traces import gather

device.import_megatron()

from megatron.core import optimizer as megatron_optimizer  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.distributed.finalize_model_grads import finalize_model_grads  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.utils import get_attr_wrapped_model  # noqa: E402

Batches = Prefetch | Sequence[MicroBatch]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Holds what one optimizer step did, the same on every rank but for `traced_logprobs`.

    skipped: the loss or the gradient was not finite, and the weights are what they were.
    num_forward_tokens, num_padding_tokens: over all ranks, each token once.
    metrics: see `MetricAccumulator.metrics`.
    traced_logprobs: float64 [num_loss_tokens] of each traced sample, in the forward pass of this step; on rank 0.
    """

    skipped: bool
    grad_norm: float
    learning_rate: float
    num_loss_tokens: int
    num_forward_tokens: int
    num_padding_tokens: int
    metrics: dict[str, float]
    traced_logprobs: Mapping[int, np.ndarray] = field(default_factory=dict)


class Trainer:
    """Owns the optimizer of a model. `control` is a gloo group of all ranks, for metrics.

    offloader: where optimizer states and gradients are; all of them on the device while anything here runs.
    """

    def __init__(self, model: Model, optimizer: OptimizerSection, num_steps: int, control: Any) -> None:
        self.model = model
        self._rotary = frequencies(model.architecture.rotary, model.architecture.head_dim)
        self._control = control
        clipping.install()
        _use_torchs_adam()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optimizer.learning_rate,
                min_lr=optimizer.min_learning_rate,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.epsilon,
                clip_grad=optimizer.clip_grad,
                bf16=model.dtype == torch.bfloat16,
                params_dtype=model.dtype,
                use_distributed_optimizer=model.chunks[0].ddp_config.use_distributed_optimizer,
            ),
            list(model.chunks),
        )
        for part in self.optimizer.chained_optimizers:
            if isinstance(getattr(part, "optimizer", None), torch.optim.AdamW):
                for group in part.optimizer.param_groups:
                    group["fused"] = True  # one pass over the states, without temporaries as large as one of them
        num_warmup_steps = optimizer.num_warmup_steps(num_steps)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optimizer.learning_rate,
            min_lr=optimizer.min_learning_rate,
            lr_warmup_steps=num_warmup_steps,
            lr_decay_steps=max(num_steps, num_warmup_steps + 1),
            lr_decay_style=optimizer.schedule,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            # The configuration of the run that resumes decides; of a checkpoint only the number of steps counts.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        model.config.finalize_model_grads_func = _finalize_gradients
        self._where = device.torch_device()
        self._moe_grad_scale = torch.ones([], device=self._where)
        model.config.moe_grad_scale_func = lambda: self._moe_grad_scale
        self._has_reference = False
        self._reference: list[Tensor] = []
        self._present: list[Tensor] = []  # room for the weights while the reference takes their place
        self._routers = model.routers
        self.offloader = Offloader(model, self.optimizer, optimizer.offload_fraction)
        self._thread = ThreadPoolExecutor(1, initializer=device.use_in_thread, initargs=(self._where,))

    def keep_reference(self) -> None:
        """Remember the present weights, off the device, as the reference policy of the KL term. For a model with
        adapters the reference is the frozen weights, which are there."""
        self._has_reference = True
        if self.model.lora is not None:
            return
        self._reference = [_on_host(p) for p in self.model.parameters()]
        self._present = [_host_like(p) for p in self.model.parameters()]

    def micro_batch(self, sequences: Sequence[TrainSequence]) -> MicroBatch:
        """Make this rank's part of these sequences, ready for the methods below."""
        return make_micro_batch(
            sequences,
            multiple_of=self.model.token_multiple,
            rotary=self._rotary,
            dtype=self.model.dtype,
            device=self._where,
            context_rank=mpu.get_context_parallel_rank(),
            context_size=self.model.layout.context,
        )

    def prefetch(self, parts: Sequence[Sequence[TrainSequence]]) -> Prefetch:
        """Return micro-batches of these sequences, made as the methods below come to them."""
        layout = self.model.layout
        rank = mpu.get_context_parallel_rank()
        sizes = [size_of(part, self.model.token_multiple, rank, layout.context) for part in parts]
        return Prefetch(parts=parts, sizes=sizes, make=self.micro_batch, thread=self._thread)

    def train_step(
        self, batches: Batches, objective: Objective, denominator: float, temperature: float = 1.0
    ) -> StepResult:
        """Run forward, backward and one optimizer update over this rank's micro-batches.

        Every data-parallel rank calls this with equally many micro-batches. The learning rate is the schedule's; log-
        probabilities are those of logits / temperature. Where no token of any rank carries loss, weights and schedule
        stay as they are: Adam's moments alone would move them.
        """
        sums = [[size.num_tokens, size.num_places, int(size.traced)] for size in sizes_of(batches)]
        counts = torch.tensor(sums).sum(0)
        dist.all_reduce(counts, group=self._control)
        copies = dist.get_world_size() // mpu.get_data_parallel_world_size(with_context_parallel=True)
        num_tokens, num_places, num_traced = (counts // copies).tolist()
        self._moe_grad_scale = torch.full([], 1.0 / max(1, num_tokens), device=self._where)
        if self._has_reference:
            batches = self._with_ref_logprobs(batches, temperature)
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        tally = MetricAccumulator(objective.reports, self._where)
        for router in self._routers:
            router.load_balance_loss = router.z_loss = 0.0
            router.num_replayed = router.num_replaced = 0
        kept = self._run(batches, temperature, partial(self._loss, objective, denominator, tally))
        self._reduce(tally)
        traced_logprobs = self._gather_traced(kept) if num_traced else {}
        metrics = tally.metrics(denominator) | self._router_metrics(num_tokens)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        grad_norm, updated = 0.0, True
        if tally.num_tokens:
            grad_norm, updated = self._update(math.isfinite(metrics["loss"]))
        if self.model.lora is not None and self.model.dtype == torch.bfloat16:
            self.model.gather_weights()
            metrics |= rounding_of_merged(self.model.chunks, self._control)
        return StepResult(
            skipped=not updated,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_loss_tokens=tally.num_tokens,
            num_forward_tokens=num_tokens,
            num_padding_tokens=num_places - num_tokens,
            metrics=metrics,
            traced_logprobs=traced_logprobs,
        )

    @property
    def _reports(self) -> bool:
        """Tell whether this rank has log-probs that no other one counts too."""
        return mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0

    def _reduce(self, tally: MetricAccumulator) -> None:
        tally.reduce(self._control, self._reports)

    def _gather_traced(self, kept: list[Any]) -> dict[int, np.ndarray]:
        """Gather the log-probs of traced tokens on rank 0. kept: what `_loss` left of each micro-batch."""
        mine = [entry["traced"] for entry in kept if "traced" in entry] if self._reports else []
        return gather(mine, self._control)

    def _update(self, may: bool) -> tuple[float, bool]:
        """Step optimizer and schedule if `may` and the gradient is finite. Return the gradient's norm, and whether they
        were stepped.

        Megatron's step would clip by whatever norm it finds and spoil the weights, so the norm is looked at first. Its
        preparation only copies gradients, so that its step repeats it does no harm.
        """
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm() or 0.0)
        good = torch.tensor([int(may and math.isfinite(grad_norm))])
        dist.all_reduce(good, op=dist.ReduceOp.MIN, group=self._control)
        if not good:
            return grad_norm, False
        self.optimizer.step()
        self.scheduler.step(1)
        return grad_norm, True

    def _router_metrics(self, num_tokens: int) -> dict[str, float]:
        """Return those router losses that are on, as the mean over the step's tokens and the model's
        mixture-of-experts layers. With router replay, return also the share of the server's choices that the routers
        would not have made."""
        sums = torch.zeros(5, dtype=torch.float64)
        for router in self._routers:
            losses, counts = (router.load_balance_loss, router.z_loss), (router.num_replayed, router.num_replaced)
            sums += torch.tensor([1.0, *map(float, losses), *map(float, counts)], dtype=torch.float64)
        dist.all_reduce(sums, group=self._control)
        # Every stage counted its layers on all of its ranks.
        num_layers = float(sums[0]) / (dist.get_world_size() // self.model.layout.pipeline)
        config = self.model.config
        on = {"load_balance_loss": config.moe_aux_loss_coeff, "z_loss": config.moe_z_loss_coeff}
        means = (sums[1:3] / max(1.0, num_tokens * num_layers)).tolist()
        metrics = {name: mean for (name, coefficient), mean in zip(on.items(), means, strict=True) if coefficient}
        num_replayed, num_replaced = sums[3:].tolist()
        return metrics | ({"router_replay_changed_share": num_replaced / num_replayed} if num_replayed else {})

    def measure(self, passes: Iterable[Batches], objective: Objective) -> dict[str, float]:
        """Measure an objective under the present weights, divided by the loss tokens; nothing changes.

        Collective. passes: this rank's micro-batches, in parts that are held in memory one at a time; every data-
        parallel rank has as many of both.
        """
        tally = MetricAccumulator(objective.reports, self._where)
        with torch.no_grad():
            for batches in passes:
                self._run(batches, 1.0, partial(self._loss, objective, 1.0, tally), forward_only=True)
        self._reduce(tally)
        return tally.metrics(tally.num_tokens)

    def logprobs(self, batches: Batches, temperature: float = 1.0) -> list[Tensor]:
        """Compute the log-probabilities [M] of each micro-batch's loss tokens, without a graph; on the last pipeline
        stage only.

        Under context parallelism they are those of this rank's loss tokens, in the order of `MicroBatch`.
        """

        def keep(batch: MicroBatch, output: tuple[Tensor, Tensor]) -> Any:
            logprobs, _ = output
            return logprobs.new_zeros(()), torch.ones([], dtype=torch.int), {"logprobs": logprobs}

        with torch.no_grad():
            kept = self._run(batches, temperature, keep, forward_only=True)
        return [entry["logprobs"] for entry in kept]

    def with_old_logprobs(self, batches: Batches, temperature: float) -> Batches:
        """Return the micro-batches with the log-probs that their tokens have under the present weights."""
        return with_field(batches, "old_logprobs", self.logprobs(batches, temperature))

    def _with_ref_logprobs(self, batches: Batches, temperature: float) -> Batches:
        """Return the micro-batches with the log-probs of the reference policy. Its weights take the place of the
        present ones for one pass; these wait in host memory. Adapters only have to be left out."""
        if self.model.lora is not None:
            with base_only(self.model.chunks):
                return with_field(batches, "ref_logprobs", self.logprobs(batches, temperature))
        parameters = self.model.parameters()
        with torch.no_grad():
            for p, kept in zip(parameters, self._present, strict=True):
                kept.copy_(p, non_blocking=True)
            for p, reference in zip(parameters, self._reference, strict=True):
                p.copy_(reference, non_blocking=True)
            found = self.logprobs(batches, temperature)
            for p, kept in zip(parameters, self._present, strict=True):
                p.copy_(kept, non_blocking=True)
        return with_field(batches, "ref_logprobs", found)

    # -- one pass through megatron's schedule ----------------------------------------------------------------------

    def _run(self, batches: Batches, temperature: float, loss: Any, forward_only: bool = False) -> list[Any]:
        """Run one pass through megatron's schedule. loss: (micro-batch, what the last stage returns) -> what megatron's
        schedules want of a loss function."""

        def forward_step(iterator: Any, module: Any) -> Any:
            batch = next(iterator)
            output = module(
                batch.token_ids,
                batch.packed.positions[None],
                None,
                packed_seq_params=batch.packed,
                padding_mask=self._padding_mask(batch, get_attr_wrapped_model(module, "pre_process")),
                output_processor=self.model.head,
                output_processor_context=HeadRequest(
                    index=batch.loss_index, targets=batch.targets, temperature=temperature
                ),
            )
            return output, partial(loss, batch)

        if len(self.model.chunks) > 1:
            batches = list(batches)  # every part of the model goes through them at its own pace
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.model.chunks],
            model=list(self.model.chunks),
            num_microbatches=len(batches),
            # Not used: micro-batches of different lengths tell each pipeline stage their length.
            seq_length=self.model.layout.tensor,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _padding_mask(self, batch: MicroBatch, is_first_stage: bool) -> Tensor:
        """Return True at padding, of the tokens that this rank's routers see. Under sequence parallelism megatron
        divides the mask on the first pipeline stage only, so later stages get their part here."""
        mask = batch.padding_mask
        if is_first_stage or not self.model.layout.sequence_parallel:
            return mask
        return mask.chunk(self.model.layout.tensor, dim=1)[mpu.get_tensor_model_parallel_rank()]

    def _loss(
        self,
        objective: Objective,
        denominator: float,
        tally: MetricAccumulator,
        batch: MicroBatch,
        output: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        logprobs, entropy = output
        terms = objective(logprobs, entropy, batch)
        tally.add(terms, len(batch.targets))
        kept = {} if batch.traced is None else {"traced": (batch.traced, logprobs.detach()[batch.traced.index])}
        return terms.total / denominator, torch.ones([], dtype=torch.int), kept


def _use_torchs_adam() -> None:
    """Take torch's AdamW, also where Transformer Engine or apex is installed: theirs have not run here. One of
    megatron's modules makes the optimizer by what is installed; another one looks by that for the number of steps,
    which theirs keep elsewhere, and finds none in torch's when a checkpoint is saved or loaded."""
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
    for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"):
        if not hasattr(distrib_optimizer, name):
            raise ImportError(f"{distrib_optimizer.__name__} has no {name}: this megatron-core counts steps otherwise")
        setattr(distrib_optimizer, name, False)


def _finalize_gradients(chunks: Sequence[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Reduce gradients as megatron does, without telling it the number of tokens (step 4), and do what adapters need
    besides."""
    finalize_model_grads(chunks, None, **options)
    finish_gradients(chunks)


def _on_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory, from where the device takes it without help of the host. The copy may be under way
    still, in front of whatever the device does next."""
    return _host_like(tensor).copy_(tensor.detach(), non_blocking=True)


def _host_like(tensor: Tensor) -> Tensor:
    """Allocate host memory for a copy of a tensor."""
    return device.host_empty(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
