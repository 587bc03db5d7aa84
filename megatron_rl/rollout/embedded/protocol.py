"""Reads SGLang's JSON bodies into validated records, and writes records as SGLang's JSON answers. Imports no torch.

Every refusal is a RequestError that names the field and the value.
"""

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import pybase64

from megatron_rl.rollout.embedded.fields import RequestError, boolean, cut, default, integer, number, string

MAX_SEQUENCES = 16384
# So many sequences of full length may be in one request, or a larger number of shorter ones.
MAX_FULL_LENGTH = 1024
MAX_TOP_K = 2**31 - 1
MAX_TEMPERATURE = 1e6
MAX_STOP_TOKEN_IDS = 15  # end tokens of the model have places of their own
MAX_STOP_STRINGS = 32  # of SGLang
DEFAULT_MAX_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    n: int
    max_new_tokens: int
    temperature: float  # 0 = greedy
    top_p: float
    top_k: int  # the vocabulary's size = all
    stop: tuple[str, ...]  # in what is drawn; the first that comes up ends it
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool  # stop at length only; as in SGLang this covers stop_token_ids too
    skip_special_tokens: bool
    no_stop_trim: bool
    sampling_seed: int | None  # None: random


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """Holds one prompt of a /generate call, with its n samples still to be drawn."""

    rid: str
    input_ids: list[int]
    params: SamplingParams
    return_logprob: bool
    logprob_start: int | None  # None: no input log-probs
    return_routed_experts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    prompts: tuple[PromptRequest, ...]
    single: bool  # the answer is one object, not a list
    stream: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Holds the limits of what the served model accepts."""

    vocab_size: int
    context_length: int

    @property
    def request_tokens(self) -> int:
        """The number of tokens that a request's prompts and all that it may generate can have."""
        return MAX_FULL_LENGTH * self.context_length

    @property
    def body_bytes(self) -> int:
        """The number of bytes of a body with so many token ids, each with a comma and a space, and with everything
        else."""
        return 2**20 + self.request_tokens * (len(str(self.vocab_size)) + 2)


