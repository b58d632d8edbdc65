"""SAEs of every kind with every weight random, and what the equations say of them, written out densely."""

import functools
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from sae_models.architectures import NAMES, build, named
from sae_models.normalise import normalisation
from sae_models.sae import SAE
from sae_models.scores import Aligned, Cosine, Direction, Tied
from sae_models.selectors import BatchTopK, Selector, TopK

D_MODEL, D_SAE, K = 12, 40, 5
ALL = (*(name for name in NAMES if "<" not in name and named(name).selector == "batchtopk"), "cosine-group3")
"""every score and decoder; 40 latents in 3 groups leave a remainder"""
SELECTORS = ("relu", "topk", "batchtopk")
NORMALISATIONS = {
    "none": {},
    "layer_norm": {"kind": "layer_norm"},
    "constant_norm": {"kind": "constant_norm"},
    "factor": {"kind": "factor", "factor": 0.25},
    "centred": {"kind": "centred"},
    "centred_constant_norm": {"kind": "centred_constant_norm"},
}


def each_pair(a: Collection, b: Collection, c: Collection) -> list[tuple]:
    """Cases of three factors, the last the one of fewest levels: every pair of levels meets, not every triple."""
    last = list(c)
    return [(x, y, last[(i + j) % len(last)]) for i, x in enumerate(a) for j, y in enumerate(b)]


