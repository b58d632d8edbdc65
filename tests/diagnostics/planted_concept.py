"""A tiny model and dictionary in which one latent raises one logit by a known amount, and nothing else does anything.

Blocks that add nothing, so that x is the token's embedding; token `CONCEPT` alone has `SIZE` in coordinate 0, which is all that the
unembedding reads, into the logit of `TARGET` alone. Latent 0 is that coordinate, z = ±SIZE and d = ±e_0; latent 1 is a coordinate
that the unembedding does not read, active at tokens `CONCEPT` and `OTHER`; latent 2 one active at `OTHER` alone.
"""

import torch

from interventions import wrap
from interventions.models.causal_model import CausalModel
from sae_models.architectures import build, named
from sae_models.sae import SAE
from sae_models.selectors import AbsTopK
from tests.tiny import D_MODEL, VOCAB, blocks, fresh

CONCEPT, OTHER, TARGET, SIZE, LOGIT = 7, 8, 30, 5.0, 2.0


@torch.no_grad()
def planted_model() -> CausalModel:
    hf = fresh("llama")
    for block in blocks("llama", hf):
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    embedding = hf.get_input_embeddings().weight
    embedding[:, :3] = 0
    embedding[CONCEPT, 0] = SIZE
    embedding[CONCEPT, 1] = embedding[OTHER, 1] = 1.0
    embedding[OTHER, 2] = 2.0
    hf.model.norm.weight.fill_(1)
    head = torch.zeros(VOCAB, D_MODEL)
    head[TARGET, 0] = LOGIT
    hf.get_output_embeddings().weight.copy_(head)
    return wrap(hf)


def planted_sae(signed: bool, layer: int = 2) -> SAE:
    """Of the stream after a block; latents of either sign where `signed`: there z_0 is −SIZE and d_0 is −e_0."""
    where = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    sae = build(named("standard:relu"), 6, 2, torch.randn(9, D_MODEL), torch.Generator().manual_seed(0), **where)
    sae.requires_grad_(False)
    sign = -1.0 if signed else 1.0
    rows = torch.eye(D_MODEL)[:6].clone()
    rows[3:] = 0
    sae.score.W_enc.copy_(rows)
    sae.score.b_enc.zero_()
    sae.b_dec.zero_()
    sae.W_dec.copy_(torch.eye(D_MODEL)[:6])
    sae.score.W_enc[0] *= sign
    sae.W_dec[0] *= sign
    if signed:
        sae.selector = AbsTopK(6)
    return sae


def size_read() -> float:
    """The logit of the target at token `CONCEPT`: LOGIT·x_0/rms(x)."""
    model = planted_model()
    x = model.hf.get_input_embeddings().weight[CONCEPT].double()
    eps = model.config.rms_norm_eps
    return float(LOGIT * x[0] / (x.square().mean() + eps).sqrt())
