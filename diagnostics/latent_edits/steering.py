"""What happens as a latent's direction is added more and more strongly: alone, with a partner, and in a random direction instead."""

from collections.abc import Iterable, Mapping, Sequence
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

from diagnostics.latent_edits.bench import LatentEdits, parts, repeated
from diagnostics.latent_edits.choices import COEFFICIENTS
from diagnostics.latent_edits.firings import Firings, chosen_latents, partner_of
from diagnostics.latent_edits.items import Items, asked_latents, check_numbers, token_items
from diagnostics.latent_edits.run import run_latent_edits
from diagnostics.latent_edits.steering_summary import NOTE, first_numbers, means, peaks
from diagnostics.results.calls import recorded
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.running.clean import CleanActivations
from diagnostics.statistics.tables import PLACEBOS
from interventions.direct_logits import direct_logits
from interventions.edits import matched_placebo
from interventions.errors import ResultError
from interventions.metrics import Probability, Rank, TokenMetric, centred_logits, entropy
from interventions.progress import Progressing
from interventions.sites import several
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary

STEERED = ("single", "partner", "joint")
CONDITIONS = (*STEERED, *(f"{edit}_{kind}" for edit in ("single", "joint") for kind in PLACEBOS))
"""single, partner: one latent; joint: both. Placebos: a random edit of the same norm and angle as the single, the joint one, in one
random plane for all coefficients of a token."""
UNITS = ("activation", "norm")
"""Of coefficients: the latent's typical activation (mean |z| where active), or ‖x‖ of the token."""
COLUMNS = (
    "sae", "layer", "point", "target_prompt", "target_position", "latent", "partner", "target_token", "condition", "coefficient",
    "delta_norm", "norm", "kl", "logit", "logit_change", "probability", "clean_probability", "rank", "clean_rank", "entropy",
    "clean_entropy",
)  # fmt: skip
"""Of the table. target_token: whose logit (less the vocabulary's mean), probability and rank (0: most likely) are followed; entropy of
the steered next-token distribution, nats; norm: ‖x‖ before the edit."""


