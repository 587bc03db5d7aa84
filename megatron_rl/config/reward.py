"""Defines the section `reward`."""

from typing import Annotated

from pydantic import Field, model_validator

from megatron_rl.config.endpoints import EndpointSection
from megatron_rl.config.names import among
from megatron_rl.config.section import Positive, Section
from megatron_rl.parsing import meant


class CodeSection(Section):
    """Says how code rewards run programs, by the fields of reward.code.CodeSettings."""

    seconds: float = Field(
        default=10.0, gt=0, description="Time limit of one response, all its tests together, in seconds."
    )
    cpu_seconds: Positive = Field(
        default=6, description="CPU time limit of the program, in seconds. With tests on stdin it is that of each test."
    )
    memory_bytes: int = Field(
        default=1024**3,
        ge=64 * 1024**2,
        description="Maximum memory of all processes of one program together, in bytes.",
    )
    processes: int = Field(
        default=32,
        ge=8,
        description="Maximum number of processes and threads of one program, including those of the sandbox itself.",
    )
    python: str | None = Field(
        default=None, description="Python interpreter of the programs. Default: /usr/bin/python3."
    )
    cpp_compiler: tuple[str, ...] = Field(
        default=(),
        description='Compiler command for C++ code blocks with tests on stdin, such as ["/usr/bin/g++", "-O2", '
        '"-std=c++17"]. Empty: no C++; such blocks run as Python, and fail.',
    )
    endpoint: str = Field(
        default="", description='URL of a SandboxFusion server that runs the programs. "": they run on this machine.'
    )
    allow_without_seccomp: bool = Field(
        default=False,
        description="Runs programs also where the sandbox has no seccomp filter, with one layer of protection less.",
    )


class JudgeSection(EndpointSection):
    """Describes a model that is asked about answers that rules call wrong: reward/model_judge.py."""

    domains: tuple[str, ...] = Field(
        default=(), description="Domains whose wrong answers are shown to the judge model. Empty: no judge."
    )
    max_tokens: Positive = Field(default=1024, description="Maximum length of the judge's reply, in tokens.")
    max_answer_characters: Positive = Field(
        default=1000,
        description="Maximum length of an answer that the judge sees, in characters. Longer answers are wrong without "
        "asking.",
    )


# Compares what stands in the box with the reference answer; a model may be asked about those that rules call wrong.
BY_ANSWER = ("exact", "math", "stem")
BUILT_IN = (*BY_ANSWER, "code")
# Choices are for evaluation alone: a guess is right too often to learn from.
OF_BENCHMARKS = (*BUILT_IN, "choice")


def is_service(kind: str) -> bool:
    """Tell whether a kind of reward is a service that is asked over HTTP."""
    return kind.startswith(("http://", "https://"))


_SERVICE = ' or the address of a service ("http://...")'
RewardKindName = Annotated[str, among(BUILT_IN, _SERVICE, is_service)]
BenchmarkKindName = Annotated[str, among(OF_BENCHMARKS, _SERVICE, is_service)]


class PartSection(Section):
    """Names one of several rewards that are added up."""

    kind: RewardKindName = Field(description="Reward of this part, with the values of reward.kind.")
    weight: float = Field(default=1.0, description="Factor of this part's score in the sum. Below 0 it is a penalty.")


class ServiceSection(Section):
    """Says how services that give rewards are asked: reward/service.py."""

    api_key_variable: str = Field(
        default="", description='Name of the environment variable that holds the API key of the service. "": no key.'
    )
    timeout_seconds: float = Field(
        default=60.0, gt=0, description="Timeout of one request, in seconds. A request has all responses of one prompt."
    )
    concurrent: Positive = Field(default=16, description="Maximum number of concurrent requests.")
    tries: Positive = Field(
        default=3, description="Number of requests for the same responses before they count as errors."
    )


