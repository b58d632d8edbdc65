"""Which latent represents which planted polarity, and how true its size is."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diagnostics.polarity.planted import Planted, Rows
from sae_models.sae import SAE

COSINE = 0.9
"""|cos| of decoder row and planted direction from which a latent may represent it."""
FIRES = 0.5
"""Share of a polarity's rows in which its latent must fire."""
SIGNS = (1.0, -1.0)


@dataclass(frozen=True)
class Matched:
    """For each polarity (+u_j, −u_j) its best-matched latent: the one that adds most along it, on average over the rows in which the
    polarity is on and the other is off:

        best = argmax_i mean_rows z_i·⟨d_i, ±u_j⟩

    It *represents* the polarity if |cos(d_i, u_j)| ≥ .9 and it adds along it (z_i·⟨d_i, ±u_j⟩ > 0) in half of those rows or more.
    A pair is *consolidated* if one latent represents both polarities. Our definitions.
    """

    latent: Int[Tensor, "pair 2"]
    represented: Bool[Tensor, "pair 2"]
    slope: Float[Tensor, "pair 2"]
    """calibration: true amplitude a (along ±u_j, net) on |z| through the origin, Σ a|z|/Σ z², over the rows in which the latent adds along the
    polarity: 1 is calibrated, above 1 shrunk; nan where the polarity is not represented"""

    @property
    def recovered(self) -> float:
        """Share of the polarities that a latent represents."""
        return float(self.represented.float().mean())

    @property
    def consolidated(self) -> float:
        """Share of the pairs whose two polarities one latent represents."""
        return float((self.represented.all(dim=1) & (self.latent[:, 0] == self.latent[:, 1])).float().mean())

    def slopes(self) -> tuple[float, float]:
        """Median slope of each polarity over the pairs in which it is represented (nan without any)."""
        plus, minus = (float(self.slope[:, i].nanmedian()) for i in range(2))
        return plus, minus


@torch.no_grad()
def match(sae: SAE, planted: Planted, rows: Rows) -> Matched:
    """The best-matched latent of each polarity. Both polarities of each pair must be on alone in at least one row."""
    z, pair = sae.encode(rows.x), torch.arange(len(planted.directions), device=rows.x.device)
    along = planted.directions @ sae.W_dec.T
    cosine = along / sae.W_dec.norm(dim=1)
    found = []
    for i, sign in enumerate(SIGNS):
        alone = rows.alone[:, :, i].to(z)
        mean = alone.T @ z / alone.sum(0)[:, None].clamp(min=1)
        best = (sign * mean * along).argmax(dim=1)
        own = z[:, best] * (sign * along[pair, best])
        share = ((own > 0) * alone).sum(0) / alone.sum(0).clamp(min=1)
        represented = (cosine[pair, best].abs() >= COSINE) & (share >= FIRES)
        size = torch.where(own > 0, z[:, best].abs(), 0)
        slope = (sign * rows.amplitude * size).sum(0) / size.square().sum(0)
        found.append((best, represented, slope.where(represented, torch.nan)))
    return Matched(*(torch.stack(column, dim=1) for column in zip(*found, strict=True)))


@torch.no_grad()
def reconstruction(sae: SAE, rows: Rows) -> tuple[float, float]:
    """Mean number of active latents a row (z ≠ 0), and the share of variance that is not explained, Σ‖x − x̂‖²/Σ‖x − x̄‖²."""
    z, x = sae.encode(rows.x), rows.x
    error = (x - sae(x)).square().sum() / (x - x.mean(dim=0)).square().sum()
    return float((z != 0).sum(dim=1).float().mean()), float(error)
