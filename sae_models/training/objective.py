"""What a training step minimises: one forward pass of an SAE over a batch, dense or at the selected entries alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_models.errors import SAEError
from sae_models.sae import SAE, restoring
from sae_models.scores import Argument
from sae_models.selectors import BatchTopK, Chunks, Scored, Support, Take, TopK, everything
from sae_models.sparse import decoded, products

_SCORES_AT_ONCE, _ON_A_GPU = 2**21, 2**27
"""scores formed together: on a CPU a chunk stays in cache until the selector has read it; on a GPU each chunk costs a wait"""
FEW = 1 / 8
"""Largest share of entries at which a dense selector is trained at those entries alone: about where it stops being faster."""


class Pass(NamedTuple):
    """One pass over a batch; everything in the space that the SAE reconstructs in (behind its input normalisation)."""

    target: Float[Tensor, "row d_model"]
    output: Float[Tensor, "row d_model"]
    factor: Float[Tensor, "row 1"] | None
    """what the decoded sum was scaled by, where the norm is restored"""
    argument: Argument
    rows: Float[Tensor, "d_sae d_model"]
    x_c: Float[Tensor, "row d_model"]
    support: Support | None
    activation: Float[Tensor, "entry"] | Float[Tensor, "row d_sae"]
    """at the support's entries; dense where there is none"""
    score: Float[Tensor, "entry"] | Float[Tensor, "row d_sae"] | None = None
    """of an SAE that a penalty makes sparse: at the same entries"""

    @property
    def error(self) -> Float[Tensor, "row d_model"]:
        """x − x̂."""
        return self.target - self.output


def forward_pass(sae: SAE, x: Float[Tensor, "row d_model"]) -> Pass:
    """A training pass with gradients, at the entries that the selector picks; where it picks none, at those that have an activation or a
    gradient, or at all while those are many.
    """
    target = sae.normalise(x.to(sae.W_dec)).u
    x_c = target - sae.b_dec if sae.subtract_b_dec else target
    argument, rows = sae.score.argument(x_c), sae.score.rows(sae.W_dec)
    if sae.selector.sparse:
        return _sparse(sae, target, argument, rows, x_c, sae.selector.support(score_chunks(sae, argument, rows)))
    if (few := _few_entries(sae, argument, rows)) is None:
        score = sae.score.finish(argument.u @ rows.T, argument.norm)
        activation = sae.selector(score)
        done = _finished(sae, target, argument, rows, x_c, None, activation, activation @ sae.W_dec)
        return done._replace(score=score)
    score, take = _scores_at(sae, argument, rows, few), _take(few)
    activation = sae.selector.at(score, take)
    done = _finished(sae, target, argument, rows, x_c, few, activation, decoded(activation, sae.W_dec, few))
    return done._replace(score=score)


def penalty(sae: SAE, done: Pass, power: float) -> Float[Tensor, ""]:
    """What makes a dense SAE sparse, in the unit of its input: mean over tokens of Σ_i |z_i|·‖d_i‖; of a gate its soft copy in place of z.

    power: p below 1 gives Σ (|z_i|·‖d_i‖)^p, scaled so that its value is that of p = 1: only the balance between large and small latents
    changes. Source: arXiv:2408.00113 (p-annealing); there the coefficient follows the running means of both sums, here the batch's own.
    """
    assert done.score is not None
    take, n_rows = _take(done.support), len(done.target)
    soft = sae.selector.soft(done.score, take)
    size = (done.activation if soft is None else soft).abs() * take(sae.W_dec.norm(dim=-1))
    total = size.sum() / n_rows
    if power == 1:
        return total
    active = size > 0
    bent = (torch.where(active, size, 1) ** power * active).sum() / n_rows
    return bent * (total / bent.clamp(min=torch.finfo(bent.dtype).tiny)).detach()


def active_latents(sae: SAE, done: Pass) -> Float[Tensor, ""]:
    """Mean number of active latents a token, with a gradient to the thresholds: what makes a JumpReLU sparse. Source: arXiv:2407.14435."""
    assert done.score is not None
    return sae.selector.indicator(done.score, _take(done.support)).sum() / len(done.target)


def gate_error(sae: SAE, done: Pass) -> Float[Tensor, "row"] | None:
    """‖x − x̂‖² of a gate's soft copy, its decoder held fixed: what teaches the gate. None of SAEs without one.

    Source: arXiv:2404.16014.
    """
    soft = None if done.score is None else sae.selector.soft(done.score, _take(done.support))
    if soft is None:
        return None
    W_dec = sae.W_dec.detach()
    total = soft @ W_dec if done.support is None else decoded(soft, W_dec, done.support)
    return (done.target - total - sae.b_dec.detach()).square().sum(dim=-1)


