"""Settings that runs of single edits share, and the clean activations that they read."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diagnostics.running.recordings import CACHE_BYTES, Recordings, shards
from diagnostics.sampling.tokens import Pairs, TokenFilter, token_filter
from interventions.edits import norm
from interventions.errors import ResultError
from interventions.models.anatomy import check_site
from interventions.models.causal_model import CausalModel
from interventions.recording import Recording
from interventions.replaying.rows import Horizon
from interventions.sites import INSIDE, POINTS, Site, as_sites, several
from interventions.texts.prompts import Prompts

CONTEXTS = ("in_place", "single_token")
"""`in_place`: the token's own prompt and position. `single_token`: the vector as the only token, id 0, as in the paper."""
METRICS = ("kl", "js", "clean_entropy", "top1_changed", "kl_direct")


def default_layers(n: int) -> list[int]:
    """Six blocks from the first to the last."""
    return sorted({0, n // 4, n // 2, 3 * n // 4, max(n - 2, 0), n - 1})


def chosen_sites(model: CausalModel, layers: Any, sites: Any) -> tuple[Site, ...]:
    """The sites given, each once; points (default: `resid_post`) at every layer given, or at six blocks.

    Raises `ResultError` for layers beside sites that name their own.
    """
    given = ("resid_post",) if sites is None else several(sites)
    if layers is not None and not any(isinstance(site, str) and site in (*POINTS, *INSIDE) for site in given):
        raise ResultError("layers and sites both given; give one of them, or points such as sites='mlp_out'")
    return as_sites(given, default_layers(model.n_layers) if layers is None else several(layers))


def chosen_contexts(context: str) -> tuple[str, ...]:
    """One of `CONTEXTS`, or both."""
    return CONTEXTS if context == "both" else (context,)


@dataclass(frozen=True)
class RunSettings:
    """What runs of single edits have in common; part of their identity."""

    sites: tuple[Site, ...]
    contexts: tuple[str, ...] = ("in_place",)
    horizon: Horizon = 1
    sink_filter: float | None = 10.0
    seed: int = 0
    null_seeds: int = 0
    """randomly initialised models of the same configuration"""
    batch_rows: int | None = None
    path: str = "auto"
    cache_bytes: int = CACHE_BYTES
    """keys and values kept at once; beyond that prompts are recorded again"""
    metrics: tuple[str, ...] = METRICS

    def identity(self) -> dict[str, Any]:
        """The settings that numbers depend on."""
        return {name: value for name, value in vars(self).items() if name != "cache_bytes"}

    def check(self, model: CausalModel) -> None:
        """Raise `SiteError` for a site that the model does not have, `ResultError` for other invalid settings."""
        if not self.sites:
            raise ResultError("no site; give at least one layer")
        for site in self.sites:
            check_site(model, site)
        if wrong := [context for context in self.contexts if context not in CONTEXTS]:
            raise ResultError(f"no context {wrong[0]!r}; known: {', '.join(CONTEXTS)}, both")
        if not (self.horizon == "last" or (isinstance(self.horizon, int) and self.horizon >= 1)):
            raise ResultError(f"horizon {self.horizon!r}; expected a number of positions, 1 or more, or 'last'")
        if self.horizon != 1 and "single_token" in self.contexts:
            raise ResultError(
                "a single token has no later positions; use context in_place with a horizon above 1, or horizon 1"
            )
        if self.null_seeds < 0:
            raise ResultError(f"{self.null_seeds} randomly initialised models; expected 0 or more")


class CleanActivations:
    """One model's clean activations at the sites of a run, and which tokens may be edited."""

    def __init__(self, model: CausalModel, prompts: Prompts, settings: RunSettings):
        self.model, self.prompts, self.settings = model, prompts, settings
        self.length = np.array([len(tokens) for tokens in prompts.tokens])
        self.shards = shards(len(self.length))
        self._recordings = Recordings(model, prompts.tokens, settings.sites, settings.cache_bytes)
        parts = self._recordings.activations()
        self.activations = {site: _joined([part[site] for part in parts]) for site in settings.sites}
        self.special = np.zeros((len(self.length), self.length.max()), dtype=bool)
        for row, flags in zip(self.special, prompts.special, strict=True):
            row[: len(flags)] = flags
        self.filter: TokenFilter = token_filter(
            list(self.activations.values()), self.length, self.special, settings.sink_filter
        )
        self.usable = self.filter.usable
        self.tokens = np.nonzero(self.usable)
        self.norm_of_median = self._norm_of_median()

    def filter_at(self, site: Site) -> TokenFilter:
        """Which tokens are left out at one site, whatever other sites the run has."""
        return token_filter([self.activations[site]], self.length, self.special, self.settings.sink_filter)

    def recording(self, number: int) -> Recording:
        """The recording of a shard, with keys and values: see `Recordings`."""
        return self._recordings[number]

    def at(self, site: Site, prompt: np.ndarray, position: np.ndarray) -> Tensor:
        """Clean activations of single tokens, `[row, d_model]`."""
        x = self.activations[site]
        return x[torch.from_numpy(prompt).to(x.device), torch.from_numpy(position).to(x.device)]

    def pair_norm_of_median(self, pairs: Pairs) -> np.ndarray:
        """The larger `norm_of_median` of each pair's two tokens, `[pair]`."""
        largest = self.norm_of_median
        target = largest[pairs.target_prompt, pairs.target_position]
        return np.maximum(target, largest[pairs.source_prompt, pairs.source_position])

    def between(self, site: Site, n: int, stream: torch.Generator, chosen: np.ndarray) -> Tensor:
        """Differences of two random usable tokens' activations: of `n` drawn from the stream those `chosen`, `[chosen, d_model]`."""
        prompt, position = self.tokens
        two = torch.randint(len(prompt), (2, n), generator=stream).numpy()
        two[1] = np.where(two[0] == two[1], (two[1] + 1) % len(prompt), two[1])  # another token
        one, other = (self.at(site, prompt[i], position[i]).float() for i in two[:, chosen])
        return one - other

    def _norm_of_median(self) -> np.ndarray:
        """‖x‖ over the site's median, the largest over sites, `[prompt, pos]`: what the sink filter looks at."""
        largest = np.zeros(self.usable.shape)
        inside = np.arange(self.usable.shape[1]) < self.length[:, None]
        for x in self.activations.values():
            size = norm(x).squeeze(-1).cpu().numpy()
            known = inside & np.isfinite(size)
            largest = np.fmax(largest, np.where(known, size / np.median(size[known]), np.nan))
        return largest


def _joined(parts: list[Tensor]) -> Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])
