"""Runs supervised fine-tuning: the trainer with cross-entropy over packed chats. docs/sft.md says what a run does."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from megatron_rl import device
from megatron_rl.c3po.packing import cost_model, pack_micro_batches
from megatron_rl.checkpoint.epochs import refuse_other_epochs
from megatron_rl.config.schema import SftConfig
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.terminal import Eta, fitted, say
from megatron_rl.train.run.alarms import Alarms, SkipGuard
from megatron_rl.train.run.context import TrainContext
from megatron_rl.train.run.metrics import MetricsLog, bar
from megatron_rl.train.run.signals import StopSignals, disk_fault, told_in_words
from megatron_rl.train.run.step_row import step_row
from megatron_rl.train.run.trackers import Trackers
from megatron_rl.train.sft.chats import ChatBatches, validation_parts
from megatron_rl.train.sft.epochs import EpochDirectories, EpochLoss
from megatron_rl.train.step.batch import TrainSequence
from megatron_rl.train.step.objective import CrossEntropy
from megatron_rl.train.step.prefetch import Prefetch
from megatron_rl.train.step.trainer import StepResult


def run_sft(config: SftConfig, resume: bool) -> int:
    """Train for `train.steps` or `train.epochs` and leave `run_dir/hf`. Returns the exit code."""
    tokenizer = load_tokenizer(config.model.path)
    batches = ChatBatches(config, tokenizer)
    validation = validation_parts(config, tokenizer, batches.messages)
    config.check_warmup(batches.num_steps)
    refuse_other_epochs(config.run_dir, config.train.epochs or 0, resume)
    signals = StopSignals()
    context = TrainContext(config, batches.num_steps, resume, check=signals.check)
    context.watchdog.num_steps = batches.num_steps
    with context, ExitStack() as parts, told_in_words(context.watchdog):
        restored = context.restore()
        context.tell((restored[0]["step"] if restored else 0, batches.num_steps))
        driver: dict[str, Any] = restored[0] if restored else batches.state(0)
        batches.check(driver)
        alarms = Alarms(config.train)
        metrics = None
        if context.is_rank_zero:
            context.accept(driver["step"])
            trackers = Trackers(config, driver["step"], resume)
            metrics = MetricsLog(config.run_dir, driver["step"], alarms.check, trackers)
            parts.callback(metrics.close)
        run = _Run(config, context, batches, validation, metrics, alarms)
        context.exit_code = run.steps(driver, signals)
    context.tell_end("sft", batches.num_steps)
    return context.exit_code


class _Run:
    """Runs the loop, and holds what it needs. metrics: on rank 0."""

    def __init__(
        self,
        config: SftConfig,
        context: TrainContext,
        batches: ChatBatches,
        validation: Sequence[Sequence[TrainSequence]],
        metrics: MetricsLog | None,
        alarms: Alarms,
    ) -> None:
        self._config, self._context, self._metrics = config, context, metrics
        self._batches, self._validation = batches, validation
        self._alarms = alarms
        self._eta = Eta(batches.num_steps)
        self._num_epochs = config.train.epochs or 0
        self._directories = EpochDirectories(context, self._num_epochs)

    def steps(self, driver: dict[str, Any], signals: StopSignals) -> int:
        """Train from where `driver` says to the end. Return the exit code."""
        config, context, batches = self._config, self._context, self._batches
        skips, epoch_loss = SkipGuard(config.train, ""), EpochLoss(driver.get("epoch_loss", (0.0, 0)))
        first, last = driver["step"], batches.num_steps

        def save(step: int) -> None:
            context.save(step, batches.state(step) | {"epoch_loss": epoch_loss.state})

        for step in range(first, last):
            if context.any_rank(signals.name is not None):
                if step > first:
                    save(step)
                context.settle(wait=True)
                return context.stop_code
            context.watchdog.enter("train", step)
            started = time.perf_counter()
            device.reset_peak_memory()
            batch = batches[step]
            result = context.trainer.train_step(
                self._placed(batch), CrossEntropy(), float(sum(len(s.loss_positions) for s in batch))
            )
            seconds = time.perf_counter() - started
            ended = batches.epochs_ended(step)
            losses = epoch_loss.add(result, ended, batches.num_seen(step + 1) % batches.num_chats)
            ends_epoch = bool(ended) and self._num_epochs > 0
            validated = self._validate(step) if ends_epoch or self._validation_is_due(step + 1) else {}
            self._report(step, result, seconds, validated)
            context.settle()
            skips.check([result])
            if ends_epoch:
                for epoch, loss in zip(ended, losses, strict=True):
                    self._end_epoch(epoch, step + 1, loss, validated)
            if context.save_is_due(step + 1, last) or ends_epoch:
                save(step + 1)
        context.settle(wait=True)
        if self._num_epochs:
            self._directories.link_last(config.run_dir / "hf")
        else:
            context.export(config.run_dir / "hf")
        return 0

    def _placed(self, batch: Sequence[TrainSequence]) -> Prefetch:
        """Return this rank's micro-batches of a batch."""
        context, layout = self._context, self._context.layout
        placed = pack_micro_batches(
            [len(s.token_ids) for s in batch],
            layout.data,
            self._config.micro_batch_cap,
            cost_model(context.architecture),
            multiple_of=layout.micro_batch_multiple,
        )
        mine = placed[layout.data_rank(context.rank)]
        return context.trainer.prefetch([[batch[i] for i in one] for one in mine])

    def _validation_is_due(self, num_steps: int) -> bool:
        every = self._config.train.validate_every
        return num_steps == self._batches.num_steps or (every > 0 and num_steps % every == 0)

    def _validate(self, step: int) -> dict[str, float]:
        """Compute loss and token entropy per target token over all chats of data.validation; nothing without them."""
        if not self._validation:
            return {}

        def passes() -> Iterator[Prefetch]:
            for part in bar(self._validation, "validating"):
                self._context.watchdog.enter("validate", step)
                yield self._placed(part)

        found = self._context.trainer.measure(passes(), CrossEntropy())
        return {f"validation_{name}": found[name] for name in ("loss", "entropy")}

    def _end_epoch(self, epoch: int, num_steps: int, train_loss: float | None, validated: dict[str, float]) -> None:
        measured = {name: validated.get(name) for name in ("validation_loss", "validation_entropy")}
        note = {"step": num_steps, **measured, "train_loss": train_loss}
        self._directories.write(epoch, note)
        if self._context.is_rank_zero:
            told = "none" if train_loss is None else f"{train_loss:.4f}"
            say(f"epoch {epoch} of {self._num_epochs} ended after {num_steps} steps  train loss {told}")

    def _report(self, step: int, result: StepResult, seconds: float, validated: dict[str, float]) -> None:
        if self._metrics is None:
            return
        context = self._context
        failed_saves, memory = context.checkpoints.num_failed_saves, context.memory_metrics()
        row = step_row(step, [result], seconds, seconds, failed_saves, memory) | validated
        self._alarms.report(row)
        try:
            self._metrics.write(row)
        except OSError as error:
            if fault := disk_fault(self._config, "the metrics of this step are not written", error):
                raise fault from error
        last = self._batches.num_steps
        eta = self._eta.after(step, seconds)
        if step % 20 == 0 or step + 1 == last or validated:
            say(
                fitted(
                    [
                        f"step {step} of {last}",
                        f"loss {row['loss']:.4f}",
                        *(f"{name.replace('_', ' ')} {value:.4f}" for name, value in validated.items()),
                        f"{row['trained_tokens_per_second']:,.0f} tokens/s",
                        f"gradient norm {row['grad_norm']:.3g}",
                        eta or "last step",
                    ]
                )
            )
