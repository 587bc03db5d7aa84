"""Defines the section `distillation`, which names a teacher policy whose opinion of sampled tokens is trained on
(docs/joint.md)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_rl.config.model import ServedModelSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.section import Positive

AtLeast0 = Annotated[float, Field(ge=0)]


class DistillationSection(ServedModelSection):
    """Says how the policy learns from a teacher. The teacher is a checkpoint with the policy's tokenizer that is served
    beside it by `rollout.engine`, or by servers that run already. Distillation out of texts that a teacher wrote is SFT
    (docs/distillation.md)."""

    advantage: Literal["added", "alone"] = Field(
        default="added",
        description="How the teacher's signal enters the advantage of a token. The signal is coefficient * (log "
        'p_teacher - log p_student). "added": it is added to the advantage of the response. "alone": it replaces it; '
        "rewards are still computed and logged.",
    )
    coefficient: AtLeast0 = Field(
        default=1.0, description="Weight of the teacher's signal: beta. 0: training by the reward alone."
    )
    final_coefficient: AtLeast0 | None = Field(
        default=None,
        description="Value that the coefficient reaches in final_step, in a straight line from the first step. Not "
        "set: it stays the same. Needs final_step.",
    )
    final_step: Positive | None = Field(
        default=None,
        description="First step, counted from 0, that has final_coefficient. Later steps have it too. Needs "
        "final_coefficient.",
    )
    domains: dict[str, AtLeast0] = Field(
        default={},
        description="Factors of the coefficient by domain of the prompt, such as {math = 0.5}. Other domains have 1.",
    )
    other_template: bool = Field(
        default=False,
        description="Accepts a teacher with another chat template. It then reads the policy's template, which it may "
        "never have seen.",
    )
    urls: tuple[str, ...] = Field(
        default=(),
        description="URLs of servers that already run the teacher. Without them the run starts servers. With them, "
        "path is only needed for its config.json and tokenizer. SGLang needs a --context-length of "
        "rollout.max_prompt_tokens + max_response_tokens + 8.",
    )
    api_key_variable: str = Field(
        default="",
        description='Name of the environment variable that holds the API key of the servers at urls. "": no key.',
    )
    servers: int = Field(
        default=0,
        ge=0,
        description="Number of teacher servers to start on each machine. 0: automatic, as for rollout.servers.",
    )
    threads: Positive = Field(default=1, description="Number of torch threads of each embedded server.")
    max_running_requests: Positive = Field(
        default=16, description="Maximum number of responses that a server scores at once."
    )
    sglang_arguments: tuple[str, ...] = Field(
        default=(),
        description="Additional arguments of SGLang for the teacher's servers, in the form of "
        "rollout.sglang_arguments.",
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> "DistillationSection":
        if (self.final_coefficient is None) != (self.final_step is None):
            raise ValueError(
                "distillation.final_coefficient and final_step say together where the coefficient goes to; set both, "
                "or leave both out"
            )
        if self.api_key_variable and not self.urls:
            raise ValueError(
                f"distillation.api_key_variable names {self.api_key_variable}, but distillation.urls is empty, and "
                "servers that a run starts get a new key from it; leave it out"
            )
        return self

    def coefficient_at(self, step: int, domain: str | None = None) -> float:
        """Give beta in a step, from 0, for prompts of a domain; None leaves its factor out."""
        found = self.coefficient
        if self.final_coefficient is not None and self.final_step is not None:
            found += (self.final_coefficient - found) * min(1.0, step / self.final_step)
        return found * (1.0 if domain is None else self.domains.get(domain, 1.0))

    def as_rollout(self, rollout: RolloutSection) -> RolloutSection:
        """Give the settings of the teacher's servers; the engine and its patience are the policy's. They read whole
        sequences, and SGLang takes none that fills its context."""
        return rollout.model_copy(
            update={
                "urls": self.urls,
                "api_key_variable": self.api_key_variable,
                "servers": self.servers,
                "threads": self.threads,
                "max_running_requests": self.max_running_requests,
                "sglang_arguments": self.sglang_arguments,
                "max_response_tokens": rollout.max_response_tokens + (rollout.engine == "sglang"),
                "port": 0,
                "router_replay": False,
                "release_memory": False,
            }
        )
