"""Do the two polarities of a signed latent do opposite things? Effects where z > 0 against effects where z < 0, and of adding ±d."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.latent_edits.bench import LatentEdits
from diagnostics.latent_edits.firings import Firings
from diagnostics.latent_edits.items import Items, asked_latents, check_numbers
from diagnostics.latent_edits.polarity_summary import NOTE, numbers
from diagnostics.latent_edits.run import run_latent_edits
from diagnostics.results.calls import recorded
from diagnostics.results.headlines import Headline, beside_null
from diagnostics.results.result import Result
from diagnostics.running.clean import CleanActivations
from diagnostics.running.recordings import SHARD
from diagnostics.sampling.latents import BIPOLAR_SHARE, is_bipolar
from diagnostics.sampling.tokens import hash_keys
from diagnostics.statistics.tables import PLACEBOS, each, lines_of, where
from interventions.errors import ResultError
from interventions.logit_changes import cosine as cosine_of
from interventions.logit_changes import kl_of
from interventions.progress import Progressing
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary

LATENTS = "latents"
KINDS = (LATENTS, *PLACEBOS)
"""Along the latent's direction; along one random direction of its length, the same at all of the latent's tokens, with the latent's z."""
ABLATION, STEERING = "ablation", "steering"
ALIKE, OPPOSITE = "alike", "opposite"
"""Relations of two edits: of one polarity; of both (the positive one is the target)."""
COLUMNS = (
    "sae", "layer", "point", "latent", "edit", "kind", "relation", "target_prompt", "target_position", "source_prompt", "source_position",
    "z_target", "z_source", "delta_norm_target", "delta_norm_source", "kl_target", "kl_source", "cosine",
)  # fmt: skip
"""Of the table: a line for each pair of edits. z: what is removed (ablation), or added (steering, ±mean |z| at one token where the latent
is silent). cosine: of the two changes of the vocabulary-centred logits, under Σ p·a·b, p the mean clean distribution of both tokens."""


