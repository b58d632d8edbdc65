"""Gradients against central differences, the sampled Fisher form against KL. The model has LayerNorm, which stays in float64."""

import numpy as np
import torch

from diagnostics.atlas import scores as atlas_scores
from diagnostics.atlas.scores import attributions, token_gradients
from interventions import Site, record, wrap
from interventions.effects import intervened_logits
from tests.tiny import D_MODEL, N_LAYERS, prompts, tiny_model

SITE = Site(3)
PROMPT, POSITION = torch.tensor([0, 0, 2]), torch.tensor([3, 11, 6])
EVERY = np.array([True, True, True])


def made(samples: int = 4, steps: int = 6, on_path: np.ndarray = EVERY):
    recording = record(wrap(tiny_model("gpt2", dtype=torch.float64)), prompts(), [SITE])
    x = recording.at(SITE, PROMPT, POSITION)
    without = x - 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    stream = torch.Generator().manual_seed(2)
    found = token_gradients(
        recording, SITE, PROMPT, POSITION, without, on_path, steps=steps, samples=samples, generator=stream
    )
    return recording, x, without, found


def logits(recording, vectors, site: Site = SITE):
    return intervened_logits(recording, site, PROMPT, POSITION, vectors)


def test_gradients_match_central_differences():
    """Central differences of 1e-4 in float64: their error is h² times a third derivative."""
    recording, x, _, found = made()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    h, top = 1e-4, logits(recording, x).argmax(-1)[:, None]
    up, down = (logits(recording, x + s * h * v).log_softmax(-1).gather(1, top)[:, 0] for s in (1, -1))
    torch.testing.assert_close((found.gradient * v).sum(-1).double(), (up - down) / (2 * h), rtol=1e-4, atol=1e-6)
    last = Site(N_LAYERS - 1)
    end = recording.at(last, PROMPT, POSITION)
    up, down = ((out := logits(recording, end + s * h * v, last)).gather(1, top)[:, 0] - out.mean(-1) for s in (1, -1))
    torch.testing.assert_close((found.direct * v).sum(-1).double(), (up - down) / (2 * h), rtol=1e-4, atol=1e-6)


def test_integrated_gradients_are_complete():
    recording, x, without, found = made(steps=24)
    top = logits(recording, x).argmax(-1)[:, None]
    all_of_it = [logits(recording, v).log_softmax(-1).gather(1, top)[:, 0] for v in (x, without)]
    whole = ((x - without) * found.integrated).sum(-1)
    torch.testing.assert_close(whole + found.gap, (all_of_it[0] - all_of_it[1]).double(), rtol=1e-4, atol=1e-5)
    assert float(found.gap.abs().max()) < 1e-3


def test_sampled_fisher_form_approximates_kl():
    """300 draws: five standard errors of the mean of squares."""
    recording, x, _, found = made(samples=300, steps=1)
    delta = 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    got = attributions(found, torch.arange(3), lambda some: delta[some])["fisher"].double()
    clean, moved = logits(recording, x).log_softmax(-1), logits(recording, x - delta).log_softmax(-1)
    p = clean.exp()
    kl = (p * (clean - moved)).sum(-1)
    slope = ((found.fisher * delta).sum(-1).double() ** 2 / 2).std(0) / 300**0.5
    assert ((got - kl).abs() < 5 * slope + 0.02 * kl).all() and (slope < 0.2 * kl).all()


def test_tokens_without_a_path_have_nan():
    _, _, _, found = made(on_path=np.array([True, False, True]))
    assert found.integrated.isnan().any(1).tolist() == [False, True, False]
    assert found.fisher.isnan().any(2).any(0).tolist() == [False, True, False] and len(found.gap) == 2
    _, _, _, none = made(on_path=~EVERY)
    assert none.integrated.isnan().all() and none.fisher.shape == (4, 3, D_MODEL) and len(none.gap) == 0


def test_attributions_are_inner_products(monkeypatch):
    _, _, _, found = made()
    token = torch.tensor([2, 0, 0, 1, 2])
    delta = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr(atlas_scores, "_PRODUCTS", 2 * D_MODEL)  # two entries at once
    got = attributions(found, token, lambda some: delta[some])
    for name in ("direct", "gradient", "integrated"):
        expected = (getattr(found, name)[token] * delta).sum(-1)
        torch.testing.assert_close(got[name], expected)
    squares = (found.fisher[:, token] * delta).sum(-1) ** 2
    torch.testing.assert_close(got["fisher"], squares.mean(0) / 2)
