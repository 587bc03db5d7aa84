"""Finds the recorded turn that a request goes on with: the one whose messages, and the answer to them, it begins with.

A client sends back what it was given, more or less: without the reasoning, without spaces around the text, with ids of
its own. What the policy wrote is known token by token, so of an answer only what it says has to be the same.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.data.messages import Message
from megatron_rl.gateway.recording import Place


@dataclass(frozen=True, slots=True)
class Continued:
    """Says that the first `count` messages are recorded up to `place`, the last of them an answer of the policy."""

    count: int
    place: Place


class History:
    """Finds the answers of one trajectory by what led to them. Of answers that say the same the latest counts."""

    def __init__(self) -> None:
        self._chats: dict[bytes, Place] = {}
        self._texts: dict[str, tuple[str, Place]] = {}

    def find(self, messages: Sequence[Message], tools: str) -> Continued | None:
        """Return the longest beginning of a conversation that is recorded; None where none is."""
        digests = _digests(messages, tools)
        for count in range(len(messages), 0, -1):
            place = self._chats.get(digests[count]) if messages[count - 1].role == "assistant" else None
            if place is not None:
                return Continued(count, place)
        return None

    def add(self, messages: Sequence[Message], tools: str, answer: Message, place: Place) -> None:
        self._chats[_digests((*messages, answer), tools)[-1]] = place

    def find_text(self, prompt: str) -> tuple[str, Place] | None:
        """Return what is left of a prompt behind the longest text that is recorded, and where that ends.

        A text that a stop string ended was told without it; a prompt goes on with it where it writes it again.
        """
        for told in sorted(self._texts, key=len, reverse=True):
            cut_off, place = self._texts[told]
            if prompt.startswith(told + cut_off):
                return prompt[len(told) + len(cut_off) :], place
        return None

    def add_text(self, told: str, cut_off: str, place: Place) -> None:
        """Record a text. told: prompt and answer as the client knows them. cut_off: what the policy wrote behind
        that."""
        self._texts[told] = (cut_off, place)


def _digests(messages: Sequence[Message], tools: str) -> list[bytes]:
    """Return the digests of the tools alone, and of the tools with each beginning of the messages."""
    digest = hashlib.blake2b(tools.encode(), digest_size=16)
    found = [digest.digest()]
    for message in messages:
        digest.update(json.dumps(_said(message), sort_keys=True).encode())
        found.append(digest.digest())
    return found


def _said(message: Message) -> list[object]:
    more = json.loads(message.more) if message.more else {}
    if message.role == "assistant":
        calls = [[call["function"]["name"], call["function"]["arguments"]] for call in more.get("tool_calls", [])]
        return [message.role, message.content.strip(), calls]
    return [message.role, message.content, more]
