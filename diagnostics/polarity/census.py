"""How many latents take both signs on real activations? The bipolar census, beside random directions that fire as often."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from diagnostics.polarity.census_summary import LATENTS, NOTE, RANDOM, bipolar, census_of
from diagnostics.results.calls import recorded
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.running.clean import CleanActivations, RunSettings
from diagnostics.running.provenance import run_provenance
from diagnostics.sampling.tokens import generator
from diagnostics.statistics.tables import lines_of
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing, followed
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.active_latents import active_latents
from sae_models.dictionaries import Dictionary, dictionaries_of

CHUNK = 2**24
"""Scores of random directions formed at once."""


@dataclass(frozen=True)
class BipolarCensus(Result):
    """How often each latent is positive and negative.

    The table has a line for each SAE × latent and for each random direction beside a signed SAE (`directions`): tokens on which it
    `fired`, on which it was `positive`, and Σ|z|·‖d‖ (`mass`, of random directions Σ|z|; activations' unit).
    """

    deletions: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each SAE, kind of directions and prompt: usable tokens, and shares of latents and of mass that are bipolar without it"""

    NAME: ClassVar[str] = "bipolar_census"
    TITLE: ClassVar[str] = "Bipolar census"
    QUESTION: ClassVar[str] = "How many latents take both signs?"
    TABLES: ClassVar[Mapping[str, str]] = {"deletions": "bipolar_deletions.parquet"}
    NOTE: ClassVar[str] = NOTE

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Bipolar shares of each SAE and of its random directions, with their intervals."""
        found = []
        for sae in self.saes:
            for directions in (LATENTS, RANDOM):
                lines = lines_of(self.frame, sae=sae, directions=directions)
                if len(lines):
                    without = lines_of(self.deletions, sae=sae, directions=directions)
                    said = self.provenance["saes"][sae]
                    found.append(
                        {"sae": sae, "directions": directions}
                        | census_of(lines, without, said, self.provenance["usable"])
                    )
        return found

    def headlines(self) -> Iterable[Headline]:
        """The bipolar share of each SAE with signed latents, beside that of random directions."""
        for g in self.groups:
            if g["directions"] == RANDOM:
                own = next(o for o in self.groups if o["sae"] == g["sae"] and o["directions"] == LATENTS)
                yield Headline(
                    f"share of the latents of {g['sae']} that take both signs",
                    str(own["bipolar"]),
                    f"random directions: {g['bipolar']}",
                )

    def plot(self) -> Any:
        """Share of firing with z > 0, and bipolar shares by rank of mass. Returns a matplotlib Figure."""
        from diagnostics.polarity.census_figures import plot_census

        return plot_census(self.frame, self.groups, self.provenance)


@recorded
@torch.no_grad()
def bipolar_census(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    min_active: int = 20,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    progress: Progressing = None,
) -> BipolarCensus:
    """Count, for each latent, the usable tokens where z > 0 and where z < 0. A latent is bipolar if each takes at least 10 % of its firing.

    Activations are spread about their mean, so a direction that fires on the largest |projection| takes both signs by itself: beside
    each SAE with signed latents stand as many random directions r, z = <r, x_c> where |z| is among its largest, on as many tokens as the
    latent of that number. A dictionary whose latents are bipolar less often than these has found one-sided features.

    saes: an SAE (anything that `as_sae` takes) or several by name, each at its own site. min_active: latents that fire on fewer usable
    tokens are counted and left out of the shares. Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for
    invalid settings and where no latent is left. Source: census of arXiv:2605.28149 (our reconstruction); the control is ours.
    """
    if min_active < 1:
        raise ResultError(f"min_active {min_active}; expected 1 or more")
    model = wrap(model)
    prompts = prompts_for(model, prompts)
    dictionaries = dictionaries_of(saes, model, None)
    sites = tuple(dict.fromkeys(d.site for d in dictionaries))
    settings = RunSettings(sites=sites, sink_filter=sink_filter, seed=seed)
    settings.check(model)
    clean = CleanActivations(model, prompts, settings)
    parts, deletions = [], []
    with followed(progress, "counting", "SAE") as told:
        for dictionary in dictionaries:
            for directions, table, without in _counted(clean, dictionary, min_active, seed):
                parts.append(
                    table.assign(
                        sae=dictionary.name,
                        layer=dictionary.site.layer,
                        point=dictionary.site.point,
                        directions=directions,
                    )
                )
                deletions.append(without.assign(sae=dictionary.name, directions=directions))
            if told is not None:
                told(1, len(dictionaries))
    described = {
        d.name: d.provenance() | {"signed": bool(d.sae is not None and d.sae.selector.signed), "min_active": min_active}
        for d in dictionaries
    }
    said = {
        "context": ["in_place"], "sink_filter": sink_filter, "seed": seed, "saes": described, "min_active": min_active,
        "usable": int(clean.usable.sum()), "tokens_left_out": clean.filter.left_out(),
    }  # fmt: skip
    provenance = run_provenance(BipolarCensus.NAME, model, prompts, sites, said)
    return BipolarCensus(
        pd.concat(parts, ignore_index=True), prompts.tokens, provenance, pd.concat(deletions, ignore_index=True)
    )


def _counted(clean: CleanActivations, dictionary: Dictionary, min_active: int, seed: int):
    """The counts of an SAE's latents, and of random directions where they may be of either sign."""
    assert dictionary.sae is not None
    sae, (prompt, position) = dictionary.sae, clean.tokens
    x = clean.at(dictionary.site, prompt, position)
    active = active_latents(sae, x)
    length = sae.W_dec.norm(dim=1).double().cpu().numpy()
    own = _Counts(prompt, active.token, active.latent, active.z.astype(float), length)
    yield LATENTS, own.table(), own.deletions(min_active)
    if sae.selector.signed:
        token, latent, z = _random(sae.centred(x), own.fired, generator(seed, "bipolar census", dictionary.label))
        other = _Counts(prompt, token, latent, z, np.ones(len(length)))
        yield RANDOM, other.table(), other.deletions(min_active)


def _random(
    x_c: Float[torch.Tensor, "token d_model"], fired: Int[ndarray, "latent"], stream: torch.Generator
) -> tuple[ndarray, ndarray, ndarray]:
    """Token, number and projection where a random direction's |projection| is among its `fired` largest."""
    d_sae, found = len(fired), []
    rows = torch.nn.functional.normalize(torch.randn(d_sae, x_c.shape[1], generator=stream), dim=1).to(x_c)
    some = max(1, CHUNK // max(1, len(x_c)))
    for start in range(0, d_sae, some):
        z = x_c @ rows[start : start + some].T
        order = z.abs().argsort(dim=0, descending=True, stable=True)
        rank = torch.arange(len(z), device=z.device)[:, None]
        keep = rank < torch.from_numpy(fired[start : start + some]).to(z.device)
        at, latent = keep.nonzero(as_tuple=True)
        token = order[at, latent]
        found.append((token.cpu().numpy(), latent.cpu().numpy() + start, z[token, latent].double().cpu().numpy()))
    token, latent, z = (np.concatenate(column) for column in zip(*found, strict=True))
    return token, latent, z


class _Counts:
    """Firing of each direction, by sign and by prompt."""

    def __init__(self, prompt: ndarray, token: ndarray, latent: ndarray, z: ndarray, length: ndarray):
        self.prompts, place = np.unique(prompt, return_inverse=True)
        self.sizes, n, d_sae = np.bincount(place), len(self.prompts), len(length)
        at = place[token] * d_sae + latent
        count = lambda weight: np.bincount(at, weights=weight, minlength=n * d_sae).reshape(n, d_sae)  # noqa: E731
        self.by_prompt = {
            "fired": count(np.ones(len(z))),
            "positive": count(z > 0),
            "mass": count(np.abs(z) * length[latent]),
        }

    @property
    def fired(self) -> Int[ndarray, "latent"]:
        return self.by_prompt["fired"].sum(0).astype(np.int64)

    def table(self) -> pd.DataFrame:
        total = {name: counts.sum(0) for name, counts in self.by_prompt.items()}
        whole = {name: total[name].astype(np.int64) for name in ("fired", "positive")}
        return pd.DataFrame({"latent": np.arange(len(total["mass"])), **whole, "mass": total["mass"]})

    def deletions(self, min_active: int) -> pd.DataFrame:
        fired, positive, mass = (self.by_prompt[name] for name in ("fired", "positive", "mass"))
        lines = [
            bipolar(fired.sum(0) - fired[i], positive.sum(0) - positive[i], mass.sum(0) - mass[i], min_active)
            for i in range(len(self.prompts))
        ]
        return pd.DataFrame(lines, columns=["bipolar", "bipolar_mass"]).assign(prompt=self.prompts, n_tokens=self.sizes)