_GENERATE_KEYS = {
    "input_ids",
    "sampling_params",
    "return_logprob",
    "return_routed_experts",
    "logprob_start_len",
    "rid",
    "stream",
}
# Accepted with the value that means "off"; refused, not ignored, with any other.
_OFF_SAMPLING = {
    "min_p": (0, None),
    "min_new_tokens": (0, None),
    "repetition_penalty": (1, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "spaces_between_special_tokens": (True, None),
}


def parse_generate(body: dict[str, Any], limits: Limits) -> GenerateRequest:
    for key in body.keys() - _GENERATE_KEYS:
        if body[key] not in (None, False, 0, "", [], {}):
            raise RequestError(f"{cut(key)} is not supported by the embedded server, got {cut(body[key])}")
    ids, batched = _input_ids(body.get("input_ids"), limits)
    count = len(ids)
    params = _per_prompt("sampling_params", body.get("sampling_params") or {}, count, dict)
    wants = _per_prompt("return_logprob", body.get("return_logprob") or False, count, bool)
    routed = _per_prompt("return_routed_experts", body.get("return_routed_experts") or False, count, bool)
    starts = _per_prompt("logprob_start_len", default(body, "logprob_start_len", -1), count, int)
    rids = _rids(body.get("rid"), count, batched)
    stream = boolean("stream", default(body, "stream", False))
    prompts = tuple(
        PromptRequest(
            rid=rids[i],
            input_ids=ids[i],
            params=parse_sampling(params[i], len(ids[i]), limits),
            return_logprob=wants[i],
            logprob_start=_logprob_start(starts[i], len(ids[i])) if wants[i] else None,
            return_routed_experts=routed[i],
        )
        for i in range(count)
    )
    total = sum(p.params.n for p in prompts)
    if total > MAX_SEQUENCES:
        raise RequestError(f"a request may ask for at most {MAX_SEQUENCES} sequences, got {total}")
    tokens = sum(len(p.input_ids) + p.params.n * p.params.max_new_tokens for p in prompts)
    if tokens > limits.request_tokens:
        raise RequestError(
            f"a request's prompts and n * max_new_tokens may come to at most {limits.request_tokens} tokens "
            f"({MAX_FULL_LENGTH} sequences of full length), got {tokens}; send several requests"
        )
    return GenerateRequest(prompts=prompts, single=not batched and total == 1, stream=stream)


def parse_sampling(body: dict[str, Any], prompt_length: int, limits: Limits) -> SamplingParams:
    known = set(SamplingParams.__slots__) | _OFF_SAMPLING.keys()
    unknown = sorted(body.keys() - known)
    if unknown:
        raise RequestError(f"sampling_params.{_bare(unknown[0])} is unknown; known: {', '.join(sorted(known))}")
    for key, off in _OFF_SAMPLING.items():
        if key in body and body[key] not in off:
            raise RequestError(f"sampling_params.{key} must be {off[0]!r} (not supported), got {cut(body[key])}")

    room = limits.context_length - prompt_length
    max_new = body.get("max_new_tokens")
    max_new = min(DEFAULT_MAX_NEW_TOKENS, room) if max_new is None else integer("max_new_tokens", max_new, 0, 2**31 - 1)
    if max_new > room:
        raise RequestError(
            f"input_ids ({prompt_length} tokens) + max_new_tokens ({max_new}) exceed the context length of "
            f"{limits.context_length}"
        )
    top_k = integer("top_k", default(body, "top_k", -1), -1, MAX_TOP_K)
    if top_k == 0:
        raise RequestError("top_k must be at least 1, or -1 for all, got 0")
    top_p = number("top_p", default(body, "top_p", 1.0), 0, 1)
    if top_p == 0:
        raise RequestError("top_p must be above 0, got 0")
    temperature = number("temperature", default(body, "temperature", 1.0), 0, MAX_TEMPERATURE)
    if 0 < temperature < 1e-6:
        raise RequestError(f"temperature must be 0 or at least 1e-6, got {temperature!r}")
    seed = body.get("sampling_seed")
    return SamplingParams(
        n=integer("n", default(body, "n", 1), 1, MAX_SEQUENCES),
        max_new_tokens=max_new,
        temperature=temperature,
        top_p=top_p,
        top_k=limits.vocab_size if top_k == -1 else min(top_k, limits.vocab_size),
        stop=_stop_strings(body.get("stop") or []),
        stop_token_ids=_stop_ids(body.get("stop_token_ids") or []),
        ignore_eos=boolean("ignore_eos", default(body, "ignore_eos", False)),
        skip_special_tokens=boolean("skip_special_tokens", default(body, "skip_special_tokens", True)),
        no_stop_trim=boolean("no_stop_trim", default(body, "no_stop_trim", False)),
        sampling_seed=None if seed is None else integer("sampling_seed", seed, -(2**63), 2**64 - 1),
    )


def meta_info(
    *,
    rid: str,
    prompt_tokens: int | None,
    output_ids: list[int],
    output_logprobs: list[float] | None,
    input_token_logprobs: list[list[Any]] | None,
    finish_reason: dict[str, Any] | None,
    weight_version: str,
    weight_versions: list[dict[str, Any]],
    routed_experts: np.ndarray | None,
    e2e_latency: float,
) -> dict[str, Any]:
    """Return the meta_info of an answer. prompt_tokens: None leaves it out with cached_tokens, as SGLang does for a
    request aborted in its queue."""
    meta: dict[str, Any] = {
        "id": rid,
        "finish_reason": finish_reason,
        "completion_tokens": len(output_ids),
        "weight_version": weight_version,
        "weight_versions": weight_versions,
        "e2e_latency": e2e_latency,
    }
    if prompt_tokens is not None:
        meta |= {"prompt_tokens": prompt_tokens, "cached_tokens": 0}
    if output_logprobs is not None:
        meta["output_token_logprobs"] = [
            [logprob, token, None] for logprob, token in zip(output_logprobs, output_ids, strict=True)
        ]
    if input_token_logprobs is not None:
        meta["input_token_logprobs"] = input_token_logprobs
    if routed_experts is not None:
        meta["routed_experts"] = pybase64.b64encode_as_string(routed_experts.astype("<i4").tobytes())
    return meta


def _input_ids(value: Any, limits: Limits) -> tuple[list[list[int]], bool]:
    """Read the prompts, and whether they came as a list: (prompts, batched)."""
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"input_ids must be a list of token ids or a list of such lists, not empty, got {cut(value)}"
        )
    batched = isinstance(value[0], list)
    prompts = value if batched else [value]
    for prompt in prompts:
        if not isinstance(prompt, list) or not prompt:
            raise RequestError(f"input_ids must hold token ids or lists of them, none empty, got {cut(prompt)}")
        for token in prompt:
            if type(token) is not int:
                raise RequestError(f"input_ids must be integers, got {cut(token)}")
            if not 0 <= token < limits.vocab_size:
                raise RequestError(f"input_ids must be in [0, {limits.vocab_size}), got {cut(token)}")
        if len(prompt) > limits.context_length:
            raise RequestError(f"input_ids ({len(prompt)} tokens) exceed the context length of {limits.context_length}")
    return prompts, batched


def _per_prompt(name: str, value: Any, count: int, kind: type) -> list[Any]:
    """Return one value of `kind` for each prompt, from one value for all or a list."""
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise RequestError(f"{name} must be one value or a list of {count}, one for each prompt, got {len(values)}")
    for item in values:
        if type(item) is not kind:
            raise RequestError(f"{name} must be of type {kind.__name__}, got {cut(item)}")
    return values


def _rids(value: Any, count: int, batched: bool) -> list[str]:
    if value is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(value, str) and value:
        string("rid", value)
        return [f"{value}_{i}" for i in range(count)] if batched else [value]
    if isinstance(value, list) and len(value) == count and all(isinstance(rid, str) and rid for rid in value):
        if len(set(value)) != count:
            raise RequestError(f"rid must not repeat within a request, got {cut(value)}")
        return [string("rid", rid) for rid in value]
    raise RequestError(f"rid must be a string, or a list of {count} strings, none empty, got {cut(value)}")


def _logprob_start(start: int, prompt_length: int) -> int | None:
    if start == -1:
        return None
    if not 0 <= start < prompt_length:
        raise RequestError(f"logprob_start_len must be -1 or in [0, {prompt_length}), got {cut(start)}")
    return start


def _stop_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise RequestError(f"stop_token_ids must be a list of token ids, got {cut(value)}")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise RequestError(f"stop_token_ids must hold at most {MAX_STOP_TOKEN_IDS} ids, got {len(value)}")
    # One that is not in the vocabulary is never drawn, and need not be refused.
    return tuple(integer("a token id in stop_token_ids", token, 0, 2**31 - 1) for token in value)


def _stop_strings(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise RequestError(f"stop must be a string or a list of strings, got {cut(value)}")
    if len(values) > MAX_STOP_STRINGS:
        raise RequestError(f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(values)}")
    return tuple(string("a string in stop", one) for one in values)


def _bare(key: str) -> str:
    return cut(key).strip("'\"")
