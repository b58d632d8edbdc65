"""Ranges in the types of options: what is refused, and what the error says."""

from dataclasses import dataclass
from math import inf, nan

import pytest

from diagnostics.commands.options import parsed
from diagnostics.commands.ranges import FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, ShareBelowOne
from interventions.errors import MechdiagError


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "said"),
    [
        (Range(2), [2, 3], [1, nan, inf], "2 or more"),
        (Range(0, above=True), [1e-9], [0, -1, inf], "a number above 0"),
        (Range(0, 1), [0, 1], [-1e-9, 1.01, nan, inf], "a number from 0 to 1"),
        (Range(0, 2, above=True, below=True), [1], [0, 2], "a number from above 0 to below 2"),
        (Range(-inf, above=True), [-5, 0], [-inf, inf, nan], "a finite number"),
    ],
)
def test_ranges_check_values_and_describe_themselves(allowed, inside, outside, said):
    assert all(value in allowed for value in inside) and not any(value in allowed for value in outside)
    assert str(allowed) == said


@dataclass(frozen=True, kw_only=True)
class Options:
    """A command."""

    batch_rows: PositiveInt | None = None
    """rows"""
    layers: tuple[NonNegativeInt, ...] = (1,)
    """blocks"""
    held_out: ShareBelowOne = 0.1
    """share"""
    c: PositiveFloat = 1.0
    """penalty"""
    steps: tuple[FiniteFloat, ...] = (1.0,)
    """sizes"""


def test_values_within_their_ranges_are_parsed():
    words = ["--batch-rows", "1", "--layers", "0", "3", "--held-out", "0", "--c", "1e-3", "--steps", "-2", "0.5"]
    assert parsed(Options, words) == Options(batch_rows=1, layers=(0, 3), held_out=0.0, c=1e-3, steps=(-2.0, 0.5))
    assert parsed(Options, []) == Options()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-rows", "0"], "--batch-rows 0; expected 1 or more"),
        (["--layers", "3", "-2"], "--layers -2; expected 0 or more"),
        (["--held-out", "1"], "--held-out 1.0; expected a number from 0 to below 1"),
        (["--c", "0"], "--c 0.0; expected a number above 0"),
        (["--steps", "1", "inf"], "--steps inf; expected a finite number"),
    ],
)
def test_values_out_of_range_are_refused_by_name(words, message):
    with pytest.raises(MechdiagError) as raised:
        parsed(Options, words)
    assert str(raised.value) == message