@dataclass(frozen=True)
class PolarityEffects(Result):
    """Cosines between the logit changes of edits of one latent; see `COLUMNS`."""

    NAME: ClassVar[str] = "polarity_effects"
    TITLE: ClassVar[str] = "Polarity effects"
    QUESTION: ClassVar[str] = "Do the two polarities of a latent do opposite things?"
    NOTE: ClassVar[str] = NOTE

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Mean cosines of each SAE, edit, relation and direction, with their intervals."""
        return [line for sae in self.saes for line in numbers(lines_of(self.frame, sae=sae), sae, LATENTS, KINDS)]

    def headlines(self) -> Iterable[Headline]:
        """Of each SAE: the cosine between effects of both polarities, beside that of a random direction."""
        return _headlines(self.groups)

    def plot(self) -> Any:
        """Mean cosines, and each latent's own beside its placebo's. Returns a matplotlib Figure."""
        from diagnostics.latent_edits.polarity_figures import plot_polarity_effects

        return plot_polarity_effects(self.frame, self.groups, self.provenance)


def _headlines(groups: Sequence[dict[str, Any]]) -> Iterator[Headline]:
    said = {ABLATION: "removing the latent where z > 0 and where z < 0", STEERING: "adding +d and −d at one token"}
    for edit, what in said.items():
        yield from beside_null(
            [g for g in groups if (g["edit"], g["relation"]) == (edit, OPPOSITE)], "cosine", f"cosine of the logit changes of {what}",
            lambda g: g["kind"] == LATENTS, lambda g: g["kind"] == PLACEBOS[1], "one random direction with the same z",
        )  # fmt: skip


@recorded
@torch.no_grad()
def polarity_effects(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    latents: int | Sequence[int] = 24,
    tokens_per_latent: int = 4,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> PolarityEffects:
    """Compare what bipolar latents do where z > 0 with what they do where z < 0, and adding +d with adding −d at one token.

        ablation   e_t = ℓ(x_t − z_t·d) − ℓ(x_t)   at tokens with z_t > 0 and with z_t < 0
        steering   e_t± = ℓ(x_t ± s·d) − ℓ(x_t)    at tokens with z_t = 0,   s = mean |z| where active
        cosine(e_t, e_u) for all pairs of ablations (`alike`: z_t z_u > 0; `opposite`: z_t z_u < 0), and for (e_t+, e_t−)

    A latent's effects are consistent if alike pairs have a cosine above 0, and its polarities opposite if opposite pairs have one below
    0. Both hold for any direction as far as the model is linear: beside the latent stand two random directions of its length (between
    two tokens' activations, isotropic; one for all of its tokens), with its z, hence at its doses ‖Δx‖. latents: how many, drawn among
    bipolar ones (each polarity takes at least 10 % of the firing, and `tokens_per_latent` usable tokens of one 64 prompts), all equally
    likely, or which; at `tokens_per_latent` tokens of each polarity and as many where it is silent, of the 64 prompts in which the rarer
    polarity is most frequent.

    Raises `BelongingError` for an SAE of another model, width or site; `ResultError` for an SAE without such latents, for a latent that is
    not one, and for invalid settings. Source: ours, on the latents of arXiv:2605.28149.
    """
    check_numbers(2, tokens_per_latent=tokens_per_latent)
    asked = asked_latents(latents)

    def choose(clean: CleanActivations, dictionary: Dictionary, firings: Firings) -> Items:
        return _choose(dictionary, firings, asked, tokens_per_latent, clean.settings.seed)

    def compute(bench: LatentEdits, items: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([_one_latent(bench, some.reset_index(drop=True)) for _, some in each(items, ["latent"])])

    own = {"latents": asked, "tokens_per_latent": tokens_per_latent}
    return run_latent_edits(
        PolarityEffects, model, prompts, saes, choose, compute, own, ("cosine", "kl_target", "kl_source"),
        sink_filter=sink_filter, seed=seed, path=path, folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def _choose(dictionary: Dictionary, firings: Firings, asked: int | list[int], n: int, seed: int) -> Items:
    """Tokens of each latent, all of one shard: n of each polarity, and n where it is silent (z = 0)."""
    active, d_sae = firings.active, firings.active.d_sae
    shard = firings.prompt[active.token] // SHARD
    counts = np.zeros((2, int(firings.prompt.max(initial=0)) // SHARD + 1, d_sae), dtype=np.int64)
    np.add.at(counts, ((active.z < 0).astype(int), shard, active.latent), 1)
    total = counts.sum(1)
    bipolar = is_bipolar(total.sum(0), total[0])
    enough = bipolar & (counts.min(0).max(0) >= n)
    if not isinstance(asked, int) and (bad := [i for i in asked if not enough[i]]):
        raise ResultError(
            f"latents {bad} of {dictionary.name} are not bipolar with {n} tokens of each polarity in one 64 prompts; it has {int(enough.sum())} "
            "that are: give one of these, fewer tokens or more text"
        )
    if not enough.any():
        raise ResultError(
            f"no latent of {dictionary.name} has both polarities in {BIPOLAR_SHARE:.0%} of its firing and at {n} tokens of one 64 prompts: give "
            "an SAE with signed latents (AbsTopK, signed gate), fewer tokens or more text"
        )
    key = hash_keys(seed, f"latents/{dictionary.label}", np.arange(d_sae))
    order = np.argsort(key, kind="stable")
    drawn = np.sort(order[enough[order]][:asked]) if isinstance(asked, int) else np.unique(asked)
    best = counts.min(0).argmax(0)
    parts = [_tokens(firings, int(i), int(best[i]), n, seed, dictionary.label) for i in drawn]
    said = {"latents": drawn.tolist(), "live": int((total.sum(0) > 0).sum()), "bipolar": int(bipolar.sum()), "with tokens": int(enough.sum())}  # fmt: skip
    return Items(pd.concat(parts, ignore_index=True), said | {"rows": sum(map(len, parts))})


def _tokens(firings: Firings, latent: int, shard: int, n: int, seed: int, label: str) -> pd.DataFrame:
    z = np.zeros(len(firings.prompt))
    mine = firings.active.latent == latent
    z[firings.active.token[mine]] = firings.active.z[mine]
    key = hash_keys(seed, f"polarity/{label}", np.full(len(z), latent), firings.prompt, firings.position)
    order = np.argsort(key, kind="stable")
    order = order[firings.prompt[order] // SHARD == shard]
    token = np.concatenate([order[sign(z[order])][:n] for sign in (lambda v: v > 0, lambda v: v < 0, lambda v: v == 0)])
    place = {"target_prompt": firings.prompt[token], "target_position": firings.position[token]}
    return pd.DataFrame(place | {"latent": latent, "z": z[token]})


def _one_latent(bench: LatentEdits, items: pd.DataFrame) -> pd.DataFrame:
    """All pairs of a latent's edits, along its direction and along the placebos'."""
    latent, z = int(items["latent"].iloc[0]), items["z"].to_numpy(float)
    d = bench.sae.W_dec[latent].float()
    directions = torch.stack([d, *(_random(bench, kind, items, latent) * d.norm() for kind in PLACEBOS)])
    removed, silent = (where(items, some).reset_index(drop=True) for some in (z != 0, z == 0))
    size = float(abs(bench.firings.typical[latent]))
    one = _pairs_of_removals(bench, removed, directions)
    other = _both_signs(bench, silent, directions, size)
    bench.tick(len(items))
    return pd.concat([one, other], ignore_index=True).assign(latent=latent)


def _random(bench: LatentEdits, kind: str, items: pd.DataFrame, latent: int) -> Float[Tensor, "d_model"]:
    """One unit direction for all tokens of a latent; nan where the text has none."""
    drawn = bench.towards(kind, items.iloc[:1], 1, f"polarity/{latent}")[0, 0]
    return torch.nn.functional.normalize(drawn, dim=0)


def _pairs_of_removals(bench: LatentEdits, items: pd.DataFrame, directions: Tensor) -> pd.DataFrame:
    z = torch.from_numpy(items["z"].to_numpy(np.float32, copy=True)).to(directions)
    change, kl, dose, p = _changes(bench, items, -z[:, None, None] * directions)
    i, j = np.triu_indices(len(items), 1)
    turned = items["z"].to_numpy()[i] < items["z"].to_numpy()[j]
    i, j = np.where(turned, j, i), np.where(turned, i, j)  # of two polarities the positive one is the target
    weight = (p[i] + p[j]) / 2
    alike = np.sign(items["z"].to_numpy())
    relation = np.where(alike[i] == alike[j], ALIKE, OPPOSITE)
    tables = []
    for k, kind in enumerate(KINDS):
        cosine = cosine_of(change[i, k], change[j, k], weight)
        ends = {"target": i, "source": j}
        values = {f"kl_{end}": kl[at, k] for end, at in ends.items()} | {
            f"delta_norm_{end}": dose[at, k] for end, at in ends.items()
        }
        tables.append(_table(items, i, j, ABLATION, kind, relation, values | {"cosine": cosine}, items["z"].to_numpy()))
    return pd.concat(tables, ignore_index=True)


def _both_signs(bench: LatentEdits, items: pd.DataFrame, directions: Tensor, size: float) -> pd.DataFrame:
    both = torch.stack([directions, -directions], dim=1).flatten(0, 1) * size  # +, − of each direction in turn
    change, kl, dose, p = _changes(bench, items, both.expand(len(items), -1, -1))
    at, tables = np.arange(len(items)), []
    for k, kind in enumerate(KINDS):
        up, down = 2 * k, 2 * k + 1
        values = {
            "kl_target": kl[:, up],
            "kl_source": kl[:, down],
            "delta_norm_target": dose[:, up],
            "delta_norm_source": dose[:, down],
        }
        values["cosine"] = cosine_of(change[:, up], change[:, down], p)
        table = _table(items, at, at, STEERING, kind, np.full(len(at), OPPOSITE), values, np.full(len(at), size))
        tables.append(table.assign(z_source=-size))
    return pd.concat(tables, ignore_index=True)


def _changes(bench: LatentEdits, items: pd.DataFrame, deltas: Float[Tensor, "item row d_model"]) -> tuple[Tensor, ...]:
    """Of x + Δ: changes of the logits, KLs, doses `[item, row]`; and the clean distributions `[item, vocab]`."""
    found = []
    for some in bench.batches(items.assign(place=np.arange(len(items))), deltas.shape[1]):
        x, clean = bench.x(some), bench.clean_logits(some)
        vectors = x[:, None] + deltas[
            torch.from_numpy(some["place"].to_numpy(np.int64, copy=True)).to(deltas.device)
        ].to(x)
        change = bench.logits(some, vectors) - clean[:, None]
        kl = torch.stack([kl_of(*one) for one in zip(clean, change, strict=True)])
        found.append((change, kl, bench.dose(x, vectors), clean.softmax(-1)))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def _table(
    items: pd.DataFrame, i: Int[ndarray, "pair"], j: Int[ndarray, "pair"], edit: str, kind: str, relation: ndarray,
    values: dict[str, Tensor], z: Float[ndarray, "item"],
) -> pd.DataFrame:  # fmt: skip
    places = {
        f"{end}_{what}": items[f"target_{what}"].to_numpy()[at]
        for end, at in (("target", i), ("source", j))
        for what in ("prompt", "position")
    }
    found = torch.stack([v.double() for v in values.values()], dim=1).cpu().numpy()
    numbers = dict(zip(values, found.T, strict=True))
    return pd.DataFrame(
        {"edit": edit, "kind": kind, "relation": relation} | places | {"z_target": z[i], "z_source": z[j]} | numbers
    )