class RewardSection(Section):
    kind: RewardKindName = Field(
        default="exact",
        description='Reward of a response. "exact", "math", "stem": compares the boxed answer with the reference '
        'answer. "code": runs the program in a sandbox against tests, which the answer holds as JSON '
        '(docs/sandbox.md). "file.py:function" or "package.module:function": a function of your own. "http://...": a '
        "service (docs/own_rewards.md).",
    )
    domains: dict[str, RewardKindName] = Field(
        default={},
        description='Kind of reward by domain of the prompt, such as {code = "code"}. Other domains have kind.',
    )
    parts: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], PartSection] = Field(
        default={},
        description="Several rewards by name whose weighted sum is the reward, instead of kind, such as {format = "
        '{kind = "rewards.py:form", weight = 0.2}, answer = {kind = "math"}}.',
    )
    correct_part: str = Field(
        default="",
        description='Name of the part that decides whether a response is correct. "": it is correct where all parts '
        "say so.",
    )
    passing_score: float = Field(
        default=1.0,
        description="Minimum score of a correct response, for functions and services that do not say themselves "
        "whether it is correct. pass@k and maj@k count correct responses.",
    )
    memory_bytes: int = Field(
        default=4 * 1024**3,
        ge=64 * 1024**2,
        description="Maximum resident memory of each worker of your own function and all processes that it starts, in "
        "bytes.",
    )
    overlong_buffer_tokens: int = Field(
        default=0,
        ge=0,
        description="Length of the interval before rollout.max_response_tokens over which the reward falls, in "
        "tokens: DAPO's soft overlong punishment. The reward loses up to overlong_penalty before advantages are "
        "computed. 0: no punishment.",
    )
    overlong_penalty: float = Field(
        default=1.0, ge=0, description="Maximum overlong punishment, in units of the reward. DAPO's paper uses 1."
    )
    workers: Positive = Field(
        default=2, description="Number of worker processes for each kind of reward that needs them."
    )
    timeout_seconds: float = Field(
        default=3.0,
        gt=0,
        description="Time limit for one answer, in seconds. For a function of your own that takes `responses` it is "
        "that of all responses of a prompt. Programs have reward.code.seconds instead, services "
        "reward.service.timeout_seconds.",
    )
    max_error_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Maximum share of responses of a phase that could not be judged (timeout, error). Above it the "
        "run stops, because such responses score 0, or the mean of their group, though they may be right. 1: no "
        "limit.",
    )
    code: CodeSection = CodeSection()
    judge: JudgeSection = JudgeSection()
    service: ServiceSection = ServiceSection()

    def kinds_of(self, domain: str) -> tuple[str, ...]:
        """Return every kind that judges responses to prompts of this domain."""
        if domain not in self.domains and self.parts:
            return tuple(part.kind for part in self.parts.values())
        return (self.domains.get(domain, self.kind),)

    def kind_of(self, domain: str) -> str:
        """Return the kind that says whether such responses are correct; the first of the parts where all say so."""
        if domain not in self.domains and self.correct_part:
            return self.parts[self.correct_part].kind
        return self.kinds_of(domain)[0]

    @property
    def needs_answers(self) -> bool:
        """Tell whether a kind of this section compares with the answer of a row, or runs it; others may do without."""
        return any(kind in OF_BENCHMARKS for kind in self.kinds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return every kind of this section once."""
        return tuple(dict.fromkeys(self._kinds_by_key().values()))

    def key_of(self, kind: str) -> str:
        """Return the key of the configuration that names this kind, for messages."""
        return next(key for key, other in self._kinds_by_key().items() if other == kind)

    def _kinds_by_key(self) -> dict[str, str]:
        parts = {f"reward.parts.{name}.kind": part.kind for name, part in self.parts.items()}
        domains = {f"reward.domains.{domain}": kind for domain, kind in self.domains.items()}
        return (parts or {"reward.kind": self.kind}) | domains

    @model_validator(mode="after")
    def _check_parts(self) -> "RewardSection":
        if self.parts and self.kind != "exact":
            raise ValueError(
                f"reward.parts takes the place of reward.kind, and both are set (kind {self.kind!r}); make it a part, "
                "or take the parts out"
            )
        if self.correct_part and self.correct_part not in self.parts:
            raise ValueError(
                f"reward.correct_part {self.correct_part!r} is no part of reward.parts "
                f"({', '.join(self.parts) or 'which is empty'}){meant(self.correct_part, self.parts)}"
            )
        return self

    @model_validator(mode="after")
    def _check_judge(self) -> "RewardSection":
        if self.judge.domains and not (self.judge.url and self.judge.model):
            raise ValueError("reward.judge.domains is set, so reward.judge.url and reward.judge.model must be too")
        for domain in self.judge.domains:
            kinds = self.kinds_of(domain)
            if "code" in kinds:
                raise ValueError(
                    f"reward.judge.domains names {domain!r}, whose answers are programs; only tests can judge them"
                )
            if kinds[0] not in BY_ANSWER or len(kinds) > 1:
                raise ValueError(
                    f"reward.judge.domains names {domain!r}, and the judge is asked about wrong answers of the kinds "
                    f"{', '.join(BY_ANSWER)} alone; take the domain out, or ask a model in your own function"
                )
        return self
