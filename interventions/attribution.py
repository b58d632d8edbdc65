"""Gradients of what the model says with respect to its activations, through record and replay, and attributions made of them.

An attribution is a first-order or path estimate of an effect; `measure` gives the effect itself. The gradient of
KL(clean ‖ intervened) at the clean point is 0 whatever the direction (there KL is least), so KL has no first-order
attribution: ask about logits.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.effects import Index, check_rows, choose_path
from interventions.errors import EditError, HookError
from interventions.metrics import TokenMetric
from interventions.models.anatomy import at_site, check_site
from interventions.models.rotary import forget_longer_passes
from interventions.models.uploads import as_vectors, token_rows
from interventions.recording import Recording
from interventions.replaying.replay import replayed, unembed
from interventions.replaying.rows import Horizon, Rows
from interventions.sites import Site, SiteLike, as_sites

Objective = TokenMetric | Callable[[Float[Tensor, "row vocab"], Int[Tensor, "row"]], Float[Tensor, "row"]]
"""A number formed of each row's logits: a metric of tokens, or a differentiable function of (logits, indices of their rows)."""


@dataclass(frozen=True)
class Attribution:
    """How much each row's activation contributes to its objective, by one method."""

    score: Float[Tensor, "row"]
    """Σ over d_model of gradient · (activation − baseline)"""
    gradient: Float[Tensor, "row d_model"]
    """at the activation, or its mean over the path from the baseline"""
    clean: Float[Tensor, "row"]
    """the objective at the activation"""
    baseline: Float[Tensor, "row"] | None
    """the objective with the baseline put in, by a pass of its own (None: not asked for)"""

    @property
    def gap(self) -> Float[Tensor, "row"]:
        """clean − baseline − score: 0 for an exact attribution, what integrated gradients leave at so many steps."""
        if self.baseline is None:
            raise EditError("the objective at the baseline was not formed; use integrated_gradients")
        return self.clean - self.baseline - self.score


