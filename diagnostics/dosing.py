"""How much does the model change when an activation moves by so much? The same distance along directions that differ in meaning.

Ours: arXiv:2606.15054 compares a direction patch with a norm patch that moves x four to ten times less.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.depth_plans import DepthPlan
from diagnostics.dose_depth import PLANS
from diagnostics.dose_summary import (
    NOTE,
    PLACEBOS,
    SHORT_COLUMNS,
    first_numbers,
    placebo_names,
    short_frame,
    shown_dose,
    summaries,
    summary_frame,
)
from diagnostics.headlines import Headline
from diagnostics.progress import Progressing
from diagnostics.results import Result
from diagnostics.sampling import cross_prompt_pairs, generator
from diagnostics.study import (
    TRAINED,
    Clean,
    Rows,
    Settings,
    among_prompts,
    chosen_contexts,
    chosen_sites,
    column,
    dose_columns,
    run_study,
)
from interventions.edits import (
    add_direction,
    cosine,
    matched_placebo,
    norm,
    random_like,
    rescale,
    rotate_by_distance,
    swap_direction,
)
from interventions.errors import EditError, ResultError
from interventions.models import wrap
from interventions.rows import Horizon
from interventions.sites import Site
from interventions.texts import Prompts

DOSES = (0.05, 0.1, 0.2, 0.5, 1.0)
"""‖Δx‖/‖x‖"""
EDITS = ("toward_token", "between_tokens", "isotropic", "norm_up", "norm_down")
"""`toward_token`: x turned towards another token's activation along the great circle; `between_tokens`: towards the difference
of two other tokens' activations; `isotropic`: towards a random direction; `norm_up`, `norm_down`: (1 ± dose)·x."""
SELF = "self"


