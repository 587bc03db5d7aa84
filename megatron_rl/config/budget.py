"""Defines the section `budget`: the tokens of an optimizer step."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import Fraction, Positive, Section


class BudgetSection(Section):
    """Sets the token budget Phi of one optimizer step (Eq. 2)."""

    tokens: int = Field(
        default=0,
        ge=0,
        description="Token budget (Phi in the C3PO paper): the number of response tokens that carry loss in one "
        "optimizer step. Required for c3po. The other algorithms have no budget.",
    )
    domains: dict[str, Fraction] = Field(
        default={},
        description="Shares of the token budget by domain of the prompt, such as {code = 0.6, science = 0.4}. They "
        "must sum to 1. Every optimizer step trains these shares, however long the responses of a domain are. Prompts "
        "of each domain are taken as needed, so the weights of data.train only mix files of the same domain. Needs "
        'under_full = "refill". Default: no shares; domains come in the order of the prompts.',
    )
    scope: Literal["global", "per_gpu"] = Field(
        default="global",
        description='What the token budget is for. "global": one optimizer step. "per_gpu": each training rank; a '
        "step has tokens x ranks.",
    )
    cut: Literal["token", "response"] = Field(
        default="token",
        description='How the budget is met. "token": exactly, by cutting the last response. "response": by whole '
        "responses, which exceeds it.",
    )
    under_full: Literal["refill", "short"] = Field(
        default="refill",
        description='What happens when a phase yields fewer tokens than the budget. "refill": more prompts are '
        'sampled, and the surplus is carried over. "short": the step trains what there is, and still divides by Phi.',
    )
    margin: float = Field(
        default=1.0,
        ge=0,
        description='Oversampling margin with under_full = "refill": the number of standard deviations by which a '
        "wave of prompts exceeds what is expected to fill the budget. A lower value makes more phases wait for a "
        "second wave. A higher one leaves more surplus tokens, which are trained one step late. On a cluster a second "
        "wave takes as long as the longest response: use 2 there.",
    )
    max_staleness: int = Field(
        default=1, ge=0, description="Maximum age of a surplus response, in steps. Older ones are dropped."
    )
    max_waves: Positive = Field(
        default=8, description="Maximum number of rollout waves per step. Beyond it the run stops with an error."
    )

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
