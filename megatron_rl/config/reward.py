"""The section `reward`."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_rl.config.endpoints import EndpointSection
from megatron_rl.config.section import Positive, Section


class CodeSection(Section):
    """How code rewards run programs; the fields of reward.code.CodeSettings."""

    seconds: float = Field(default=10.0, gt=0, description="of one response, all of its tests")
    cpu_seconds: Positive = Field(default=6, description="of CPU time of the program; on stdin, of each test")
    memory_bytes: int = Field(default=1024**3, ge=64 * 1024**2, description="of all processes of one program")
    processes: int = Field(default=32, ge=8, description="and threads of one program, the sandbox's own included")
    python: str | None = Field(default=None, description="interpreter for programs; none takes /usr/bin/python3")
    cpp_compiler: tuple[str, ...] = Field(
        default=(),
        description='such as ["/usr/bin/g++", "-O2", "-std=c++17"], for blocks marked as C++ with tests on stdin',
    )
    endpoint: str = Field(default="", description="URL of a SandboxFusion server; empty runs programs on this machine")
    allow_without_seccomp: bool = Field(
        default=False, description="judge programs where the sandbox has no seccomp filter, with one layer less"
    )


class JudgeSection(EndpointSection):
    """A model that is asked about answers that rules call wrong: reward/model_judge.py."""

    domains: tuple[str, ...] = Field(default=(), description="whose wrong answers it is asked about; empty is off")
    max_tokens: Positive = Field(default=1024, description="of its reply")
    max_answer_characters: Positive = Field(default=1000, description="a longer answer is wrong without asking")


# The pool knows "choice" too, which is for evaluation: a guess is right too often to learn from.
RewardKindName = Literal["exact", "math", "stem", "code"]


class RewardSection(Section):
    kind: RewardKindName = Field(
        default="exact", description="code runs programs in a sandbox (docs/sandbox.md); its answers are JSON of tests"
    )
    domains: dict[str, RewardKindName] = Field(
        default={}, description='kinds by the domain of the prompt, such as {code = "code"}; kind is for all others'
    )
    overlong_buffer_tokens: int = Field(
        default=0,
        ge=0,
        description="DAPO's soft punishment: over the last so many tokens before rollout.max_response_tokens a reward "
        "loses up to 1 before advantages are taken; 0 is off",
    )
    workers: Positive = Field(default=2, description="processes for each kind that needs some")
    timeout_seconds: float = Field(
        default=3.0, gt=0, description="for one answer; programs have reward.code.seconds instead"
    )
    max_error_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="a phase of which a greater share of responses could not be judged (timeout, error) stops the run: "
        "they score 0 though nobody knows that they are wrong; 1 is off",
    )
    code: CodeSection = CodeSection()
    judge: JudgeSection = JudgeSection()

    def kind_of(self, domain: str) -> str:
        return self.domains.get(domain, self.kind)

    @model_validator(mode="after")
    def _check_judge(self) -> "RewardSection":
        if self.judge.domains and not (self.judge.url and self.judge.model):
            raise ValueError("reward.judge.domains is set, so reward.judge.url and reward.judge.model must be too")
        programs = [d for d in self.judge.domains if self.kind_of(d) == "code"]
        if programs:
            raise ValueError(
                f"reward.judge.domains names {programs[0]!r}, whose answers are programs; only tests can judge them"
            )
        return self