class AbsBatchTopK(BatchTopK):
    """The k·rows largest |s| of a batch, sign kept: latents of either sign need no more than this."""

    signed = True


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal, the same for the same seed and shape."""
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def inputs(n: int = 30, d_model: int = D_MODEL, seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    """Activations of norms from small to large, off zero."""
    return drawn(n, d_model, seed=seed, dtype=dtype) * torch.linspace(0.3, 4, n, dtype=dtype)[:, None] + 0.5


def random_sae(name: str, selector: str = "topk", kind: str = "none", dtype: torch.dtype = torch.float64) -> SAE:
    """Built, then moved off its start: biases, exponents and lengths of decoder rows too. About K latents a row are active."""
    x = inputs(dtype=dtype)
    layer_norm = "layer_norm" if kind == "layer_norm" else "none"
    sae = build(replace(named(f"{name}:{selector}"), normalise=layer_norm), D_SAE, K, x, generator(3))
    sae.normalise = normalisation(**NORMALISATIONS[kind])
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * drawn(*parameter.shape, seed=parameter.numel(), dtype=dtype)
        if isinstance(sae.selector, BatchTopK):
            sae.selector.threshold.fill_(between(scores(sae, x), K))
    return sae


def between(s: Tensor, k: int) -> Tensor:
    """A threshold that about k scores of a row are above, in the widest gap nearby.

    At a score itself its latent would be active on one processor and not on another.
    """
    weakest = s.topk(k, dim=1).values[:, -1].median().clamp(min=0.01)
    near = s[(s - weakest).abs() <= 0.1 * weakest].sort().values
    widest = near.diff().argmax()
    return (near[widest] + near[widest + 1]) / 2


def normalised(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, scale and shift, each written out."""
    kind, one = sae.normalise.kind, torch.ones_like(x[:, :1])
    if kind == "layer_norm":
        std = ((x - x.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True).div(x.shape[1] - 1).sqrt()
        return (x - x.mean(1, keepdim=True)) / (std + 1e-5), std, x.mean(1, keepdim=True)
    if kind == "centred":
        return x - x.mean(1, keepdim=True), one, x.mean(1, keepdim=True)
    if kind == "centred_constant_norm":
        shift = x.mean(1, keepdim=True)
        scale = ((x - shift) ** 2).sum(1, keepdim=True).sqrt() / x.shape[1] ** 0.5
        return (x - shift) / scale, scale, shift
    if kind == "constant_norm":
        scale = (x**2).sum(1, keepdim=True).sqrt() / x.shape[1] ** 0.5
        return x / scale, scale, 0 * one
    factor = NORMALISATIONS["factor"]["factor"] if kind == "factor" else 1.0
    return factor * x, one / factor, 0 * one


def scores(sae: SAE, x: Tensor) -> Tensor:
    """s of each row and latent, from the equations and the raw parameters; differentiable."""
    x_c = normalised(sae, x)[0] - sae.b_dec
    score, d, norm = sae.score, sae.W_dec, (x_c**2).sum(1, keepdim=True).sqrt()
    if isinstance(score, Tied):
        return x_c @ d.T + score.b_enc
    if isinstance(score, Aligned):
        projector = torch.eye(d.shape[1]) - torch.einsum("ia,ib->iab", d, d) / (d**2).sum(1)[:, None, None]
        w = d / (d**2).sum(1, keepdim=True) + torch.einsum("iab,ib->ia", projector.to(d), score.W_enc)
        return x_c @ w.T + score.b_enc
    if not isinstance(score, Direction):
        return x_c @ score.W_enc.T + score.b_enc
    unit = score.W_enc / (score.W_enc**2).sum(1, keepdim=True).sqrt() if score.unit else score.W_enc
    cosine = (x_c / norm) @ unit.T
    if not isinstance(score, Cosine):
        return cosine
    a, b = (each(scale, len(d)) for scale in (score.scale_a, score.scale_b))
    a = a if score.scale_delta is None else a + score.scale_delta
    return norm**a * b.exp() * cosine + score.b_enc


def each(scale: Tensor, d_sae: int) -> Tensor:
    """One number a latent of those of G equal slices, the remainder in the last."""
    size = d_sae // len(scale)
    return torch.stack([scale[min(i // size, len(scale) - 1)] for i in range(d_sae)])


def mask_of(sae: SAE, s: Tensor, times: int = 1) -> Tensor:
    """Which entries a training step selects, by sorting."""
    strength = sae.selector.strength(s.detach())
    if isinstance(sae.selector, BatchTopK):
        wanted = round(times * sae.selector.k * len(s))
        least = strength.flatten().sort(descending=True).values[min(wanted, s.numel()) - 1]
        return (strength >= least) & (strength > 0)
    if isinstance(sae.selector, TopK):
        least = strength.sort(dim=1, descending=True).values[:, min(times * sae.selector.k, s.shape[1]) - 1]
        return (strength >= least[:, None]) & (strength > 0)
    return strength > 0


def decoded(sae: SAE, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ where the SAE reconstructs, x̂ behind the way back, and the latents with every scale in them."""
    u, scale, shift = normalised(sae, x)
    r = f @ sae.W_dec
    if sae.restore_norm:
        some = (r != 0).any(1)
        x_c = u - sae.b_dec
        safe = torch.where(some[:, None], r, 1.0)
        factor = torch.where(some, (x_c**2).sum(1).sqrt() / (safe**2).sum(1).sqrt(), 0)[:, None]
        f, r = f * factor, r * factor
    return r + sae.b_dec, scale * (r + sae.b_dec) + shift, f * scale


def inference(sae: SAE, x: Tensor) -> Tensor:
    """f at inference."""
    s = scores(sae, x)
    if isinstance(sae.selector, BatchTopK):
        return sae.selector.value(s) * (sae.selector.strength(s) > sae.selector.threshold)
    return sae.selector.value(s) * mask_of(sae, s)


def auxiliary(sae: SAE, x: Tensor, dead: list[int], k: int, error: Tensor, factor: Tensor) -> Tensor:
    """AuxK, a row and a dead latent at a time. factor: what each row's decoded sum was scaled by."""
    s = scores(sae, x)
    missed = torch.zeros((), dtype=x.dtype)
    for row in range(len(x)):
        guess = torch.zeros_like(error[row])
        strengths = {i: float(sae.selector.strength(s[row, i].detach())) for i in dead}
        for i in sorted(dead, key=lambda i: -strengths[i])[:k]:
            guess = guess + sae.selector.value(s[row, i]) * sae.W_dec[i]
        missed = missed + (error[row] - guess * factor[row]).square().sum()
    return missed / (error - error.mean(dim=0)).square().sum()


def with_selector(sae: SAE, selector: Selector) -> SAE:
    sae.selector = selector
    return sae


close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
"""Two orders of summation in float64: a few dozen terms of size 1 to 100, each rounded to 1e-16 of itself, through an
exponential or a division; 1e-13 is seen."""
