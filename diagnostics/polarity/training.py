"""The SAEs of the protocols: trained side by side on one stream of planted rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diagnostics.polarity.planted import Planted
from interventions.errors import ResultError
from sae_models.architectures import SELECTORS, Architecture
from sae_models.sae import SAE
from sae_models.training.recipe import Recipe
from sae_models.training.trainer import SAETraining

SIGNED, UNSIGNED = ("abstopk", "signed_gated_tied"), ("topk", "gated")
"""Selectors with signed latents, each beside its unsigned counterpart."""
_SAMPLE, _LR, _WARM_UP = 1024, 2e-2, 0.5


@dataclass(frozen=True)
class Settings:
    """How the SAEs are trained. Signed SAEs have a latent a pair, unsigned ones a latent a polarity: as many half-lines."""

    d_model: int
    active: float
    noise: float
    ks: tuple[int, ...]
    """of topk and abstopk"""
    l1s: tuple[float, ...]
    """of the gates"""
    steps: int
    batch: int
    test_rows: int
    seed: int

    def check(self) -> None:
        """Raise `ResultError` for settings that cannot be trained."""
        if self.d_model < 2 or min(self.steps, self.batch) < 1 or self.test_rows < 2:
            raise ResultError(
                f"d_model {self.d_model}, steps {self.steps}, batch {self.batch}, test_rows {self.test_rows}; expected at least 2, 1, 1, 2"
            )
        if not self.noise >= 0:
            raise ResultError(f"noise {self.noise}; expected a standard deviation, 0 or more")
        if not (self.ks and self.l1s):
            raise ResultError("no sparsity; expected at least one in ks and one in l1s")
        if not all(1 <= k <= self.d_model for k in self.ks) or not all(l1 > 0 for l1 in self.l1s):
            raise ResultError(
                f"ks {self.ks}, l1s {self.l1s}; expected numbers of latents from 1 to {self.d_model}, and positive weights"
            )

    def sparsities(self, selector: str) -> tuple[float, ...]:
        """The sweep of a selector: k, or the weight of the penalty."""
        return self.ks if SELECTORS[selector] == "k" else self.l1s

    def middle(self, selector: str) -> float:
        """The sparsity at which protocols B and C measure: the middle of the sweep as it is given."""
        some = self.sparsities(selector)
        return some[len(some) // 2]


def width(selector: str, pairs: int) -> int:
    """Number of latents: one a pair where they are signed, else one a polarity."""
    return pairs if selector in SIGNED else 2 * pairs


def trained(
    planted: Planted,
    asked: Sequence[tuple[str, float]],
    settings: Settings,
    seed: int,
    stream: torch.Generator,
    stepped: Callable[[], object],
) -> dict[tuple[str, float], SAE]:
    """An SAE for each selector and sparsity, all from the same rows. seed: of the first weights. stepped: called after each step of each."""
    start = planted.draw(_SAMPLE, stream).x
    runs = {}
    for selector, sparsity in asked:
        counts = SELECTORS[selector] == "k"
        recipe = Recipe(
            width(selector, len(planted.directions)),
            k=sparsity if counts else 1,
            l1=0.0 if counts else sparsity,
            lr=_LR,
            penalty_warm_up=_WARM_UP,
            dead_window=0.5,
            seed=seed,
        )
        runs[selector, sparsity] = SAETraining(Architecture(selector=selector), recipe, start, steps=settings.steps)
    with torch.enable_grad():
        for _ in range(settings.steps):
            x = planted.draw(settings.batch, stream).x
            for run in runs.values():
                run.step(x)
                stepped()
    for run in runs.values():
        run.metrics()  # raises where the loss is not finite
    return {which: run.sae.requires_grad_(False).eval() for which, run in runs.items()}
