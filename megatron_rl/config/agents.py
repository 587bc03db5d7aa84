"""Defines the keys of the section `rollout` that are about agents."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from megatron_rl.config.names import among
from megatron_rl.config.section import Positive, Section


def _beside(command: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    """Return the command with whole paths in place of the words that are files beside the configuration."""
    folders: list[Path] = (info.context or {}).get("folders", [])
    return tuple(
        next((str((folder / word).resolve()) for folder in folders if word and (folder / word).is_file()), word)
        for word in command
    )


# The keys that decide what agents have the policy say.
AGENT_KEYS = ("agent", "agent_command", "history", "tool_parser", "max_turns")


class AgentKeys(Section):
    """Says how agents run (docs/agents.md). With none of them a prompt is answered once, and that is all."""

    agent: Annotated[str, among(("",))] = Field(
        default="",
        description='Agent function of your own, `async def run(task, model)`, as "file.py:function" or '
        '"package.module:function" (docs/agents.md). It may ask the policy any number of times. It returns a score, '
        'or None: then the reward judges the last message. "": no agent function.',
    )
    agent_command: Annotated[tuple[str, ...], AfterValidator(_beside)] = Field(
        default=(),
        description='Agent program, instead of agent, such as ["python", "agent.py"]. It finds the policy by '
        "OPENAI_BASE_URL and OPENAI_API_KEY. Files are looked for beside the configuration.",
    )
    history: Literal["as_sampled", "template"] = Field(
        default="as_sampled",
        description='What the policy reads of its earlier turns. "as_sampled": the tokens that it sampled, thinking '
        'included. "template": what the chat template makes of their text; where it leaves thinking out, each turn is '
        "a sequence of its own.",
    )
    tool_parser: str = Field(
        default="auto",
        description="Parser of the tool calls in the policy's output. \"template\": the tokenizer's "
        'response_template. "hermes": also for Qwen. "ling": also for GLM-4.5. "llama3", "mistral": those formats. '
        '"none": no tool calls. "auto": '
        "the response_template if there is one, else by the chat template.",
    )
    max_turns: Positive = Field(default=64, description="Maximum number of model requests of one trajectory.")
    agent_seconds: float = Field(
        default=600.0, gt=0, description="Time limit of one trajectory, in seconds. Only time in rollout phases counts."
    )
    agent_memory_bytes: int = Field(
        default=2 * 1024**3,
        ge=64 * 1024**2,
        description="Maximum resident memory of one agent and all processes that it starts, in bytes.",
    )

    @property
    def has_agent(self) -> bool:
        return bool(self.agent or self.agent_command)

    @model_validator(mode="after")
    def _check_agent(self) -> Self:
        if self.agent and self.agent_command:
            raise ValueError(
                f"either agent or agent_command, got {self.agent!r} and {' '.join(self.agent_command)!r}; take one out"
            )
        return self
