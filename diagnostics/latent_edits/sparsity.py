"""How widely does taking one latent away spread over the vocabulary and the tokens that follow?

For numbers drawn from a normal distribution the measure is 2/π = 64 % whatever their number, and rounding errors look like that too:
so every edit's size stands beside it, with that of putting the token back as it was.
"""

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

from diagnostics.latent_edits.bench import LatentEdits, repeated
from diagnostics.latent_edits.firings import Firings, chosen_latents
from diagnostics.latent_edits.items import Items, asked_latents, check_numbers
from diagnostics.latent_edits.run import run_latent_edits
from diagnostics.results.calls import recorded
from diagnostics.results.headlines import Headline, beside_null
from diagnostics.results.result import Result
from diagnostics.running.clean import CleanActivations
from diagnostics.sampling.tokens import hash_keys
from diagnostics.statistics.measures import median_ratio
from diagnostics.statistics.tables import PLACEBOS, columns_of, few_prompts, lines_of, mean_of, median_of, totals, where
from interventions.edits import matched_placebo
from interventions.logit_changes import kl_of
from interventions.progress import Progressing
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary

EDITS = ("latent", "channel", *PLACEBOS, "self")
"""latent: −z_i·d_i; channel: one coordinate of the stream drawn at random, set to its mean over the usable tokens; placebos: random edits of the
latent's norm and angle; self: nothing."""
CLEAR = 10.0
"""Times the largest change by `self` that an edit's L2 must have to enter the means."""
COLUMNS = (
    "sae", "layer", "point", "target_prompt", "target_position", "latent", "z", "edit", "channel", "delta_norm", "sparsity", "l1", "l2",
    "kl_at_0",
)  # fmt: skip
"""Of the table; one kl_at_j for each token of the horizon. sparsity: (L1/L2)²/(V·T); l1, l2: of the median-centred changes of the logits
over V tokens of the vocabulary and T positions. channel: which coordinate, else −1."""
NOTE = (
    "sparsity: mean over latents' tokens of (L1/L2)²/(V·T), of rows whose L2 is clear of rounding; 64 % is what normal numbers give. "
    "KL: median; beyond the token: median share of the KL of all T positions that falls beyond the edited one. Intervals: 95 %, over prompts"
)


@dataclass(frozen=True)
class AblationSparsity(Result):
    """How sparse the effects of ablations are, row by row; see `COLUMNS`."""

    NAME: ClassVar[str] = "ablation_sparsity"
    TITLE: ClassVar[str] = "Sparsity of effects"
    QUESTION: ClassVar[str] = "How many logits, and how many later tokens, does an ablation reach?"
    NOTE: ClassVar[str] = NOTE

    def clear(self, sae: str, edit: str) -> tuple[pd.DataFrame, int]:
        """The lines of an SAE and edit that are clear of rounding, and how many are not."""
        floor = CLEAR * float(lines_of(self.frame, sae=sae, edit="self")["l2"].max())
        lines = lines_of(self.frame, sae=sae, edit=edit)
        good = lines["l2"].to_numpy(float) > (floor if np.isfinite(floor) else 0.0)
        return where(lines, good & lines["sparsity"].notna().to_numpy()), int((~good).sum())

    @cached_property
    @few_prompts()
    def groups(self) -> list[dict[str, Any]]:
        """Means (of KLs medians) of each SAE and edit, with their intervals."""
        horizon = [f"kl_at_{j}" for j in range(self.provenance["horizon"])]
        found = []
        for sae in self.saes:
            for edit in EDITS[:-1]:
                lines, lost = self.clear(sae, edit)
                if not len(lines):
                    continue
                lines, prompt = lines.assign(all=lines[horizon].sum(axis=1)), lines["target_prompt"].to_numpy()
                after = lines["all"].to_numpy() - lines["kl_at_0"].to_numpy()
                found.append(
                    {"sae": sae, "edit": edit, "rows": len(lines), "within rounding": lost,
                     "sparsity": mean_of(lines, "sparsity"),
                     "dose": mean_of(lines, "delta_norm"),
                     "KL": median_of(lines, "all"),
                     "beyond the token": median_ratio(np.maximum(after, 0), lines["all"].to_numpy(), 0.0, prompt)}
                )  # fmt: skip
        return found

    def by_latent(self) -> pd.DataFrame:
        """One line a latent: mean sparsity and KL of its ablation, and of its placebos, with their number of tokens."""
        parts = {(sae, edit): self.clear(sae, edit)[0] for sae in self.saes for edit in ("latent", *PLACEBOS)}
        table = pd.concat(list(parts.values()))
        means = table.pivot_table(
            index=["sae", "latent"], columns="edit", values=["sparsity", "kl_at_0"], aggfunc="mean"
        )
        means.columns = [f"{what}_{edit}" for what, edit in means.columns]
        tokens = totals(lines_of(table, edit="latent").assign(tokens=1), ["sae", "latent"], ["tokens"])
        return means.join(tokens, how="inner").reset_index()

    @few_prompts()
    def horizon(self, sae: str, edit: str) -> pd.DataFrame:
        """Median KL at each position of the horizon, nats, with its interval."""
        lines = self.clear(sae, edit)[0]
        found = [median_of(lines, f"kl_at_{j}") for j in range(self.provenance["horizon"])]
        return pd.DataFrame({"position": range(len(found))} | columns_of(found))

    def headlines(self) -> Iterable[Headline]:
        """Of each SAE, the share of logits that an ablation reaches, beside its placebo's."""
        return beside_null(
            self.groups, "sparsity", "share of logits that an ablation reaches", lambda g: g["edit"] == "latent",
            lambda g: g["edit"] == "placebo_token", "its placebo",
        )  # fmt: skip

    def plot(self) -> Any:
        """Sparsity by edit, and KL along the horizon. Returns a matplotlib Figure."""
        from diagnostics.latent_edits.figures import plot_sparsity

        keys = [(g["sae"], g["edit"]) for g in self.groups]
        clear = {key: self.clear(*key)[0] for key in keys}
        return plot_sparsity(self.groups, clear, {key: self.horizon(*key) for key in keys}, self.provenance)


