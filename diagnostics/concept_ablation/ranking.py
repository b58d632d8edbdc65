"""Encoded texts, and three rankings of their active latents by a concept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interventions.replaying.replay import unembed
from interventions.spliced import Passes
from sae_models.active_latents import active_latents
from sae_models.sae import SAE
from sae_models.sparse import weighted_sums


@dataclass(frozen=True, eq=False)
class Encoded:
    """An SAE's active latents at some tokens, on the SAE's device; entries in ascending order of row."""

    sae: SAE
    x: Float[Tensor, "row d_model"]
    """activations of the tokens"""
    row: Int[Tensor, "entry"]
    latent: Int[Tensor, "entry"]
    z: Float[Tensor, "entry"]
    """of either sign, never 0"""

    @classmethod
    def of(cls, sae: SAE, x: Float[Tensor, "row d_model"]) -> "Encoded":
        """Raises `BelongingError` for activations of another width."""
        found = active_latents(sae, x)
        row, latent, z = (torch.from_numpy(part).to(sae.device) for part in (found.token, found.latent, found.z))
        return cls(sae, x, row, latent, z.to(sae.dtype))

    def take(self, keep: Bool[Tensor, "row"]) -> "Encoded":
        """Some of the tokens."""
        inside = keep[self.row]
        place = keep.cumsum(0) - 1
        return Encoded(self.sae, self.x[keep], place[self.row[inside]], self.latent[inside], self.z[inside])

    def mean(self, values: Float[Tensor, "entry"]) -> Float[Tensor, "d_sae"]:
        """Mean over all tokens, active or not, of a value of each entry; float64, so that near ties do not depend on the order of sums."""
        return self.total(values) / max(1, len(self.x))

    def total(self, values: Float[Tensor, "entry"]) -> Float[Tensor, "d_sae"]:
        """The sum, float64."""
        total = torch.zeros(self.sae.d_sae, dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.latent, values.double())

    @property
    def frequency(self) -> Float[Tensor, "d_sae"]:
        """Share of the tokens at which each latent is active."""
        return self.mean(torch.ones_like(self.z))

    @property
    def dose(self) -> Float[Tensor, "d_sae"]:
        """Expected dose: mean |z_i|·‖d_i‖ over all tokens."""
        return self.mean(self.z.abs()) * self.sae.W_dec.double().norm(dim=-1)

    def contribution(self, latents: Int[Tensor, "latent"], rest: bool = False) -> Float[Tensor, "row d_model"]:
        """Σ z_i·d_i over the latents given, or over all others (`rest`); exactly 0 where none of them is active."""
        chosen = torch.zeros(self.sae.d_sae, dtype=torch.bool, device=self.z.device)
        chosen[latents] = True
        some = (chosen[self.latent] != rest).nonzero()[:, 0]
        return weighted_sums(self.z[some], self.sae.W_dec, self.latent[some], self.row[some], len(self.x))


def mean_difference(own: Encoded, others: Encoded) -> Float[Tensor, "d_sae"]:
    """(mean |z_i| on tokens of the concept − mean |z_i| on others)·‖d_i‖, in units of x.

    Means are over all tokens, active or not. Source: arXiv:2606.15054; |z| for latents of either sign and the factor ‖d_i‖, 1 for
    unit rows, are ours.
    """
    return own.dose - others.dose


def probe_difference(own: Encoded, others: Encoded, weight: Float[Tensor, "d_model"]) -> Float[Tensor, "d_sae"]:
    """<w, d_i>·(mean z_i on tokens of the concept − mean z_i on others): the latent's part in the probe's separation, in logits.

    Source: arXiv:2606.15054 (probe weight × mean difference), carried to decoder rows.
    """
    return (own.sae.W_dec.double() @ weight.to(own.z.device).double()) * (own.mean(own.z) - others.mean(others.z))


def attribution(own: Encoded, gradient: Float[Tensor, "row d_model"]) -> Float[Tensor, "d_sae"]:
    """Σ z_i·<d_i, g> over tokens, g the gradient of the target logit: its first-order fall when the latent is subtracted."""
    return own.total(own.z.double() * _products(own, gradient.to(own.sae.W_dec)))


def _products(own: Encoded, gradient: Float[Tensor, "row d_model"], many: int = 2**16) -> Float[Tensor, "entry"]:
    """<d_i, g_row> at each entry, some at a time."""
    found = torch.empty_like(own.z, dtype=torch.float64)
    for some in torch.arange(len(own.z), device=own.z.device).split(many):
        found[some] = (own.sae.W_dec[own.latent[some]] * gradient[own.row[some]]).sum(-1, dtype=torch.float64)
    return found


def best(score: Float[Tensor, "d_sae"], active: Bool[Tensor, "d_sae"]) -> Int[Tensor, "latent"]:
    """The latents that are active, the largest score first; equal ones by number."""
    order = score.argsort(descending=True, stable=True)
    return order[active[order]]


def target_gradient(
    passes: Passes,
    texts: Sequence[int],
    reads: Bool[Tensor, "prompt pos"],
    targets: Sequence[int],
    *,
    batch_tokens: int | None = None,
) -> Float[Tensor, "row d_model"]:
    """∂(target logit)/∂x at the edited tokens of some texts, text after text, by one forward and backward pass a text.

        target logit = Σ over the text's reads of (mean logit of the targets − mean logit of the vocabulary) / number of reads

    A token's gradient includes all later reads of its text. Runs only the blocks above the site, `batch_tokens` at once
    (default 512 on the CPU, 8192 elsewhere).
    """
    ids = torch.as_tensor(list(targets), device=passes.device)
    index = torch.as_tensor(list(texts), device=passes.device)
    found = []
    many = batch_tokens or (512 if passes.device.type == "cpu" else 8192)
    size = max(1, many // int(passes.length[index].max()))
    for some in index.split(size):
        width = int(passes.length[some].max())
        edited = passes.edited[some, :width]
        leaf = torch.zeros(int(edited.sum()), passes.model.d_model, device=passes.device, dtype=passes.model.dtype)
        found.append(leaf)
        if not len(leaf):
            continue
        leaf.requires_grad_(True)
        with passes.recording.held(), torch.enable_grad():
            hidden = passes.above(some, width, "gradient", lambda old, leaf=leaf: old + leaf)
            at = reads[some, :width].nonzero(as_tuple=True)
            logits = unembed(passes.recording, hidden[at]).to(torch.promote_types(leaf.dtype, torch.float32))
            centred = logits[:, ids].mean(-1) - logits.mean(-1)
            share = 1.0 / reads[some, :width].sum(-1).clamp(min=1)
            (found[-1],) = torch.autograd.grad((centred * share[at[0]]).sum(), leaf)
    return torch.cat(found)
