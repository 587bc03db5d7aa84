"""Defines what `tools/prepare_data.py` reads from TOML. Field descriptions are the reference."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from megatron_rl.config.section import Fraction, Positive, Section
from megatron_rl.data.curation.presets import PRESETS
from megatron_rl.data.curation.rules import RULES
from megatron_rl.data.curation.test_layouts import NEED_A_COLUMN, TEST_LAYOUTS


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is not a regular expression ({error})") from None
    return text


def _answer_pattern(text: str) -> str:
    if _pattern(text) and re.compile(text).groups != 1:
        raise ValueError("must have exactly one group, which is the answer; write other groups as (?:...)")
    return text


def _one_of(known: Iterable[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name and name not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return name

    return AfterValidator(check)


Pattern = Annotated[str, AfterValidator(_pattern)]
RuleName = Annotated[str, _one_of(RULES)]


class Layout(Section):
    """Says which column is what. A column is a dotted path: `reward_model.ground_truth`, `prompt.-1.content`."""

    prompt: str = Field(default="", description="column of the question")
    answer: str = Field(default="", description="column of the reference answer")
    answer_from: Literal["text", "boxed", "stated"] = Field(
        default="text",
        description="text: the column as it stands; boxed: its last \\boxed{}; stated: what a solution without a box "
        "says its answer is (reward/answers.py)",
    )
    answer_pattern: Annotated[str, AfterValidator(_answer_pattern)] | None = Field(
        default=None, description="regular expression whose group is the answer; the last match counts"
    )
    tests: Annotated[str, _one_of(TEST_LAYOUTS)] = Field(
        default="", description="how the row gives the tests of a program, instead of `answer`"
    )
    tests_column: str = Field(default="", description=f"where, for the layouts {', '.join(NEED_A_COLUMN)}")
    options: tuple[str, ...] = Field(
        default=(),
        description="instead of `answer`: the columns of the options of a multiple choice, the right one first. They "
        "go below the prompt in an order by options_seed, and the answer is a letter: for evaluation",
    )
    options_seed: int = 1
    chat: str = Field(
        default="",
        description="instead of all these: the column of a conversation, {role, content} or {from, value}, for "
        "supervised fine-tuning; other columns go into `meta`",
    )
    domain: str = Field(default="", description="the domain of every row, or of those without one in domain_column")
    domain_column: str = Field(default="", description="a row with tests is one of `code` whatever stands there")
    domains: dict[str, str] = Field(default={}, description='other names, {MATH = "math"}')
    id_column: str = Field(default="", description="may be missing in a row: the id is then a hash of the content")
    source_column: str = Field(default="", description="may be missing in a row: the source is then path or hf")
    append: str = Field(default="", description="column whose text goes below the prompt where it is not empty")
    remove: tuple[Pattern, ...] = Field(
        default=(), description="regular expressions whose matches are cut out of the prompt: instructions to the model"
    )
    meta: tuple[str, ...] = Field(default=(), description="columns to keep in `meta`; an object is merged into it")

    @property
    def columns(self) -> set[str]:
        """Return every column that is named, by the first part of its path. Tests may be read from others too."""
        named = (self.prompt, self.answer, self.tests_column, self.domain_column, self.id_column, self.source_column)
        return {name.partition(".")[0] for name in (*named, self.chat, self.append, *self.options, *self.meta) if name}


class Input(Layout):
    """Names files or a Hugging Face dataset. Its layout is the preset's, overridden by the keys that are given here."""

    path: str = Field(default="", description="file or glob: .jsonl, .jsonl.gz, .json, .parquet, .csv")
    hf: str = Field(default="", description='"org/name", streamed by the library `datasets`')
    hf_config: str | None = None
    split: str = "train"
    preset: Annotated[str, _one_of(PRESETS)] = ""

    @model_validator(mode="after")
    def _check(self) -> "Input":
        if bool(self.path) == bool(self.hf):
            raise ValueError(f"needs either path or hf, got path = {self.path!r} and hf = {self.hf!r}")
        return self

    @property
    def name(self) -> str:
        return self.path or f"hf:{self.hf}/{self.split}"

    def layout(self) -> Layout:
        given = {name: getattr(self, name) for name in self.model_fields_set & set(Layout.model_fields)}
        return Layout.model_validate({**PRESETS.get(self.preset, {}), **given})