@recorded
@torch.no_grad()
def ablation_sparsity(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    latents: int | Sequence[int] = 50,
    tokens_per_latent: int = 4,
    horizon: int = 16,
    min_active: int = 2,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> AblationSparsity:
    """Take one latent away at one position and read the logits there and at the T − 1 positions after it.

        Δ [T, V] = ℓ(x − z_i d_i) − ℓ(x), less its median over the vocabulary;   sparsity = (‖Δ‖₁/‖Δ‖₂)²/(V·T)

    1 when every logit changes by the same amount (but for the sign), 1/(V·T) when one changes. latents: how many (those active on
    `min_active` tokens with room for the horizon, all equally likely) or which; tokens_per_latent tokens where each is active.
    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for invalid settings. Source:
    arXiv:2406.04093 (latents 10–14 %, channels of the residual stream about 60 %); the placebos and the floor are ours.
    """
    check_numbers(tokens_per_latent=tokens_per_latent, horizon=horizon, min_active=min_active)
    asked = asked_latents(latents)

    def choose(clean: CleanActivations, dictionary: Dictionary, firings: Firings) -> Items:
        room = firings.position + horizon <= clean.length[firings.prompt]
        near = firings.among(room)
        drawn = chosen_latents(near, asked, clean.settings.seed, dictionary, min_active)
        table = near.some(drawn, tokens_per_latent, clean.settings.seed, f"sparsity/{dictionary.label}")
        key = hash_keys(
            clean.settings.seed,
            "channel",
            *(table[c].to_numpy() for c in ("target_prompt", "target_position", "latent")),
        )
        table["channel"] = (key % np.uint64(clean.model.d_model)).astype(np.int64)
        said = {
            "latents": len(drawn),
            "rows": len(table),
            f"usable tokens without {horizon} positions from there on": int((~room).sum()),
        }
        return Items(table, said)

    def compute(bench: LatentEdits, items: pd.DataFrame) -> pd.DataFrame:
        x = bench.clean.at(bench.dictionary.site, *bench.clean.tokens)
        mean = (x if x.dtype == torch.float64 else x.float()).mean(0)
        rows = len(EDITS) * horizon
        return pd.concat([_ablated(bench, some, mean, horizon) for some in bench.batches(items, rows)])

    own = {"latents": asked, "tokens_per_latent": tokens_per_latent, "horizon": horizon, "min_active": min_active}
    return run_latent_edits(
        AblationSparsity, model, prompts, saes, choose, compute, own, ("kl_at_0", "l2", "delta_norm"),
        sink_filter=sink_filter, seed=seed, path=path, folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def sparsity(change: Float[Tensor, "row pos vocab"]) -> dict[str, Float[Tensor, "row"]]:
    """`sparsity`, `l1` and `l2` of changes of logits, median-centred over the vocabulary; sparsity is nan where nothing changes."""
    change = (change - change.median(dim=-1, keepdim=True).values).flatten(1)
    l1, l2 = change.abs().sum(1, dtype=torch.float64), change.norm(dim=1, dtype=torch.float64)
    return {"sparsity": torch.where(l2 > 0, (l1 / l2) ** 2 / change.shape[1], torch.nan), "l1": l1, "l2": l2}


def _ablated(bench: LatentEdits, items: pd.DataFrame, mean: Float[Tensor, "d_model"], horizon: int) -> pd.DataFrame:
    x = bench.x(items)
    latent, channel = (bench.column(items, name) for name in ("latent", "channel"))
    z = torch.from_numpy(items["z"].to_numpy(copy=True)).to(x)
    removed = x - z[:, None] * bench.sae.W_dec[latent].to(x)
    edited = [removed, x.scatter(1, channel[:, None], mean[channel][:, None])]
    edited += [matched_placebo(x, removed, bench.towards(kind, items, 1, "sparsity")[:, 0]) for kind in PLACEBOS]
    vectors = torch.stack([*edited, x], dim=1)
    change = bench.logits(items, vectors, horizon).view(len(items), len(EDITS), horizon, -1)
    clean = torch.stack([bench.clean_logits(items, ahead=j) for j in range(horizon)], dim=1)
    change -= clean[:, None]
    found = sparsity(change.flatten(0, 1))
    kl = torch.stack([
        torch.stack([kl_of(clean[i, j], change[i, :, j]) for j in range(horizon)], dim=1) for i in range(len(items))
    ]).flatten(0, 1)  # fmt: skip
    n = len(EDITS)
    table = repeated(items, n)
    table["edit"] = np.tile(EDITS, len(items))
    table["channel"] = table["channel"].where(table["edit"] == "channel", -1)
    table["delta_norm"] = bench.dose(x, vectors).flatten().cpu().numpy()
    for name, value in found.items():
        table[name] = value.cpu().numpy()
    for j, column in enumerate(kl.T.cpu().numpy()):
        table[f"kl_at_{j}"] = column
    bench.tick(len(items))
    return table
