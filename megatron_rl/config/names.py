"""Checks keys that name one of several built-in things, or a function of the user's own."""

from collections.abc import Callable

from pydantic import AfterValidator, ValidationInfo

from megatron_rl.own_functions import beside, is_own
from megatron_rl.parsing import meant


def among(
    known: tuple[str, ...], more: str = "", is_more: Callable[[str], bool] = lambda name: False
) -> AfterValidator:
    """Return a validator that takes the names that are known, and functions of the user's own, with the whole path of
    their file, which lies beside the configuration. more: what else may stand there, for messages; is_more tells it."""

    def checked(name: str, info: ValidationInfo) -> str:
        if name in known or is_more(name):
            return name
        if is_own(name):
            return beside(name, (info.context or {}).get("folders", ()))
        raise ValueError(
            f'must be {", ".join(known)}{"," if more else " or"} a function of your own ("file.py:function", '
            f'"package.module:function"){more}{meant(name, known)}'
        )

    return AfterValidator(checked)
