"""A model and a dictionary whose effects are known beforehand: nothing acts above the site but the unembedding."""

import torch
from torch import nn

from interventions import Site
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import ReLU
from tests.tiny import D_MODEL, VOCAB, alone, fresh

SITE, TOKEN, GAIN, D_SAE = Site(3), 7, 2.0, 12


def planted_model(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, SAE]:
    """A llama and an SAE at `SITE`. The blocks above write nothing and the final norm is the identity, so that logits are linear
    in the stream; latent 0's decoder row, of norm 1, raises the logit of `TOKEN` by `GAIN` and no other. All decoder rows have norm
    1 but that of latent 1, 2; every latent is active at about half of the tokens."""
    hf = fresh("llama", dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    decoder = torch.randn(D_SAE, D_MODEL, generator=generator, dtype=dtype)
    decoder /= decoder.norm(dim=1, keepdim=True)
    decoder[1] *= 2
    with torch.no_grad():
        for block in hf.model.layers[SITE.layer + 1 :]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        hf.model.norm = nn.Identity()
        head = hf.lm_head.weight
        head /= 10  # logits of a few
        head -= (head @ decoder[0])[:, None] * decoder[0]
        head[TOKEN] += GAIN * decoder[0]
    assert head.shape == (VOCAB, D_MODEL)
    score = Inner(
        torch.randn(D_SAE, D_MODEL, generator=generator, dtype=dtype) / D_MODEL**0.5, torch.zeros(D_SAE, dtype=dtype)
    )
    sae = SAE(score, ReLU(), decoder, torch.zeros(D_MODEL, dtype=dtype), hook_name=SITE.hook_name)
    return hf, sae.requires_grad_(False)


def standing(
    name: str, hf: nn.Module, tokens: list[int], site: Site, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean logits at a position, and what stands at the site there, by a full forward pass."""
    seen = []
    logits = alone(name, hf, tokens, site, position, lambda x: seen.append(x) or x)
    return logits, seen[0]
