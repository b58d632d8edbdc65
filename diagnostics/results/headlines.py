"""The main numbers of a result, each with what it is compared with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diagnostics.statistics.estimate import Estimate, verdict

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Headline:
    """One number, where it is from, and its null."""

    what: str
    """the quantity, and where: `direction patch ÷ its placebo, block 15`"""
    value: str
    """with its 95 % interval; what has no interval says so in `what`"""
    against: str
    """the null value, or that of a control, with its name"""

    @property
    def sentence(self) -> str:
        """`Quantity is value; control.`"""
        comma = "," if ", " in self.what else ""
        return (
            "; ".join(filter(None, [f"{self.what[:1].upper()}{self.what[1:]}{comma} is {self.value}", self.against]))
            + "."
        )


def middle(groups: Sequence[Group]) -> list[Group]:
    """The groups of the middle block measured."""
    layers = sorted({g["layer"] for g in groups}) or [None]
    return [g for g in groups if g["layer"] == layers[len(layers) // 2]]


def null_range(values: Sequence[Any], own: Estimate) -> str:
    """The range of values over randomly initialised models, and what the own interval says about it; empty without any."""
    known = [getattr(v, "estimate", v).value for v in values]
    if not known:
        return ""
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    return f"randomly initialised models: {low if low == high else f'{low} to {high}'} ({verdict(own, *known)})"


def beside_null(
    groups: Sequence[Group], value: str, what: str, own: Callable[[Group], bool], null: Callable[[Group], bool], called: str
) -> Iterator[Headline]:  # fmt: skip
    """`value` of the groups that are `own`, each beside that of the first group of its SAE that is a `null`."""
    for g in groups:
        if own(g) and g.get(value) is not None:
            nulls = [n for n in groups if n["sae"] == g["sae"] and null(n) and n.get(value) is not None]
            against = "; ".join(f"{called}: {n[value]}" for n in nulls[:1])
            yield Headline(f"{what}, {g['sae']}", str(g[value]), against)
