"""Tells whether two reference answers to one question agree."""

from megatron_rl.reward.compare import Rules, same_answer
from megatron_rl.reward.latex import clean
from megatron_rl.reward.limits import excess
from megatron_rl.reward.math import same_numbers

_WITHOUT_ALGEBRA = Rules(numbers=same_numbers, formulas=lambda gold, answer: False)


def agree(domain: str, one: str, other: str) -> bool:
    """Tell whether two answers agree by the rules of the math reward without computer algebra: 1/2, 0.5 and
    \\frac{1}{2} agree, x+1 and 1+x do not.

    Tests of programs are not compared, two sets of them may differ and both be right. Literals that a program gives
    (domains code_...) must be equal.
    """
    if domain == "code" or one.strip() == other.strip():
        return True
    if domain.startswith("code") or excess(one) or excess(other):
        return False
    return same_answer(clean(one), clean(other), _WITHOUT_ALGEBRA)
