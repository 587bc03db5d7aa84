"""Tells what the tokenizer of the model that will be trained makes of texts that another model wrote."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.data.chat import render_chat
from megatron_rl.data.prompts import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "What is in between?"
_TURN = re.compile(r"<([^<>\s]+)>[^<>\s]+</\1>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """Says how the model reads texts. markers: texts that are no ordinary words to the model, none of them empty.
    num_tokens: of a conversation."""

    markers: tuple[str, ...]
    num_tokens: Callable[[Sequence[Message]], int]

    def would_misread(self, text: str) -> bool:
        """Tell whether SFT would encode a part of the text as a special token, or the model take it for the next
        turn."""
        return any(marker in text for marker in self.markers)


def student_of(tokenizer: "PreTrainedTokenizerBase") -> Student:
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {str(token) for token in tokenizer.all_special_tokens}
    return Student(
        markers=tuple(sorted((special | _turns(tokenizer)) - {""})),
        num_tokens=lambda messages: len(render_chat(tokenizer, messages)[0]),
    )


def _turns(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Return how the chat template begins a turn, where it does so by <tag>...</tag>: Ling-lite's are
    <role>HUMAN</role>, which not every tokenizer of its calls special."""
    from jinja2 import TemplateError

    found = set()
    for roles in (("user",), ("system", "user", "assistant")):
        rows = [{"role": role, "content": _PROBE} for role in roles]
        try:
            text = str(tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=roles[-1] == "user"))
        except TemplateError:  # of a template without system messages
            continue
        found |= {turn[0] for piece in text.split(_PROBE) for turn in _TURN.finditer(piece)}
    return found
