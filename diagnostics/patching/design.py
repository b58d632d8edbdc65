"""Cells of an activation patching experiment: what is put where, beside which matched control."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.pairs.controls import Partners, unit
from diagnostics.pairs.pair import Pairs
from interventions.errors import EditError, ResultError
from interventions.models.anatomy import check_site, n_heads
from interventions.models.causal_model import CausalModel
from interventions.recording import Recording, record
from interventions.replaying.joint import Put
from interventions.sites import HEADS, Site, SiteLike, as_sites, several

DIRECTIONS = ("denoise", "noise")
"""denoise: clean activations are put into the corrupt run. noise: corrupt ones into the clean run."""
POSITIONS = ("each", "all")
"""each: a cell for each position. all: every differing position of a pair at once."""
METRICS = ("logit_difference", "probability")
"""At a prompt's last position: logit(right) − logit(wrong), or the probability of the right answer."""
SCORES = ("gradient", "ig5", "ig20", "dla")
"""Estimates that cost a few passes for all cells: see `scores`."""
_UNITS = 4
"""pairs in a unit of work"""


@dataclass(frozen=True)
class Settings:
    """What is asked of each pair."""

    sites: tuple[Site, ...]
    """of all heads or neurons"""
    positions: str
    directions: tuple[str, ...]
    metric: str
    controls: int
    scores: tuple[str, ...]
    seed: int
    path: str
    batch_rows: int | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "sites": [str(s) for s in self.sites],
        }


def settings_of(
    model: CausalModel,
    sites: SiteLike | Sequence[SiteLike],
    layers: int | Sequence[int] | None,
    directions: str | Sequence[str],
    **asked: Any,
) -> Settings:
    """Checked settings. Raises `SiteError` for a site that the model does not have, `ResultError` for other names and numbers."""
    every = range(model.n_layers) if layers is None else several(layers)
    found = [site.whole for site in as_sites(sites, every)]
    directions, asked["scores"] = several(directions), several(asked["scores"])
    for site in found:
        check_site(model, site)
        if site.point in HEADS:
            check_site(model, Site(site.layer, site.point, head=0))
    known = {"positions": POSITIONS, "metric": METRICS}
    wrong = [
        f"{name} {asked[name]!r}; known: {', '.join(kinds)}"
        for name, kinds in known.items()
        if asked[name] not in kinds
    ]
    wrong += [f"direction {name!r}; known: {', '.join(DIRECTIONS)}" for name in directions if name not in DIRECTIONS]
    wrong += [f"score {name!r}; known: {', '.join(SCORES)}" for name in asked["scores"] if name not in SCORES]
    if "dla" in asked["scores"] and asked["metric"] != "logit_difference":
        wrong.append("direct logit attribution is of logits; use metric='logit_difference'")
    if not found or not directions or asked["controls"] < 0:
        wrong.append(
            f"{len(found)} sites, {len(directions)} directions, {asked['controls']} controls; expected 1, 1 and 0 or more"
        )
    if wrong:
        raise ResultError(wrong[0])
    asked["scores"] = tuple(dict.fromkeys(asked["scores"]))
    return Settings(sites=tuple(dict.fromkeys(found)), directions=tuple(dict.fromkeys(directions)), **asked)


