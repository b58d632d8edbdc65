"""Do two latents that are active together act on their own? Interactions of pairs in logit space, beside pairs of like geometry.

Logits, not KLs, are compared: effects that add exactly in the logits differ in KL by up to tenths of a nat.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.latent_edits.bench import LatentEdits, removals, strongest, turned
from diagnostics.latent_edits.firings import Firings
from diagnostics.latent_edits.interaction_summary import NOTE, pair_matrix, pair_summary
from diagnostics.latent_edits.items import Items, asked_latents, check_numbers, token_items
from diagnostics.latent_edits.run import run_latent_edits
from diagnostics.results.calls import recorded
from diagnostics.results.headlines import Headline, beside_null
from diagnostics.results.result import Result
from diagnostics.running.clean import CleanActivations
from diagnostics.statistics.tables import PLACEBOS, lines_of, where
from interventions.errors import ResultError
from interventions.logit_changes import kl_of, rms, spread
from interventions.progress import Progressing
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary

LATENTS = "latents"
KINDS = (LATENTS, *PLACEBOS)
"""Of a line: two latents; two edits of the same norms, cosines to x and cosine to each other, but turned about x at random."""
COLUMNS = (
    "sae", "layer", "point", "target_prompt", "target_position", "kind", "latent_i", "latent_j", "z_i", "z_j", "decoder_cosine",
    "delta_norm_i", "delta_norm_j", "delta_norm", "rms_i", "rms_j", "rms_joint", "rms_interaction", "spread_i", "spread_j",
    "spread_interaction", "kl_i", "kl_j", "kl_joint", "kl_sum", "noise_rms",
)  # fmt: skip
"""Of the table. latent_i < latent_j; decoder_cosine: of d_i and d_j; delta_norm: ‖Δx‖ of both edits together (L2). rms: √(Σ p·Δ²) of
vocabulary-centred logit changes, rms_interaction that of Δℓ_ij − Δℓ_i − Δℓ_j; spread: the same centred by p, the clean distribution.
kl_sum: KL(p ‖ softmax(ℓ + Δℓ_i + Δℓ_j)), nats. noise_rms: of the token put back as it was."""


@dataclass(frozen=True)
class Interactions(Result):
    """What removing pairs of latents did, pair by pair. The table has a line for each SAE × token × pair × kind; see `COLUMNS`."""

    NAME: ClassVar[str] = "interactions"
    TITLE: ClassVar[str] = "Interactions"
    QUESTION: ClassVar[str] = "Do two latents of a token act independently?"
    NOTE: ClassVar[str] = NOTE

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each SAE and kind of pair, with their intervals."""
        return [pair_summary(lines_of(self.frame, sae=sae), sae, kind, LATENTS) for sae in self.saes for kind in KINDS]

    def matrix(self, sae: str | None = None, at_least: int | None = None, most: int = 40) -> pd.DataFrame:
        """Interaction minus that of its placebo between tokens, of the latents with most pairs; see `pair_matrix`."""
        some = lines_of(self.frame, sae=sae or self.saes[0])
        return pair_matrix(some, LATENTS, PLACEBOS[0], at_least or self.provenance["min_tokens"], most)

    def headlines(self) -> Iterable[Headline]:
        """The interaction of each SAE's pairs, beside that of the same edits turned at random."""
        return beside_null(
            self.groups, "interaction", "interaction of two latents ÷ their single effects", lambda g: g["kind"] == LATENTS,
            lambda g: g["kind"] == "placebo_token", "the same edits turned at random",
        )  # fmt: skip

    def plot(self) -> Any:
        """Distributions of interactions beside their placebos'. Returns a matplotlib Figure."""
        from diagnostics.latent_edits.interaction_figures import plot_interactions

        return plot_interactions(self.frame, self.provenance)

    def plot_matrix(self, sae: str | None = None) -> Any:
        """Clustered heat map of latents' interactions beyond their placebos'. Returns a matplotlib Figure."""
        from diagnostics.latent_edits.interaction_figures import plot_matrix

        sae = sae or self.saes[0]
        matrix, least = self.matrix(sae), self.provenance["min_tokens"]
        if len(matrix) < 3:
            raise ResultError(
                f"no three latents of {sae} meet in pairs on {least} tokens; ask for more tokens, or give latents"
            )
        return plot_matrix(matrix, self.provenance, sae)

    def figures(self) -> dict[str, Any]:
        """Distributions; a heat map for each SAE in which enough pairs recur."""
        maps = {
            f"{self.NAME}_matrix_{sae.replace('/', '-')}": self.plot_matrix(sae)
            for sae in self.saes
            if len(self.matrix(sae)) > 2
        }
        return {self.NAME: self.plot()} | maps


