"""Scores against their equations: which of them are the same, and what they do not see."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_models.errors import SAEError
from sae_models.scores import Cosine, Direction, Tied, norm_of, spread, starting_scale, unit_rows
from tests.sae_models.built import ALL, D_MODEL, D_SAE, close, drawn, each, inputs, random_sae, scores

W, W_DEC, BIAS = drawn(D_SAE, D_MODEL, seed=1), drawn(D_SAE, D_MODEL, seed=2), drawn(D_SAE, seed=3)
NO_BIAS = torch.zeros(D_SAE, dtype=torch.float64)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def cosine(a, b, delta=None, bias=BIAS, **options):
    return Cosine(W.clone(), bias.clone(), a, b, delta, **options)


@pytest.mark.parametrize("name", ALL)
def test_single_entries_match_the_whole_matrix(name):
    """A training step computes only the entries that it selected."""
    sae, x = random_sae(name), inputs()
    u, norm = sae.score.argument(x - sae.b_dec)
    rows = sae.score.rows(sae.W_dec)
    row, latent = torch.tensor([0, 0, 7, 29, 12]), torch.tensor([3, 39, 0, 26, 13])
    found = sae.score.finish((u[row] * rows[latent]).sum(1), norm[row, 0], lambda parameter: parameter[latent])
    close(found, scores(sae, x)[row, latent])


# Cosine


@settings(max_examples=30)
@given(st.floats(-2, 2), st.floats(-3, 3), st.floats(0.01, 100), st.integers(0, 50))
def test_scores_grow_with_the_input_norm_to_the_exponent(a, b, factor, seed):
    x, score = drawn(5, D_MODEL, seed=seed), cosine(numbers(a), numbers(b), bias=NO_BIAS)
    close(score(factor * x, W_DEC), factor**a * score(x, W_DEC), rtol=1e-8)
    pure = cosine(numbers(0), numbers(b))
    close(pure(factor * x, W_DEC), pure(x, W_DEC))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_cosine_ignores_norms_of_encoder_rows(factor):
    x, a, b = inputs(), numbers(0.3), numbers(1)
    close(Cosine(factor * W, BIAS, a, b)(x, W_DEC), Cosine(W, BIAS, a, b)(x, W_DEC))
    close(Direction(factor * W)(x, W_DEC), Direction(W)(x, W_DEC))
    close(Direction(factor * W, unit=False)(x, W_DEC), factor * Direction(W, unit=False)(x, W_DEC))


@given(st.integers(1, 40), st.data())
@settings(max_examples=30)
def test_spread_accepts_any_number_of_groups(d_sae, data):
    scale = torch.arange(float(data.draw(st.integers(1, d_sae))))
    assert torch.equal(spread(scale, d_sae).expand(d_sae), each(scale, d_sae))


def test_fixed_exponent_is_not_trained():
    score = cosine(numbers(0), numbers(1), fixed=True)
    assert score.fixed and not score.scale_a.requires_grad and score.scale_b.requires_grad
    assert not cosine(numbers(0), numbers(1)).fixed


@pytest.mark.parametrize("name", ALL)
def test_zero_input_has_finite_scores_and_gradients(name):
    sae = random_sae(name)
    x_c = torch.zeros(2, D_MODEL, dtype=torch.float64)
    s = sae.score(x_c, sae.W_dec)
    bias = NO_BIAS if sae.score.b_enc is None else sae.score.b_enc
    close(s, bias.expand(2, -1))
    s.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize(
    ("a", "b", "delta", "message"),
    [
        (D_SAE + 1, 1, False, "41 scales a for 40 latents; expected 1 to 40"),
        (1, D_SAE + 1, False, "41 scales b for 40 latents"),
        (0, 1, False, "0 scales a for 40 latents"),
        (2, 1, True, "2 base exponents beside a delta for each latent; expected 1"),
    ],
)
def test_wrong_number_of_scales_raises(a, b, delta, message):
    with pytest.raises(SAEError, match=message):
        cosine(NO_BIAS.new_zeros(a), NO_BIAS.new_zeros(b), NO_BIAS if delta else None)


# Aligned and tied


def test_tied_encoder_is_the_decoder():
    d = torch.nn.Parameter(W_DEC.clone())
    score = Tied(BIAS)
    assert score.rows(d) is d
    assert [name for name, _ in score.named_parameters()] == ["b_enc"]
    x = inputs()
    score(x, d).sum().backward()
    close(d.grad, x.sum(0).expand(D_SAE, -1))


# Edge cases


def test_norms_and_unit_rows_of_zero_vectors():
    x = torch.cat([torch.zeros(1, D_MODEL), torch.ones(1, D_MODEL)])
    assert torch.equal(norm_of(x), torch.tensor([[1e-8], [D_MODEL**0.5]]))
    torch.testing.assert_close(unit_rows(x), torch.stack([torch.zeros(D_MODEL), torch.full((D_MODEL,), D_MODEL**-0.5)]))


@pytest.mark.parametrize(
    ("mean_norm", "start"),
    [(8, 8), (4, 8), (16, 8), (math.nextafter(4, 0), 4), (math.nextafter(16, 17), 16), (6, 8), (0.5, 0.5), (300, 300)],
)
def test_starting_scale_is_root_of_width_or_mean_norm(mean_norm, start):
    assert starting_scale(mean_norm, 64) == pytest.approx(math.log(start), rel=1e-12)