class PairBatch:
    """Some pairs recorded, clean and corrupt, with the clean runs of those that give their controls."""

    def __init__(self, model: CausalModel, pairs: Pairs, which: Sequence[int], settings: Settings):
        self.pairs, self.which, self.settings = pairs, list(which), settings
        self.runs = {
            "clean": record(model, [list(pairs[i].clean) for i in self.which], settings.sites),
            "corrupt": record(model, [list(pairs[i].corrupt) for i in self.which], settings.sites),
        }
        self.partners = Partners.of(model, pairs, self.which, settings.sites, settings.controls, settings.seed)
        self.n_pos = max(len(pairs[i]) for i in self.which)
        self.heads = {site: n_heads(model, site) if site.point in HEADS else 1 for site in settings.sites}

    @property
    def model(self) -> CausalModel:
        return self.runs["clean"].model

    @cached_property
    def inside(self) -> Bool[ndarray, "pair pos"]:
        """Positions of each prompt."""
        return np.arange(self.n_pos) < np.array([len(self.pairs[i]) for i in self.which])[:, None]

    @cached_property
    def differs(self) -> Bool[ndarray, "pair pos"]:
        """Where tokens differ."""
        found = np.zeros_like(self.inside)
        for row, i in zip(found, self.which, strict=True):
            row[list(self.pairs[i].differing)] = True
        return found

    def runs_at(self, site: Site) -> Bool[ndarray, "pair pos"]:
        """Positions where a site can differ: from the first differing token on; where it depends on its own token alone, at
        differing tokens. Elsewhere the cell is 0 exactly."""
        if site.layer == 0 and site.point in ("resid_pre", "q", "k", "v"):
            return self.differs
        return self.inside & (np.cumsum(self.differs, axis=1) > 0)

    def by_head(self, run: Recording, site: Site) -> Float[Tensor, "pair pos head width"]:
        """Activations at a site."""
        return run.of(site).unflatten(-1, (self.heads[site], -1))

    def change(self, site: Site, direction: str) -> tuple[Tensor, Tensor]:
        """What stands at a site in the run that is patched, and in the other run; `[pair, pos, head, width]`."""
        base, source = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
        return self.by_head(self.runs[base], site), self.by_head(self.runs[source], site)

    def control(self, site: Site, base: Tensor, source: Tensor, k: int) -> Tensor:
        """`base` moved as far as `source` is, along the difference of two other pairs' clean activations at the same label.

        x + ‖x′ − x‖·(a − b)/‖a − b‖;   nan where there are no two others or they do not differ
        """
        if self.partners.run is None:
            return torch.full_like(base, torch.nan)
        pair, position = np.indices(base.shape[:2]).reshape(2, -1)
        along = self.partners.difference(site, k, pair, position).float()
        along = along.unflatten(-1, (self.heads[site], -1)).unflatten(0, base.shape[:2])
        if site.point == "pattern":  # weights on tokens of another prompt: only where these stand at the same places
            size = min(along.shape[-1], base.shape[-1])
            padded = along.new_zeros(base.shape)
            padded[..., :size] = along[..., :size]
            along = padded.masked_fill(~self._alike(k).to(along.device)[:, None, None, None], torch.nan)
        far = (source.float() - base.float()).norm(dim=-1, keepdim=True)
        return (base.float() + far * unit(along)).to(base.dtype)

    def _alike(self, k: int) -> Bool[Tensor, "pair"]:
        own = np.arange(self.n_pos)
        return torch.from_numpy(((self.partners.position[:, k] == own) | ~self.inside[:, None]).all(axis=(1, 2)))


@dataclass
class Rows:
    """Rows of one direction: the cells' own, then those of each control."""

    puts: list[Put]
    pair: Int[ndarray, "row"]
    """within the batch"""
    columns: dict[str, ndarray]
    """of the table, a number for each row"""


def rows_of(batch: PairBatch, direction: str) -> Rows:
    """Every cell that can differ, and its controls, as rows."""
    settings = batch.settings
    puts: list[Put] = []
    parts: list[dict[str, ndarray]] = []
    n = 0
    for site in settings.sites:
        base, source = batch.change(site, direction)
        dose = (source.float() - base.float()).norm(dim=-1) / base.float().norm(dim=-1).clamp(min=1e-30)
        pair, position = (torch.from_numpy(x) for x in np.nonzero(batch.runs_at(site)))
        heads = batch.heads[site]
        for control in range(settings.controls + 1):
            vectors = source if control == 0 else batch.control(site, base, source, control - 1)
            at = (pair.to(vectors.device), position.to(vectors.device))
            values, doses = vectors[at], dose[at].cpu().numpy()
            if settings.positions == "each":
                row_of, n_rows = torch.arange(len(pair)), len(pair)
                own = {"pair": pair.numpy(), "position": position.numpy()}
            else:
                which, row_of = torch.unique(pair, return_inverse=True)
                n_rows = len(which)
                own = {"pair": which.numpy(), "position": np.full(n_rows, -1)}
                squares = np.zeros((n_rows, heads))
                np.add.at(squares, row_of.numpy(), doses**2)
                doses = np.sqrt(squares / np.bincount(row_of.numpy(), minlength=n_rows)[:, None])
            for head in range(heads):
                single = site.point in HEADS
                where = Site(site.layer, site.point, head=head) if single else site
                puts.append(Put(where, n + row_of, position, values[:, head]))
                parts.append({
                    **own,
                    "site": np.full(n_rows, settings.sites.index(site)),
                    "head": np.full(n_rows, head if single else -1),
                    "control": np.full(n_rows, control),
                    "dose": doses[:, head],
                })  # fmt: skip
                n += n_rows
    if not n:
        raise EditError("no cell can differ: the prompts of these pairs differ nowhere that the sites see")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Rows(puts, columns["pair"], columns)


def batches(n: int) -> list[list[int]]:
    """Pairs of each unit of work."""
    return [list(range(start, min(start + _UNITS, n))) for start in range(0, n, _UNITS)]
