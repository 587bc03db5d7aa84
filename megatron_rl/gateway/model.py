"""Gives an agent's function a way to ask the policy. Anything else that speaks OpenAI's API does as well."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from megatron_rl.keys import bearer
from megatron_rl.rollout.connection import Connection, ConnectionFailed


class ModelError(Exception):
    """Says why the policy gave no answer. status: of HTTP; 0 where no answer came. code: a word."""

    def __init__(self, message: str, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class TrajectoryOver(ModelError):
    """Says that a limit has ended this trajectory: nothing more is answered. An agent need not catch it."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Holds a call of a tool. arguments: as the policy wrote them, a JSON object."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Holds an answer of the policy. content: what the policy says, without reasoning and calls. message: to be put
    behind the messages that it answers. finish_reason: "stop", "length" or "tool_calls"."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    message: dict[str, Any] = field(repr=False)

    def result_of(self, call: ToolCall, content: object) -> dict[str, Any]:
        """Return the message that tells the result of a call."""
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text}


class Model:
    """Asks the policy, for one trajectory. base_url, api_key: for OpenAI's clients and what is built on them."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url, self.api_key = base_url, api_key
        self.name = "policy"  # any is taken
        self._place = urlsplit(base_url)
        self._idle: list[Connection] = []

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | str,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Reply:
        """Ask the policy. messages: as OpenAI's; a text is one message of the user. options: further keys of the
        request, such as max_tokens, stop or tool_choice. Raise ModelError where there is no answer."""
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        body = {"model": self.name, "messages": asked, **({"tools": list(tools)} if tools else {}), **options}
        choice = (await self._post("/chat/completions", body))["choices"][0]
        message = choice["message"]
        calls = tuple(
            ToolCall(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in message.get("tool_calls") or ()
        )
        kept = {key: value for key, value in message.items() if value is not None}
        return Reply(
            content=message.get("content") or "",
            reasoning=message.get("reasoning_content") or "",
            tool_calls=calls,
            finish_reason=choice["finish_reason"],
            message={"content": "", **kept},
        )

    async def complete(self, prompt: str | Sequence[int], **options: Any) -> str:
        """Continue a bare text, or token ids."""
        asked = prompt if isinstance(prompt, str) else list(prompt)
        answer = await self._post("/completions", {"model": self.name, "prompt": asked, **options})
        return str(answer["choices"][0]["text"])

    async def _post(self, route: str, body: Mapping[str, Any]) -> Any:
        content = json.dumps(body).encode()
        connection = self._idle.pop() if self._idle else None
        try:
            if connection is None or not connection.is_open:
                connection = await Connection.open(self._place, None)
            target = self._place.path + route
            status, said = await connection.ask("POST", target, content, bearer(self.api_key))
        except ConnectionFailed as error:
            raise ModelError(f"the gateway of the run does not answer: {error}") from None
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        self._idle.append(connection)
        found = json.loads(said)
        if "error" not in found:
            return found
        problem = found["error"]
        kind = TrajectoryOver if problem.get("code") in OVER else ModelError
        raise kind(str(problem["message"]), status, str(problem.get("code", "")))


# Codes of errors that say that a limit has ended the trajectory.
OVER = ("length", "turns", "seconds")