@recorded
@torch.no_grad()
def interactions(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    n_tokens: int = 200,
    per_token: int = 8,
    latents: int | Sequence[int] | None = None,
    min_tokens: int = 5,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> Interactions:
    """Remove latents i and j, each alone and both, at tokens where both are active, and compare the changes of the logits.

        interaction = rms(Δℓ_ij − Δℓ_i − Δℓ_j) / (rms(Δℓ_i) + rms(Δℓ_j)),      rms(Δ) = √(Σ p·(Δ − mean Δ)²)
        KL beyond the sum = KL_ij − KL(p ‖ softmax(ℓ + Δℓ_i + Δℓ_j))

    ℓ, p: the clean logits and distribution; an edit subtracts z_i·d_i. saes: an SAE (anything that `as_sae` takes) or several by
    name, each at its own site. n_tokens: drawn from the usable ones, the same for all SAEs. per_token: all pairs of so many latents
    of the largest |z|‖d‖; with `latents`, of these alone (a number: the so many that fire most often), and tokens are drawn where at
    least two of them are active, so that pairs recur and the matrix fills: other tokens for each SAE. Beside each pair stand two of
    like geometry (`rotated_edits`): all edits of the token turned about x as one, towards differences of two other tokens'
    activations and isotropically. min_tokens: tokens at which a pair must meet to stand in the matrix.

    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for invalid settings. Source: pairs
    and geometry-matched controls after arXiv:2605.03160; interactions in logit space are ours.
    """
    check_numbers(n_tokens=n_tokens, min_tokens=min_tokens)
    check_numbers(2, per_token=per_token)
    named = None if latents is None else asked_latents(latents)
    if named is not None:
        check_numbers(2, latents=named if isinstance(named, int) else len(set(named)))

    def choose(clean: CleanActivations, dictionary: Dictionary, firings: Firings) -> Items:
        return token_items(clean, firings, n_tokens, _of_those(firings, named))

    def compute(bench: LatentEdits, items: pd.DataFrame) -> pd.DataFrame:
        some = _of_those(bench.firings, named)
        rows = 1 + len(KINDS) * per_token * (per_token + 1) // 2
        return pd.concat([_pairs(bench, part, per_token, some) for part in bench.batches(items, rows)])

    own = {"n_tokens": n_tokens, "per_token": per_token, "latents": named, "min_tokens": min_tokens}
    return run_latent_edits(
        Interactions, model, prompts, saes, choose, compute, own, ("rms_interaction", "rms_i", "rms_j", "kl_joint", "kl_sum"),
        sink_filter=sink_filter, seed=seed, path=path, folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def _of_those(firings: Firings, latents: int | list[int] | None) -> np.ndarray | None:
    """The latents to which pairs are limited: those given, or so many of the most frequent."""
    if latents is None or not isinstance(latents, int):
        return None if latents is None else np.array(latents)
    return np.sort(np.argsort(-firings.count, kind="stable")[:latents])


def _pairs(bench: LatentEdits, items: pd.DataFrame, per_token: int, among: np.ndarray | None) -> pd.DataFrame:
    """All pairs of the strongest latents of each token, and their placebos."""
    x = bench.x(items)
    index, z = strongest(bench, x, per_token, among)
    i, j = torch.triu_indices(index.shape[1], index.shape[1], offset=1, device=x.device)
    singles = {LATENTS: removals(bench, index, z).to(x)}
    singles |= {kind: turned(bench, kind, items, x, singles[LATENTS]) for kind in PLACEBOS}
    edits = [torch.zeros_like(x[:, None])]
    for delta in singles.values():
        edits += [delta, delta[:, i] + delta[:, j]]
    vectors = x[:, None] + torch.cat(edits, dim=1)
    logits = bench.logits(items, vectors)
    moved = bench.dose(x, vectors)
    found = []
    there = ((index[:, i] >= 0) & (index[:, j] >= 0)).cpu().numpy()
    for row, clean in enumerate(bench.clean_logits(items)):
        found += _one_token(
            bench, clean, logits[row], moved[row], index[row], z[row], i, j, there[row], items.iloc[row]
        )
    bench.tick(len(items))
    return pd.concat(found, ignore_index=True)


def _one_token(
    bench: LatentEdits, clean: Tensor, logits: Tensor, moved: Tensor, index: Tensor, z: Tensor, i: Tensor, j: Tensor,
    there: np.ndarray, item: pd.Series,
) -> list[pd.DataFrame]:  # fmt: skip
    change, p = logits - clean, clean.softmax(-1)
    directions = torch.nn.functional.normalize(bench.sae.W_dec[index.clamp(min=0)], dim=1)
    shared = {
        "decoder_cosine": (directions[i] * directions[j]).sum(1),
        "noise_rms": rms(change[0], p).expand(len(i)),
    }
    first = torch.minimum(index[i], index[j])
    low, high = torch.where(first == index[i], i, j), torch.where(first == index[i], j, i)
    k, n, tables = len(index), len(i), []
    for place, kind in enumerate(KINDS):
        start = 1 + place * (k + n)
        single, joint = change[start : start + k], change[start + k : start + k + n]
        size, wide = rms(single, p), spread(single, p)
        together = single[i] + single[j]
        kl = kl_of(clean, single)
        values = {
            "z_i": z[low], "z_j": z[high], **shared,
            "delta_norm_i": moved[start : start + k][low], "delta_norm_j": moved[start : start + k][high],
            "delta_norm": moved[start + k : start + k + n],
            "rms_i": size[low], "rms_j": size[high], "rms_joint": rms(joint, p), "rms_interaction": rms(joint - together, p),
            "spread_i": wide[low], "spread_j": wide[high], "spread_interaction": spread(joint - together, p),
            "kl_i": kl[low], "kl_j": kl[high], "kl_joint": kl_of(clean, joint), "kl_sum": kl_of(clean, together),
        }  # fmt: skip
        numbers = torch.stack([v.to(joint) for v in values.values()], dim=1).cpu().numpy()
        names = {"latent_i": index[low].cpu().numpy(), "latent_j": index[high].cpu().numpy()}
        table = where(pd.DataFrame({"kind": kind, **names, **dict(zip(values, numbers.T, strict=True))}), there)
        for column, name in enumerate(("target_prompt", "target_position")):
            table.insert(column, name, item[name])
        tables.append(table)
    return tables
