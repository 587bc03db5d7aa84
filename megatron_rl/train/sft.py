"""Supervised fine-tuning: the trainer with cross-entropy over packed chats."""

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from megatron_rl.c3po.packing import cost_model, pack_micro_batches
from megatron_rl.config.schema import SftConfig
from megatron_rl.data.chat import load_tokenizer, render_chat
from megatron_rl.data.prompts import Chat, read_chats
from megatron_rl.errors import EXIT_STOPPED
from megatron_rl.train.batch import MicroBatch, TrainSequence
from megatron_rl.train.guards import Alarms, SkipGuard
from megatron_rl.train.metrics import MetricsLog, console
from megatron_rl.train.objective import CrossEntropy
from megatron_rl.train.resilience import StopSignals, disk_fault, told_in_words
from megatron_rl.train.session import Session, should_save
from megatron_rl.train.trainer import StepResult


def run_sft(config: SftConfig, resume: bool) -> int:
    """Train for `train.steps` optimizer steps and export `run_dir/hf`. Returns the exit code."""
    signals = StopSignals()
    chats = read_chats(config.data.train)
    tokenizer = load_tokenizer(config.model.path)
    limit = min(config.micro_batch_cap, config.data.batch_tokens)
    sequences = [_sequence(chat, tokenizer, limit) for chat in chats]
    session = Session(config, config.train.steps, resume)
    with ExitStack() as parts, told_in_words(session.watch):
        parts.callback(session.close)
        restored = session.restore()
        first = restored[0]["step"] if restored else 0
        metrics = MetricsLog(config.run_dir, first) if session.is_leader else None
        if metrics is not None:
            parts.callback(metrics.close)
        return _steps(config, session, sequences, first, metrics, signals)


def _steps(
    config: SftConfig,
    session: Session,
    sequences: Sequence[TrainSequence],
    first: int,
    metrics: MetricsLog | None,
    signals: StopSignals,
) -> int:
    """From step `first` to the end. Returns the exit code."""
    batches = itertools.islice(sequence_batches(sequences, config.data.batch_tokens, config.seed), first, None)
    skips, alarms = SkipGuard(config.train, ""), Alarms(config.train, metrics.past if metrics else ())
    for step in range(first, config.train.steps):
        if session.any_rank(signals.name is not None):
            if step > first:
                session.save(step, {"step": step})
            session.settle(wait=True)
            return EXIT_STOPPED
        session.watch.enter("train", step)
        started = time.perf_counter()
        result = session.trainer.train_step(*_placed(config, session, next(batches)))
        if metrics is not None:
            _report(config, session, metrics, alarms, step, result, time.perf_counter() - started)
        session.settle()
        skips.check([result])
        if should_save(step + 1, config):
            session.save(step + 1, {"step": step + 1})
    session.settle(wait=True)
    session.export(config.run_dir / "hf")
    return 0


def _placed(
    config: SftConfig, session: Session, batch: Sequence[TrainSequence]
) -> tuple[list[MicroBatch], CrossEntropy, float]:
    """This rank's micro-batches of a step, its objective and its denominator."""
    layout = session.layout
    placed = pack_micro_batches(
        [len(s.token_ids) for s in batch],
        layout.data,
        config.micro_batch_cap,
        cost_model(session.bailing),
        multiple_of=layout.micro_batch_multiple,
    )
    mine = [session.trainer.micro_batch([batch[i] for i in one]) for one in placed[layout.data_rank(session.rank)]]
    return mine, CrossEntropy(), float(sum(len(s.loss_positions) for s in batch))


def _report(
    config: SftConfig,
    session: Session,
    metrics: MetricsLog,
    alarms: Alarms,
    step: int,
    result: StepResult,
    seconds: float,
) -> None:
    row = {
        "step": step,
        **result.metrics,
        "num_skipped_steps": int(result.skipped),
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_loss_tokens": result.num_loss_tokens,
        "step_seconds": seconds,
        "num_failed_saves": session.checkpoints.num_failed_saves,
        "trained_tokens_per_second": result.num_forward_tokens / seconds,
    }
    alarms.report(row)
    try:
        metrics.write(row)
    except OSError as error:
        if fault := disk_fault(config, "the metrics of this step are not written", error):
            raise fault from error
    if step % 20 == 0 or step + 1 == config.train.steps:
        console.print(
            f"sft {step + 1}/{config.train.steps}  loss {row['loss']:.4f}  "
            f"grad norm {row['grad_norm']:.3f}  {row['trained_tokens_per_second']:,.0f} tokens/s"
        )


def sequence_batches(sequences: Sequence[TrainSequence], batch_tokens: int, seed: int) -> Iterator[list[TrainSequence]]:
    """Endless batches of whole sequences, at most `batch_tokens` tokens each, in a seeded order, epoch after epoch."""
    batch: list[TrainSequence] = []
    used = 0
    for epoch in itertools.count():
        order = list(range(len(sequences)))
        random.Random(f"sft order {seed} {epoch}").shuffle(order)
        for index in order[::-1]:
            sequence = sequences[index]
            if used + len(sequence.token_ids) > batch_tokens:
                yield batch
                batch, used = [], 0
            batch.append(sequence)
            used += len(sequence.token_ids)


def _sequence(chat: Chat, tokenizer: Any, limit: int) -> TrainSequence:
    ids, mask = render_chat(tokenizer, chat.messages)
    if len(ids) > limit:
        raise ValueError(
            f"chat {chat.id} has {len(ids)} tokens; data.batch_tokens and train.micro_batch_tokens allow {limit}: "
            "raise them or drop the chat"
        )
    positions = np.flatnonzero(mask).astype(np.int32)
    return TrainSequence(
        token_ids=np.array(ids, np.int32),
        loss_positions=positions,
        weight=1.0,
        advantage=0.0,
        rollout_logprobs=np.full(len(positions), np.nan, np.float32),
        num_stale_tokens=len(positions),
    )
