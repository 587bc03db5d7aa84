"""Defines the base of all sections of a configuration file, and types that several have."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# The lowest temperature besides 0 that servers take.
_LEAST_TEMPERATURE = 1e-6

Positive = Annotated[int, Field(gt=0)]


Fraction = Annotated[float, Field(gt=0, le=1)]


def _far_from_0(temperature: float) -> float:
    if 0 < temperature < _LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature {temperature:g} is too near to 0 to divide by; set 0, which is greedy, or at least "
            f"{_LEAST_TEMPERATURE:g}"
        )
    return temperature


Temperature = Annotated[float, Field(ge=0, le=1e6), AfterValidator(_far_from_0)]


class Section(BaseModel):
    """A section is frozen, and an unknown key in it is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
