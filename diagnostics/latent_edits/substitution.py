"""Is a latent's part of the stream better replaced by another atom than taken away? Substitution against deletion of equal dose."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.latent_edits.bench import LatentEdits, parts, repeated
from diagnostics.latent_edits.firings import Firings, chosen_latents
from diagnostics.latent_edits.items import Items, asked_latents, check_numbers
from diagnostics.latent_edits.run import run_latent_edits
from diagnostics.results.calls import recorded
from diagnostics.results.headlines import Headline, beside_null
from diagnostics.results.result import Result
from diagnostics.running.clean import CleanActivations
from diagnostics.sampling.tokens import generator
from diagnostics.statistics.measures import median_ratio, share
from diagnostics.statistics.tables import PLACEBOS, few_prompts, lines_of, mean_of, where
from interventions.edits import matched_placebo
from interventions.progress import Progressing
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary

ATOMS = ("nearest", "active", "random")
"""What takes the latent's place: the decoder row of largest |cosine|; one of the token's other active latents, at random; any live latent, at
random, which is what the first two must beat."""
EDITS = ("substitution", "matched_deletion", "deletion", *PLACEBOS)
COLUMNS = (
    "sae", "layer", "point", "target_prompt", "target_position", "latent", "z", "atom", "other", "decoder_cosine", "edit", "delta_norm", "kl",
)  # fmt: skip
"""Of the table, a line for each latent × token × atom × edit. other: the latent whose atom takes the place; decoder_cosine: of d_other
(turned to the latent's side) and d_latent; delta_norm: ‖Δx‖, L2."""
NOTE = (
    "wins: share of (latent, token) where substitution changes the output less than deletion of the same ‖Δx‖; KL / …: median ratio of "
    "substitution to that deletion (and over plain deletion, whose dose is smaller by √(2 − 2 cos)). Intervals: 95 %, over "
    "prompts"
)


@dataclass(frozen=True)
class Substitutions(Result):
    """KL of replacing latents' atoms and of taking them away; see `COLUMNS`."""

    NAME: ClassVar[str] = "atom_substitution"
    TITLE: ClassVar[str] = "Substitution"
    QUESTION: ClassVar[str] = "Does another atom in a latent's place change less than deleting it at equal dose?"
    NOTE: ClassVar[str] = NOTE

    def contests(self, sae: str, atom: str) -> pd.DataFrame:
        """One line a (latent, token): KL of each edit, in columns; nan for a placebo that has no direction."""
        f = lines_of(self.frame, sae=sae, atom=atom)
        keys = ["target_prompt", "target_position", "latent", "decoder_cosine"]
        edits = f.pivot(index=keys, columns="edit", values="kl").reindex(columns=list(EDITS))
        return edits.dropna(subset=list(EDITS[:3])).reset_index()

    @cached_property
    @few_prompts()
    def groups(self) -> list[dict[str, Any]]:
        """Wins and ratios of each SAE and kind of atom."""
        found = []
        for sae in self.saes:
            for atom in ATOMS:
                c = self.contests(sae, atom)
                if not len(c):
                    continue
                prompt, kl = c["target_prompt"].to_numpy(), {edit: c[edit].to_numpy(float) for edit in EDITS}
                ratios = {}
                for edit in EDITS[1:]:
                    known = np.isfinite(kl[edit])
                    ratios[f"KL / {edit}"] = median_ratio(
                        kl["substitution"][known], kl[edit][known], 0.0, prompt[known]
                    )
                found.append(
                    {"sae": sae, "atom": atom, "rows": len(c), "wins": share(kl["substitution"] < kl["matched_deletion"], prompt),
                     "wins over plain deletion": share(kl["substitution"] < kl["deletion"], prompt),
                     "decoder cosine": mean_of(c, "decoder_cosine")} | ratios
                )  # fmt: skip
        return found

    def headlines(self) -> Iterable[Headline]:
        """Of each SAE, how often the nearest atom changes less than deletion, beside a random atom."""
        return beside_null(
            self.groups, "wins", "share of rows where substitution by the nearest atom changes less than deletion of its dose",
            lambda g: g["atom"] == "nearest", lambda g: g["atom"] == "random", "by a random atom",
        )  # fmt: skip

    def plot(self) -> Any:
        """KL of substitution against that of deletion of equal dose. Returns a matplotlib Figure."""
        from diagnostics.latent_edits.figures import plot_substitution

        return plot_substitution(self.groups, self.provenance, ATOMS)


@recorded
@torch.no_grad()
def atom_substitution(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    latents: int | Sequence[int] = 50,
    tokens_per_latent: int = 8,
    min_active: int = 2,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> Substitutions:
    """Put another atom in a latent's place, at tokens where it is active, and compare with taking it away by the same distance.

        substitution       x − z_i d_i + z_i‖d_i‖·d̂,     d̂ = ±d_j/‖d_j‖, the sign that makes <d̂, d_i> ≥ 0
        matched deletion   x − λ·z_i d_i,                λ = √(2 − 2·cos(d̂, d_i)), which makes ‖Δx‖ the same
        deletion           x − z_i d_i                   placebos: `matched_placebo` of the substitution

    For atoms across the latent λ is √2: the matched deletion then takes more than is there. latents: how many (those active on
    `min_active` usable tokens, all equally likely) or which.
    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for invalid settings. Source: after
    WriteSAE's substitution against matched-norm ablation (wins published there: 92.4 %), on the residual stream; our reconstruction.
    """
    check_numbers(tokens_per_latent=tokens_per_latent, min_active=min_active)
    asked = asked_latents(latents)

    def choose(clean: CleanActivations, dictionary: Dictionary, firings: Firings) -> Items:
        drawn = chosen_latents(firings, asked, clean.settings.seed, dictionary, min_active)
        table = firings.some(drawn, tokens_per_latent, clean.settings.seed, f"substitution/{dictionary.label}")
        live = np.flatnonzero(firings.count)
        nearest = _nearest(dictionary, drawn, live)
        table["nearest"] = table["latent"].map(dict(zip(drawn.tolist(), nearest, strict=True)))
        table["active"], table["random"] = _at_random(table, firings, live, clean.settings.seed, dictionary.label)
        said = {"latents": len(drawn), "rows": len(table), "live": len(live)}
        return Items(table, said | {"alone at their token": int((table["active"] < 0).sum())})

    def compute(bench: LatentEdits, items: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([_replaced(bench, part) for part in parts(items, 128)])

    own = {"latents": asked, "tokens_per_latent": tokens_per_latent, "min_active": min_active}
    return run_latent_edits(
        Substitutions, model, prompts, saes, choose, compute, own, ("kl", "delta_norm"),
        sink_filter=sink_filter, seed=seed, path=path, folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def _nearest(dictionary: Dictionary, drawn: np.ndarray, live: np.ndarray) -> list[int]:
    """The live latent, another one, whose decoder row has the largest |cosine| with each."""
    unit = torch.nn.functional.normalize(dictionary.directions, dim=1)
    close = (unit[drawn] @ unit[live].T).abs()
    close[torch.from_numpy(drawn[:, None] == live).to(close.device)] = -1
    return live[close.argmax(1).cpu().numpy()].tolist()


def _at_random(
    table: pd.DataFrame, firings: Firings, live: np.ndarray, seed: int, label: str
) -> tuple[list[int], list[int]]:
    """For each line another latent active at its token (−1: there is none), and another live one."""
    place = {pair: row for row, pair in enumerate(zip(firings.prompt.tolist(), firings.position.tolist(), strict=True))}
    start, active, some = firings.active.start, [], []
    for prompt, position, latent in table[["target_prompt", "target_position", "latent"]].itertuples(index=False):
        row = place[prompt, position]
        there = firings.active.latent[start[row] : start[row + 1]]
        stream = generator(seed, "substitution", label, latent, prompt, position)
        for found, pool in ((active, there[there != latent]), (some, live[live != latent])):
            draw = int(torch.randint(max(1, len(pool)), (), generator=stream))
            found.append(int(pool[draw]) if len(pool) else -1)
    return active, some


def _replaced(bench: LatentEdits, items: pd.DataFrame) -> pd.DataFrame:
    x = bench.x(items)
    unit = torch.nn.functional.normalize(bench.sae.W_dec.to(x), dim=1)
    latent = bench.column(items, "latent")
    z = torch.from_numpy(items["z"].to_numpy(copy=True)).to(x)
    part = (z * bench.sae.W_dec[latent].to(x).norm(dim=1))[:, None] * unit[latent]
    vectors, others, cosines = [], [], []
    for atom in ATOMS:
        other = bench.column(items, atom)
        cosine = (unit[other.clamp(min=0)] * unit[latent]).sum(1, keepdim=True)
        side = torch.where(cosine < 0, -1.0, 1.0).to(x)
        replaced = x - part + (part * unit[latent]).sum(1, keepdim=True) * side * unit[other.clamp(min=0)]
        vectors += [replaced, _deleted(x, part, (replaced - x).norm(dim=1, keepdim=True)), x - part]
        for kind in PLACEBOS:
            vectors.append(matched_placebo(x, replaced, bench.towards(kind, items, 1, f"substitution/{atom}")[:, 0]))
        others.append(other)
        cosines.append((cosine * side)[:, 0])
    stacked = torch.stack(vectors, dim=1)
    n = len(EDITS)
    table = repeated(items.drop(columns=list(ATOMS)), len(ATOMS) * n)
    table["atom"] = np.tile(np.repeat(ATOMS, n), len(items))
    table["other"] = torch.stack(others, dim=1).cpu().numpy().repeat(n)
    table["decoder_cosine"] = torch.stack(cosines, dim=1).cpu().numpy().repeat(n)
    table["edit"] = np.tile(EDITS, len(items) * len(ATOMS))
    table["delta_norm"] = bench.dose(x, stacked).flatten().cpu().numpy()
    table["kl"] = bench.measured(items, stacked)["kl"].numpy()
    bench.tick(len(items))
    return where(table, table["other"] >= 0)


def _deleted(
    x: Float[Tensor, "row d_model"], part: Float[Tensor, "row d_model"], distance: Float[Tensor, "row 1"]
) -> Tensor:
    return x - distance / part.norm(dim=1, keepdim=True) * part
