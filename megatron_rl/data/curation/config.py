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

    prompt: str = Field(default="", description="Column of the question.")
    answer: str = Field(default="", description="Column of the reference answer.")
    answer_from: Literal["text", "boxed", "stated"] = Field(
        default="text",
        description='How the answer is read from its column. "text": the column as it stands. "boxed": its last '
        '\\boxed{}. "stated": the answer that a solution without a box states (reward/answers.py).',
    )
    answer_pattern: Annotated[str, AfterValidator(_answer_pattern)] | None = Field(
        default=None,
        description="Regular expression with one group, which is the answer. The last match counts. Not set: no "
        "pattern.",
    )
    tests: Annotated[str, _one_of(TEST_LAYOUTS)] = Field(
        default="", description="Layout of a program's tests in the row, instead of `answer`."
    )
    tests_column: str = Field(
        default="", description=f"Column of the tests. Needed for tests = {', '.join(NEED_A_COLUMN)}."
    )
    options: tuple[str, ...] = Field(
        default=(),
        description="Columns of the options of a multiple choice, instead of `answer`, the right one first. They are "
        "added below the prompt in an order by options_seed, and the answer is a letter. For evaluation.",
    )
    options_seed: int = Field(default=1, description="Random seed of the order of the options.")
    chat: str = Field(
        default="",
        description="Column of a conversation, {role, content} or {from, value}, for supervised fine-tuning, instead "
        "of all these. Other columns go into `meta`.",
    )
    response: str = Field(
        default="",
        description="Column of what an assistant answers, for supervised fine-tuning, instead of `answer`: prompt and "
        "response become a conversation. Other columns go into `meta`.",
    )
    domain: str = Field(default="", description="Domain of every row, or of those without one in domain_column.")
    domain_column: str = Field(
        default="",
        description="Column of the domain. A row whose answer turns out to be tests is of the domain `code` where "
        'this column is empty, "math" or "stem".',
    )
    domains: dict[str, str] = Field(default={}, description='New names of domains, such as {MATH = "math"}.')
    id_column: str = Field(
        default="", description="Column of the row's id. Rows without one get a hash of the content."
    )
    source_column: str = Field(default="", description="Column of the row's source. Rows without one get path or hf.")
    append: str = Field(default="", description="Column whose text is added below the prompt where it is not empty.")
    remove: tuple[Pattern, ...] = Field(
        default=(),
        description="Regular expressions whose matches are removed from the prompt, such as instructions to the model.",
    )
    meta: tuple[str, ...] = Field(
        default=(), description="Columns that are kept in `meta`. An object is merged into it."
    )

    @property
    def columns(self) -> set[str]:
        """Return every column that is named, by the first part of its path. Tests may be read from others too."""
        named = (self.prompt, self.answer, self.tests_column, self.domain_column, self.id_column, self.source_column)
        more = (self.chat, self.response, self.append, *self.options, *self.meta)
        return {name.partition(".")[0] for name in (*named, *more) if name}

    @property
    def is_chat(self) -> bool:
        """Tell whether rows become conversations."""
        return bool(self.chat or self.response)


