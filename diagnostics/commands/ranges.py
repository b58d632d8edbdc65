"""Ranges of numeric options, written into their types: `n_prompts: PositiveInt = 100`."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Annotated, Any, get_args, get_type_hints

from interventions.errors import MechdiagError


@dataclass(frozen=True, repr=False)
class Range:
    """The values that a numeric option accepts. NaN and, without `high`, infinity are outside every range."""

    low: float
    high: float = inf
    above: bool = False
    """`low` itself is refused"""
    below: bool = False
    """`high` itself is refused"""

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below or self.high == inf else value <= self.high
        )

    def __repr__(self) -> str:
        if self.low == -inf:
            return "a finite number"
        if self.high == inf:
            return f"a number above {self.low:g}" if self.above else f"{self.low:g} or more"
        low, high = "above " * self.above, "below " * self.below
        return f"a number from {low}{self.low:g} to {high}{self.high:g}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
FiniteFloat = Annotated[float, Range(-inf, above=True)]
PromptLength = Annotated[int, Range(2)]
"""tokens: one to edit and one before it"""


def check_ranges(options: type, given: Mapping[str, Any]) -> None:
    """Check numbers against the ranges in the types of a dataclass's fields.

    Raises `MechdiagError` with the option, its value and its range.
    """
    for name, type_ in get_type_hints(options, include_extras=True).items():
        values = given[name] if isinstance(given[name], tuple) else (given[name],)
        for allowed in _ranges(type_):
            for value in values:
                if value is not None and value not in allowed:
                    raise MechdiagError(f"--{name.replace('_', '-')} {value}; expected {allowed}")


def _ranges(type_: Any) -> list[Range]:
    """The ranges in an annotation, also within `tuple[...]` and `... | None`."""
    own = [part for part in getattr(type_, "__metadata__", ()) if isinstance(part, Range)]
    return own + [found for inner in get_args(type_) for found in _ranges(inner)]
