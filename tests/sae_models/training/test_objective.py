"""The pass of a training step against plain dense autograd with the same mask, in float64."""

import itertools

import pytest
import torch

from sae_models.errors import SAEError
from sae_models.selectors import AbsTopK
from sae_models.training.objective import auxiliary_loss, forward_pass, token_weights, wider
from tests.sae_models.built import (
    ALL,
    D_SAE,
    SELECTORS,
    AbsBatchTopK,
    auxiliary,
    close,
    decoded,
    drawn,
    each_pair,
    inputs,
    mask_of,
    normalised,
    random_sae,
    scores,
    with_selector,
)

BYPASSES = [name for name in ALL if name.startswith("bypass")]
SIGNED = {"abstopk": AbsTopK, "absbatchtopk": AbsBatchTopK}


def made(name, selector, kind="none"):
    if selector in SIGNED:
        return with_selector(random_sae(name, kind=kind), SIGNED[selector](5))
    return random_sae(name, selector, kind)


def dense(sae, x, times=1):
    """Activations and reconstruction of a training pass, without anything sparse."""
    s = scores(sae, x)
    f = sae.selector.value(s) * mask_of(sae, s, times)
    return f, decoded(sae, x, f)[0]


def activations_of(done):
    """`[row, d_sae]`, dense."""
    if done.support is None:
        return done.activation
    whole = torch.zeros(len(done.target), D_SAE, dtype=done.target.dtype)
    return whole.index_put((done.support.row, done.support.latent), done.activation)


def gradients(sae, value):
    """Of every parameter, by name; 0 where it has none."""
    named = [(name, p) for name, p in sae.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named, found, strict=True)}


def objective(target, output, f):
    """Something that every part of a pass matters for, and no two of them alike."""
    back = drawn(*target.shape, seed=7)
    return ((target - output).square() * back.abs()).sum() + (output * back).sum() + (f**2 * torch.arange(D_SAE)).sum()


def assert_same_gradients(sae, one, other):
    found, expected = gradients(sae, one), gradients(sae, other)
    for name, gradient in expected.items():
        close(found[name], gradient, msg=lambda m, name=name: f"{name}: {m}")
        assert gradient.any(), name


@pytest.mark.parametrize(("name", "selector", "kind"), each_pair(ALL, [*SELECTORS, *SIGNED], ["none", "layer_norm"]))
def test_training_pass_matches_dense_autograd(name, selector, kind):
    sae, x = made(name, selector, kind), inputs()
    done = forward_pass(sae, x)
    f, output = dense(sae, x)
    assert (done.support is None) == (selector == "relu")
    close(activations_of(done), f)
    close(done.output, output)
    close(done.target, normalised(sae, x)[0])
    close(done.error, normalised(sae, x)[0] - output)
    target = normalised(sae, x)[0]
    assert_same_gradients(sae, objective(done.target, done.output, activations_of(done)), objective(target, output, f))


def test_training_pass_without_subtracting_b_dec():
    sae, x = random_sae("standard"), inputs()
    sae.subtract_b_dec = False
    s = x @ sae.score.W_enc.T + sae.score.b_enc
    f = s.relu() * mask_of(sae, s)
    done = forward_pass(sae, x)
    output = f @ sae.W_dec + sae.b_dec
    close(done.output, output)
    assert_same_gradients(sae, objective(x, done.output, activations_of(done)), objective(x, output, f))


@pytest.mark.parametrize("selector", ["topk", "batchtopk"])
def test_batch_larger_than_a_chunk_of_scores(selector, monkeypatch):
    sae, x = random_sae("standard", selector), inputs()
    expected = forward_pass(sae, x).output
    monkeypatch.setattr("sae_models.training.objective._SCORES_AT_ONCE", 7 * D_SAE)
    close(forward_pass(sae, x).output, expected)


