"""What is taken from the stream: random latents, placebos, and what is kept."""

import numpy as np
import torch

from diagnostics.ablation_arms import NEAREST, Arm, frequency_matched, tangents
from diagnostics.latent_ranking import Encoded
from tests.sae_models.built import AbsTopK, inputs, random_sae, with_selector


def encoded() -> Encoded:
    sae = with_selector(random_sae("standard"), AbsTopK(5)).requires_grad_(False)
    return Encoded.of(sae, inputs())


def test_random_latents_are_others_of_like_frequency_each_once():
    frequency = torch.linspace(0, 1, 200)
    candidates = torch.ones(200, dtype=torch.bool)
    selected = torch.tensor([100, 50, 150, 10])
    candidates[selected] = False
    drawn = frequency_matched(selected, frequency, candidates, 0, "x").tolist()
    assert len(set(drawn)) == 4 and not set(drawn) & set(selected.tolist())
    assert all(abs(one - other) <= NEAREST for one, other in zip(drawn, selected.tolist(), strict=True))
    assert drawn == frequency_matched(selected, frequency, candidates, 0, "x").tolist()
    assert drawn != frequency_matched(selected, frequency, candidates, 1, "x").tolist()
    assert (
        drawn[:2] == frequency_matched(selected[:2], frequency, candidates, 0, "x").tolist()
    )  # N grows, none is redrawn
    few = torch.arange(200) < 3  # latent 0 never fires
    assert sorted(frequency_matched(selected, frequency, few, 0, "x").tolist()) == [1, 2]


def test_a_placebo_has_the_norm_and_the_angle_of_the_selected_edit():
    some = encoded()
    keep = torch.arange(len(some.x)) % 2 == 0
    towards = tangents(some.x, inputs(40, seed=5), 3, "x")
    latents = some.latent.unique()[:6]
    (selected, missing), (placebo, unformed) = (
        Arm(name, latents, by).delta(some, keep) for name, by in (("selected", None), ("placebo", lambda k: towards[k]))
    )
    assert missing == unformed == 0
    x = some.x[keep]
    for size in (lambda d: d.norm(dim=1), lambda d: (x + d).norm(dim=1), lambda d: ((x + d) * x).sum(1)):
        torch.testing.assert_close(size(placebo), size(selected), rtol=1e-5, atol=1e-5)
    fires = selected.any(1)
    assert fires.any() and not placebo[~fires].any()
    assert not torch.allclose(placebo[fires], selected[fires], atol=0.1)


def test_a_placebo_that_does_not_exist_is_counted_and_left_out():
    """Where an edit leaves nothing of x there is no direction to turn to."""
    some = encoded()
    sae = some.sae
    row, latent, z = some.row[:1], some.latent[:1], some.z[:1]
    x = (z[:, None] * sae.W_dec[latent]).repeat(2, 1)
    alone = Encoded(sae, x, row * 0, latent, z)
    towards = torch.full_like(x, torch.nan)
    found, missing = Arm("placebo", latent, lambda keep: towards[keep]).delta(alone, torch.tensor([True, True]))
    assert missing == 1 and not found.any()


def test_keeping_all_or_ablating_none_is_the_identity():
    some = encoded()
    every = torch.ones(len(some.x), dtype=torch.bool)
    none, latents = some.latent[:0], some.latent.unique()
    assert not Arm("selected", none).delta(some, every)[0].any()
    assert not Arm("keep", latents).delta(some, every)[0].any()
    all_gone, none_kept = Arm("selected", latents).delta(some, every)[0], Arm("keep", none).delta(some, every)[0]
    assert torch.equal(all_gone, none_kept)
    left = some.x + none_kept
    error = some.x - (some.sae.encode(some.x) @ some.sae.W_dec + some.sae.offset(some.x))
    torch.testing.assert_close(left, some.sae.offset(some.x) + error, rtol=1e-5, atol=1e-4)  # z is kept in float32


def test_tangents_join_two_tokens_of_the_pool():
    pool = torch.arange(5.0)[:, None] ** 3 * torch.ones(1, 4)
    found = tangents(torch.zeros(50, 4), pool, 0, "x")
    known = {float(a - b) for a in pool[:, 0] for b in pool[:, 0] if a != b}
    assert set(found[:, 0].tolist()) <= known and len(np.unique(found[:, 0])) > 5
