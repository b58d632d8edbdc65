"""Is a latent's part of the stream better replaced by another atom than taken away? Substitution against deletion of equal dose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.firings import Firings, chosen_latents
from diagnostics.interaction_summary import from_sums, terminal
from diagnostics.latent_study import PLACEBOS, Bench, Items, run_latent_study
from diagnostics.probes import Probe, probes_of
from diagnostics.results import Result
from diagnostics.sampling import generator
from diagnostics.statistics import log_ratio_of_means, share
from diagnostics.study import Clean, Settings
from interventions.edits import matched_placebo
from interventions.errors import ResultError
from interventions.models import wrap
from interventions.texts import Prompts, as_prompts

ATOMS = ("nearest", "active", "random")
"""What takes the latent's place: the decoder row of largest |cosine|; one of the token's other active latents, by lot; any live latent, by
lot, which is what the first two must beat."""
EDITS = ("substitution", "matched_deletion", "deletion", *PLACEBOS)
COLUMNS = (
    "sae", "layer", "point", "target_prompt", "target_position", "latent", "z", "atom", "other", "decoder_cosine", "edit", "delta_norm", "kl",
)  # fmt: skip
"""Of the table, a line for each latent × token × atom × edit. other: the latent whose atom takes the place; decoder_cosine: of d_other
(turned to the latent's side) and d_latent; delta_norm: ‖Δx‖, L2."""
NOTE = (
    "wins: share of (latent, token) where substitution changes the output less than deletion of the same ‖Δx‖; KL ratio: sums, "
    "substitution over that deletion (and over plain deletion, whose dose is smaller by √(2 − 2 cos)). Intervals: 95 %, delete-one-prompt "
    "jackknife"
)


@dataclass(frozen=True)
class Substitutions(Result):
    """KL of replacing latents' atoms and of taking them away; see `COLUMNS`."""

    NAME: ClassVar[str] = "atom_substitution"

    @property
    def saes(self) -> list[str]:
        """Names of the SAEs, in the order in which they were given."""
        return list(self.provenance["saes"])

    def contests(self, sae: str, atom: str) -> pd.DataFrame:
        """One line a (latent, token): KL of each edit, in columns."""
        f = self.frame[(self.frame["sae"] == sae) & (self.frame["atom"] == atom)]
        keys = ["target_prompt", "target_position", "latent", "decoder_cosine"]
        return f.pivot(index=keys, columns="edit", values="kl").dropna().reset_index()

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Wins and ratios of each SAE and kind of atom."""
        found = []
        for sae in self.saes:
            for atom in ATOMS:
                c = self.contests(sae, atom)
                if not len(c):
                    continue
                prompt, kl = c["target_prompt"].to_numpy(), {edit: c[edit].to_numpy(float) for edit in EDITS}
                ratios = {
                    f"KL / {edit}": log_ratio_of_means(kl["substitution"], kl[edit], prompt)
                    for edit in EDITS[1:]
                }  # fmt: skip
                found.append(
                    {"sae": sae, "atom": atom, "rows": len(c), "wins": share(kl["substitution"] < kl["matched_deletion"], prompt),
                     "wins over plain deletion": share(kl["substitution"] < kl["deletion"], prompt),
                     "decoder cosine": from_sums(c.assign(one=1.0), ["decoder_cosine", "one"], lambda a, n: a / n)} | ratios
                )  # fmt: skip
        return found

    def summary(self) -> pd.DataFrame:
        """One row an SAE and kind of atom."""
        return pd.DataFrame([{k: str(v) if hasattr(v, "se") else v for k, v in g.items()} for g in self.groups])

    def table(self) -> str:
        """The summary as text, for a terminal."""
        return terminal(self.summary(), NOTE, self.provenance)

    def plot(self) -> Any:
        """KL of substitution against that of deletion of equal dose. Returns a matplotlib Figure."""
        from diagnostics.steering_plots import plot_substitution

        return plot_substitution(self)

    def figures(self) -> dict[str, Any]:
        """The contests."""
        return {self.NAME: self.plot()}

    def _repr_html_(self) -> str:
        return self.summary().to_html(index=False) + f"<p>{NOTE}</p>"


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
    progress: Callable[[int, int], object] | None = None,
) -> Substitutions:
    """Put another atom in a latent's place, at tokens where it is active, and compare with taking it away by the same distance.

        substitution       x − z_i d_i + z_i‖d_i‖·d̂,     d̂ = ±d_j/‖d_j‖, the sign that makes <d̂, d_i> ≥ 0
        matched deletion   x − λ·z_i d_i,                λ = √(2 − 2·cos(d̂, d_i)), which makes ‖Δx‖ the same
        deletion           x − z_i d_i                   placebos: `matched_placebo` of the substitution

    For atoms across the latent λ is √2: the matched deletion then takes more than is there. latents: how many (those active on
    `min_active` usable tokens, all equally likely) or which.
    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for settings that do not serve. Source: after
    WriteSAE's substitution against matched-norm ablation (wins published there: 92.4 %), on the residual stream; our reconstruction.
    """
    model = wrap(model)
    prompts = as_prompts(prompts, model.tokenizer)
    if tokens_per_latent < 1 or min_active < 1:
        raise ResultError(f"tokens_per_latent {tokens_per_latent}, min_active {min_active}; expected 1 or more")

    def choose(clean: Clean, probe: Probe, firings: Firings) -> Items:
        drawn = chosen_latents(firings, latents, clean.settings.seed, probe, min_active)
        table = firings.some(drawn, tokens_per_latent, clean.settings.seed, f"substitution/{probe.label}")
        live = np.flatnonzero(firings.count)
        nearest = _nearest(probe, drawn, live)
        table["nearest"] = table["latent"].map(dict(zip(drawn.tolist(), nearest, strict=True)))
        table["active"], table["random"] = _by_lot(table, firings, live, clean.settings.seed, probe.label)
        said = {"latents": len(drawn), "rows": len(table), "live": len(live)}
        return Items(table, said | {"alone at their token": int((table["active"] < 0).sum())})

    def compute(bench: Bench, items: pd.DataFrame) -> pd.DataFrame:
        tables = [_replaced(bench, items.iloc[s : s + 128].reset_index(drop=True)) for s in range(0, len(items), 128)]
        return pd.concat(tables)

    own = {
        "latents": latents if isinstance(latents, int) else [int(i) for i in latents],
        "tokens_per_latent": tokens_per_latent,
        "min_active": min_active,
        "finite": ["kl", "delta_norm"],
    }
    study = run_latent_study(
        Substitutions.NAME, model, prompts, probes_of(saes, model, None), choose, compute,
        Settings(sites=(), sink_filter=sink_filter, seed=seed, path=path), own,
        folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip
    return Substitutions(study.frame, study.tokens, study.provenance)


def _nearest(probe: Probe, drawn: np.ndarray, live: np.ndarray) -> list[int]:
    """The live latent, another one, whose decoder row has the largest |cosine| with each."""
    unit = torch.nn.functional.normalize(probe.directions, dim=1)
    close = (unit[drawn] @ unit[live].T).abs()
    close[torch.from_numpy(drawn[:, None] == live).to(close.device)] = -1
    return live[close.argmax(1).cpu().numpy()].tolist()


def _by_lot(
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


def _replaced(bench: Bench, items: pd.DataFrame) -> pd.DataFrame:
    x = bench.x(items)
    unit = torch.nn.functional.normalize(bench.sae.W_dec.to(x), dim=1)
    latent = torch.from_numpy(items["latent"].to_numpy(np.int64, copy=True)).to(x.device)
    z = torch.from_numpy(items["z"].to_numpy(copy=True)).to(x)
    part = (z * bench.sae.W_dec[latent].to(x).norm(dim=1))[:, None] * unit[latent]
    vectors, others, cosines = [], [], []
    for atom in ATOMS:
        other = torch.from_numpy(items[atom].to_numpy(np.int64, copy=True)).to(x.device)
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
    table = items.drop(columns=list(ATOMS)).loc[items.index.repeat(len(ATOMS) * n)].reset_index(drop=True)
    table["atom"] = np.tile(np.repeat(ATOMS, n), len(items))
    table["other"] = torch.stack(others, dim=1).cpu().numpy().repeat(n)
    table["decoder_cosine"] = torch.stack(cosines, dim=1).cpu().numpy().repeat(n)
    table["edit"] = np.tile(EDITS, len(items) * len(ATOMS))
    table["delta_norm"] = (stacked.to(bench.clean.model.dtype).to(x) - x[:, None]).norm(dim=-1).flatten().cpu().numpy()
    table["kl"] = bench.measured(items, stacked)["kl"].numpy()
    bench.tick(len(items))
    return table[table["other"] >= 0]


def _deleted(
    x: Float[Tensor, "row d_model"], part: Float[Tensor, "row d_model"], distance: Float[Tensor, "row 1"]
) -> Tensor:
    return x - distance / part.norm(dim=1, keepdim=True) * part
