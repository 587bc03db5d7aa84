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
        description="What a special token of the tokenizer, such as `<|endoftext|>`, becomes where a user's message "
        'contains it. "text": ordinary text. "token": the special token itself.',
    )
    template_arguments: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | float | str] = Field(
        default={},
        description="Additional arguments of the chat template, such as {enable_thinking = false}. Messages and tools "
        "come from the rows.",
    )

    @model_validator(mode="after")
    def _check_arguments(self) -> "TextSection":
        for name in sorted(_SET_BY_US & self.template_arguments.keys()):
            raise ValueError(f"data.template_arguments sets {name!r}, which is set from the rows; take it out")
        return self


class PromptSection(TextSection):
    """Says how the rows of a file become prompts."""

    domain: str = Field(
        default="math",
        min_length=1,
        description="Domain of rows that name none. Rows without a domain whose answer is a program's tests are of "
        'the domain "code".',
    )
    suffix: str = Field(
        default="",
        description='Text that is appended to every prompt as it stands, such as "\\n\\nPut your final answer within '
        '\\\\boxed{}." for mathematics.',
    )
    system: str = Field(default="", description='System message for every prompt that has none. "": no system message.')


TooLong = Annotated[
    Literal["stop", "drop"],
    Field(
        description='What happens to rows that exceed the length limits of the run. "stop": the run stops at its '
        'start. "drop": they are left out.'
    ),
]


class SftData(TextSection):
    too_long: TooLong = "stop"
    train: Weights = Field(
        description="JSONL file of {messages: [{role, content}, ...]}, or several such files with weights: "
        '{"math.jsonl" = 64.5, "code.jsonl" = 25.5}.'
    )
    validation: Path | None = Field(
        default=None,
        description="JSONL file of chats in the same format that are not trained on. Their loss and token entropy are "
        "logged. Not set: no validation.",
    )
    batch_tokens: Positive = Field(description="Number of tokens per optimizer step, prompt tokens included.")

    @property
    def files(self) -> list[Path]:
        return [*self.train, *([self.validation] if self.validation else [])]


class DataStage(Section):
    """Describes a part of training with a mixture of its own."""

    prompts: Positive | None = Field(
        default=None,
        description="Number of prompts after which the next stage begins. Required for every stage but the last, "
        "which has none.",
    )
    train: Weights = Field(description="Training files of this stage, in the form of data.train.")


class RlData(PromptSection):
    too_long: TooLong = "stop"
    train: Weights | None = Field(
        default=None,
        description='JSONL file of {domain, prompt, answer}, or several such files with weights: {"math.jsonl" = 3, '
        '"code.jsonl" = 1} takes three prompts of the first for each of the second. Either this or stages is '
        "required.",
    )
    stages: tuple[DataStage, ...] = Field(
        default=(),
        description="Curriculum of data mixtures that follow each other, instead of train. Stages are counted in "
        "prompts, because the number of prompts per step depends on the token budget.",
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
