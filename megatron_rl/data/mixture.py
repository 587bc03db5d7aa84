"""The order in which training goes through its prompts: stages, each a weighted mixture of files."""

import hashlib
import json
import logging
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path

from megatron_rl.config.schema import RlData
from megatron_rl.data.prompts import Prompt, read_prompts

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The prompts of one file. weight: its share of the stage, relative to the other weights."""

    path: Path
    prompts: tuple[Prompt, ...]
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """num_prompts: after which the next stage begins; None for the last."""

    sources: tuple[Source, ...]
    num_prompts: int | None = None


class PromptStream:
    """Prompts in a seeded order. A pure function of (stages, seed, cursor), where the cursor counts prompts from the
    start of training; it is all that a checkpoint has to keep.

    Files take turns so that after any number of prompts each has had its weight's share of the stage, to within one
    prompt for every other file. In its turns a file goes through one seeded permutation of its rows after the other,
    each row once in every epoch; a file of several stages goes on where it was. So a prompt can come twice in a step
    only where an epoch of its file ends.
    """

    def __init__(self, stages: Sequence[Stage], seed: int) -> None:
        self.seed = seed
        self._sources = {source.path: source.prompts for stage in stages for source in stage.sources}
        self._paths = list(self._sources)
        # Where each position's prompt is: its file, and the how manieth of that file it is. Grows on demand.
        self._file, self._turn = array("L"), array("Q")
        self._stages = tuple(stages)
        self._turns = _turns(stages)
        self._order = lru_cache(maxsize=4 * len(self._paths))(self._permutation)
        self.digest = _digest(stages, seed)

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt once. ValueError when two that differ have the same id."""
        found: dict[str, tuple[Prompt, Path]] = {}
        for path, prompts in self._sources.items():
            for prompt in prompts:
                other, where = found.setdefault(prompt.id, (prompt, path))
                if (other.domain, other.prompt, other.answer) != (prompt.domain, prompt.prompt, prompt.answer):
                    raise ValueError(
                        f"id {prompt.id!r} is a prompt in {where} and another one in {path}; give one of them another "
                        "id, or leave the ids out: then they are made from the content"
                    )
        return [prompt for prompt, _ in found.values()]

    def check_shares(self, shares: Mapping[str, float]) -> None:
        """ValueError unless every stage has prompts of the domains that have a share of the budget, and no others."""
        for number, stage in enumerate(self._stages, start=1):
            where = f"stage {number} of data.stages" if len(self._stages) > 1 else "data.train"
            check_domains((prompt for source in stage.sources for prompt in source.prompts), shares, where)
            of_file = {source.path: frozenset(prompt.domain for prompt in source.prompts) for source in stage.sources}
            if len(set(of_file.values())) > 1 and len({source.weight for source in stage.sources}) > 1:
                log.warning(
                    "budget.domains says how much of each domain is trained; the weights of %s only say how files of "
                    "the same domain mix",
                    where,
                )

    def take(self, cursor: int, count: int) -> tuple[list[Prompt], int]:
        """The `count` prompts from `cursor` on, and the cursor after them."""
        if cursor < 0 or count < 0:
            raise ValueError(f"cursor and count must not be negative, got {cursor} and {count}")
        while len(self._file) < cursor + count:
            path, turn = next(self._turns)
            self._file.append(self._paths.index(path))
            self._turn.append(turn)
        return [self._at(position) for position in range(cursor, cursor + count)], cursor + count

    def positions_of(self, domain: str, cursor: int, count: int) -> tuple[list[int], int]:
        """The first `count` positions from `cursor` on whose prompts are of this domain, and the cursor after them. So
        every domain can go through the one order by itself. domain: one that the last stage has, or "" for any."""
        found: list[int] = []
        while len(found) < count:
            (prompt,), after = self.take(cursor, 1)
            if domain in ("", prompt.domain):
                found.append(cursor)
            cursor = after
        return found, cursor

    def _at(self, position: int) -> Prompt:
        path = self._paths[self._file[position]]
        epoch, index = divmod(self._turn[position], len(self._sources[path]))
        return self._sources[path][self._order(len(self._sources[path]), epoch)[index]]

    def _permutation(self, length: int, epoch: int) -> list[int]:
        order = list(range(length))
        random.Random(f"prompt order {self.seed} {epoch}").shuffle(order)
        return order


def load_stream(data: RlData, seed: int) -> PromptStream:
    """Reads every file once. ValueError for rows that are wrong."""
    prompts: dict[Path, tuple[Prompt, ...]] = {}
    stages = []
    for num_prompts, weights in data.weights_by_stage:
        for path in weights:
            if path not in prompts:
                prompts[path] = tuple(read_prompts(path))
        sources = (Source(path=path, prompts=prompts[path], weight=weight) for path, weight in weights.items())
        stages.append(Stage(sources=tuple(sources), num_prompts=num_prompts))
    return PromptStream(stages, seed)


def check_domains(prompts: Iterable[Prompt], shares: Mapping[str, float], where: str) -> None:
    """ValueError unless the prompts are of the domains that have a share of the budget, all of these and no others."""
    found = {prompt.domain for prompt in prompts}
    for domain in sorted(found - shares.keys()):
        raise ValueError(
            f"{where} has prompts of domain {domain!r}, which has no share in budget.domains "
            f"({', '.join(sorted(shares))}); give it one, or leave its prompts out"
        )
    for domain in sorted(shares.keys() - found):
        raise ValueError(
            f"budget.domains has a share for {domain!r}, but {where} has no prompts of that domain "
            f"({', '.join(sorted(found))}); add some, or take the share out"
        )


def _turns(stages: Sequence[Stage]) -> Iterator[tuple[Path, int]]:
    """The file of each position, and how many turns it has had before."""
    turns: Counter[Path] = Counter()
    for stage in stages:
        total = sum(source.weight for source in stage.sources)
        credit = [0.0] * len(stage.sources)
        for _ in count() if stage.num_prompts is None else range(stage.num_prompts):
            # Smooth weighted round robin: everybody earns its share, the richest pays for a turn.
            credit = [c + source.weight / total for c, source in zip(credit, stage.sources, strict=True)]
            chosen = credit.index(max(credit))
            credit[chosen] -= 1.0
            path = stage.sources[chosen].path
            yield path, turns[path]
            turns[path] += 1


def _digest(stages: Sequence[Stage], seed: int) -> str:
    """16 hexadecimal digits that are others as soon as any position could have another prompt."""
    digest = hashlib.sha256(str(seed).encode())
    paths: list[Path] = []
    for stage in stages:
        digest.update(json.dumps([stage.num_prompts, [source.weight for source in stage.sources]]).encode())
        for source in stage.sources:
            if source.path in paths:  # goes on where it was; a copy of it would begin
                digest.update(f"file {paths.index(source.path)} again".encode())
            else:
                paths.append(source.path)
            for p in source.prompts:
                digest.update(json.dumps([p.id, p.domain, p.prompt, p.answer]).encode())
    return digest.hexdigest()[:16]
