"""Edits of each condition: selected and random latents, placebos, and latents that are kept."""

import numpy as np
import pytest
import torch

from diagnostics.concept_ablation.conditions import WITHIN, Condition, directions, dose_matched
from diagnostics.concept_ablation.ranking import Encoded
from sae_models.selectors import AbsTopK
from tests.sae_models.built import inputs, random_sae, with_selector


def encoded() -> Encoded:
    sae = with_selector(random_sae("standard"), AbsTopK(5)).requires_grad_(False)
    return Encoded.of(sae, inputs())


def test_random_latents_are_distinct_and_dose_matched():
    dose = torch.exp(torch.linspace(-6, 3, 400))
    active = torch.ones(400, dtype=torch.bool)
    selected = torch.tensor([200, 120, 300, 60])
    drawn = dose_matched(selected, dose, active, 0, "x").tolist()
    assert len(set(drawn)) == 4 and not any(a == b for a, b in zip(drawn, selected.tolist(), strict=True))
    assert all(1 / WITHIN <= dose[a] / dose[b] <= WITHIN for a, b in zip(drawn, selected.tolist(), strict=True))
    assert drawn == dose_matched(selected, dose, active, 0, "x").tolist()
    assert drawn != dose_matched(selected, dose, active, 1, "x").tolist()
    assert drawn[:2] == dose_matched(selected[:2], dose, active, 0, "x").tolist()  # N grows, none is redrawn
    top = torch.tensor([399])  # none within the factor: the nearest
    assert dose_matched(top, dose, active & (torch.arange(400) < 100), 0, "x").tolist() == [99]
    few = torch.tensor([0.0, 1, 2, 3, 4])  # latent 0 moves nothing
    assert dose_matched(torch.tensor([4]), few, few >= 0, 0, "x").tolist() == [3]
    every = dose_matched(torch.arange(1, 5), few, few >= 0, 0, "x").tolist()
    assert len(set(every)) == len(every) >= 3 and not any(a == b for a, b in zip(every, range(1, 5), strict=False))


def test_random_latents_have_the_total_dose_of_the_selected_ones():
    """Latents selected at random, with doses over four decades: the totals agree at every N, and larger N only add latents."""
    generator = torch.Generator().manual_seed(0)
    dose = torch.exp(2 * torch.randn(3000, generator=generator))
    order = torch.randperm(3000, generator=generator)
    active = torch.ones(3000, dtype=torch.bool)
    drawn = {n: dose_matched(order[:n], dose, active, 0, "x") for n in (5, 20, 100, 500)}
    for n, found in drawn.items():
        assert float(dose[found].sum()) == pytest.approx(float(dose[order[:n]].sum()), rel=0.15)
        assert found.tolist() == drawn[500][:n].tolist()
    # as many of the selected ones as chance says: 500 of 3,000, with a standard error of 1.7 %
    among = np.isin(drawn[500].numpy(), order[:500].numpy()).mean()
    assert among == pytest.approx(1 / 6, abs=0.07)


def test_placebo_has_the_norm_and_angle_of_the_selected_edit():
    some = encoded()
    keep = torch.arange(len(some.x)) % 2 == 0
    towards = directions(1, inputs(40, seed=5), 3, "x").expand(len(some.x), -1)  # of one text
    latents = some.latent.unique()[:6]
    (selected, missing), (placebo, unformed) = (
        Condition(name, latents, by).delta(some, keep)
        for name, by in (("selected", None), ("placebo", lambda k: towards[k]))
    )
    assert missing == unformed == 0
    x = some.x[keep]
    for size in (lambda d: d.norm(dim=1), lambda d: (x + d).norm(dim=1), lambda d: ((x + d) * x).sum(1)):
        torch.testing.assert_close(size(placebo), size(selected), rtol=1e-5, atol=1e-5)
    fires = selected.any(1)
    assert fires.any() and not placebo[~fires].any()
    assert not torch.allclose(placebo[fires], selected[fires], atol=0.1)
    turned = (placebo - (placebo * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True) * x)[fires]
    along = towards[keep][fires]
    along = along - (along * x[fires]).sum(1, keepdim=True) / x[fires].square().sum(1, keepdim=True) * x[fires]
    torch.testing.assert_close(torch.cosine_similarity(turned, along), torch.ones_like(along[:, 0]))


def test_placebo_of_one_latent_is_coherent_over_a_text():
    """60 tokens, each edited by a small multiple of one decoder row: coherence, ‖Σ Δx‖ / Σ ‖Δx‖, is 1, and that of placebos close."""
    some = encoded()
    latent = some.latent.bincount().argmax()
    direction = directions(1, inputs(40, seed=5), 3, "x")
    x = torch.randn(60, some.x.shape[1], generator=torch.Generator().manual_seed(1)).to(some.x) * 10
    row = torch.arange(60)
    alone = Encoded(some.sae, x, row, latent.expand(60), torch.linspace(0.5, 1, 60).to(some.z))
    every = torch.ones(60, dtype=torch.bool)

    def coherence(towards):
        delta, _ = Condition("placebo", latent[None], towards).delta(alone, every)
        return float(delta.sum(0).norm() / delta.norm(dim=1).sum())

    one_a_text = coherence(lambda keep: direction.expand(60, -1))
    one_a_token = coherence(lambda keep: directions(60, inputs(40, seed=5), 3, "x"))
    assert coherence(None) == pytest.approx(1, abs=1e-5)
    assert one_a_text > 0.9 and one_a_token < 0.5


def test_missing_placebos_are_counted_and_left_out():
    """Where an edit leaves nothing of x there is no direction to turn to."""
    some = encoded()
    sae = some.sae
    row, latent, z = some.row[:1], some.latent[:1], some.z[:1]
    x = (z[:, None] * sae.W_dec[latent]).repeat(2, 1)
    alone = Encoded(sae, x, row * 0, latent, z)
    towards = torch.full_like(x, torch.nan)
    found, missing = Condition("placebo", latent, lambda keep: towards[keep]).delta(alone, torch.tensor([True, True]))
    assert missing == 1 and not found.any()


def test_keeping_all_or_ablating_none_is_the_identity():
    some = encoded()
    every = torch.ones(len(some.x), dtype=torch.bool)
    none, latents = some.latent[:0], some.latent.unique()
    assert not Condition("selected", none).delta(some, every)[0].any()
    assert not Condition("keep", latents).delta(some, every)[0].any()
    all_gone, none_kept = (
        Condition("selected", latents).delta(some, every)[0],
        Condition("keep", none).delta(some, every)[0],
    )
    assert torch.equal(all_gone, none_kept)
    left = some.x + none_kept
    error = some.x - (some.sae.encode(some.x) @ some.sae.W_dec + some.sae.offset(some.x))
    torch.testing.assert_close(left, some.sae.offset(some.x) + error, rtol=1e-5, atol=1e-4)  # z is kept in float32


def test_directions_are_differences_of_distinct_pool_tokens():
    pool = (torch.arange(5.0)[:, None] ** 3 * torch.ones(1, 4)).repeat(2, 1)
    found = directions(50, pool, 0, "x")
    known = {float(a - b) for a in pool[:, 0] for b in pool[:, 0] if a != b}
    assert set(found[:, 0].tolist()) <= known and len(np.unique(found[:, 0])) > 5
    assert torch.equal(found[:20], directions(50, pool, 0, "x")[:20]) and found[0].tolist() == found[0, :1].tolist() * 4
    assert not directions(3, pool[:1], 0, "x").any()
