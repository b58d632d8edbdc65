"""Rows in which a direction takes a polarity that it never takes in training: how well m numbers a row detect them."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from sklearn.metrics import roc_auc_score
from torch import Tensor

from diagnostics.polarity.planted import Rows
from sae_models.sae import SAE

TAIL = 0.001
"""Share of the training rows beyond each end of a number's usual range."""
Read = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row number"]]


def deviation(usual: Float[Tensor, "row number"], z: Float[Tensor, "row number"]) -> Float[Tensor, "row"]:
    """How far the most unusual number of each row lies outside of its usual range, in standard deviations:

        max_i max(z_i − high_i, low_i − z_i)/s_i      low_i, high_i: the .1 % and 99.9 % quantiles of the training rows
                                                      s_i: their standard deviation

    Negative within all ranges. Numbers that are constant in training are divided by the smallest positive float: any change stands out.
    """
    low, high = torch.quantile(usual, usual.new_tensor([TAIL, 1 - TAIL]), dim=0)
    s = usual.std(dim=0).clamp(min=torch.finfo(usual.dtype).tiny)
    return (torch.maximum(z - high, low - z) / s).clamp(max=1e30).amax(dim=1)


def auroc(score_normal: Float[Tensor, "row"], score_anomalous: Float[Tensor, "row"]) -> float:
    """Probability that an anomalous row scores above a normal one; ties count half."""
    scores = torch.cat([score_normal, score_anomalous]).cpu().double().numpy()
    return float(roc_auc_score([0] * len(score_normal) + [1] * len(score_anomalous), scores))


@torch.no_grad()
def detected(read: Read, usual: Rows, pair: tuple[Rows, Rows]) -> float:
    """AUROC of `deviation` of the numbers that `read` gives, between rows as in training and rows with a turned polarity."""
    normal, anomalous = (deviation(read(usual.x), read(rows.x)) for rows in pair)
    return auroc(normal, anomalous)


@torch.no_grad()
def strongest_latents(sae: SAE, usual: Rows, m: int) -> Read:
    """The m latents with the largest mean |z| on training rows."""
    chosen = sae.encode(usual.x).abs().mean(dim=0).topk(m).indices
    return lambda x: sae.encode(x)[:, chosen]


def components(usual: Rows, m: int) -> Read:
    """Projections on the first m principal components of training rows."""
    mean = usual.x.mean(dim=0)
    v = torch.linalg.svd(usual.x - mean, full_matrices=False).Vh[:m]
    return lambda x: (x - mean) @ v.T


def random_directions(d_model: int, m: int, generator: torch.Generator) -> Read:
    """Projections on m random directions."""
    v = torch.nn.functional.normalize(torch.randn(m, d_model, generator=generator), dim=1)
    return lambda x: x @ v.to(x).T


@torch.no_grad()
def error_detected(sae: SAE, pair: tuple[Rows, Rows]) -> float:
    """AUROC of ‖x − x̂‖, which needs every latent: what no latent represents shows there."""
    normal, anomalous = ((rows.x - sae(rows.x)).norm(dim=1) for rows in pair)
    return auroc(normal, anomalous)