@dataclass(frozen=True, eq=False)
class _CentredLogit(TokenMetric):
    """The logit of a token less the mean over the vocabulary."""

    name: str = "logit"

    def _of(self, logits: Tensor, rows: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        return self._at(centred_logits(logits), self.tokens, rows)[:, 0]


@dataclass(frozen=True, eq=False)
class _Entropy(TokenMetric):
    """Entropy of the next-token distribution, whichever tokens are given."""

    name: str = "entropy"

    def _of(self, logits: Tensor, rows: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        return entropy(logits)


@dataclass(frozen=True)
class Steering(Result):
    """Effects of adding latents, coefficient by coefficient. The table has a line for each latent × token × condition × coefficient;
    see `COLUMNS`."""

    NAME: ClassVar[str] = "latent_steering"
    TITLE: ClassVar[str] = "Steering"
    QUESTION: ClassVar[str] = "What do latents do that are added more and more strongly, alone and jointly?"
    NOTE: ClassVar[str] = NOTE

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Means of each SAE, condition and coefficient, with their intervals."""
        return means(self.frame)

    def peaks(self) -> pd.DataFrame:
        """Of each SAE and condition: where the target's mean probability is largest, and whether it falls again beyond (`peaks`)."""
        return peaks(self.frame)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"peaks": self.peaks().to_dict("records")}

    def tables(self) -> dict[str, pd.DataFrame]:
        """The peaks and the means."""
        return {"peaks": self.peaks(), "means": pd.DataFrame(self.groups)}

    def headlines(self) -> Iterable[Headline]:
        """The rise of the target's probability at its peak, beside the placebo's."""
        return first_numbers(self.peaks())

    def plot(self) -> Any:
        """KL, target and entropy against the dose. Returns a matplotlib Figure."""
        from diagnostics.latent_edits.figures import plot_steering

        return plot_steering(self.frame, self.provenance)


@recorded
@torch.no_grad()
def latent_steering(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    latents: int | Sequence[int] = 16,
    partners: Mapping[int, int] | None = None,
    targets: Mapping[int, int] | None = None,
    n_tokens: int = 24,
    coefficients: float | Sequence[float] = COEFFICIENTS,
    unit: str = "activation",
    min_active: int = 10,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> Steering:
    """Add c times a latent's direction at single tokens, alone, with a partner, and at random instead.

        single  x + c·s_i·d_i       partner  x + c·s_j·d_j       joint  x + c·(s_i·d_i + s_j·d_j)
        s_i: mean |z_i| where active, with the sign that the latent mostly has; unit "norm": ‖x‖/‖d_i‖, with that sign

    latents: how many (drawn among those active on `min_active` usable tokens, all equally likely) or which; each at the same
    `n_tokens` tokens, drawn whether or not the latent is active there. partners: of each latent (default: the one most often active
    with it). targets: the token followed for each latent (default: see `NOTE`); the pair's is the latent's. One position is steered,
    and the next token read there.
    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for invalid settings. Source: sweep
    crossed with the joint condition after arXiv:2605.03160; our reconstruction.
    """
    coefficients = [float(c) for c in several(coefficients)]
    check_numbers(n_tokens=n_tokens, min_active=min_active)
    check_coefficients(coefficients)
    if unit not in UNITS:
        raise ResultError(f"unit {unit!r}; known: {', '.join(UNITS)}")
    asked = asked_latents(latents)

    def choose(clean: CleanActivations, dictionary: Dictionary, firings: Firings) -> Items:
        tokens = token_items(clean, firings, n_tokens)
        drawn = chosen_latents(firings, asked, clean.settings.seed, dictionary, min_active)
        found = {
            i: partner_of(firings, i) if partners is None or i not in partners else partners[i] for i in drawn.tolist()
        }
        alone = [i for i, j in found.items() if j < 0]
        pairs = pd.DataFrame([(i, j) for i, j in found.items() if j >= 0], columns=["latent", "partner"])
        if not len(pairs):
            raise ResultError(f"no latent of {dictionary.name} is ever active with another; give partners")
        raised = _raised(clean, dictionary, firings, pairs["latent"].to_numpy(np.int64, copy=True))
        pairs["target_token"] = [
            (targets or {}).get(i, own) for i, own in zip(pairs["latent"].tolist(), raised, strict=True)
        ]
        said = {
            "latents": pairs["latent"].tolist(),
            "without a partner": alone,
            "latents that fire often enough": int((firings.count >= min_active).sum()),
        }
        return Items(tokens.table.merge(pairs, how="cross"), tokens.said | said)

    def compute(bench: LatentEdits, items: pd.DataFrame) -> pd.DataFrame:
        size = max(1, 512 // (len(CONDITIONS) * len(coefficients)))
        return pd.concat([_swept(bench, part, coefficients, unit) for part in parts(items, size)])

    own = {
        "latents": asked, "n_tokens": n_tokens, "coefficients": coefficients, "unit": unit, "min_active": min_active,
        "partners": partners and dict(partners), "targets": targets and dict(targets),
    }  # fmt: skip
    return run_latent_edits(
        Steering, model, prompts, saes, choose, compute, own, ("kl", "logit", "entropy"),
        sink_filter=sink_filter, seed=seed, path=path, folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def check_coefficients(coefficients: Sequence[float]) -> None:
    """Raise `ResultError` unless there are some, finite, each once."""
    if not coefficients or len(set(coefficients)) < len(coefficients) or not all(np.isfinite(coefficients)):
        raise ResultError(f"coefficients {list(coefficients)}; expected one or more, finite, each once")


def _raised(
    clean: CleanActivations, dictionary: Dictionary, firings: Firings, latents: Int[ndarray, "latent"]
) -> list[int]:
    """The token that each latent raises most by itself (see `direct_logits`)."""
    sign = torch.from_numpy(np.sign(firings.typical[latents])).to(dictionary.directions)
    return direct_logits(clean.recording(0), sign[:, None] * dictionary.directions[latents], 1.0).argmax(1).tolist()


def _swept(bench: LatentEdits, items: pd.DataFrame, coefficients: list[float], unit: str) -> pd.DataFrame:
    x = bench.x(items)
    c = torch.tensor(coefficients, device=x.device, dtype=x.dtype)
    step = {name: _step(bench, x, items[column].to_numpy(np.int64, copy=True), unit)
            for name, column in (("single", "latent"), ("partner", "partner"))}  # fmt: skip
    step["joint"] = step["single"] + step["partner"]
    x_c = x[:, None].expand(-1, len(c), -1)
    edited = {name: x_c + c[:, None] * delta[:, None] for name, delta in step.items()}
    for name in ("single", "joint"):
        for kind in PLACEBOS:
            towards = bench.towards(kind, items, 1, f"steering/{name}")
            edited[f"{name}_{kind}"] = matched_placebo(x_c, edited[name], towards.expand_as(x_c))
    vectors = torch.cat([edited[name] for name in CONDITIONS], dim=1)
    n = vectors.shape[1]
    target = torch.from_numpy(items["target_token"].to_numpy(np.int64).repeat(n))[:, None]
    metrics = ("kl", _CentredLogit(target), Probability(target), Rank(target), _Entropy(target))
    effects = bench.measured(items, vectors, metrics)
    table = repeated(items, n)
    table["condition"] = np.tile(np.repeat(CONDITIONS, len(c)), len(items))
    table["coefficient"] = np.tile(coefficients, len(items) * len(CONDITIONS))
    table["delta_norm"] = bench.dose(x, vectors).flatten().cpu().numpy()
    table["norm"] = x.norm(dim=-1).cpu().numpy().repeat(n)
    for name in ("kl", "logit", "probability", "clean_probability", "rank", "clean_rank", "entropy", "clean_entropy"):
        table[name] = effects[name].numpy()
    table["logit_change"] = table["logit"] - effects["clean_logit"].numpy()
    bench.tick(len(items))
    return table


def _step(bench: LatentEdits, x: Tensor, latents: Int[ndarray, "item"], unit: str) -> Float[Tensor, "item d_model"]:
    """What coefficient 1 adds."""
    d = bench.sae.W_dec[torch.from_numpy(latents).to(x.device)].to(x)
    typical = torch.from_numpy(bench.firings.typical[latents]).to(x)[:, None]
    if unit == "activation":
        return typical * d
    return typical.sign() * x.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(d, dim=1)
