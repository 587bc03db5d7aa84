"""Defines the base of all sections of a configuration file, and types that several have."""

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

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

    @field_validator("*", mode="before")
    @classmethod
    def _check_names_a_path(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse an empty text as a path: to Python it is the working directory."""
        is_empty = value == "" or (isinstance(value, list | tuple) and "" in value)
        if is_empty and _holds_paths(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("must name a file or a folder, got an empty text")
        return value


def _holds_paths(annotation: Any) -> bool:
    return annotation is Path or any(map(_holds_paths, get_args(annotation)))
