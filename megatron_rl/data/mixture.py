"""Gives the order in which training goes through its rows: stages, each a weighted mixture of files. RL has prompts,
SFT chats and one stage."""

import hashlib
import json
import logging
import random
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megatron_rl.config.data import RlData, SftData, Weights
from megatron_rl.config.schema import RolloutPhase
from megatron_rl.data.domains import check_domains, check_reward_domains
from megatron_rl.data.fitting import prompt_limit, rendered_prompts
from megatron_rl.data.judged import check_judged
from megatron_rl.data.prompt_tokens import PromptTokens
from megatron_rl.data.prompts import Chat, Prompt, read_chats, read_prompts
from megatron_rl.data.rows import Problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row", bound=Prompt | Chat)
Fits = Callable[[Sequence[Row]], Sequence[Row]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Generic[Row]):
    """Holds the rows of one file. weight: its share of the stage, relative to the other weights."""

    path: Path
    rows: tuple[Row, ...]
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Generic[Row]):
    """Holds one mixture of files. num_rows: after which the next stage begins; None for the last."""

    sources: tuple[Source[Row], ...]
    num_rows: int | None = None


class Stream(ABC, Generic[Row]):
    """Gives rows in a seeded order. It is a pure function of (stages, seed, cursor), where the cursor counts rows from
    the start of training; it is all that a checkpoint has to keep.

    Files take turns so that after any number of rows each has had its weight's share of the stage, to within one row
    for every other file. In its turns a file goes through one seeded permutation of its rows after the other, each row
    once in every epoch of the file; a file of several stages goes on where it was. So a row can come twice in a step
    only where an epoch of its file ends.
    """

    def __init__(
        self,
        stages: Sequence[Stage[Row]],
        seed: int,
        special_tokens: str = "text",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the stages. special_tokens, arguments: as data.special_tokens and template_arguments, for the digest:
        other tokens are other rows."""
        self.seed = seed
        self._of_tokens = "" if special_tokens == "text" else special_tokens
        if arguments:
            self._of_tokens += json.dumps(arguments, sort_keys=True)
        self._sources: dict[Path, tuple[Row, ...]] = {
            source.path: source.rows for stage in stages for source in stage.sources
        }
        self._paths = list(self._sources)
        # For each position, the number of its file and how many turns that file had before. Both arrays grow on demand.
        self._file, self._turn = array("H"), array("I")
        self._stages = tuple(stages)
        self._turns = _turns(stages)
        self._order = lru_cache(maxsize=4 * len(self._paths))(self.permutation)
        self.digest = self._digest(stages)

    @abstractmethod
    def permutation(self, length: int, epoch: int) -> list[int]:
        """Return the order of a file's rows in its epoch `epoch`."""

    @staticmethod
    @abstractmethod
    def content(row: Row) -> list[Any]:
        """Return what two rows with the same id must have in common."""

    @property
    def num_rows(self) -> int:
        """Count the rows of all files together."""
        return sum(len(rows) for rows in self._sources.values())

    @property
    def rows(self) -> list[Row]:
        """Return every row once. Raise ValueError when two that differ have the same id."""
        found: dict[str, tuple[Row, Path]] = {}
        for path, rows in self._sources.items():
            for row in rows:
                other, where = found.setdefault(row.id, (row, path))
                if self.content(other) != self.content(row):
                    kind = type(row).__name__.lower()
                    raise ValueError(
                        f"id {row.id!r} is a {kind} in {where} and another one in {path}; give one of them another "
                        "id, or leave the ids out: then they are made from the content"
                    )
        return [row for row, _ in found.values()]

    def take(self, cursor: int, count: int) -> tuple[list[Row], int]:
        """Return the `count` rows from `cursor` on, and the cursor after them."""
        if cursor < 0 or count < 0:
            raise ValueError(f"cursor and count must not be negative, got {cursor} and {count}")
        while len(self._file) < cursor + count:
            path, turn = next(self._turns)
            self._file.append(self._paths.index(path))
            self._turn.append(turn)
        return [self._at(position) for position in range(cursor, cursor + count)], cursor + count

    def _at(self, position: int) -> Row:
        path = self._paths[self._file[position]]
        epoch, index = divmod(self._turn[position], len(self._sources[path]))
        return self._sources[path][self._order(len(self._sources[path]), epoch)[index]]

    def _digest(self, stages: Sequence[Stage[Row]]) -> str:
        """Return 16 hexadecimal digits that change as soon as any position could have another row."""
        digest = hashlib.sha256(f"{self.seed}{self._of_tokens}".encode())
        paths: list[Path] = []
        for stage in stages:
            digest.update(json.dumps([stage.num_rows, [source.weight for source in stage.sources]]).encode())
            for source in stage.sources:
                if source.path in paths:  # it continues where it was; a copy of it would start anew
                    digest.update(f"file {paths.index(source.path)} again".encode())
                else:
                    paths.append(source.path)
                for row in source.rows:
                    digest.update(json.dumps([row.id, *self.content(row)]).encode())
        return digest.hexdigest()[:16]


class PromptStream(Stream[Prompt]):
    def permutation(self, length: int, epoch: int) -> list[int]:
        return _shuffled(length, f"prompt order {self.seed} {epoch}")

    @staticmethod
    def content(row: Prompt) -> list[Any]:
        more = row.asked.parts() if row.asked else []
        return [row.domain, row.prompt, row.answer, *more]

    def check_shares(self, shares: Mapping[str, float], warns: bool = True) -> None:
        """Raise ValueError unless every stage has prompts of the domains that have a share of the budget, and no
        others. warns: of weights that do not say what is trained."""
        for number, stage in enumerate(self._stages, start=1):
            where = f"stage {number} of data.stages" if len(self._stages) > 1 else "data.train"
            check_domains((prompt for source in stage.sources for prompt in source.rows), shares, where)
            of_file = {source.path: frozenset(prompt.domain for prompt in source.rows) for source in stage.sources}
            if warns and len(set(of_file.values())) > 1 and len({source.weight for source in stage.sources}) > 1:
                log.warning(
                    "budget.domains says how much of each domain is trained; the weights of %s only say how files of "
                    "the same domain mix",
                    where,
                )

    def positions_of(self, domain: str, cursor: int, count: int) -> tuple[list[int], int]:
        """Return the first `count` positions from `cursor` on whose prompts are of this domain, and the cursor after
        them. So every domain can go through the one order by itself. domain: one that the last stage has, or "" for
        any."""
        found: list[int] = []
        while len(found) < count:
            (prompt,), after = self.take(cursor, 1)
            if domain in ("", prompt.domain):
                found.append(cursor)
            cursor = after
        return found, cursor


class ChatStream(Stream[Chat]):
    def permutation(self, length: int, epoch: int) -> list[int]:
        return _shuffled(length, f"sft order {self.seed} {epoch}")[::-1]

    @staticmethod
    def content(row: Chat) -> list[Any]:
        messages = [[one.role, one.content, *([one.more] if one.more else [])] for one in row.messages]
        return [*messages, *([row.tools] if row.tools else [])]


def load_stream(
    data: RlData, seed: int, fits: Fits[Prompt] = list, remarks: bool = True, needs_answer: bool = True
) -> PromptStream:
    """Read every file once. Raise ValueError for rows that are wrong, those of all files together.

    fits: those of all rows that stay. remarks, needs_answer: as of `read_prompts`.
    """

    def read(path: Path, found: Problems) -> list[Prompt]:
        return read_prompts(path, data.domain, data.suffix, found, None, remarks, data.system, needs_answer)

    rows = _rows(data.train_files, read, fits)
    return PromptStream(_stages(data.weights_by_stage, rows), seed, data.special_tokens, data.template_arguments)


def load_prompts(
    config: RolloutPhase, tokenizer: "PreTrainedTokenizerBase", kept: Path | None = None
) -> tuple[PromptStream, PromptTokens]:
    """Return the prompts of a run in their order, and their token ids by id. Raise ValueError for rows that are wrong,
    too long, or not for the reward that judges them.

    kept: a file of the token ids, see data/prompt_tokens.py.
    """
    limit, data = prompt_limit(config), config.data
    rendered: list[PromptTokens] = []

    def fits(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        rendered.append(rendered_prompts(prompts, tokenizer, limit, data.special_tokens, kept, data.template_arguments))
        return [prompt for prompt in prompts if prompt.id in rendered[0]]

    stream = load_stream(config.data, config.seed, fits, needs_answer=config.reward.needs_answers)
    check_reward_domains(stream.rows, config.reward, "data.train")
    check_judged(stream.rows, config.reward)
    return stream, rendered[0]


def load_chats(data: SftData, seed: int, fits: Fits[Chat] = list) -> ChatStream:
    """Read the chats of data.train, as `load_stream` does prompts."""
    rows = _rows(list(data.train), read_chats, fits)
    return ChatStream(_stages([(None, data.train)], rows), seed, data.special_tokens, data.template_arguments)


def _rows(
    paths: Sequence[Path], read: Callable[[Path, Problems], list[Row]], fits: Fits[Row]
) -> dict[Path, tuple[Row, ...]]:
    problems = Problems()
    rows = {path: tuple(read(path, problems)) for path in paths}
    problems.tell()
    stay = {id(row) for row in fits([row for members in rows.values() for row in members])}
    left = {path: tuple(row for row in members if id(row) in stay) for path, members in rows.items()}
    for path in (path for path, members in left.items() if not members):
        raise ValueError(f"all rows of {path} are too long; take the file out, or raise the limit")
    return left


def _stages(
    weights_by_stage: Sequence[tuple[int | None, Weights]], rows: Mapping[Path, tuple[Row, ...]]
) -> list[Stage[Row]]:
    return [
        Stage(
            sources=tuple(Source(path=path, rows=rows[path], weight=weight) for path, weight in weights.items()),
            num_rows=num_rows,
        )
        for num_rows, weights in weights_by_stage
    ]


def _shuffled(length: int, seed: str) -> list[int]:
    order = list(range(length))
    random.Random(seed).shuffle(order)
    return order


def _turns(stages: Sequence[Stage[Row]]) -> Iterator[tuple[Path, int]]:
    """Yield the file of each position, and how many turns it has had before."""
    turns: Counter[Path] = Counter()
    for stage in stages:
        total = sum(source.weight for source in stage.sources)
        credit = [0.0] * len(stage.sources)
        for _ in count() if stage.num_rows is None else range(stage.num_rows):
            # Smooth weighted round robin: everybody earns its share, the richest pays for a turn.
            credit = [c + source.weight / total for c, source in zip(credit, stage.sources, strict=True)]
            chosen = credit.index(max(credit))
            credit[chosen] -= 1.0
            path = stage.sources[chosen].path
            yield path, turns[path]
            turns[path] += 1