@dataclass(frozen=True)
class DoseResponse(Result):
    """What edits of equal length did, row by row, and how it was made.

    The table has a line for each model × layer × point × context × pair × edit × dose; its columns are those of `COLUMNS`.
    """

    NAME: ClassVar[str] = "dose_response"
    TITLE: ClassVar[str] = "Dose and response"
    QUESTION: ClassVar[str] = "How far must an activation move, and which way, before the output changes?"
    CALL: ClassVar[str] = "dose_response"
    NOTE: ClassVar[str] = NOTE
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS
    NULL_MODELS: ClassVar[bool] = True

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each model × layer × point × context × dose: of every edit, and ratios at equal dose."""
        return summaries(self.frame, list(self.provenance["directions"]))

    @property
    def defaults(self) -> dict[str, Any]:
        """The model itself; the first point and context."""
        return {"model": TRAINED, "point": self.points[0], "context": self.provenance["context"][0]}

    def summary(self) -> pd.DataFrame:
        """One row per model, layer, point, context, dose and edit: KL (nats), ratios to the controls, direct ÷ total, intervals."""
        return summary_frame(self.groups)

    def headlines(self) -> Iterable[Headline]:
        """At the middle block and the dose that figures by depth show."""
        nulls = [g for label in self.null_models for g in self.select(model=label)]
        return first_numbers(self.select(), nulls, self.provenance)

    def plot(self, point: str | None = None, context: str | None = None) -> Any:
        """KL against dose, a panel a layer. Returns a matplotlib Figure."""
        from diagnostics.dose_plots import plot_dose_response

        groups, nulls, place = self._drawn(point, context)
        return plot_dose_response(groups, nulls, self.provenance, *place)

    def plot_depth(self, dose: float = 0.2, point: str | None = None, context: str | None = None) -> Any:
        """By depth at one dose: each edit over an isotropic rotation, and direct over total effect. Returns a matplotlib Figure."""
        from diagnostics.dose_plots import plot_dose_depth

        groups, nulls, place = self._drawn(point, context)
        return plot_dose_depth(groups, nulls, self.provenance, dose, *place)

    def _drawn(self, point: str | None, context: str | None) -> tuple[Any, Any, tuple[str, str]]:
        place = point or self.points[0], context or self.provenance["context"][0]
        of = {
            label: self.select(model=label, point=place[0], context=place[1]) for label in (TRAINED, *self.null_models)
        }
        return of.pop(TRAINED), list(of.values()), place

    def figures(self) -> dict[str, Any]:
        """Both figures, for each point and context."""
        found, doses = {}, self.provenance["doses"]
        dose = shown_dose(doses)
        for i, point in enumerate(self.points):
            for j, context in enumerate(self.provenance["context"]):
                end = "" if i == j == 0 else f"_{point}_{context}"
                found[f"{self.NAME}{end}"] = self.plot(point, context)
                found[f"{self.NAME}_depth{end}"] = self.plot_depth(dose, point, context)
        return found

    def tables(self) -> dict[str, pd.DataFrame]:
        """KL and ratios by layer and dose, a table for each context and point."""
        return {
            f"{context.replace('_', '-')}, {point}": self._short(point, context)
            for context in self.provenance["context"]
            for point in self.points
        }

    def _short(self, point: str, context: str) -> pd.DataFrame:
        nulls = [self.select(model=label, point=point, context=context) for label in self.null_models]
        return short_frame(self.select(point=point, context=context), nulls, list(self.provenance["directions"]))


COLUMNS = (
    "model", "layer", "point", "context", "pair", "edit", "dose", "target_prompt", "target_position", "source_prompt",
    "source_position", "target_norm", "norm_of_median", "cosine", "delta_norm", "delta_angle", "kl", "js", "clean_entropy",
    "top1_changed", "kl_direct",
)  # fmt: skip
"""Of the table. dose: ‖Δx‖/‖x‖ as asked for (0: `self`, the noise floor); cosine: of target and source token. The others as in
the direction-norm table."""


@torch.no_grad()
def dose_response(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    sites: Sequence[Site] | None = None,
    doses: Sequence[float] = DOSES,
    directions: Mapping[str, Tensor] | None = None,
    tokens: int = 200,
    context: str = "in_place",
    horizon: Horizon = 1,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    null_seeds: int = 0,
    batch_rows: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> DoseResponse:
    """Move activations by a share of their own norm, along directions that differ in meaning, and measure the KL.

        ‖Δx‖ = dose·‖x‖        toward_token, between_tokens, isotropic: rotations, ‖x‖ kept        norm_up/down: (1 ± dose)·x

    doses: shares of ‖x‖, above 0; a rotation moves x by at most 2‖x‖, and 1 down is zero ablation. directions: by name, of
    any length, `[d_model]`, e.g. a steering vector: x + dose·‖x‖·d̂, beside edits of the same norm and angle along both
    kinds of random tangent (`name_placebo_token`, `name_placebo_isotropic`). tokens: edited tokens, each with a source of
    another prompt; the same at every depth. Other arguments as in `direction_norm`.

    Raises `EditError` for a direction that is no vector of the model or of norm 0, `ResultError` for doses that do not serve.
    """
    model = wrap(model)
    places = chosen_sites(model, layers, sites)
    doses = tuple(sorted(dict.fromkeys(float(d) for d in doses)))
    if not doses or not all(0 < dose <= 2 for dose in doses):
        raise ResultError(f"doses {list(doses)}; expected numbers above 0 and up to 2, shares of the activation's norm")
    if tokens < 1:
        raise ResultError(f"{tokens} tokens asked for; ask for at least one")
    given = {name: _checked(name, d, model.d_model) for name, d in (directions or {}).items()}
    names = [SELF, *edit_names(given)]
    said = [name.replace("_", " ") for name in names]
    if twice := [name for i, name in enumerate(names) if said[i] in said[:i]]:
        raise EditError(f"two edits have the name {twice[0]!r}; give the direction another name")
    settings = Settings(
        sites=places,
        contexts=chosen_contexts(context),
        horizon=horizon,
        sink_filter=sink_filter,
        seed=seed,
        null_seeds=null_seeds,
        batch_rows=batch_rows,
        path=path,
    )
    study = run_study(
        DoseResponse.NAME,
        model,
        prompts,
        lambda clean: _Design(clean, tokens, doses, given),
        settings,
        {"tokens_asked": tokens, "doses": list(doses), "directions": {n: _digest(d) for n, d in given.items()}},
        {"pair": (), "edit": [SELF, *edit_names(given)], "dose": ()},
        folder=folder,
        overwrite=overwrite,
        progress=progress,
    )
    return DoseResponse(study.frame, study.tokens, study.provenance)


def _checked(name: str, direction: Tensor, d_model: int) -> Tensor:
    """A direction in float64 on the CPU. Raises `EditError` for one that is none of the model's, or of a name that tables cannot hold."""
    direction = direction.detach().double().cpu()
    if direction.shape != (d_model,) or not bool(direction.isfinite().all()) or not bool(direction.any()):
        raise EditError(
            f"direction {name!r} has shape {list(direction.shape)} and norm {float(norm(direction)):.3g}; expected "
            f"[{d_model}], finite and not zero"
        )
    said = name.replace("_", " ")
    if not said.strip() or "÷" in said or said in SHORT_COLUMNS or said.startswith("untrained"):
        raise EditError(
            f"a direction is called {name!r}, which tables need for something else; give it another name, without ÷"
        )
    return direction


