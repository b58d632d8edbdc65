"""Figures by depth: what a figure is drawn from, its panels and axes, and what its caption must say."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diagnostics.statistics.estimate import Estimate, FiellerInterval
from diagnostics.statistics.tables import TRAINED

Groups = Sequence[Mapping[str, Any]]
Provenance = Mapping[str, Any]
Looks = dict[str, tuple[str, str]]
KL, TIMES = "median KL(clean ‖ intervened), nats", "median ratio of KLs"
LOWEST_RATIO = 1e-3
OVER_PROMPTS = "95 % intervals over prompts"


@dataclass(frozen=True)
class DepthPoint:
    """One point of a figure by depth."""

    panel: str
    """key of the panel, a column of the figure"""
    series: str
    """what has one colour: an edit, a context, an SAE, a score"""
    layer: int
    point: str
    """of the site"""
    estimate: Estimate | FiellerInterval
    row: str = ""
    """key of the row of panels: a context, a corpus, an SAE"""
    network: str = TRAINED
    role: str = "main"
    """`main`, or the name of the placebo that was measured: the same statistic for directions without meaning"""
    noise: bool = False
    """the effect lies within 10 times the noise floor"""
    run: str = ""
    """name of the run within a result that holds several"""
    settings: dict[str, Any] = field(default_factory=dict)
    """further settings that two points of one panel must share"""


def plain(value: float, n: int, sd: float = np.nan) -> Estimate:
    """A number without an interval, or with ± one standard deviation."""
    return Estimate(value, value - sd, value + sd, np.nan, n, 0)


@dataclass(frozen=True)
class DepthPanel:
    """A column of a figure."""

    title: str
    label: str
    """of the y axis, with its unit"""
    log: bool = False
    lines: tuple[float, ...] = ()
    """reference values: a ratio of 1, a win rate of ½, the exponents of cosine and inner product"""
    lowest: float = -math.inf
    """values at or below are drawn open at the bottom, outside of the scale"""
    limits: tuple[float, float] | None = None
    """largest range of the y axis; with `whole` its range"""
    whole: bool = False


@dataclass(frozen=True)
class DepthPlan:
    """A figure by depth."""

    points: Callable[..., Iterator[DepthPoint]]
    """from a result's groups and provenance"""
    what: str
    """the figure's sentence"""
    panels: dict[str, DepthPanel]
    unit: str
    """what n counts"""
    looks: Looks | None = None
    """colour and marker of each series; None: series are SAEs"""
    labels: dict[str, str] | None = None
    bars: str = OVER_PROMPTS
    done: str = "edited"
    """what is done to a block's output"""
    rows_are_saes: bool = False
    """a row of panels for each SAE"""
    one_scale: bool = False
    """all panels share the y axis"""
    placebo: str = ""
    """what the broad bars of placebos mean"""


def ratio_panel(title: str, label: str = TIMES) -> DepthPanel:
    """Of ratios, on a log scale with a line at 1."""
    return DepthPanel(title, label, log=True, lines=(1,), lowest=LOWEST_RATIO)