class Input(Layout):
    """Names files or a Hugging Face dataset. Its layout is the preset's, overridden by the keys that are given here."""

    path: str = Field(
        default="",
        description="File or glob: .jsonl, .jsonl.gz, .json, .parquet or .csv. Either this or hf is required.",
    )
    hf: str = Field(
        default="",
        description='Hugging Face dataset as "org/name", streamed by the library `datasets`. Either this or path is '
        "required.",
    )
    hf_config: str | None = Field(
        default=None, description="Configuration (subset) of the Hugging Face dataset. Not set: its default."
    )
    split: str = Field(default="train", description="Split of the Hugging Face dataset.")
    preset: Annotated[str, _one_of(PRESETS)] = Field(
        default="", description='Name of a known layout. Keys that are given here override it. "": no preset.'
    )

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

    skip_rules: tuple[RuleName, ...] = Field(default=(), description="Rules that are not applied to this source.")

    @model_validator(mode="after")
    def _complete(self) -> "Source":
        layout = self.layout()
        if layout.response and not layout.prompt:
            raise ValueError(f"{self.name}: response = {layout.response!r} needs the column prompt")
        if layout.is_chat:
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
    exact: bool = Field(default=True, description="Drops exact duplicates.")
    near: bool = Field(default=True, description="Drops near-duplicates.")
    threshold: Fraction = Field(default=0.8, description="Minimum Jaccard similarity of two near-duplicate prompts.")
    shingle_tokens: Positive = Field(
        default=3,
        description="Length of the shingles, in tokens. Similarity is that of the sets of shingles of two prompts.",
    )
    bands: Positive = Field(
        default=16,
        description="Number of bands of the MinHash signature. More bands find more pairs, those below the threshold "
        "too.",
    )
    band_rows: Positive = Field(
        default=5,
        description="Number of rows per band. A pair of similarity s is found with probability 1 - (1 - "
        "s^band_rows)^bands.",
    )
    same_numbers: bool = Field(
        default=True,
        description="Whether prompts with different numbers are different questions, however similar they are.",
    )
    same_answer: bool = Field(
        default=True,
        description="Whether prompts with different answers are different questions, however similar they are.",
    )
    verbatim_domains: tuple[str, ...] = Field(
        default=("code_io",),
        description="Domains in which every character of the prompt counts: no normalisation and no near-duplicates.",
    )


class ContaminationSection(Section):
    ngram_tokens: Positive = Field(
        default=13, description="Length of the n-grams that are compared with benchmarks, in tokens."
    )
    min_share: Fraction = Field(
        default=0.4,
        description="Minimum share of common n-grams, of the benchmark's prompt or of the row's, at which a row is "
        "contaminated.",
    )
    min_tokens: Positive = Field(
        default=8,
        description="Minimum length of a benchmark prompt for a partial match, in tokens. Shorter ones must be equal. "
        "Those of up to ngram_tokens must be contained.",
    )


class DifficultySection(Section):
    rollouts: tuple[str, ...] = Field(
        default=(), description="Files (or globs) that `megatron-rl rollout` wrote with the model to be trained."
    )
    stronger: tuple[str, ...] = Field(
        default=(),
        description="Files (or globs) that `megatron-rl rollout` wrote with a stronger model. Needs rollouts.",
    )
    max_pass_rate: float = Field(
        default=1.0, gt=0, le=1, description="Pass rate of the model from which a row is dropped as too easy."
    )
    min_pass_rate: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Pass rate up to which a row is dropped as too hard, where neither model exceeds it.",
    )
    suffix: str = Field(default="", description="Suffix of the rollouts' prompts: their data.suffix.")
    passing_reward: float | None = Field(
        default=None,
        description="Minimum reward of a solved response. Default: a response is solved if it was judged correct.",
    )
    unmeasured: Literal["keep", "drop"] = Field(
        default="keep",
        description='What happens to rows without rollouts. "keep": they stay. "drop": they are dropped.',
    )

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
    output: Path = Field(description="Folder for kept.jsonl, dropped.jsonl and report.json.")
    workers: Positive = Field(default=2, description="Number of processes that read rows. 1: this process alone.")
    max_malformed_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Maximum share of malformed rows of a source. Above it the layout is taken to be wrong.",
    )
    rules: tuple[RuleName, ...] = Field(default=tuple(RULES), description="Defects to look for.")
    source: tuple[Source, ...] = Field(
        description="Sources of rows, in order of preference: the first of several duplicates stays."
    )
    benchmark: tuple[Benchmark, ...] = Field(
        default=(), description="Benchmarks whose questions must not be trained on. Only their prompts are read."
    )
    duplicates: DuplicateSection = DuplicateSection()
    contamination: ContaminationSection = ContaminationSection()
    difficulty: DifficultySection = DifficultySection()

    @model_validator(mode="after")
    def _has_sources(self) -> "CurationConfig":
        if not self.source:
            raise ValueError("there is nothing to curate; add a [[source]]")
        chats = [source.layout().is_chat for source in self.source]
        if any(chats) and not all(chats):
            raise ValueError(
                f"{self.source[chats.index(True)].name} holds conversations and {self.source[chats.index(False)].name} "
                "prompts, and one file of rows cannot be both; curate them apart"
            )
        if chats[0] and self.difficulty.rollouts:
            raise ValueError("difficulty is of prompts, and the sources are conversations; take difficulty out")
        return self
