"""How many of a token's latents carry its effect, and do their single effects add up to that of all?

Necessity: latents removed one after another. Sufficiency: all others removed, the SAE's error kept. Greedy counts, no dimension:
the causal dimensionality of arXiv:2605.08740 is an effective rank of the model above the site.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diagnostics.latent_edits.bench import LatentEdits, parts, removals, strongest, turned
from diagnostics.latent_edits.concentration_summary import NOTE, curve, summary_of
from diagnostics.latent_edits.firings import Firings
from diagnostics.latent_edits.items import Items, check_numbers, token_items
from diagnostics.latent_edits.run import run_latent_edits
from diagnostics.results.calls import recorded
from diagnostics.results.headlines import Headline, beside_null
from diagnostics.results.result import Result
from diagnostics.running.clean import CleanActivations
from diagnostics.sampling.tokens import generator
from diagnostics.statistics.tables import PLACEBOS, each, lines_of, where
from interventions.logit_changes import cosine, kl_of, rms
from interventions.progress import Progressing
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary

EDITS = ("remove", "keep", *PLACEBOS)
"""remove: the first n of the order; keep: these alone of the active ones, the others removed and the SAE's error kept; placebos:
what is removed is turned about x at random, all edits of a token as one (same dose, same angles)."""
ORDERS = ("size", "effect", "random")
"""By falling |z|‖d‖; by falling KL of removing the latent alone; at random. Placebos and `keep` have no random order, placebos are in that
of size."""
SHARES = (0.5, 0.8, 0.9)
COLUMNS = (
    "sae", "layer", "point", "target_prompt", "target_position", "edit", "order", "n", "n_active", "delta_norm", "kl", "kl_all",
    "kl_sum", "sum_cosine", "sum_ratio",
)  # fmt: skip
"""Of the table, a line for each SAE × token × edit × order × n. kl: of the edit, kl_all: of all active latents removed (for placebos:
all turned edits), nats. Where n = n_active of `remove` and placebos in the order of size, else nan: kl_sum = KL(p ‖ softmax(ℓ + Σ Δℓ_i)),
sum_cosine, sum_ratio: cosine of Σ Δℓ_i and the joint Δℓ, and rms of the first over that of the second, p-weighted."""


@dataclass(frozen=True)
class Concentration(Result):
    """KL as latents of a token are removed or kept one after another; see `COLUMNS`."""

    NAME: ClassVar[str] = "causal_concentration"
    TITLE: ClassVar[str] = "Causal concentration"
    QUESTION: ClassVar[str] = "How many of a token's latents carry its effect, and do single effects add up?"
    NOTE: ClassVar[str] = NOTE

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each SAE, edit and order, with their intervals."""
        keys = ["edit", "order"]
        return [
            {"sae": sae, "edit": edit, "order": order} | summary_of(lines, SHARES, edit == "keep")
            for sae in self.saes
            for (edit, order), lines in each(lines_of(self.frame, sae=sae), keys)
        ]

    def curve(self, sae: str, edit: str = "remove", order: str = "size") -> pd.DataFrame:
        """Share of the joint effect against the share of active latents removed (or kept), with its interval."""
        return curve(lines_of(self.frame, sae=sae, edit=edit, order=order), edit == "keep")

    def headlines(self) -> Iterable[Headline]:
        """Of each SAE, the share of a token's latents that carries 90 % of their effect."""
        return beside_null(
            self.groups, "n90 / active", "share of a token's latents that carries 90 % of their effect",
            lambda g: (g["edit"], g["order"]) == ("remove", "size"), lambda g: g["edit"] == "placebo_token", "turned at random",
        )  # fmt: skip

    def plot(self) -> Any:
        """Share of the joint effect against the share of latents. Returns a matplotlib Figure."""
        from diagnostics.latent_edits.interaction_figures import plot_concentration

        curves = {(g["sae"], g["edit"], g["order"]): self.curve(g["sae"], g["edit"], g["order"]) for g in self.groups}
        return plot_concentration(self.frame, curves, self.provenance, max(g["tokens"] for g in self.groups))


