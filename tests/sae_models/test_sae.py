"""SAEs against their equations, written out densely in float64."""

import re

import pytest
import torch

from sae_models.errors import BelongingError, SAEError
from sae_models.sae import SAE, restoring
from sae_models.scores import Inner
from sae_models.selectors import AbsTopK, ReLU
from tests.sae_models.built import (
    ALL,
    D_MODEL,
    D_SAE,
    NORMALISATIONS,
    SELECTORS,
    close,
    decoded,
    drawn,
    each_pair,
    inference,
    inputs,
    random_sae,
    with_selector,
)

RESTORED = tuple(name for name in ALL if name.startswith("bypass") and "no-restore" not in name)


@pytest.mark.parametrize(("name", "kind", "selector"), each_pair(ALL, NORMALISATIONS, SELECTORS))
def test_sae_computes_its_equations(name, selector, kind):
    sae, x = random_sae(name, selector, kind), inputs()
    f = inference(sae, x)
    _, x_hat, z = decoded(sae, x, f)
    assert 0 < (f != 0).double().mean() < 1
    close(sae.encode(x), z)
    close(sae(x), x_hat)
    close(sae.encode(x) @ sae.W_dec + sae.offset(x), x_hat)
    close(sae.offset(x).expand(x.shape), decoded(sae, x, torch.zeros_like(f))[1])
    several = x.view(2, 3, 5, D_MODEL)
    close(sae(several).view(x.shape), x_hat)
    close(sae(x[3]), x_hat[3])


@pytest.mark.parametrize("name", ["standard", "cosine", "bypass"])
def test_signed_selector_gives_signed_latents(name):
    sae, x = with_selector(random_sae(name), AbsTopK(5)), inputs()
    _, x_hat, z = decoded(sae, x, inference(sae, x))
    assert (z < 0).any() and (z > 0).any()
    close(sae.encode(x), z)
    close(sae(x), x_hat)


# The magnitude bypass


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", RESTORED)
def test_bypass_restores_the_norm_where_a_latent_is_active(name, selector):
    sae, x = random_sae(name, selector), inputs()
    sae.score.W_enc.data[:, 0] = -10  # what points far enough along the first axis activates nothing
    x[:4, 0] += 200
    active = (sae.encode(x) != 0).any(1)
    assert active.tolist() == [False] * 4 + active[4:].tolist() and active.sum() > 5
    size = (sae(x) - sae.b_dec).norm(dim=1)
    close(size[active], (x - sae.b_dec).norm(dim=1)[active])
    assert not size[~active].any()


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("bypass")])
def test_bypass_scales_with_the_input_only_if_norms_are_restored(name):
    sae, x = random_sae(name), inputs()
    x_c = x - sae.b_dec
    close(sae(sae.b_dec + 3 * x_c) - sae.b_dec, (3 if name in RESTORED else 1) * (sae(x) - sae.b_dec))


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("bypass")])
def test_encoder_norms_matter_only_in_free_encoder_variants(name):
    sae, x = random_sae(name, "relu"), inputs()
    before = sae.encode(x)
    sae.score.W_enc.data *= torch.linspace(0.5, 2, D_SAE, dtype=x.dtype)[:, None]
    assert torch.allclose(sae.encode(x), before) == ("free-encoder" not in name and "free-both" not in name)


def test_restoring_a_zero_reconstruction_has_finite_gradients():
    x_c, r = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1)
    r[1] = 0
    r.requires_grad_()
    found = restoring(x_c, r)
    assert found[1] == 0
    close(found[::2, 0], x_c[::2].norm(dim=1) / r[::2].norm(dim=1))
    (r * found).sum().backward()
    assert x_c.grad.isfinite().all() and r.grad.isfinite().all()
    assert not x_c.grad[1].any() and not r.grad[1].any() and r.grad[::2].all()


# Alignment


@pytest.mark.parametrize("name", ["aligned", "tied", "standard", "cosine", "bypass"])
def test_alignment_uses_the_effective_encoder_rows(name):
    sae = random_sae(name)
    found = sae.alignment()
    close(found, torch.einsum("ia,ia->i", sae.encoder_rows(), sae.W_dec))
    if name == "aligned":
        close(found, torch.ones_like(found))
    elif name == "tied":
        close(found, sae.W_dec.square().sum(1))
    else:
        assert found.std() > 0.1
    if name in ("cosine", "bypass"):
        close(sae.encoder_rows().norm(dim=1), torch.ones_like(found))


