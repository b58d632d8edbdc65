"""`polarity_protocols`: signed and unsigned SAEs on planted antipodal pairs."""

import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch

from diagnostics.polarity.anomalies import components, detected, error_detected, random_directions, strongest_latents
from diagnostics.polarity.matching import match, reconstruction
from diagnostics.polarity.planted import Planted, least_cosine, spread_directions
from diagnostics.polarity.result import Polarity
from diagnostics.polarity.training import SIGNED, UNSIGNED, Settings, trained, width
from diagnostics.results.calls import recorded
from diagnostics.sampling.tokens import generator
from interventions.errors import ResultError
from interventions.models.loading import resolve_device
from interventions.progress import Progressing, followed
from interventions.provenance import processor, versions
from interventions.sites import several

SELECTORS = (*SIGNED, *UNSIGNED)
DIAL = 1.0
"""Pairs ÷ d_model of protocols A and B: orthogonal directions, no superposition."""


@recorded
@torch.no_grad()
def polarity_protocols(
    *,
    d_model: int = 24,
    active: float = 3.0,
    noise: float = 0.03,
    rhos: float | Sequence[float] = (-1.0, -0.5, 0.0),
    superpositions: float | Sequence[float] = (1.0, 1.5, 2.0),
    budgets: int | Sequence[int] = (3, 6, 12, 24),
    ks: int | Sequence[int] = (2, 3, 4),
    l1s: float | Sequence[float] = (1.2, 0.9, 0.6),
    steps: int = 400,
    batch: int = 256,
    test_rows: int = 4000,
    seeds: int = 3,
    seed: int = 0,
    device: str | None = "cpu",
    progress: Progressing = None,
) -> Polarity:
    """Protocols A (polarity dial), B (directional anomalies) and C (toy geometry) of arXiv:2605.28149: our reconstruction.

    The data are planted antipodal pairs (`Planted`), no model's. SAEs with signed latents (abstopk, signed_gated_tied), a latent a
    pair, are compared with unsigned ones (topk, gated), a latent a polarity, trained on the same rows.

    A: as many pairs as dimensions, every ρ and sparsity: share of variance not explained against L0, and `Matched.slope`.

    B: half the pairs take + alone in training. Detect rows in which one of them takes −, against the same rows with +, by
    `deviation` of m latents (largest mean |z|), beside m principal components, m random directions, and ‖x − x̂‖.

    C: share of pairs that one latent represents (`Matched`), against pairs/d_model and ρ, at the middle sparsity; signed SAEs alone
    (an unsigned latent cannot represent two polarities).

    active: mean number of active pairs a row. noise: standard deviation a coordinate. rhos: within-pair correlations, −1 to 0.
    superpositions: pairs ÷ d_model. budgets: numbers m. ks, l1s: sparsities of topk and abstopk, and of the gates.
    batch, test_rows: rows a step, and rows that are measured. seeds: of directions, rows and first weights; no interval is formed over
    them. Raises `ResultError` for settings outside these ranges.
    """
    ks, l1s = several(ks), several(l1s)
    settings = Settings(d_model, active, noise, ks, l1s, steps, batch, test_rows, seed)
    rhos, superpositions = tuple(dict.fromkeys(several(rhos))), tuple(dict.fromkeys(several(superpositions)))
    budgets = tuple(dict.fromkeys(several(budgets)))
    _check(settings, rhos, superpositions, budgets, seeds)
    where = resolve_device(device)
    work = _Work(settings, where)
    grid = [(s, rho, i) for i in range(seeds) for s in dict.fromkeys((DIAL, *superpositions)) for rho in rhos]
    total = sum(len(work.asked(s)) for s, _, _ in grid) + len(SELECTORS) * seeds
    with followed(progress, "training SAEs", "step") as told:
        stepped = (lambda: None) if told is None else (lambda: told(1, total * steps))
        rows = [line for s, rho, i in grid for line in work.geometry(s, rho, i, stepped)]
        anomalies = [line for i in range(seeds) for line in work.anomalies(budgets, i, stepped)]
    provenance = {
        "planted": f"antipodal pairs in {d_model} dimensions",
        "seed": seed,
        "seeds": seeds,
        "settings": {
            "d_model": d_model, "active": active, "noise": noise, "rhos": list(rhos), "superpositions": list(superpositions),
            "budgets": list(budgets), "ks": list(ks), "l1s": list(l1s), "steps": steps, "batch": batch, "test_rows": test_rows,
        },
        "middle": {selector: settings.middle(selector) for selector in SELECTORS},
        "device": where.type,
        "processor": processor(where),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
    }  # fmt: skip
    return Polarity(pd.DataFrame(rows), provenance, pd.DataFrame(anomalies))


