"""Defines the section `teacher`, and what it shares with the judge: endpoints that speak OpenAI's API."""

from typing import Any

from pydantic import Field, model_validator

from megatron_rl.config.section import Fraction, Positive, Section


class EndpointSection(Section):
    """Describes a model behind an OpenAI-compatible endpoint: megatron_rl/endpoint.py."""

    url: str = Field(default="", description="of the server, such as http://host:port/v1")
    model: str = Field(default="", description="the name under which that server has it")
    api_key_variable: str = Field(default="", description="environment variable that holds the key; empty: none")
    timeout_seconds: float = Field(default=60.0, gt=0, description="for one reply, after which it is asked again")
    concurrent: Positive = Field(default=16, description="requests at a time")


class TeacherSection(EndpointSection):
    """Describes a model that answers the prompts in place of a checkpoint: rollout/teacher.py. Temperature, length and
    number of its responses are rollout.temperature, max_response_tokens and samples_per_prompt."""

    url: str = Field(min_length=1, description="of an OpenAI-compatible server, such as http://host:port/v1")
    model: str = Field(min_length=1, description="the name under which that server has it")
    timeout_seconds: float = Field(default=600.0, gt=0, description="for one response, after which it is asked again")
    concurrent: Positive = Field(default=64, description="responses at a time")
    tries: Positive = Field(
        default=5, description="requests for a response before it has failed, and its prompt with it"
    )
    max_failure_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="the run stops when a greater share of prompts failed; --resume asks them again. 1 is off",
    )
    system: str = Field(default="", description="system message before every prompt; empty: none")
    top_p: Fraction = Field(default=1.0, description="share of the most probable tokens that it samples from")
    send_seed: bool = Field(
        default=True,
        description="send a seed, another for each response; false for servers that refuse the key `seed`",
    )
    extra: dict[str, Any] = Field(
        default={},
        description='further keys of each request, such as {reasoning_effort = "high"}; max_completion_tokens among '
        "them takes the place of max_tokens",
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
