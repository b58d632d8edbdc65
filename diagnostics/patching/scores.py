"""Estimates of every cell's effect from a few passes: gradient × difference, integrated gradients, direct logit attribution.

With x what stands at a cell in the run that is patched, x′ what is put there, m the metric of that run:

    gradient    (x′ − x)·∂m/∂x                                     attribution patching (Nanda 2023)
    ig          (x′ − x)·mean over steps of ∂m/∂x, the prompt's embeddings moved from one run's to the
                other's in as many steps (EAP-IG, arXiv:2403.17806; midpoints)
    dla         what the change writes to the residual stream of the last position, times the unembedding's
                difference of the two answers, the scale of the final norm held fixed; 0 at other
                positions, nan where a site writes nothing itself

Each estimates m(patched) − m; the table has it with the sign of `effect`.
"""

from contextlib import ExitStack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diagnostics.patching.design import PairBatch
from interventions.direct_logits import carried_directly
from interventions.edits import norm_read
from interventions.metrics import LogitDifference, TokenMetric
from interventions.models.anatomy import adder, at_site
from interventions.models.exclusive import exclusive
from interventions.models.inside import check_inside
from interventions.models.weights import unembedding
from interventions.recording import Recording
from interventions.sites import Site

STEPS = {"gradient": 0, "ig5": 5, "ig20": 20}
"""Steps on the way from one run's embeddings to the other's; 0: the run that is patched alone."""
_STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def estimates(
    batch: PairBatch, direction: str, metric: TokenMetric
) -> dict[str, dict[Site, Float[Tensor, "pair pos head"]]]:
    """Each score asked for, at every site, with the sign of the effect."""
    sign = 1 if direction == "denoise" else -1
    runs = batch.runs if direction == "denoise" else {"clean": batch.runs["corrupt"], "corrupt": batch.runs["clean"]}
    base, source = runs["corrupt"], runs["clean"]
    delta = {
        site: (there - here).double()
        for site in batch.settings.sites
        for here, there in [batch.change(site, direction)]
    }
    found: dict[str, dict[Site, Tensor]] = {}
    for name in batch.settings.scores:
        if name == "dla":
            assert isinstance(metric, LogitDifference)
            found[name] = {site: sign * _direct(batch, base, site, delta[site], metric) for site in delta}
            continue
        slopes = _mean_gradients(batch, base, source, STEPS[name], metric)
        found[name] = {
            site: sign * (delta[site] * slopes[site].unflatten(-1, (batch.heads[site], -1)).double()).sum(-1)
            for site in delta
        }
    return found


def _mean_gradients(
    batch: PairBatch, base: Recording, source: Recording, steps: int, metric: TokenMetric
) -> dict[Site, Tensor]:
    if not steps:
        return _gradients(batch, base, None, metric)
    start, end = (_embedded(run) for run in (base, source))
    total: dict[Site, Tensor] = {}
    for step in range(steps):
        share = (step + 0.5) / steps
        for site, slope in _gradients(batch, base, start + share * (end - start), metric).items():
            total[site] = total.get(site, 0) + slope / steps
    return total


@torch.no_grad()
def _embedded(run: Recording) -> Tensor:
    """What the first block reads."""
    seen: list[Tensor] = []
    with exclusive(run.model), at_site(run.model, Site(0, "resid_pre"), lambda x: seen.append(x)):
        run.model.base(input_ids=run.tokens)
    return seen[0]


def _gradients(batch: PairBatch, run: Recording, embedded: Tensor | None, metric: TokenMetric) -> dict[Site, Tensor]:
    """∂m/∂x at all sites and positions, one pass forward and back."""
    model, leaves = run.model, {}

    def watched(site: Site):
        def see(x: Tensor) -> Tensor:
            leaves[site] = torch.zeros_like(x, requires_grad=True)
            return x + leaves[site]

        return see

    with torch.enable_grad(), run.held(), ExitStack() as stack:
        if embedded is not None:
            stack.enter_context(at_site(model, Site(0, "resid_pre"), lambda _: embedded))
        for site in sorted(batch.settings.sites, key=lambda site: site.rank):
            stack.enter_context(at_site(model, site, watched(site)))
        logits = model.hf(input_ids=run.tokens).logits
        rows = torch.arange(len(run.length))
        last = logits[rows.to(logits.device), (run.length - 1).to(logits.device)]
        total = metric(last, rows).sum()
        slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        site: torch.zeros_like(leaf) if slope is None else slope.detach()
        for (site, leaf), slope in zip(leaves.items(), slopes, strict=True)
    }


@torch.no_grad()
def _direct(batch: PairBatch, base: Recording, site: Site, delta: Tensor, metric: LogitDifference) -> Tensor:
    """What the change adds to the metric by itself, the final norm's scale held fixed."""
    model = base.model
    last = (base.length - 1).to(delta.device)
    pair = torch.arange(len(last), device=delta.device)
    found = delta.new_zeros(delta.shape[:3])
    write = _written(batch, site, delta[pair, last])
    if write is None:
        return torch.full_like(found, torch.nan)
    stream = base.at(Site(model.n_layers - 1), pair, last)
    size = norm_read(model.norm_kind, stream).double()[:, None]
    hidden = carried_directly(base, write.flatten(0, 1), size.expand(-1, write.shape[1], 1).flatten(0, 1).float())
    weight = unembedding(model.hf)
    ids = [torch.as_tensor(x).to(weight.device).reshape(len(last), -1) for x in (metric.tokens, metric.against)]
    along = weight[ids[0]].float().mean(1) - weight[ids[1]].float().mean(1)
    found[pair, last] = (hidden.unflatten(0, write.shape[:2]).double() * along[:, None].double()).sum(-1)
    return found


def _written(batch: PairBatch, site: Site, delta: Float[Tensor, "pair head width"]) -> Tensor | None:
    """What a change writes to the stream, `[pair, head, d_model]`; None where its site does not write, or a norm stands between."""
    model = batch.model
    if site.point in _STREAM:
        return delta.float()
    if site.point not in ("z", "neurons"):
        return None
    place = check_inside(model, site).places[site.point]
    added = adder(model, Site(site.layer, "attn_out" if site.point == "z" else "mlp_out"))
    if not any(module is place.module for module in added.modules()):
        return None
    heads = delta.shape[1]
    alone = torch.eye(heads, device=delta.device)[:, :, None] * delta.float()[:, :, None, :]
    rows = alone.flatten(2).flatten(0, 1).to(model.dtype)
    zero: Int[Tensor, 1] = torch.zeros_like(rows[:1])
    with exclusive(model):
        written = place.module(torch.cat([zero, rows])[None])[0].float()
    return (written[1:] - written[:1]).unflatten(0, (len(delta), heads))
