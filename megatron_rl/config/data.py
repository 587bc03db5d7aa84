"""Defines the section `data`: files, their mixture, and how rows become prompts and chats."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_rl.config.section import Positive, Section


def _weights(train: object) -> object:
    """Return files with their weights; a file alone has weight 1."""
    if isinstance(train, str | Path):
        return {train: 1.0}
    if not isinstance(train, dict):
        raise ValueError('must be a file, or files with weights, {"a.jsonl" = 3, "b.jsonl" = 1}')
    if not train:
        raise ValueError('names no file; write {"file.jsonl" = 1}')
    return train


Weights = Annotated[dict[Path, Annotated[float, Field(gt=0)]], BeforeValidator(_weights)]


_SET_BY_US = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("padding", "truncation", "max_length"),
}


class TextSection(Section):
    """Says how the texts of rows become tokens."""

    special_tokens: Literal["text", "token"] = Field(
        default="text",
        description="what the tokenizer's special tokens are where a user's message has them written out, as in "
        "`<|endoftext|>`: text like any other, or the token itself",
    )
    template_arguments: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | float | str] = Field(
        default={}, description="what the chat template is given beside messages and tools: {enable_thinking = false}"
    )

    @model_validator(mode="after")
    def _check_arguments(self) -> "TextSection":
        for name in sorted(_SET_BY_US & self.template_arguments.keys()):
            raise ValueError(f"data.template_arguments sets {name!r}, which is set from the rows; take it out")
        return self


class PromptSection(TextSection):
    """Says how the rows of a file become prompts."""

    domain: str = Field(default="math", min_length=1, description="of rows that name none and have no tests")
    suffix: str = Field(
        default="",
        description="goes behind every prompt as it stands, such as "
        '"\\n\\nPut your final answer within \\\\boxed{}." of mathematics',
    )
    system: str = Field(default="", description="system message before every prompt that has none; empty: none")


TooLong = Annotated[
    Literal["stop", "drop"],
    Field(description="rows that are longer than the run's limits: stop the run at its start, or are left out"),
]


class SftData(TextSection):
    too_long: TooLong = "stop"
    train: Weights = Field(
        description="JSONL of {messages: [{role, content}, ...]}, or weights of several such files: "
        '{"math.jsonl" = 64.5, "code.jsonl" = 25.5}'
    )
    validation: Path | None = Field(
        default=None, description="the same of chats that are not trained on; their loss and token entropy are logged"
    )
    batch_tokens: Positive = Field(description="tokens per optimizer step, prompt tokens included")

    @property
    def files(self) -> list[Path]:
        return [*self.train, *([self.validation] if self.validation else [])]


class DataStage(Section):
    """Describes a part of training with a mixture of its own."""

    prompts: Positive | None = Field(default=None, description="after which the next stage begins; none for the last")
    train: Weights = Field(description="as data.train")


class RlData(PromptSection):
    too_long: TooLong = "stop"
    train: Weights | None = Field(
        default=None,
        description="JSONL of {domain, prompt, answer}, or weights of several such files: "
        '{"math.jsonl" = 3, "code.jsonl" = 1} takes three prompts of the first for each of the second',
    )
    stages: tuple[DataStage, ...] = Field(
        default=(),
        description="instead of train: mixtures that follow each other. They are counted in prompts, because how many "
        "prompts a step takes is up to the token budget",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> "RlData":
        if (self.train is None) == (not self.stages):
            raise ValueError("set either data.train or [[data.stages]], not both and not neither")
        if self.stages:
            *before, last = (stage.prompts for stage in self.stages)
            if last is not None or None in before:
                raise ValueError("every stage of data.stages but the last needs `prompts`, and the last has none")
        return self

    @property
    def weights_by_stage(self) -> list[tuple[int | None, Weights]]:
        """Return (prompts, weights by file) of every stage; prompts is None for the last."""
        return [(stage.prompts, stage.train) for stage in self.stages] or [(None, self.train or {})]

    @property
    def train_files(self) -> list[Path]:
        """Return every file once."""
        return list(dict.fromkeys(path for _, weights in self.weights_by_stage for path in weights))