@recorded
@torch.no_grad()
def causal_concentration(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    n_tokens: int = 100,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> Concentration:
    """Remove a token's active latents one after another, or keep only the first n, and add up what each does alone.

        removed:  x − Σ_{i ≤ n} z_i d_i           share(n) = KL_n / KL_all
        kept:     x − Σ_{i > n} z_i d_i           share(n) = 1 − KL_n / KL_all
        additivity:  Σ_i Δℓ_i against Δℓ of all,  KL(p ‖ softmax(ℓ + Σ_i Δℓ_i)) against KL_all

    Tokens as in `interactions`. KL_n need not grow with n: shares may exceed 1, and a count is of the first n that reaches its share.
    A row for each active latent and edit: ten times as many rows a token as latents are active there.
    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for invalid settings. Source: ours.
    """
    check_numbers(n_tokens=n_tokens)

    def choose(clean: CleanActivations, dictionary: Dictionary, firings: Firings) -> Items:
        items = token_items(clean, firings, n_tokens)
        active = np.zeros(clean.usable.shape, dtype=int)
        active[firings.prompt, firings.position] = np.diff(firings.active.start)
        n = active[items.table["target_prompt"], items.table["target_position"]]
        said = {
            "without an active latent": int((n == 0).sum()),
            "mean active latents": float(n.mean()) if len(n) else 0.0,
        }
        return Items(where(items.table, n > 0), items.said | said)

    def compute(bench: LatentEdits, items: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([_token(bench, item) for item in parts(items, 1)])

    return run_latent_edits(
        Concentration, model, prompts, saes, choose, compute, {"n_tokens": n_tokens}, ("kl", "kl_all"),
        sink_filter=sink_filter, seed=seed, path=path, folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def _token(bench: LatentEdits, item: pd.DataFrame) -> pd.DataFrame:
    """All curves of one token."""
    x = bench.x(item)
    index, z = strongest(bench, x)
    deltas = {"remove": removals(bench, index, z).to(x)[0]}
    deltas |= {kind: turned(bench, kind, item, x, deltas["remove"][None])[0] for kind in PLACEBOS}
    n = len(index[0])
    sums = _added(bench, item, x, torch.stack(list(deltas.values())))
    orders = {
        "size": torch.arange(n, device=x.device),
        "effect": sums.kl[0].argsort(descending=True),
        "random": torch.from_numpy(_lot(bench, item, n)).to(x.device),
    }
    curves = {("remove", name): deltas["remove"][order].cumsum(0) for name, order in orders.items()}
    whole = curves["remove", "size"][-1]
    curves |= {("keep", name): whole - deltas["remove"][orders[name]].cumsum(0) for name in ORDERS[:2]}
    for name in ORDERS[:2]:
        curves["keep", name][-1] = 0.0  # all kept: what rounding leaves of a sum taken from itself
    curves |= {(kind, "size"): deltas[kind].cumsum(0) for kind in PLACEBOS}
    vectors = x + torch.cat(list(curves.values()))
    kl = bench.measured(item, vectors[None])["kl"].double().view(len(curves), n).numpy()
    dose = bench.dose(x, vectors[None]).view(len(curves), n).cpu().numpy()
    tables = []
    for row, (edit, order) in enumerate(curves):
        own = edit if edit in PLACEBOS else "remove"
        all_removed = kl[list(curves).index((own, "size")), -1]
        table = pd.DataFrame({"edit": edit, "order": order, "n": np.arange(1, n + 1), "n_active": n})
        table["delta_norm"], table["kl"], table["kl_all"] = dose[row], kl[row], all_removed
        for name in ("kl_sum", "sum_cosine", "sum_ratio"):
            table[name] = np.nan
            if order == "size" and edit != "keep":
                table.loc[n - 1, name] = float(getattr(sums, name)[list(deltas).index(own)])
        tables.append(table)
    found = pd.concat(tables)
    for place, name in enumerate(("target_prompt", "target_position")):
        found.insert(place, name, int(item.loc[0, name]))
    bench.tick(1)
    return found


@dataclass(frozen=True)
class _Sums:
    """Single edits of one token, of several kinds, and what their changes of logits add up to."""

    kl: Float[Tensor, "kind edit"]
    """of each alone"""
    kl_sum: Float[Tensor, "kind"]
    sum_cosine: Float[Tensor, "kind"]
    sum_ratio: Float[Tensor, "kind"]


def _added(
    bench: LatentEdits, item: pd.DataFrame, x: Float[Tensor, "1 d_model"], deltas: Float[Tensor, "kind edit d_model"]
) -> _Sums:
    clean = bench.clean_logits(item)[0]
    p, (kinds, n, _) = clean.softmax(-1), deltas.shape
    edits = torch.cat([deltas.flatten(0, 1), deltas.sum(1)])
    kind = torch.arange(kinds, device=x.device).repeat_interleave(n)
    total, alone, joint = clean.new_zeros(kinds, len(clean)), [], []
    for start in range(0, len(edits), bench.at_once):
        change = bench.logits(item, (x + edits[start : start + bench.at_once])[None])[0] - clean
        single = change[: max(0, kinds * n - start)]
        total.index_add_(0, kind[start : start + len(single)], single)
        alone.append(kl_of(clean, single))
        joint.append(change[len(single) :])
    both = torch.cat(joint)
    kl = torch.cat(alone).view(kinds, n)
    return _Sums(kl, kl_of(clean, total), cosine(total, both, p), rms(total, p) / rms(both, p))


def _lot(bench: LatentEdits, item: pd.DataFrame, n: int) -> Int[np.ndarray, "n"]:
    token = (int(item.loc[0, name]) for name in ("target_prompt", "target_position"))
    stream = generator(bench.clean.settings.seed, "order", bench.dictionary.label, *token)
    return torch.randperm(n, generator=stream).numpy()
