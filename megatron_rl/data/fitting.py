"""Finds the rows that a model can read: those that are short enough, of tokens that it has embeddings for."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.config.schema import RolloutPhase
from megatron_rl.data.prompt_tokens import PromptTokens, prompt_tokens
from megatron_rl.data.prompts import Prompt
from megatron_rl.families import load_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Says how long a row may be. tokens: of a row at most. key: what says so. kind: what the rows are, for messages.
    too_long: as data.too_long; None where there is no such key."""

    tokens: int
    key: str
    kind: str = "prompts"
    too_long: str | None = None

    def check(self, lengths: Mapping[str, int]) -> set[str]:
        """Return the rows to leave out, by where they stand. ValueError names those that are too long, or all where
        none is left. lengths: tokens by file:line."""
        longer = {where: length for where, length in lengths.items() if length > self.tokens}
        if not longer:
            return set()
        named = ", ".join(f"{where} with {length:,}" for where, length in list(longer.items())[:_NAMED])
        more = f" and {len(longer) - _NAMED:,} more" if len(longer) > _NAMED else ""
        told = f"{len(longer):,} of {len(lengths):,} {self.kind} have more tokens than {self.key} = {self.tokens:,}"
        if self.too_long == "drop" and len(longer) < len(lengths):
            log.warning("%s and are left out, as data.too_long says: %s%s", told, named, more)
            return set(longer)
        drop = ' or leave them out by data.too_long = "drop"' if self.too_long == "stop" else " or drop the rows"
        raise ValueError(f"{told}: {named}{more}; raise it (the longest has {max(longer.values()):,}){drop}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Says which tokens a model has embeddings for. size: ids are below it. tokenizer: writes the model's text."""

    size: int
    tokenizer: "PreTrainedTokenizerBase"

    def check(self, ids: Collection[int], where: str) -> None:
        """Raise ValueError for a row with another token: that of another model's tokenizer, say. ids: of the row."""
        largest = max(ids, default=0)
        if largest >= self.size:
            text, model = self.tokenizer.convert_ids_to_tokens(largest), self.tokenizer.name_or_path
            raise ValueError(
                f"{where}: the tokenizer of {model} makes token {largest} ({text!r}) of it, and vocab_size in "
                f"config.json is {self.size}; take the tokenizer that belongs to the model, or resize the model's "
                "embedding (resize_token_embeddings) where tokens were added"
            )


def vocabulary_of(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    """Return the vocabulary of the model whose directory a tokenizer was loaded from; without config.json any token is
    in it."""
    directory = Path(tokenizer.name_or_path)
    known = (directory / "config.json").is_file()
    return Vocabulary(size=load_architecture(directory).vocab_size if known else 2**31, tokenizer=tokenizer)


def prompt_limit(config: RolloutPhase) -> Limit:
    """Make the limit of a run's prompts."""
    key = "rollout.max_prompt_tokens"
    return Limit(tokens=config.rollout.max_prompt_tokens, key=key, too_long=config.data.too_long)


def rendered_prompts(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    limit: Limit,
    special_tokens: str = "text",
    kept: Path | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> PromptTokens:
    """Return the token ids, by id, of every prompt that is short enough. Raise ValueError as `Limit.check` and
    `Vocabulary.check` do.

    All of them at the start, so that a long prompt cannot end a run when its turn comes hours later. kept, arguments:
    as of `prompt_tokens`.
    """
    ids = [prompt.id for prompt in prompts]
    asked = [prompt.conversation for prompt in prompts]
    rendered = prompt_tokens(ids, asked, tokenizer, special_tokens, kept, arguments)
    left_out = limit.check({p.where or f"prompt {p.id}": rendered.num_tokens(p.id) for p in prompts})
    for prompt in prompts if left_out else ():
        if (prompt.where or f"prompt {prompt.id}") in left_out:
            rendered.drop(prompt.id)
    vocabulary = vocabulary_of(tokenizer)
    for prompt in prompts if rendered.largest >= vocabulary.size else ():
        vocabulary.check(rendered.get(prompt.id, ()), prompt.where or f"prompt {prompt.id}")
    return rendered
