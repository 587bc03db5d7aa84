"""Makes what supervised fine-tuning trains and validates on: chats as token sequences, and the batches of its steps."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice, pairwise
from typing import Any

import numpy as np

from megatron_rl.config.schema import SftConfig
from megatron_rl.data.batches import batch_ends, epochs_ended
from megatron_rl.data.chat import render_chat
from megatron_rl.data.fitting import Limit, vocabulary_of
from megatron_rl.data.mixture import load_chats
from megatron_rl.data.prompts import Chat, read_chats
from megatron_rl.families import load_architecture
from megatron_rl.train.run.metrics import bar
from megatron_rl.train.run.starts import what_differs
from megatron_rl.train.step.batch import TrainSequence

# Keys that say which chats there are in which order, and how they are divided into batches.
_OF_THE_ORDER = ("seed", "data.train", "data.special_tokens", "data.template_arguments", "data.too_long", "model.path")
_OF_THE_BATCHES = ("data.batch_tokens", "train.epochs", "model.path")


class ChatBatches:
    """Divides the chats of a run into batches: whole chats in the order of their stream, at most data.batch_tokens
    tokens each. Batches do not stop at the end of an epoch, only at that of a run with train.epochs; an epoch is as
    many chats as all files of data.train hold together.

    num_steps: optimizer steps of the run. digest: of the chats and their order.
    """

    def __init__(self, config: SftConfig, tokenizer: Any) -> None:
        """Read and tokenize the chats. Raise ValueError for data that cannot be used."""
        self._config = config
        self._sequences: dict[str, TrainSequence] = {}

        def fits(chats: Sequence[Chat]) -> Sequence[Chat]:
            self._sequences = tokenized(chats, config, tokenizer, "data.train")
            return [chat for chat in chats if chat.id in self._sequences]

        self._stream = load_chats(config.data, config.seed, fits)
        self.num_chats, self.digest = self._stream.num_rows, self._stream.digest
        self.messages = {chat.messages for chat in self._stream.rows}
        positions = count() if config.train.epochs is None else range(config.train.epochs * self.num_chats)
        lengths = (len(sequence.token_ids) for position in positions for sequence in self._at(position, position + 1))
        self._ends = list(islice(batch_ends(lengths, config.data.batch_tokens), config.train.steps))
        self.num_steps = len(self._ends)

    def __getitem__(self, step: int) -> list[TrainSequence]:
        return self._at(self.num_seen(step), self.num_seen(step + 1))

    def num_seen(self, num_steps: int) -> int:
        """Count the chats after so many steps."""
        return self._ends[num_steps - 1] if num_steps else 0

    def epochs_ended(self, step: int) -> range:
        """Return the epochs, from 1, whose last chat is in the batch of step `step`, from 0."""
        return epochs_ended(self.num_seen(step), self.num_seen(step + 1), self.num_chats)

    def state(self, num_steps: int) -> dict[str, Any]:
        """Return what a checkpoint keeps for `check`."""
        return {"step": num_steps, "chats": self.num_seen(num_steps), "data": self.digest}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError when a run with this state cannot go on with these batches."""
        step = state["step"]
        if state.get("data") != self.digest:
            raise ValueError(
                "the chats and their order are not those that this run began with: "
                f"{what_differs(self._config, _OF_THE_ORDER, 'a file of data.train')}; put that back, or start a new "
                "run with model.path set to the checkpoint"
            )
        if step > self.num_steps:
            raise ValueError(
                f"the checkpoint is of step {step}, and this configuration ends after {self.num_steps}; raise "
                "train.steps or train.epochs, or set run_dir to a new folder"
            )
        if state["chats"] != self.num_seen(step):
            raise ValueError(
                f"after step {step} this run had seen {state['chats']} chats; with this configuration it would have "
                f"seen {self.num_seen(step)} ({what_differs(self._config, _OF_THE_BATCHES)}): put data.batch_tokens "
                "and train.epochs back (the last batch of an ended run cannot be filled up), or start a new run with "
                "model.path set to the checkpoint"
            )

    def _at(self, start: int, end: int) -> list[TrainSequence]:
        chats, _ = self._stream.take(start, end - start)
        return [self._sequences[chat.id] for chat in chats]


def validation_parts(config: SftConfig, tokenizer: Any, trained: set[Any]) -> list[list[TrainSequence]]:
    """Return the chats of data.validation in parts of at most data.batch_tokens tokens; none without that file.

    trained: messages of the chats of data.train. Raises ValueError when they are among these: the loss of what was
    learned says nothing about other chats, and whoever chooses by it has to be told before, not after.
    """
    path = config.data.validation
    if path is None:
        return []
    chats = read_chats(path)
    known = [chat.id for chat in chats if chat.messages in trained]
    if known:
        raise ValueError(
            f"{len(known)} of {len(chats)} chats of data.validation are in data.train too, the first is {known[0]} in "
            f"{path}; drop them from one of the two"
        )
    sequences = list(tokenized(chats, config, tokenizer, str(path)).values())
    ends = [0, *batch_ends((len(s.token_ids) for s in sequences), config.data.batch_tokens)]
    return [sequences[start:end] for start, end in pairwise(ends)]


def tokenized(chats: Sequence[Chat], config: SftConfig, tokenizer: Any, where: str) -> dict[str, TrainSequence]:
    """Return the sequences of chats by id, with loss on what the model would have to generate (`render_chat`); only
    those that are short enough.

    where: for the progress bar. Raises ValueError for chats that are too long, as data.too_long says, and for tokens
    that the model has no embedding for.
    """
    most, key = min(_limits(config))
    end_ids = load_architecture(config.model.path).eos_token_ids
    limit = Limit(tokens=most, key=key, kind="chats", too_long=config.data.too_long)
    found, lengths, data, vocabulary = {}, {}, config.data, vocabulary_of(tokenizer)
    for chat in bar(chats, f"tokenizing {where}"):
        ids, mask = render_chat(
            tokenizer, chat.messages, data.special_tokens, end_ids, tools=chat.tools, arguments=data.template_arguments
        )
        lengths[chat.where] = len(ids)
        if len(ids) > most:
            continue
        vocabulary.check(ids, chat.where)
        positions = np.flatnonzero(mask).astype(np.int32)
        found[chat.id] = TrainSequence(
            token_ids=np.array(ids, np.int32),
            loss_positions=positions,
            weight=1.0,
            rollout_logprobs=np.full(len(positions), np.nan, np.float32),
            num_stale_tokens=len(positions),
        )
    limit.check(lengths)
    return found


def _limits(config: SftConfig) -> Iterator[tuple[int, str]]:
    """Yield the limits on the tokens of a chat, and the key that sets each."""
    shared = " x parallel.context" if config.parallel.context > 1 else ""
    yield config.micro_batch_cap, f"train.micro_batch_tokens{shared}"
    yield config.data.batch_tokens, "data.batch_tokens"
    yield load_architecture(config.model.path).max_position_embeddings, "the model's max_position_embeddings"