def _digest(direction: Tensor) -> list[float]:
    """What tells one direction from another: its norm and three projections."""
    fixed = torch.randn(3, len(direction), generator=torch.Generator().manual_seed(0))
    return [float(norm(direction)), *(fixed.double() @ direction).tolist()]


def edit_names(directions: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Edits at every dose: ours, then each given direction with its placebos."""
    return [*EDITS, *(full for name in directions for full in (name, *placebo_names(name)))]


class _Design:
    """Tokens and sources, and the vectors at each dose: the same whatever order they are asked for in."""

    def __init__(self, clean: Clean, asked: int, doses: tuple[float, ...], directions: dict[str, Tensor]):
        self.clean, self.doses = clean, doses
        # By the name of an edit its direction, of length 1, and the kind of placebo; a name is never taken apart.
        self.given: dict[str, tuple[Tensor, str | None]] = {}
        for name, direction in directions.items():
            unit = (direction / norm(direction)).float()
            kinds = zip((name, *placebo_names(name)), (None, *PLACEBOS), strict=True)
            self.given |= {full: (unit, kind) for full, kind in kinds}
        drawn = cross_prompt_pairs(clean.length, asked, clean.settings.seed)
        keep, dropped = clean.filter.keep(drawn)
        self.pairs, self.numbers = drawn.take(keep), np.flatnonzero(keep)
        self.found = {"pairs_dropped": {reason: n for reason, n in dropped.items() if n}, "pairs_used": int(keep.sum())}
        if not keep.any():
            raise ResultError(
                f"none of {asked} tokens is left, dropped: {self.found['pairs_dropped']}; give other text or a looser sink filter"
            )
        names = edit_names(directions)
        self.lines = [(SELF, 0.0), *((name, dose) for name in names for dose in doses)]

    def _chosen(self, among: np.ndarray | None) -> np.ndarray:
        return among_prompts(self.pairs.target_prompt, among)

    def count(self, site: Site, among: np.ndarray | None, null: bool = False) -> int:
        """How many `rows` there are."""
        return len(self._chosen(among)) * len(self.lines)

    def rows(self, site: Site, among: np.ndarray | None) -> Rows:
        """The rows at a site whose targets are in the prompts `among` (None: all), token by token."""
        chosen, n = self._chosen(among), len(self.lines)
        pairs = self.pairs.take(chosen)
        x = self.clean.at(site, pairs.target_prompt, pairs.target_position)
        a = self.clean.at(site, pairs.source_prompt, pairs.source_position)
        stream = generator(self.clean.settings.seed, "dose_response", site)
        isotropic = random_like(torch.empty(len(self.pairs), x.shape[1]), stream)[torch.from_numpy(chosen)].to(x.device)
        between = self.clean.between(site, len(self.pairs), stream, chosen)
        towards = {"toward_token": a, "between_tokens": between, "isotropic": isotropic}
        edited = torch.stack([self._edit(name, dose, x, towards) for name, dose in self.lines], dim=1)
        table = pd.DataFrame(
            {
                "pair": self.numbers[chosen].repeat(n),
                "edit": [name for name, _ in self.lines] * len(pairs),
                "dose": [dose for _, dose in self.lines] * len(pairs),
                "target_prompt": pairs.target_prompt.repeat(n),
                "target_position": pairs.target_position.repeat(n),
                "source_prompt": pairs.source_prompt.repeat(n),
                "source_position": pairs.source_position.repeat(n),
                "target_norm": column(norm(x).squeeze(-1), n),
                "norm_of_median": self.clean.pair_norm_of_median(pairs).repeat(n),
                "cosine": column(cosine(x, a), n),
                **dose_columns(x, edited),
            }
        )
        return Rows(table, edited.flatten(0, 1), x[:, None].expand_as(edited).flatten(0, 1))

    def _edit(self, name: str, dose: float, x: Tensor, towards: dict[str, Tensor]) -> Tensor:
        if name == SELF:
            return swap_direction(x, x)
        if name in towards:
            return rotate_by_distance(x, towards[name], dose * norm(x))
        if name in ("norm_up", "norm_down"):
            return rescale(x, 1 + dose if name == "norm_up" else 1 - dose)
        unit, kind = self.given[name]
        moved = add_direction(x.float(), unit.to(x.device), dose * norm(x))
        if kind is None:
            return moved.to(x.dtype)
        return matched_placebo(x, moved, towards["between_tokens" if kind == "placebo_token" else "isotropic"])
