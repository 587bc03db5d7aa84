"""Defines the section `budget`: the tokens of an optimizer step."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import Fraction, Positive, Section


class BudgetSection(Section):
    """Sets the token budget Phi of one optimizer step (Eq. 2)."""

    tokens: int = Field(
        default=0,
        ge=0,
        description="Phi: response tokens that carry loss in one optimizer step. Required for c3po; the other "
        "algorithms have no budget",
    )
    domains: dict[str, Fraction] = Field(
        default={},
        description="shares of Phi by the domain of the prompt, such as {code = 0.6, science = 0.4}, that sum to 1: so "
        "many tokens of each are in every optimizer step, however long its responses are. Prompts of each domain are "
        "taken as its share needs them, so the weights of data.train only say how files of the same domain mix. Needs "
        "under_full = 'refill'. Default: whatever the prompts in their order bring",
    )
    scope: Literal["global", "per_gpu"] = Field(default="global", description="per_gpu multiplies by training ranks")
    cut: Literal["token", "response"] = Field(
        default="token", description="token: exactly Phi tokens; response: whole responses, overshooting"
    )
    under_full: Literal["refill", "short"] = Field(
        default="refill", description="too few tokens: sample more and carry the surplus, or divide by Phi anyway"
    )
    margin: float = Field(
        default=1.0,
        ge=0,
        description="under refill, standard deviations by which a wave of prompts is larger than is expected to fill "
        "Phi. Less makes more phases wait for a second wave; more leaves more surplus, whose tokens are trained a step "
        "late. On a cluster a second wave takes as long as the longest response: take 2 there",
    )
    max_staleness: int = Field(default=1, ge=0, description="steps a surplus response may wait before it is dropped")
    max_waves: Positive = Field(default=8, description="rollout waves per step before the run stops with an error")

    @model_validator(mode="after")
    def _check_domains(self) -> "BudgetSection":
        total = sum(self.domains.values())
        if self.domains and abs(total - 1) > 1e-9:
            shares = " + ".join(map(str, self.domains.values()))
            raise ValueError(f"the shares of budget.domains must sum to 1, got {shares} = {total:.10g}; change one")
        if self.domains and self.under_full != "refill":
            raise ValueError(
                f"budget.domains needs budget.under_full = 'refill', got {self.under_full!r}: the part of a domain is "
                "filled by sampling more of its prompts; set refill, or take budget.domains out"
            )
        return self
