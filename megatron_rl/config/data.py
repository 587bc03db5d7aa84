"""The section `data`: files, their mixture, and how rows become prompts and chats."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_rl.config.section import Positive, Section


def _weights(train: object) -> object:
    """A file alone has weight 1."""
    if isinstance(train, str | Path):
        return {train: 1.0}
    if not isinstance(train, dict):
        raise ValueError('must be a file, or files with weights, {"a.jsonl" = 3, "b.jsonl" = 1}')
    if not train:
        raise ValueError('names no file; write {"file.jsonl" = 1}')
    return train


Weights = Annotated[dict[Path, Annotated[float, Field(gt=0)]], BeforeValidator(_weights)]


TemplateName = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,63}$")]


class TextSection(Section):
    """How the texts of rows become tokens."""

    special_tokens: Literal["text", "token"] = Field(
        default="text",
        description="what the tokenizer's special tokens are where a user's message has them written out, as in "
        "`<|endoftext|>`: text like any other, or the token itself",
    )
    template_arguments: dict[TemplateName, bool | int | str] = Field(
        default={},
        description="values that the chat template is given by their names, as {enable_thinking = false} of Qwen3's; "
        "one that it does not read is refused",
    )

    @property
    def rendering(self) -> str:
        """Tell how texts become tokens, where it is not as usual: for digests, since other tokens are other rows."""
        tokens = "" if self.special_tokens == "text" else self.special_tokens
        return tokens + (json.dumps(self.template_arguments, sort_keys=True) if self.template_arguments else "")


class PromptSection(TextSection):
    """How the rows of a file become prompts."""

    domain: str = Field(default="math", min_length=1, description="of rows that name none and have no tests")
    suffix: str = Field(
        default="",
        description="goes behind every prompt as it stands, such as "
        '"\\n\\nPut your final answer within \\\\boxed{}." of mathematics',
    )


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
    """A part of training with a mixture of its own."""

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
        """(prompts, weights by file) of every stage; prompts is None for the last."""
        return [(stage.prompts, stage.train) for stage in self.stages] or [(None, self.train or {})]

    @property
    def train_files(self) -> list[Path]:
        """Each once."""
        return list(dict.fromkeys(path for _, weights in self.weights_by_stage for path in weights))