def prefix_errors(sae: SAE, done: Pass, sizes: Sequence[int]) -> list[Float[Tensor, "row"]]:
    """‖x − x̂‖² with the first latents alone, for each of some sizes of the dictionary. Source: arXiv:2503.17547 (Matryoshka)."""
    found = []
    for size in sizes:
        if done.support is None:
            total = done.activation[:, :size] @ sae.W_dec[:size]
        else:
            among = (done.support.latent < size).nonzero()[:, 0]
            row, latent, score, product = (column[among] for column in done.support[:4])
            some = Support(row, latent, score, product, done.support.n_rows)
            total = decoded(done.activation[among], sae.W_dec, some)
        total = total if done.factor is None else total * restoring(done.x_c, total)
        found.append((done.target - total - sae.b_dec).square().sum(dim=-1))
    return found


def wider(sae: SAE, done: Pass, times: int) -> Float[Tensor, "row d_model"]:
    """The reconstruction with `times` as many active latents (Multi-TopK). Raises `SAEError` where the selector counts none."""
    if not isinstance(sae.selector, (TopK, BatchTopK)):
        raise SAEError(f"Multi-TopK with selector {sae.selector.kind!r}; expected topk or batchtopk")
    support = sae.selector.support(score_chunks(sae, done.argument, done.rows), times)
    return _sparse(sae, done.target, done.argument, done.rows, done.x_c, support).output


def score_chunks(sae: SAE, argument: Argument, rows: Float[Tensor, "d_sae d_model"]) -> Chunks:
    """The scores of a batch without gradients, some rows at a time."""
    u, norm = argument.u.detach(), argument.norm.detach()
    step = max(1, (_SCORES_AT_ONCE if u.device.type == "cpu" else _ON_A_GPU) // len(rows))

    @torch.no_grad()
    def formed(start: int) -> Scored:
        part = slice(start, start + step)
        product = u[part] @ rows.T
        return Scored(start, product, sae.score.finish(product, norm[part]))

    return lambda: (formed(start) for start in range(0, len(u), step))


def _few_entries(sae: SAE, argument: Argument, rows: Tensor) -> Support | None:
    """The entries of a dense selector that have an activation or a gradient; None where they are more than `FEW`."""
    found = []
    for scored in score_chunks(sae, argument, rows)():
        at = sae.selector.open(scored.score).nonzero()
        if len(at) > FEW * scored.score.numel():
            return None
        row, latent = at.T
        found.append((row + scored.start, latent, scored.score[row, latent], scored.product[row, latent]))
    row, latent, score, product = (torch.cat(column) for column in zip(*found, strict=True))
    return Support(row, latent, score, product, len(argument.u))


def _take(support: Support | None) -> Take:
    return everything if support is None else lambda parameter: parameter.index_select(0, support.latent)


def _scores_at(sae: SAE, argument: Argument, rows: Tensor, support: Support) -> Float[Tensor, "entry"]:
    norm = argument.norm[:, 0].index_select(0, support.row)
    return sae.score.finish(products(argument.u, rows, support), norm, _take(support))


def _sparse(sae: SAE, target: Tensor, argument: Argument, rows: Tensor, x_c: Tensor, support: Support) -> Pass:
    score = _scores_at(sae, argument, rows, support)
    activation = sae.selector.value(score)
    return _finished(sae, target, argument, rows, x_c, support, activation, decoded(activation, sae.W_dec, support))


def _finished(
    sae: SAE,
    target: Tensor,
    argument: Argument,
    rows: Tensor,
    x_c: Tensor,
    support: Support | None,
    activation: Tensor,
    total: Tensor,
) -> Pass:
    factor = restoring(x_c, total) if sae.restore_norm else None
    total = total if factor is None else total * factor
    return Pass(target, total + sae.b_dec, factor, argument, rows, x_c, support, activation)


def auxiliary_loss(sae: SAE, done: Pass, dead: Int[Tensor, "dead"], k: int) -> Float[Tensor, ""]:
    """How much of the error x − x̂ the dead latents leave unexplained, as a share of it:

        Σ‖e − ê‖²/Σ‖e − ē‖² over the batch,   ê = (the k strongest of the dead latents' activations) W_dec
                                              e = x − x̂, held fixed

    Source: arXiv:2606.15054 (recipe), after arXiv:2406.04093. Where the norm is restored ê is scaled as x̂ was: ours.
    """
    error = done.error.detach()
    product = done.argument.u @ done.rows.index_select(0, dead).T
    score = sae.score.finish(product, done.argument.norm, lambda parameter: parameter.index_select(0, dead))
    if k < len(dead):
        strongest = sae.selector.strength(score.detach()).topk(k, dim=-1, sorted=False).indices
        score = torch.zeros_like(score).scatter(-1, strongest, score.gather(-1, strongest))
    guess = sae.selector.value(score) @ sae.W_dec.index_select(0, dead)
    if done.factor is not None:
        guess = guess * done.factor.detach()
    variance = (error - error.mean(dim=0)).square().sum().clamp(min=torch.finfo(error.dtype).tiny)
    return (error - guess).square().sum() / variance


def token_weights(x_c: Float[Tensor, "row d_model"], power: int) -> Float[Tensor, "row"]:
    """1/‖x_c‖^power with mean 1 over the batch, held fixed. Source: arXiv:2606.15054, loss reweighting control."""
    weight = x_c.detach().norm(dim=-1).clamp(min=1e-8) ** -power
    return weight / weight.mean()
