"""Rankings of latents, against dense sums and finite differences."""

import pytest
import torch

from diagnostics.concept_ablation.ranking import (
    Encoded,
    attribution,
    best,
    mean_difference,
    probe_difference,
    target_gradient,
)
from interventions import Site, record, wrap
from interventions.spliced import Passes
from sae_models.edits import keep_latents, zero_latents
from sae_models.selectors import AbsTopK
from tests.sae_models.built import drawn, inputs, random_sae, with_selector
from tests.tiny import D_MODEL, changed_in, prompts, tiny_model


def sae(signed: bool):
    found = random_sae("standard", "topk")
    return (with_selector(found, AbsTopK(5)) if signed else found).requires_grad_(False)


@pytest.mark.parametrize("signed", [False, True])
def test_contributions_match_the_latents_edits(signed):
    """Subtracting a set leaves x − Σ z_i·d_i, keeping one the rest; latents of both signs."""
    dictionary, x = sae(signed), inputs()
    dictionary.selector.k = 5
    z = dictionary.encode(x)
    assert bool((z < 0).any()) is signed
    encoded = Encoded.of(dictionary, x)
    some = encoded.latent.unique()[:4]
    tolerance = {"rtol": 1e-5, "atol": 1e-4}  # active latents are kept in float32
    torch.testing.assert_close(x - encoded.contribution(some), zero_latents(x, dictionary, some), **tolerance)
    torch.testing.assert_close(
        x - encoded.contribution(some, rest=True), keep_latents(x, dictionary, some), **tolerance
    )
    every = encoded.contribution(some[:0], rest=True)
    error = x - (z @ dictionary.W_dec + dictionary.offset(x))
    torch.testing.assert_close(x - every, error + dictionary.offset(x), **tolerance)
    assert not encoded.contribution(some[:0]).any()
    one = some[:1]
    fires = (z[:, one[0]] != 0)[:, None]
    assert not encoded.contribution(one)[~fires[:, 0]].any()


def test_token_subset_matches_encoding_it_alone():
    dictionary, x = sae(True), inputs()
    keep = torch.arange(len(x)) % 3 == 1
    part, alone = Encoded.of(dictionary, x).take(keep), Encoded.of(dictionary, x[keep])
    for name in ("row", "latent", "z", "x"):
        assert torch.equal(getattr(part, name), getattr(alone, name))
    z = dictionary.encode(x[keep])
    assert torch.equal(part.frequency, (z != 0).double().mean(0))
    expected = (z.abs().mean(0) * dictionary.W_dec.norm(dim=1)).double()
    torch.testing.assert_close(part.dose, expected, rtol=1e-5, atol=1e-6)


def test_scores_match_dense_sums():
    dictionary = sae(True)
    x, y = inputs(20), inputs(12, seed=4)
    own, others = Encoded.of(dictionary, x), Encoded.of(dictionary, y)
    z, w = (dictionary.encode(part).double() for part in (x, y))
    W_dec = dictionary.W_dec.double()
    length = W_dec.norm(dim=1)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(mean_difference(own, others), (z.abs().mean(0) - w.abs().mean(0)) * length, **tolerance)
    probe = drawn(x.shape[1], seed=2)
    expected = (W_dec @ probe.double()) * (z.mean(0) - w.mean(0))
    torch.testing.assert_close(probe_difference(own, others, probe), expected, **tolerance)
    gradient = drawn(*x.shape, seed=3)
    torch.testing.assert_close(attribution(own, gradient), (z * (gradient.double() @ W_dec.T)).sum(0), **tolerance)


def test_ties_are_broken_by_latent_number():
    score = torch.tensor([1.0, 3.0, 3.0, -1.0, 9.0])
    active = torch.tensor([True, True, True, True, False])
    assert best(score, active).tolist() == [1, 2, 0, 3]


def test_target_gradient_matches_a_full_pass():
    """A token's gradient includes its effect on all later measured positions of its text."""
    hf, tokens, site, targets = tiny_model("llama"), prompts((9, 6, 7)), Site(3), [3, 8]
    recording = record(wrap(hf), tokens, [site], keep_cache=False)
    counted = torch.arange(9)[None] < recording.length[:, None]
    counted[:, 0] = False
    reads = torch.zeros(3, 9, dtype=torch.bool)
    reads[0, [2, 5]], reads[2, [4]] = True, True
    found = target_gradient(Passes(recording, site, counted), [0, 2], reads, targets, batch_tokens=9)
    expected = []
    for text in (0, 2):
        leaf = torch.zeros(len(tokens[text]), D_MODEL, requires_grad=True)
        remove = changed_in("llama", hf, site, lambda x, leaf=leaf: x + leaf)
        logits = hf(input_ids=torch.tensor([tokens[text]])).logits[0][reads[text].nonzero()[:, 0]]
        remove()
        (logits[:, targets].mean(-1) - logits.mean(-1)).mean().backward()
        assert leaf.grad is not None
        expected.append(leaf.grad[1:])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-6)
    assert not found[5:8].any() and found[:5].any(-1).all()  # after the last read of text 0
    counted[0] = False  # a batch without a token to edit
    late = target_gradient(Passes(recording, site, counted), [0, 2], reads, targets, batch_tokens=9)
    torch.testing.assert_close(late, torch.cat(expected)[8:], rtol=1e-3, atol=1e-6)


def test_near_ties_are_summed_in_double_precision():
    """Two latents active at 10,000 tokens, one by one unit in the last place stronger: float32 sums would not tell which."""
    dictionary, n = sae(False), 10_000
    pair = torch.tensor([1000.0, torch.nextafter(torch.tensor(1000.0), torch.tensor(2000.0))])
    row = torch.arange(n).repeat_interleave(2)
    some = Encoded(dictionary, inputs(1).expand(n, -1), row, torch.arange(2).repeat(n), pair.repeat(n))
    total = some.total(some.z)
    assert float(total[1] - total[0]) == pytest.approx(n * float(pair[1].double() - pair[0].double()), rel=1e-9)
