"""The planted model is what it says: linear above the site, one latent on one logit."""

import torch

from tests.planted import GAIN, SITE, TOKEN, planted_model
from tests.tiny import D_MODEL, alone, prompts


def test_latent_0_raises_one_logit_by_a_known_amount():
    hf, sae = planted_model()
    tokens = prompts((9,))[0]
    clean = alone("llama", hf, tokens, SITE, 5, lambda x: x)
    moved = alone("llama", hf, tokens, SITE, 5, lambda x: x + 3 * sae.W_dec[0]) - clean
    expected = torch.zeros_like(moved)
    expected[TOKEN] = 3 * GAIN
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    one, other = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [alone("llama", hf, tokens, SITE, 5, lambda x, d=d: x + d) - clean for d in (one, other, one + other)]
    torch.testing.assert_close(parts[0] + parts[1], parts[2], rtol=0, atol=1e-12)