class Source(Input):
    """Names rows to curate."""

    skip_rules: tuple[RuleName, ...] = Field(default=(), description="rules that are not applied to this source")

    @model_validator(mode="after")
    def _complete(self) -> "Source":
        layout = self.layout()
        if layout.chat:
            return self
        gives_answer = layout.answer or layout.tests or layout.options
        if not layout.prompt or not gives_answer or not (layout.domain or layout.domain_column):
            raise ValueError(
                f"{self.name} needs the columns prompt, answer (or tests) and domain (or domain_column); "
                f"set them, or a preset: {', '.join(PRESETS)}; megatron-rl inspect finds out which"
            )
        if layout.tests in NEED_A_COLUMN and not layout.tests_column:
            raise ValueError(f'{self.name}: tests = "{layout.tests}" needs tests_column')
        if len(layout.options) == 1 or len(layout.options) > 10:
            raise ValueError(f"{self.name}: options names {len(layout.options)} columns, and a choice has 2 to 10")
        return self


class Benchmark(Input):
    """Names questions that must not be trained on; only their prompts are read."""

    @model_validator(mode="after")
    def _complete(self) -> "Benchmark":
        if not self.layout().prompt:
            raise ValueError(f"{self.name} needs the column prompt; set it, or a preset: {', '.join(PRESETS)}")
        return self


class DuplicateSection(Section):
    exact: bool = True
    near: bool = True
    threshold: Fraction = Field(default=0.8, description="Jaccard similarity from which two prompts are the same")
    shingle_tokens: Positive = Field(default=3, description="similarity is that of the sets of runs of so many tokens")
    bands: Positive = Field(default=16, description="of the signature; more find more pairs below the threshold too")
    band_rows: Positive = Field(default=5, description="a pair of similarity s is found with 1 - (1 - s^rows)^bands")
    same_numbers: bool = Field(default=True, description="near-duplicates whose numbers differ are different questions")
    same_answer: bool = Field(default=True, description="near-duplicates whose answers differ are different questions")
    verbatim_domains: tuple[str, ...] = Field(
        default=("code_io",),
        description="domains in which every character of the prompt counts: no normal form and no near-duplicates",
    )


class ContaminationSection(Section):
    ngram_tokens: Positive = Field(default=13, description="length of the runs of tokens that are looked up")
    min_share: Fraction = Field(
        default=0.4, description="share of the runs of the benchmark's prompt, or of the row's, that both must have"
    )
    min_tokens: Positive = Field(
        default=8, description="shorter benchmark prompts must be equal; up to ngram_tokens they must be contained"
    )


class DifficultySection(Section):
    rollouts: tuple[str, ...] = Field(
        default=(), description="files (or globs) that `megatron-rl rollout` wrote with the model to be trained"
    )
    stronger: tuple[str, ...] = Field(default=(), description="the same of a stronger model")
    max_pass_rate: float = Field(default=1.0, gt=0, le=1, description="rows that the model solves so often are dropped")
    min_pass_rate: float = Field(
        default=0.0, ge=0, lt=1, description="rows that neither model solves more often are dropped"
    )
    suffix: str = Field(default="", description="data.suffix of the rollouts, which their prompts end in")
    passing_reward: float | None = Field(
        default=None, description="the least reward of a solved response; default: those that were judged correct"
    )
    unmeasured: Literal["keep", "drop"] = "keep"

    @model_validator(mode="after")
    def _ordered(self) -> "DifficultySection":
        if self.stronger and not self.rollouts:
            raise ValueError("difficulty.stronger needs difficulty.rollouts, those of the model to be trained")
        if self.min_pass_rate >= self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate must be below max_pass_rate, got {self.min_pass_rate} and {self.max_pass_rate}"
            )
        return self


class CurationConfig(Section):
    output: Path = Field(description="folder for kept.jsonl, dropped.jsonl and report.json")
    workers: Positive = Field(default=2, description="processes that read rows; 1 is this process itself")
    max_malformed_share: float = Field(
        default=0.1, ge=0, le=1, description="of the rows of a source; above it the layout is taken to be wrong"
    )
    rules: tuple[RuleName, ...] = Field(default=tuple(RULES), description="defects to look for")
    source: tuple[Source, ...]
    benchmark: tuple[Benchmark, ...] = ()
    duplicates: DuplicateSection = DuplicateSection()
    contamination: ContaminationSection = ContaminationSection()
    difficulty: DifficultySection = DifficultySection()

    @model_validator(mode="after")
    def _has_sources(self) -> "CurationConfig":
        if not self.source:
            raise ValueError("there is nothing to curate; add a [[source]]")
        chats = [bool(source.layout().chat) for source in self.source]
        if any(chats) and not all(chats):
            raise ValueError(
                f"{self.source[chats.index(True)].name} holds conversations and {self.source[chats.index(False)].name} "
                "prompts, and one file of rows cannot be both; curate them apart"
            )
        if chats[0] and self.difficulty.rollouts:
            raise ValueError("difficulty is of prompts, and the sources are conversations; take difficulty out")
        return self
