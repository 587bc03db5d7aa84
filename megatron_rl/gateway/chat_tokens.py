"""Translates between the texts of a conversation and token ids: the model's chat template, tokenizer and parser of
responses.

All of it runs in one thread beside the event loop: a tokenizer encodes in one thread at a time, and long conversations
take a while.
"""

import asyncio
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from megatron_rl.data.chat import mentions, render_behind, render_conversation
from megatron_rl.data.messages import REASONING, Conversation, Message
from megatron_rl.gateway.parsers import ResponseParser, Said
from megatron_rl.rollout.embedded.fields import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Parsers get so many tokens of a context: the beginning of the policy's turn is among them.
_LAST_TOKENS = 256

T = TypeVar("T")


class ChatTokens:
    """Encodes and decodes with the policy's tokenizer. `close()` ends its thread. Raises RequestError for what the
    template refuses."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        parser: ResponseParser,
        end_ids: Collection[int],
        special_tokens: str = "text",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the thread. end_ids: what ends a response. special_tokens, arguments: as data.special_tokens and
        data.template_arguments."""
        self._tokenizer, self.parser, self._end_ids = tokenizer, parser, end_ids
        self._special_tokens, self._arguments = special_tokens, dict(arguments or {})
        self._keeps_reasoning = mentions(tokenizer, *REASONING)
        self._thread = ThreadPoolExecutor(1, "chat-tokens")

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    async def context(self, messages: Sequence[Message], tools: str) -> np.ndarray:
        """Return int32 [n] of a conversation up to where the policy is to speak."""
        chat = self._conversation(messages, tools)
        return await self._run(
            lambda: render_conversation(self._tokenizer, chat, self._special_tokens, self._arguments)
        )

    async def behind(self, messages: Sequence[Message], tools: str, index: int) -> np.ndarray:
        """Return int32 [n] of what stands behind what the policy said in the message at `index`; see
        `render_behind`."""
        chat = self._conversation(messages, tools)
        return await self._run(
            lambda: render_behind(self._tokenizer, chat, index, self._special_tokens, self._arguments)
        )

    async def encode(self, text: str, *, begins: bool = False) -> np.ndarray:
        """Return int32 [n] of a text. begins: the text is a prompt of its own, with what the tokenizer puts before
        one."""
        return await self._run(lambda: self._tokenizer.encode(text, add_special_tokens=begins))

    async def text_of(self, ids: np.ndarray) -> str:
        """Return the text of sampled tokens, without the one that ends them."""
        ended = len(ids) and int(ids[-1]) in self._end_ids
        shown = ids[:-1].tolist() if ended else ids.tolist()
        return await self._in_thread(lambda: str(self._tokenizer.decode(shown)))

    async def texts_of(self, ids: np.ndarray) -> list[str]:
        """Return the text of each token alone."""
        return await self._in_thread(lambda: [str(self._tokenizer.decode([one])) for one in ids.tolist()])

    async def read(self, text: str, context_ids: np.ndarray, tools: str) -> Said:
        """Return what a text of the policy says. tools: that it was offered."""
        offered = json.loads(tools) if tools else []

        def parse() -> Said:
            context = str(self._tokenizer.decode(context_ids[-_LAST_TOKENS:].tolist()))
            return self.parser.parse(text, context, offered)

        return await self._in_thread(parse)

    def _conversation(self, messages: Sequence[Message], tools: str) -> Conversation:
        """Return the conversation, without reasoning where the template has no place for it: what the policy thought is
        known by its tokens."""
        if not self._keeps_reasoning:
            messages = [_without_reasoning(message) for message in messages]
        return Conversation(messages=tuple(messages), tools=tools)

    async def _run(self, encode: Callable[[], Sequence[int]]) -> np.ndarray:
        try:
            return np.array(await self._in_thread(encode), np.int32)
        except ValueError as error:
            raise RequestError(str(error)) from None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _without_reasoning(message: Message) -> Message:
    if not message.more or message.role != "assistant":
        return message
    more = {key: value for key, value in json.loads(message.more).items() if key not in REASONING}
    return replace(message, more=json.dumps(more, ensure_ascii=False) if more else "")
