"""A model whose stream says which token patterns end at each token, and an SAE with a latent for each."""

import torch
from torch import nn

from interventions import Site
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import AbsTopK
from tests.tiny import VOCAB, llama

SITE, PAD, D_MODEL = Site(1), 40, 104
PATTERNS = (((5, -1, 7), 1.0), ((11,), 1.0), ((12, 13), -1.0))
"""in reading order, −1 for any token, and the activation: latent i fires where pattern i ends, the last with negative sign"""
KINDS = (5, 7, 11, 12, 13, *range(20, 26))


class Planted(nn.Module):
    """In place of a block: the stream's first coordinates say the token; coordinate VOCAB + i says whether pattern i ends there."""

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        said = hidden.clone()
        for i, (pattern, value) in enumerate(PATTERNS):
            here = torch.full_like(hidden[..., 0], value)
            for back, token in enumerate(reversed(pattern)):
                there = torch.nn.functional.pad(hidden, (0, 0, back, 0))[:, : hidden.shape[1]]
                here = here * (there[..., :VOCAB].sum(-1) if token == -1 else there[..., token])
            said[..., VOCAB + i] = here
        return said


def planted_patterns() -> tuple[nn.Module, SAE]:
    """A llama whose embeddings are the tokens' unit vectors and whose block 1 is `Planted`, block 0 writing nothing; the SAE at `SITE`."""
    hf = llama(hidden_size=D_MODEL, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB)
    with torch.no_grad():
        hf.model.embed_tokens.weight.copy_(torch.eye(VOCAB, D_MODEL))
        hf.model.layers[0].self_attn.o_proj.weight.zero_()
        hf.model.layers[0].mlp.down_proj.weight.zero_()
    hf.model.layers[1] = Planted()
    rows = torch.eye(D_MODEL)[VOCAB : VOCAB + len(PATTERNS)]
    sae = SAE(
        Inner(rows.clone(), torch.zeros(len(rows))),
        AbsTopK(len(rows)),
        rows.clone(),
        torch.zeros(D_MODEL),
        hook_name=SITE.hook_name,
    )
    return hf, sae.requires_grad_(False)


def planted_prompts(n: int = 40, length: int = 30) -> list[list[int]]:
    """Random prompts of few tokens, so that every pattern occurs."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.tensor(KINDS)
    return [kinds[torch.randint(len(kinds), (length - i % 5,), generator=generator)].tolist() for i in range(n)]
