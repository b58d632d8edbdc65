"""Cheap scores of a latent at a token: size, angle, and attributions from gradients that all latents of the token share.

A gradient g costs one forward and backward pass of a token through the blocks above; a latent's attribution is z_i·<d_i, g>. With t the
most likely next token:

    direct       g of (logit of t − mean logit) at the end of the last block, through the final norm and unembedding alone
    gradient     g of log p(t) at the site: first-order estimate of the fall of log p(t) when the latent is removed
    integrated   the same, its mean over the path from x without any of its active latents to x
    fisher       ½ · mean over y ~ p of (z_i·<d_i, g_y>)², g_y the gradient of log p(y): second-order estimate of KL itself, whose
                 gradient is 0. Unbiased for ½ΔᵀFΔ with F the Fisher information of the next token in x, drawn with few y.

Beside these, exactly what the Fisher form estimates, which is not cheap: it costs about 2.5 times what measuring the effect does.

    second_order ½ · Σ_y p(y)·(z_i·<d_i, g_y>)² over the whole vocabulary, by forward-mode products through replay
    fisher_n     the same, mean over n draws y ~ p in place of the sum, for n = 1, 2, 4, … 128: how the sampled form converges

Sources: direct logit attribution and gradient attribution as commonly used; integrated gradients arXiv:1703.01365, in the space of
latents arXiv:2403.19647; the sampled Fisher form is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from interventions.attribution import gradients, integrated_gradients
from interventions.effects import check_rows, choose_path
from interventions.recording import Recording
from interventions.replaying.replay import unembed
from interventions.second_order import SecondOrder, second_order
from interventions.sites import Site

SCORES = ("delta_norm", "z", "cosine", "inner", "direct", "gradient", "integrated", "fisher", "second_order")
"""Scores of an atlas, all but the last one cheap; their absolute values are compared with effects."""
DRAWS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of next tokens drawn for `fisher_n`; each includes the draws before."""
_SOME = 128
_PRODUCTS = 2**24  # numbers held at once


@dataclass(frozen=True, eq=False)
class TokenGradients:
    """Of some tokens; float32, on the model's device."""

    direct: Float[Tensor, "token d_model"]
    gradient: Float[Tensor, "token d_model"]
    integrated: Float[Tensor, "token d_model"]
    """nan for tokens without a path"""
    fisher: Float[Tensor, "sample token d_model"]
    """nan for these tokens too"""
    gap: Float[Tensor, "some_token"]
    """of each path: log p(t) at x − log p(t) without latents − the attribution of all latents together, nats"""


def token_gradients(
    recording: Recording,
    site: Site,
    prompt: Int[Tensor, "token"],
    position: Int[Tensor, "token"],
    without: Float[Tensor, "token d_model"],
    on_path: Bool[ndarray, "token"],
    *,
    steps: int = 8,
    samples: int = 4,
    generator: torch.Generator,
) -> TokenGradients | None:
    """Gradients of some tokens, by replay; None where replay is not exact.

    without: x without its active latents, where paths begin. on_path: tokens with `integrated` and `fisher`, which cost 2·steps and
    2·samples passes a token; steps: points of Gauss-Legendre quadrature; samples: next tokens drawn from p with a CPU generator.
    Raises what `gradients` raises.
    """
    x = recording.at(site, prompt, position)
    with recording.held():
        if choose_path(check_rows(recording, site, prompt, position, x), "auto", _SOME).path == "hooks":
            return None
    some = torch.from_numpy(np.flatnonzero(on_path))
    top, drawn = _next_tokens(recording, prompt, position, samples, generator)
    last = Site(recording.model.n_layers - 1)
    direct, _ = gradients(recording, last, prompt, position, _contrast(top))
    gradient, _ = gradients(recording, site, prompt, position, _log_probability(top))
    path, gap, fisher = [torch.full_like(gradient, torch.nan)], gradient.new_zeros(0), []
    if len(some):
        at = prompt[some], position[some]
        on = some.to(x.device)
        found = integrated_gradients(
            recording, site, *at, _log_probability(top[some]), baseline=without[on], steps=steps, batch_rows=_SOME
        )
        path[0][on], gap = found.gradient.to(gradient), found.gap
        for tokens in drawn[:, some]:
            fisher.append(torch.full_like(gradient, torch.nan))
            fisher[-1][on] = gradients(recording, site, *at, _log_probability(tokens))[0].to(gradient)
    if not fisher:
        fisher = [torch.full_like(gradient, torch.nan)] * samples
    return TokenGradients(direct.float(), gradient.float(), path[0].float(), torch.stack(fisher).float(), gap.float())