def gradients(
    recording: Recording,
    site: SiteLike,
    prompt: Index,
    position: Index,
    objective: Objective,
    *,
    vectors: Float[Tensor, "row d_model"] | None = None,
    horizon: Horizon = 1,
    batch_rows: int = 128,
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row"]]:
    """∂objective/∂activation at single tokens, and the objective, by replay: each row costs its branch, forward and back.

    Gradients `[row, d_model]`, a unit of the objective per unit of activation, and the objective `[row]`, in float32 at
    least, on the model's device. The objective is formed of the logits at the token itself (horizon 1), at its prompt's
    `last` position, or summed over h positions, as many of them as the prompt has. A vector that is not finite gives nan. vectors: where the gradient is taken (default: the clean activations). Raises `ReplayError` where replay is
    not exact, `SiteError`, `EditError` for an objective that does not depend on the activation.
    """
    if vectors is None:
        vectors = recording.at(site, prompt, position)
    vectors = as_vectors(vectors).to(recording.model.device, recording.model.stream_dtype)
    with recording.held():
        rows = check_rows(recording, site, prompt, position, vectors.detach(), horizon)
        if isinstance(objective, TokenMetric):
            objective.check(len(rows))
        with torch.no_grad():
            chunks = [rows.order[i : i + batch_rows] for i in range(0, len(rows), batch_rows)]
            choose_path(rows, "replay", batch_rows, chunks)
        wide = torch.promote_types(vectors.dtype, torch.float32)
        grads, values = torch.empty_like(vectors), vectors.new_empty(len(vectors), dtype=wide)
        for chunk in chunks:
            at = torch.from_numpy(chunk).to(vectors.device)
            gradient, value = _gradient(rows, chunk, objective)
            grads[at], values[at] = gradient, value.to(wide)
    return grads, values


def _gradient(rows: Rows, chunk: np.ndarray, objective: Objective) -> tuple[Tensor, Tensor]:
    reads = rows.reads(chunk)
    assert rows.attention is not None
    x = rows.edited(chunk).detach().requires_grad_(True)
    branches = rows.branches(chunk)
    with torch.enable_grad():
        hidden = replayed(rows.recording, branches, rows.placed(chunk, x, branches), rows.attention).hidden
        token = torch.from_numpy(branches.first[reads.row] + reads.position - branches.start[reads.row]).to(x.device)
        at_read = objective(unembed(rows.recording, hidden[token]), torch.from_numpy(chunk[reads.row]))
        row = torch.from_numpy(reads.row).to(x.device)
        value = at_read.new_zeros(len(chunk)).index_add(0, row, at_read)
        if not value.requires_grad:
            raise EditError("the objective does not depend on the activation, or cannot be differentiated (a rank?)")
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient.masked_fill(~x.detach().isfinite().all(-1, keepdim=True), torch.nan), value.detach()


def gradient_times_activation(
    recording: Recording,
    site: SiteLike,
    prompt: Index,
    position: Index,
    objective: Objective,
    *,
    baseline: Float[Tensor, "row d_model"] | float = 0.0,
    horizon: Horizon = 1,
    batch_rows: int = 128,
) -> Attribution:
    """(x − baseline)·∂objective/∂x at the clean activation: the first-order estimate of what putting the baseline in takes away."""
    x = recording.at(site, prompt, position)
    baseline = torch.as_tensor(baseline).to(x)
    gradient, value = gradients(recording, site, prompt, position, objective, horizon=horizon, batch_rows=batch_rows)
    score = ((x - baseline).to(value.dtype) * gradient.to(value.dtype)).sum(-1)
    return Attribution(score, gradient, value, None)


def integrated_gradients(
    recording: Recording,
    site: SiteLike,
    prompt: Index,
    position: Index,
    objective: Objective,
    *,
    baseline: Float[Tensor, "row d_model"] | float = 0.0,
    steps: int = 32,
    horizon: Horizon = 1,
    batch_rows: int = 128,
) -> Attribution:
    """(x − b)·∫₀¹ ∂objective/∂x (b + t·(x − b)) dt, by Gauss-Legendre quadrature with `steps` points.

    Complete as steps grow: scores tend to objective(x) − objective(b); `Attribution.gap` says what is missing. On the way
    to a zero baseline the norms of the blocks make the integrand steep near 0: look at the gap. Source: arXiv:1703.01365.
    """
    if steps < 1:
        raise EditError(f"{steps} steps; expected 1 or more")
    x = recording.at(site, prompt, position)
    b = torch.zeros_like(x) + torch.as_tensor(baseline).to(x)
    how = {"horizon": horizon, "batch_rows": batch_rows}
    at, weight = _gauss_legendre(steps)
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for t, w in zip(at, weight, strict=True):
        gradient, _ = gradients(recording, site, prompt, position, objective, vectors=b + t * (x - b), **how)
        total += w * gradient
    _, clean = gradients(recording, site, prompt, position, objective, **how)
    _, left = gradients(recording, site, prompt, position, objective, vectors=b, **how)
    return Attribution(((x - b) * total).sum(-1), total.to(x.dtype), clean, left)


def _gauss_legendre(n: int) -> tuple[list[float], list[float]]:
    node, weight = np.polynomial.legendre.leggauss(n)
    return ((node + 1) / 2).tolist(), (weight / 2).tolist()


def _with_leaf(seen: dict[Site, Tensor], site: Site, hidden: Tensor) -> Tensor:
    """A sum with a leaf of zeros: its gradient is the activation's, and earlier sites still get theirs."""
    seen[site] = torch.zeros_like(hidden, requires_grad=True)
    return hidden + seen[site]


def gradients_everywhere(
    recording: Recording,
    sites: SiteLike | Sequence[SiteLike],
    prompt: Index,
    position: Index,
    objective: Objective,
    *,
    batch_rows: int = 8,
) -> dict[Site, Float[Tensor, "row pos d_model"]]:
    """∂objective/∂activation at every position of every site, the objective being formed at each row's own position.

    One full pass forward and back a row gives all sites and positions: what to use to attribute one prediction to all that
    came before it. 0 after the row's position. Works for models that replay does not support.
    """
    model, sites = recording.model, as_sites(sites)
    for site in sites:
        check_site(model, site)
    prompt, position = token_rows(prompt, position)
    recording.check_rows(prompt, position)
    if isinstance(objective, TokenMetric):
        objective.check(len(prompt))
    length = recording.length[prompt]
    found = {
        site: torch.zeros(
            len(prompt), int(recording.length.max()), model.d_model, device=model.device, dtype=model.stream_dtype
        )
        for site in sites
    }
    if recording.own_code:
        batch_rows = 1  # code of the user's own may tell prompts of a pass apart
    with recording.held():
        for tokens in length.unique().tolist():
            for rows in (length == tokens).nonzero()[:, 0].split(batch_rows):
                where = prompt[rows].to(model.device), position[rows].to(model.device)
                grads = _whole_gradients(recording, sites, where, tokens, rows, objective)
                for site, gradient in grads.items():
                    found[site][rows.to(model.device), :tokens] = gradient.to(model.stream_dtype)
    return found


def _whole_gradients(
    recording: Recording,
    sites: Sequence[Site],
    where: tuple[Tensor, Tensor],
    n_tokens: int,
    rows: Int[Tensor, "some_row"],
    objective: Objective,
) -> dict[Site, Float[Tensor, "some_row pos d_model"]]:
    """One pass forward and back over whole prompts of `n_tokens` tokens each."""
    model, (prompt, position) = recording.model, where
    seen: dict[Site, Tensor] = {}
    forget_longer_passes(model.hf)
    with ExitStack() as stack, torch.enable_grad():
        for site in sites:
            stack.enter_context(at_site(model, site, partial(_with_leaf, seen, site)))
        logits = model.hf(input_ids=recording.tokens[prompt, :n_tokens]).logits.to(model.device)
        own = logits[torch.arange(len(rows), device=logits.device), position]
        value = objective(own, rows)
        if missing := [str(site) for site in sites if site not in seen]:
            raise HookError(f"nothing passed {', '.join(missing)}; check that the model runs these blocks")
        if not value.requires_grad:
            raise EditError("the objective does not depend on the logits, or cannot be differentiated (a rank?)")
        grads = torch.autograd.grad(value.sum(), [seen[site] for site in sites], allow_unused=True)
    return {site: gradient for site, gradient in zip(sites, grads, strict=True) if gradient is not None}
