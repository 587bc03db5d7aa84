"""Defines the section `teacher`, and what it shares with the judge: endpoints that speak OpenAI's API."""

from typing import Any

from pydantic import Field, model_validator

from megatron_rl.config.section import Fraction, Positive, Section


class EndpointSection(Section):
    """Describes a model behind an OpenAI-compatible endpoint: megatron_rl/endpoint.py."""

    url: str = Field(default="", description="URL of the OpenAI-compatible server, such as http://host:port/v1.")
    model: str = Field(default="", description="Name of the model on the server at url.")
    api_key_variable: str = Field(
        default="", description='Name of the environment variable that holds the API key of the server. "": no key.'
    )
    timeout_seconds: float = Field(
        default=60.0, gt=0, description="Timeout of one reply, in seconds. After it the request is sent again."
    )
    concurrent: Positive = Field(default=16, description="Maximum number of concurrent requests.")


class TeacherSection(EndpointSection):
    """Describes a model that answers the prompts in place of a checkpoint: rollout/teacher.py. Temperature, length and
    number of its responses are rollout.temperature, max_response_tokens and samples_per_prompt."""

    url: str = Field(min_length=1, description="URL of the OpenAI-compatible server, such as http://host:port/v1.")
    model: str = Field(min_length=1, description="Name of the model on the server at url.")
    timeout_seconds: float = Field(
        default=600.0, gt=0, description="Timeout of one response, in seconds. After it the request is sent again."
    )
    concurrent: Positive = Field(default=64, description="Maximum number of concurrent responses.")
    tries: Positive = Field(
        default=5, description="Number of requests for one response before it counts as failed, and its prompt with it."
    )
    max_failure_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Maximum share of failed prompts. Above it the run stops; --resume asks them again. 1: no limit.",
    )
    system: str = Field(default="", description='System message before every prompt. "": no system message.')
    top_p: Fraction = Field(
        default=1.0,
        description="Nucleus sampling: probability mass of the tokens that the teacher samples from. 1: all tokens.",
    )
    send_seed: bool = Field(
        default=True,
        description="Sends a seed with each request, a different one for each response. Set false for servers that "
        "refuse the key `seed`.",
    )
    extra: dict[str, Any] = Field(
        default={},
        description='Additional keys of each request, such as {reasoning_effort = "high"}. max_completion_tokens '
        "replaces max_tokens.",
    )

    @model_validator(mode="after")
    def _check_extra(self) -> "TeacherSection":
        taken = {"model", "messages", "n", "stream", "temperature", "top_p", "max_tokens", "seed"} & self.extra.keys()
        if taken:
            raise ValueError(
                f"teacher.extra names {sorted(taken)[0]!r}, which a request has from elsewhere (rollout.temperature, "
                "rollout.max_response_tokens, rollout.samples_per_prompt, teacher.top_p, seed); take it out"
            )
        return self