def _next_tokens(
    recording: Recording, prompt: Tensor, position: Tensor, samples: int, generator: torch.Generator
) -> tuple[Int[Tensor, "token"], Int[Tensor, "sample token"]]:
    """The most likely next token of each, and draws from p."""
    top, drawn = [], []
    device = recording.final_hidden.device
    for some in torch.arange(len(prompt)).split(_SOME):
        logits = unembed(recording, recording.final_hidden[prompt[some].to(device), position[some].to(device)]).float()
        top.append(logits.argmax(-1).cpu())
        uniform = torch.rand(samples, len(some), generator=generator).to(device)
        below = logits.softmax(-1).cumsum(-1)
        found = torch.searchsorted(below, (uniform * below[:, -1]).T.contiguous())
        drawn.append(found.clamp(max=logits.shape[-1] - 1).T.cpu())
    return torch.cat(top), torch.cat(drawn, dim=1)


def _log_probability(tokens: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, rows: (
        -torch.nn.functional.cross_entropy(logits.float(), tokens[rows].to(logits.device), reduction="none")
    )


def _contrast(tokens: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, rows: (
        logits.float().gather(-1, tokens[rows].to(logits.device)[:, None])[:, 0] - logits.float().mean(-1)
    )


def attributions(
    found: TokenGradients | None,
    token: Int[Tensor, "entry"],
    removed: Callable[[Tensor], Float[Tensor, "some_entry d_model"]],
) -> dict[str, Float[Tensor, "entry"]]:
    """`direct`, `gradient`, `integrated` and `fisher` of each entry; nan where not computed.

    token: index of each entry's token; removed: z_i·d_i of the entries at given indices.
    """
    names = ("direct", "gradient", "integrated", "fisher")
    if found is None:
        return {name: torch.full((len(token),), torch.nan) for name in names}
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for some in torch.arange(len(token)).split(max(1, _PRODUCTS // found.gradient.shape[1])):
        delta, own = removed(some).float(), token[some].to(found.gradient.device)
        for name in names[:3]:
            parts[name].append((getattr(found, name)[own] * delta).sum(-1))
        slopes = torch.stack([(sample[own] * delta).sum(-1) for sample in found.fisher])
        parts["fisher"].append(slopes.square().mean(0) / 2)
    return {name: torch.cat(values).cpu() for name, values in parts.items()}


def exact_second_order(
    recording: Recording,
    site: Site,
    prompt: Int[Tensor, "token"],
    position: Int[Tensor, "token"],
    token: Int[Tensor, "entry"],
    change: Callable[[Tensor], Float[Tensor, "some_entry d_model"]],
    *,
    generator: torch.Generator,
    **how: Any,
) -> SecondOrder:
    """`second_order` and `fisher_n` of each entry.

    token: index of each entry's token, whose draws all its entries share; change: −z_i·d_i of the entries at given indices; how: path and
    batch_rows of `measure`. Where replay is not exact, by full forward passes. Raises what `second_order` raises.
    """
    _, drawn = _next_tokens(recording, prompt, position, DRAWS[-1], generator)

    def sampled(slope: Tensor, entry: Tensor, n: int) -> Tensor:
        return slope.gather(1, drawn[:n, token[entry]].T.to(slope.device)).square().mean(1) / 2

    also = {f"fisher_{n}": partial(sampled, n=n) for n in DRAWS}
    return second_order(recording, site, prompt[token], position[token], change, also=also, **how)
