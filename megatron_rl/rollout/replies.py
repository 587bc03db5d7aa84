"""Reads replies of /generate straight into arrays: a long phase has a hundred million tokens, each a list in JSON.

If a parser made these lists, the cyclic garbage collector would walk through all of them again and again, which takes
twice as long as the parsing. It does not see the records here (gc=False), and fields that nobody needs are skipped.
"""

from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

READABLE = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)  # what reading nonsense may raise


class _Drawn(msgspec.Struct, array_like=True, gc=False):
    """Holds [log-prob, token, text]; a log-prob that is not finite comes as null."""

    logprob: float | None


class _Span(msgspec.Struct, gc=False):
    version: str | int
    start: int
    end: int


class _FinishReason(msgspec.Struct):
    type: str
    message: Any = None


class _Meta(msgspec.Struct):
    """Holds the meta_info of a reply. output_token_logprobs: None for a request that was aborted before it ran."""

    finish_reason: _FinishReason
    output_token_logprobs: list[_Drawn] | None = None
    weight_version: str | int | None = None
    weight_versions: list[_Span] | None = None
    routed_experts: Any = None

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions of the weights that drew its tokens, in order."""
        if self.weight_versions:
            return tuple(str(span.version) for span in self.weight_versions if span.end > span.start)
        return (str(self.weight_version),)


class _Body(msgspec.Struct):
    output_ids: list[int]
    meta_info: _Meta


class _InputMeta(msgspec.Struct):
    input_token_logprobs: list[_Drawn]


class _Scored(msgspec.Struct):
    meta_info: _InputMeta


class Reply(msgspec.Struct):
    """Holds what a server says of one response. output_ids: int32 [n]. logprobs: float32, of as many where all is
    well."""

    output_ids: np.ndarray
    logprobs: np.ndarray
    meta: _Meta


_DECODER, _SCORED = msgspec.json.Decoder(_Body), msgspec.json.Decoder(_Scored)
_LOGPROB = attrgetter("logprob")


def read_reply(content: bytes) -> Reply:
    """Read the JSON of one reply. Raise one of READABLE for what is none."""
    body = _DECODER.decode(content)
    logprobs = _logprobs(body.meta_info.output_token_logprobs or [])
    return Reply(output_ids=np.array(body.output_ids, np.int32), logprobs=logprobs, meta=body.meta_info)


def read_input_logprobs(content: bytes) -> np.ndarray:
    """Read the log-probs float32 [n - 1] of a reply about n input tokens, of which the first has none. Raise one of
    READABLE for what is no such reply."""
    return _logprobs(_SCORED.decode(content).meta_info.input_token_logprobs[1:])


def _logprobs(drawn: list[_Drawn]) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large is not finite, and None is no number
        return np.array(list(map(_LOGPROB, drawn)), np.float32)