def _check(
    settings: Settings,
    rhos: Sequence[float],
    superpositions: Sequence[float],
    budgets: Sequence[int],
    seeds: int,
) -> None:
    settings.check()
    d_model, pairs = settings.d_model, [round(s * settings.d_model) for s in superpositions]
    if not rhos or not all(-1 <= rho <= 0 for rho in rhos):
        raise ResultError(f"rhos {rhos}; expected correlations from -1 to 0")
    if not superpositions or not all(n >= 2 for n in pairs):
        raise ResultError(f"superpositions {superpositions} of {d_model} dimensions; expected two pairs or more each")
    if not 0 < settings.active <= min(*pairs, d_model):
        raise ResultError(f"active {settings.active}; expected a number of pairs above 0, up to {min(*pairs, d_model)}")
    if not budgets or not all(1 <= m <= d_model for m in budgets):
        raise ResultError(f"budgets {budgets}; expected numbers of latents from 1 to d_model, {d_model}")
    if seeds < 1 or settings.seed < 0:
        raise ResultError(f"seeds {seeds}, seed {settings.seed}; expected at least one, from 0 on")


class _Work:
    """The conditions: each trains its SAEs on its own stream and measures them on other rows."""

    def __init__(self, settings: Settings, device: torch.device):
        self.settings, self.device = settings, device

    def asked(self, superposition: float) -> list[tuple[str, float]]:
        """What is trained: the whole sweep of every selector for the dial; elsewhere signed SAEs at the middle sparsity."""
        settings = self.settings
        if superposition == DIAL:
            return [(selector, s) for selector in SELECTORS for s in dict.fromkeys(settings.sparsities(selector))]
        return [(selector, settings.middle(selector)) for selector in SIGNED]

    def geometry(
        self, superposition: float, rho: float, seed: int, stepped: Callable[[], object]
    ) -> Iterator[dict[str, Any]]:
        """Lines of protocols A and C for one condition."""
        pairs = round(superposition * self.settings.d_model)
        planted, stream = self._planted(pairs, rho, seed, "geometry")
        saes = trained(planted, self.asked(superposition), self.settings, self.settings.seed + seed, stream, stepped)
        test = planted.draw(self.settings.test_rows, stream)
        if not bool(test.alone.any(dim=0).all()):
            raise ResultError(
                f"a polarity of {pairs} pairs is never on alone in {len(test.x)} test rows; raise test_rows or active"
            )
        for (selector, sparsity), sae in saes.items():
            l0, error = reconstruction(sae, test)
            found = match(sae, planted, test)
            plus, minus = found.slopes()
            yield {
                "superposition": superposition, "pairs": pairs, "least_cosine": least_cosine(pairs, self.settings.d_model), "rho": rho,
                "seed": seed, "selector": selector, "latents": width(selector, pairs), "sparsity": sparsity, "l0": l0, "error": error,
                "represented": found.recovered, "consolidated": found.consolidated, "slope_plus": plus, "slope_minus": minus,
            }  # fmt: skip

    def anomalies(self, budgets: Sequence[int], seed: int, stepped: Callable[[], object]) -> Iterator[dict[str, Any]]:
        """Lines of protocol B for one seed."""
        settings, d_model = self.settings, self.settings.d_model
        planted, stream = self._planted(d_model, -1.0, seed, "anomalies", one_sided=d_model // 2)
        asked = [(selector, settings.middle(selector)) for selector in SELECTORS]
        saes = trained(planted, asked, settings, settings.seed + seed, stream, stepped)
        usual, pair = planted.draw(settings.test_rows, stream), planted.turned(settings.test_rows, stream)
        controls = {
            "pca": lambda m: components(usual, m),
            "random": lambda m: random_directions(d_model, m, stream),
        }
        reads = {selector: (lambda m, sae=sae: strongest_latents(sae, usual, m)) for (selector, _), sae in saes.items()}
        for name, read in (reads | controls).items():
            for m in budgets:
                score = detected(read(m), usual, pair)
                yield {"seed": seed, "read": name, "score": "deviation", "m": m, "auroc": score}
        for (selector, _), sae in saes.items():
            m, score = width(selector, d_model), error_detected(sae, pair)
            yield {"seed": seed, "read": selector, "score": "error", "m": m, "auroc": score}

    def _planted(
        self, pairs: int, rho: float, seed: int, what: str, one_sided: int = 0
    ) -> tuple[Planted, torch.Generator]:
        settings = self.settings
        directions = spread_directions(
            pairs, settings.d_model, generator(settings.seed, "polarity directions", seed, pairs)
        )
        stream = generator(settings.seed, f"polarity {what}", seed, pairs, rho)
        return Planted(directions.to(self.device), settings.active, rho, settings.noise, one_sided), stream