# State, dtype and sizes


@pytest.mark.parametrize("name", ALL)
def test_no_state_is_kept_between_calls(name):
    sae, x = random_sae(name, "batchtopk", "layer_norm"), inputs()
    own = {key: value for key, value in vars(sae).items() if not key.startswith("_")}
    before, z = {key: value.clone() for key, value in sae.state_dict().items()}, sae.encode(x)
    sae.encode(7 * x + 1)
    sae(x[:3])
    assert torch.equal(sae.encode(x), z)
    assert own == {key: value for key, value in vars(sae).items() if not key.startswith("_")}
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_outputs_have_the_dtype_of_the_weights(dtype):
    sae = random_sae("cosine").to(dtype)
    x = inputs().to(torch.float16)
    assert sae.dtype == dtype
    assert sae.encode(x).dtype == sae(x).dtype == sae.offset(x).dtype == sae.centred(x).dtype == dtype
    assert torch.equal(sae(x), sae(x.to(dtype)))


def test_gradients_reach_the_input():
    sae, x = random_sae("cosine", kind="layer_norm"), inputs(4)
    assert torch.autograd.gradcheck(sae, (x.requires_grad_(),))


def test_repr_sizes_and_metadata():
    sae = random_sae("cosine", "batchtopk")
    assert (sae.d_model, sae.d_sae, sae.device) == (D_MODEL, D_SAE, torch.device("cpu"))
    assert "cosine → batchtopk, d_model=12, d_sae=40, unknown model, unknown site" in repr(sae)
    sae = SAE(sae.score, ReLU(), sae.W_dec, sae.b_dec, metadata=(given := {"seed": 1}))
    given["seed"] = 2
    assert sae.metadata == {"seed": 1}
    close(sae.centred(inputs()), inputs() - sae.b_dec)


def test_b_dec_is_subtracted_only_if_set():
    parts = drawn(D_SAE, D_MODEL), drawn(D_SAE, seed=1), drawn(D_SAE, D_MODEL, seed=2), drawn(D_MODEL, seed=3)
    W_enc, b_enc, W_dec, b_dec = parts
    x = inputs()
    for subtracts, x_c in ((True, x - b_dec), (False, x)):
        sae = SAE(Inner(W_enc.clone(), b_enc.clone()), ReLU(), W_dec, b_dec, subtract_b_dec=subtracts)
        close(sae(x), (x_c @ W_enc.T + b_enc).relu() @ W_dec + b_dec)
        close(sae.centred(x), x_c)


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_decode_raises_where_the_offset_depends_on_the_input(kind):
    sae, x = random_sae("standard", kind=kind), inputs()
    if kind == "none":
        close(sae.decode(sae.encode(x)), sae(x))
    else:
        with pytest.raises(
            SAEError, match=re.escape(f"normalises its input ({kind}); use z @ sae.W_dec + sae.offset(x)")
        ):
            sae.decode(sae.encode(x))


# Width, model and site


def test_wrong_width_raises():
    sae = random_sae("standard")
    for call in (sae, sae.encode, sae.offset, sae.centred):
        with pytest.raises(BelongingError, match="activations of width 11 for an SAE of width 12"):
            call(inputs(d_model=11))
    with pytest.raises(BelongingError, match="an SAE of width 12 for activations of width 11"):
        sae.check_belongs(d_model=11)
    sae.check_belongs(d_model=12)


def test_wrong_model_or_site_raises_if_known():
    sae = random_sae("standard")
    sae.check_belongs(model_name="gpt2", hook_name="blocks.3.hook_mlp_out")
    sae.model_name, sae.hook_name = "EleutherAI/Pythia-70m", "blocks.3.hook_resid_post"
    sae.check_belongs()
    sae.check_belongs(model_name="pythia-70M", hook_name="blocks.3.hook_resid_post")
    with pytest.raises(
        BelongingError, match=r"of model 'EleutherAI/Pythia-70m' put to model 'gpt2'; .* clear sae\.model_name"
    ):
        sae.check_belongs(model_name="gpt2")
    with pytest.raises(BelongingError, match=r"put to site 'blocks\.4\.hook_resid_post'; .* clear sae\.hook_name"):
        sae.check_belongs(hook_name="blocks.4.hook_resid_post")
