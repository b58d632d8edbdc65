"""Dictionaries: SAEs at the sites they belong to, or plain directions."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.errors import EditError, ResultError, SiteError
from interventions.models.causal_model import CausalModel
from interventions.sites import Site, SiteLike, as_site
from sae_models.belonging import sae_site
from sae_models.errors import SAEError
from sae_models.live import Wrapped, as_sae
from sae_models.sae import SAE
from sae_models.scores import Cosine

_ENTRIES = 2**24  # of all latents, formed at once


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Directions at a site, by name."""

    name: str
    site: Site
    directions: Float[Tensor, "latent d_model"]
    """decoder rows, of any length"""
    rows: Float[Tensor, "latent d_model"] | None = None
    """encoder rows, where there are any"""
    sae: SAE | None = None

    @property
    def label(self) -> str:
        """What random draws are seeded with: site and kind, whatever else is asked about and however it is named for that."""
        where = str(self.site.layer) if self.site.point == "resid_post" else str(self.site)
        return f"{where}/{self.name.rsplit('/', 1)[-1]}"

    @torch.no_grad()
    def activation(
        self, x: Float[Tensor, "row d_model"], latent: Tensor
    ) -> tuple[Float[Tensor, "row"], Float[Tensor, "row d_model"]]:
        """z of one latent a row, and x_c in the activations' own unit. For an SAE only."""
        assert self.sae is not None
        z, x_c = [], []
        for some, which in zip(x.split(self.few), latent.split(self.few), strict=True):
            scale = self.sae.normalise(some.to(self.sae.W_dec)).scale
            z.append(self.sae.encode(some).gather(1, which[:, None])[:, 0])
            x_c.append(self.sae.centred(some) * (1.0 if scale is None else scale))
        return torch.cat(z), torch.cat(x_c)

    @property
    def few(self) -> int:
        """Activations to be encoded at once."""
        return max(16, _ENTRIES // len(self))

    def __len__(self) -> int:
        return len(self.directions)

    @property
    def learned(self) -> Float[Tensor, "latent"] | None:
        """a_i of a cosine-scored SAE."""
        score = None if self.sae is None else self.sae.score
        return score.exponents().detach().float().cpu() if isinstance(score, Cosine) else None

    @torch.no_grad()
    def provenance(self) -> dict[str, Any]:
        """What tells these directions, and how they are read, from others."""
        found = hashlib.sha256()
        parts = {"directions": self.directions}
        if self.sae is not None:
            parts = dict(sorted(self.sae.state_dict().items()))
            settings = [_settings(part) for part in (self.sae, self.sae.score, self.sae.selector, self.sae.normalise)]
            found.update(json.dumps(settings).encode())
            if isinstance(self.sae.score, Wrapped):  # known as a function: by what it gives, but for last bits
                drawn = torch.randn(16, self.directions.shape[1], generator=torch.Generator().manual_seed(0))
                z = self.sae.encode(10 * drawn.to(self.directions)).float()
                parts["z"] = (z / z.abs().max().clamp(min=1e-30) * 1e3).round()
        for name, value in parts.items():
            found.update(f"{name} {list(value.shape)}".encode())
            found.update(value.detach().float().cpu().numpy().tobytes())
        known = self.learned
        return {
            "site": str(self.site),
            "latents": len(self),
            "sha256": found.hexdigest()[:16],
            "sae": None if self.sae is None else f"{self.sae.score.kind} → {self.sae.selector.kind}",
            "learned_a": None if known is None else {"mean": float(known.mean()), "sd": float(known.std())},
        }


def _settings(part: Any) -> dict[str, Any]:
    """What a module knows beside its tensors."""
    plain = {name: value for name, value in vars(part).items() if isinstance(value, bool | int | float | str)}
    return {"kind": type(part).__name__} | {name: plain[name] for name in sorted(plain) if name != "training"}


def dictionaries_of(given: Any, model: CausalModel, site: SiteLike | None) -> list[Dictionary]:
    """Dictionaries of an SAE, of directions, or of several (see `by_name`). Raises what `sae_site` raises; `EditError`, `ResultError`."""
    site = None if site is None else as_site(site)
    return [_dictionary(name, thing, model, site) for name, thing in by_name(given).items()]


def by_name(given: Any) -> dict[str, Any]:
    """SAEs or directions under the names given; one, or a list of several, by what they are. Raises `ResultError` for none."""
    if isinstance(given, Mapping):
        named = {str(name): thing for name, thing in given.items()}
    elif isinstance(given, list | tuple):
        named = {}
        for thing in given:
            known = thing if isinstance(thing, Tensor | str | Path) else as_sae(thing)
            name = _name(known, full=True)
            same = sum(other == name or other.startswith(f"{name} #") for other in named)
            named[f"{name} #{same + 1}" if same else name] = known
    else:
        named = {_name(given): given}
    if not named:
        raise ResultError("no SAE and no directions; give at least one")
    return named


def _name(thing: Any, *, full: bool = False) -> str:
    if isinstance(thing, str | Path):
        return str(thing)
    if full and isinstance(thing, SAE):
        return f"{thing.score.kind}:{thing.selector.kind} {thing.d_sae} {thing.hook_name}"
    return "directions" if isinstance(thing, Tensor) else getattr(getattr(thing, "score", None), "kind", "sae")


def _dictionary(name: str, thing: Any, model: CausalModel, site: Site | None) -> Dictionary:
    if isinstance(thing, Tensor):
        if site is None:
            raise SiteError(f"directions {name!r} do not say where they act; give site=Site(layer)")
        rows = torch.atleast_2d(thing.detach()).float()
        if rows.ndim != 2 or rows.shape[1] != model.d_model:
            raise EditError(
                f"directions {name!r} of shape {list(thing.shape)}; expected [n, {model.d_model}], finite and not zero"
            )
        if not bool((good := rows.isfinite().all(1) & rows.any(1)).all()):
            bad = int(good.int().argmin())
            raise EditError(
                f"directions {name!r} of shape {list(thing.shape)}: number {bad} is {'zero' if not rows[bad].any() else 'not finite'} in "
                f"float32; expected [n, {model.d_model}], finite and not zero"
            )
        return Dictionary(name, site, rows.to(model.device))
    sae = as_sae(thing)
    where = sae_site(sae, model, site)
    if sae.device != model.device:
        sae = copy.deepcopy(sae).to(model.device)  # the caller's stays where it is
    try:
        rows = sae.encoder_rows().detach()
    except SAEError:  # an encoder known as a function only
        rows = None
    return Dictionary(name, where, sae.W_dec.detach(), rows, sae)