@pytest.mark.parametrize(("name", "selector"), [*zip(BYPASSES, itertools.cycle(SELECTORS), strict=False)])
def test_bypass_rows_without_active_latents_have_finite_gradients(name, selector):
    sae, x = random_sae(name, selector), inputs()
    sae.score.W_enc.data[:, 0] = -10
    x[:4, 0] += 200
    done = forward_pass(sae, x)
    assert not activations_of(done)[:4].any() and activations_of(done)[4:].any()
    close(done.output[:4], sae.b_dec.expand(4, -1))
    f, output = dense(sae, x)
    found = gradients(sae, objective(done.target, done.output, activations_of(done)))
    expected = gradients(sae, objective(x, output, f))
    for key, gradient in found.items():
        assert gradient.isfinite().all()
        close(gradient, expected[key])


@pytest.mark.parametrize("name", ["standard", "cosine", "bypass"])
@pytest.mark.parametrize("selector", ["topk", "batchtopk"])
def test_batch_without_active_latents_trains_only_b_dec(name, selector):
    sae, x = random_sae(name, selector), inputs()
    sae.score.W_enc.data[:, 0] = -10
    if sae.score.b_enc is not None:
        sae.score.b_enc.data.fill_(-1)
    x[:, 0] += 200
    done = forward_pass(sae, x)
    assert len(done.activation) == 0
    close(done.output, sae.b_dec.expand(x.shape))
    found = gradients(sae, done.error.square().sum())
    assert found.pop("b_dec").any() and not any(gradient.any() for gradient in found.values())


# Multi-TopK


@pytest.mark.parametrize(
    ("name", "selector", "times"),
    each_pair(["standard", "cosine", "bypass", "aligned"], ["topk", "batchtopk", *SIGNED], [2, 4, 20]),
)
def test_multi_topk_matches_dense_autograd(name, selector, times):
    sae, x = made(name, selector), inputs()
    done = forward_pass(sae, x)
    found, (_, output) = wider(sae, done, times), dense(sae, x, times)
    close(found, output)
    assert not torch.allclose(found, done.output)
    back = drawn(*x.shape, seed=7)
    assert_same_gradients(sae, (found * back).sum(), (output * back).sum())
    again = forward_pass(sae, x)  # the wider search leaves no trace
    assert torch.equal(again.output, done.output)


def test_multi_topk_with_relu_raises():
    sae = random_sae("standard", "relu")
    with pytest.raises(SAEError, match="Multi-TopK with selector 'relu'; expected topk or batchtopk"):
        wider(sae, forward_pass(sae, inputs()), 4)


# Dead latents


@pytest.mark.parametrize(
    ("name", "k", "selector"),
    each_pair(
        ["standard", "cosine", "cosine-group3", "bypass", "aligned", "tied"],
        [1, 3, 6, 50],
        ["topk", "batchtopk", "abstopk"],
    ),
)
def test_auxiliary_loss_and_gradients(name, selector, k):
    sae, x, dead = made(name, selector), inputs(), [1, 2, 12, 14, 27, 39]
    done = forward_pass(sae, x)
    factor = torch.ones(len(x)) if done.factor is None else done.factor[:, 0].detach()
    found = auxiliary_loss(sae, done, torch.tensor(dead), k)
    expected = auxiliary(sae, x, dead, k, done.error.detach(), factor)
    close(found, expected)
    of_found, of_expected = gradients(sae, found), gradients(sae, expected)
    for name, gradient in of_expected.items():
        close(of_found[name], gradient)
    alive = [i for i in range(D_SAE) if i not in dead]
    assert of_found["W_dec"].any() and not of_found["W_dec"][alive].any()


def test_auxiliary_loss_of_zero_decoder_rows():
    sae, x = random_sae("standard"), inputs()
    done = forward_pass(sae, x)
    sae.W_dec.data[[3, 4]] = 0
    error = done.error.detach()
    whole = error.square().sum() / (error - error.mean(dim=0)).square().sum()
    close(auxiliary_loss(sae, done, torch.tensor([3, 4]), 2), whole)


# Reweighting


def test_token_weights_have_mean_1():
    x_c = drawn(20, 6).requires_grad_()
    for power in (1, 2):
        found = token_weights(x_c, power)
        assert not found.requires_grad
        close(found.mean(), torch.tensor(1.0, dtype=found.dtype))
        close(found * x_c.norm(dim=1) ** power, (found * x_c.norm(dim=1) ** power)[:1].expand(20))
    assert token_weights(torch.zeros(3, 6), 2).tolist() == [1.0, 1.0, 1.0]
