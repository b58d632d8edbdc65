"""A trained SAE read with the other score: what belongs to the dictionary, and what to the score that reads it."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from sae_models.errors import SAEError
from sae_models.sae import SAE
from sae_models.scores import Cosine, Direction, norm_of, spread


@torch.no_grad()
def swap_score(sae: SAE, sample: Float[Tensor, "row d_model"]) -> SAE:
    """A copy of an SAE that scores by direction alone where it scored by inner product, and the other way round:

        inner product → cosine     s_i = c·‖w_i‖·cos(x_c, w_i) + b_i
        cosine → inner product     s_i = e^{b_i}·c^{a_i − 1}·<x_c, ŵ_i> + β_i

    c is the median ‖x_c‖ of the sample; there both scores are the same, so that biases and thresholds keep their meaning.
    Source: arXiv:2606.15054 (score swap); that the scores meet at the median norm is our reconstruction.
    Raises `SAEError` for an SAE whose score is not known (a live object of another library) or that has a gate.
    """
    score = sae.score
    if sae.selector.kind == "gated" or score.kind not in ("inner", "tied", "aligned", "cosine", "direction"):
        raise SAEError(
            f"no other score for a {score.kind} SAE with {sae.selector.kind}; expected an inner product or a cosine"
        )
    log_c = norm_of(sae.centred(sample)).median().log()
    rows, d_sae = sae.encoder_rows().clone(), sae.d_sae
    one = torch.ones(1).to(rows)
    log_norm = rows.norm(dim=-1).clamp(min=1e-8).log()
    bias = torch.zeros(d_sae).to(rows) if score.b_enc is None else score.b_enc.clone()
    if isinstance(score, Cosine):
        a, b = one, spread(score.scale_b, d_sae).expand(d_sae) + (score.exponents() - 1) * log_c
    elif isinstance(score, Direction):
        a, b = one, -log_c.expand(d_sae) + (0 if score.unit else log_norm)
    else:
        a, b = 0 * one, log_c + log_norm
    swapped = copy.deepcopy(sae)
    swapped.score = Cosine(rows, bias, a, b.clone(), fixed=True)
    swapped.metadata["score_swapped_at_norm"] = float(log_c.exp())
    return swapped.requires_grad_(False)
