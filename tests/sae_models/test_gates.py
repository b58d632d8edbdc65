"""Learned thresholds and gates, of one sign and of both: their equations in numpy, what teaches them, files, and short trainings."""

import numpy as np
import pytest
import torch

from sae_models import load_sae
from sae_models.architectures import SELECTORS, Architecture, named
from sae_models.errors import SAEError
from sae_models.gates import BiJumpReLU, Gate, JumpReLU, SignedGate
from sae_models.saving import save_sae
from sae_models.training.objective import active_latents, forward_pass, gate_error, penalty, prefix_errors
from sae_models.training.recipe import Recipe
from sae_models.training.trainer import SAETraining
from tests.sae_models.built import D_SAE, close, drawn, inputs, random_sae

LEARNED = ("jumprelu", "bijumprelu", "gated", "signed_gated", "signed_gated_tied")


def positive(seed):
    return drawn(D_SAE, seed=seed).abs() / 2


def biases(*seeds):
    return tuple(drawn(D_SAE, seed=seed) / 2 for seed in seeds)


def test_bijumprelu_is_zero_in_its_dead_zone_and_signed_outside():
    s, above, below = drawn(30, D_SAE), positive(1), positive(2)
    found, (u, up, down) = BiJumpReLU(above, below)(s), (x.numpy() for x in (s, above, below))
    np.testing.assert_array_equal(found.detach().numpy(), u * (u > up) + u * (u < -down))
    assert (found > 0).any() and (found < 0).any()


def test_bijumprelu_with_infinite_lower_threshold_is_jumprelu():
    s, threshold = drawn(30, D_SAE).requires_grad_(), positive(1)
    both, one = BiJumpReLU(threshold, torch.full_like(threshold, torch.inf)), JumpReLU(threshold)
    found = []
    for selector in (both, one):
        selector.bandwidth = 0.3
        value = (selector(s) * drawn(30, D_SAE, seed=3)).sum() + selector.indicator(s).sum()
        gradients = torch.autograd.grad(value, (s, selector.threshold))
        found.append((selector(s), selector.indicator(s), *gradients))
        assert gradients[1].any()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_signed_gate_follows_its_equations():
    s, (up, down, r, bias, r_down) = drawn(30, D_SAE), biases(1, 2, 3, 4, 5)
    selector = SignedGate(up, down, r, bias, r_down)
    p, u, d, radius, b, other = (x.numpy() for x in (s, up, down, r, bias, r_down))
    expected = (p + u > 0) * np.maximum(np.exp(radius) * p + b, 0) - (-p + d > 0) * np.maximum(
        -np.exp(other) * p + b, 0
    )
    np.testing.assert_allclose(selector(s).detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(
        selector.soft(s).detach().numpy(), np.maximum(p + u, 0) - np.maximum(-p + d, 0), rtol=1e-12
    )
    at = selector(s).nonzero()[:, 1]
    close(selector.magnitude(s[selector(s) != 0], lambda parameter: parameter[at]), selector(s)[selector(s) != 0])


def test_signed_gate_reduces_to_tied_and_one_sided_gates():
    s, (up, down, r, bias) = drawn(30, D_SAE), biases(1, 2, 3, 4)
    assert torch.equal(SignedGate(up, down, r, bias, r.clone())(s), SignedGate(up, down, r, bias)(s))
    assert torch.equal(SignedGate(up, torch.full_like(down, -torch.inf), r, bias)(s), Gate(up, r, bias)(s))
    assert torch.equal(SignedGate(up, down, r, bias)(s), -SignedGate(down, up, r, bias)(-s))  # both signs alike


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_straight_through_gradients_match_uniform_scores(threshold):
    """For u uniform on [0, 1]: d/dθ E[u·1(u > θ)] = −θ and d/dθ E[1(u > θ)] = −1, whatever the bandwidth."""
    s = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    for bandwidth in (0.05, 0.4):
        selector = JumpReLU(torch.tensor([threshold], dtype=torch.float64))
        selector.bandwidth = bandwidth
        jumped, counted = (
            torch.autograd.grad(value, selector.threshold)[0].item()
            for value in (selector(s).mean(), selector.indicator(s).mean())
        )
        assert jumped == pytest.approx(-threshold, rel=1e-3) and counted == pytest.approx(-1, rel=1e-3)


def made(selector, name="standard"):
    sae = random_sae(name, selector)
    if isinstance(sae.selector, JumpReLU):
        sae.selector.bandwidth = 0.5
        with torch.no_grad():
            for threshold in sae.selector.parameters():
                threshold.copy_(positive(4))
    return sae


@pytest.mark.parametrize("selector", ["gated", "signed_gated", "signed_gated_tied"])
def test_gate_is_trained_only_through_its_soft_copy(selector):
    sae, x = made(selector), inputs()
    done = forward_pass(sae, x)
    soft, size = sae.selector.soft(done.score), sae.W_dec.norm(dim=1)
    close(penalty(sae, done, 1.0), (soft.abs() * size).sum(1).mean())
    error = gate_error(sae, done)
    close(error, (x - soft @ sae.W_dec - sae.b_dec).square().sum(1))
    learned = dict(sae.named_parameters())
    found = torch.autograd.grad(error.sum(), list(learned.values()), allow_unused=True, retain_graph=True)
    taught = {name for name, gradient in zip(learned, found, strict=True) if gradient is not None and gradient.any()}
    gates = {name for name in learned if "b_gate" in name}
    assert taught == {"score.W_enc", "b_dec"} | gates  # b_dec through what the gate reads
    with torch.no_grad():
        x_c = x - sae.b_dec
    again = sae.selector.soft(x_c @ sae.score.W_enc.T)
    frozen = (x - again @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum()
    close(torch.autograd.grad(frozen, sae.score.W_enc)[0], found[list(learned).index("score.W_enc")])
    reconstruction = torch.autograd.grad(done.error.square().sum(), list(learned.values()), allow_unused=True)
    assert all(
        gradient is None or not gradient.any()
        for name, gradient in zip(learned, reconstruction, strict=True)
        if name in gates
    )


@pytest.mark.parametrize(
    ("name", "selector"),
    [*(("standard", kind) for kind in (*LEARNED, "relu")), ("aligned", "relu"), ("bypass", "jumprelu")],
)
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_sparse_steps_equal_dense_steps(name, selector, power, monkeypatch):
    """Values and gradients of every loss term, computed at the active entries alone and densely."""
    found = []
    for few in (0, 1):
        monkeypatch.setattr("sae_models.training.objective.FEW", few)
        sae, x = made(selector, name), inputs()
        done = forward_pass(sae, x)
        assert (done.support is None) == (few == 0)
        parts = [done.error.square().sum(1), *prefix_errors(sae, done, (7,))]
        parts += [active_latents(sae, done) if sae.selector.counts else penalty(sae, done, power)]
        parts += [] if (error := gate_error(sae, done)) is None else [error]
        value = sum((part * drawn(*(part.shape or (1,)), seed=i).abs()).sum() for i, part in enumerate(parts))
        learned = [p for p in sae.parameters() if p.requires_grad]
        found.append([*parts, *torch.autograd.grad(value, learned)])
    assert all(gradient.any() for gradient in found[0])
    for dense, sparse in zip(*found, strict=True):
        close(sparse, dense)


@pytest.mark.parametrize("name", ["standard", "aligned"])
def test_penalty_power_changes_gradients_and_not_the_value(name):
    sae, x = random_sae(name, "relu"), inputs()
    done = forward_pass(sae, x)
    whole = penalty(sae, done, 1.0)
    bent = penalty(sae, done, 0.4)
    close(bent, whole)
    size = done.activation * sae.W_dec.norm(dim=1)
    by_hand = torch.where(size > 0, 0.4 * size.clamp(min=1e-300) ** -0.6, 0) / len(x)
    scale = whole / torch.where(size > 0, size.clamp(min=1e-300) ** 0.4, 0).sum(1).mean()
    found = torch.autograd.grad(bent, done.activation, retain_graph=True)[0]
    close(found, by_hand * scale * sae.W_dec.norm(dim=1))


@pytest.mark.parametrize(
    ("name", "selector"), [("standard", "topk"), ("bypass", "batchtopk"), ("standard", "relu"), ("standard", "gated")]
)
def test_prefix_errors_use_only_the_latents_of_the_prefix(name, selector):
    sae, x = random_sae(name, selector), inputs()
    done = forward_pass(sae, x)
    z = done.activation
    if done.support is not None:
        z = torch.zeros(len(x), D_SAE, dtype=x.dtype).index_put((done.support.row, done.support.latent), z)
    for size, found in zip((3, 17), prefix_errors(sae, done, (3, 17)), strict=True):
        r = z[:, :size] @ sae.W_dec[:size]
        if sae.restore_norm:
            norm = r.norm(dim=1, keepdim=True)
            r = torch.where(norm > 0, r * done.x_c.norm(dim=1, keepdim=True) / norm.clamp(min=1e-30), 0)
        close(found, (x - r - sae.b_dec).square().sum(1))


@pytest.mark.parametrize("selector", [*LEARNED, "abstopk"])
def test_saved_sae_is_loaded_bit_for_bit(selector, tmp_path):
    sae = random_sae("standard", selector, dtype=torch.float32)
    back = load_sae(save_sae(sae, tmp_path))
    x = inputs(dtype=torch.float32)
    assert torch.equal(back.encode(x), sae.encode(x)) and torch.equal(back(x), sae(x))
    assert type(back.selector) is type(sae.selector) and back.selector.settings() == sae.selector.settings()
    assert back.selector.signed == (bool((sae.encode(x) < 0).any()))


N = 24


def planted(n, seed, signed):
    """Sparse sums of N orthogonal directions, each on in a tenth of the rows, of either sign where `signed`."""
    g = torch.Generator().manual_seed(seed)
    size = (0.5 + torch.rand(n, N, generator=g)) * (torch.rand(n, N, generator=g) < 0.1)
    if signed:
        size = size * (torch.randint(0, 2, size.shape, generator=g) * 2 - 1)
    return size @ AXES, AXES


AXES = torch.linalg.qr(drawn(N, N, dtype=torch.float32))[0]


@pytest.mark.parametrize("name", [*LEARNED, "abstopk"])
def test_training_finds_planted_directions(name):
    """One latent for each direction, of either sign where latents may be negative."""
    signed, steps = name not in ("jumprelu", "gated"), 400
    lr, l0 = (1e-2, 0.2) if name == "jumprelu" else (2e-2, 0.12)
    recipe = Recipe(N, k=2, lr=lr, l1=0.5, l0=l0, penalty_warm_up=0.5, dead_window=0.5)
    training = SAETraining(Architecture(selector=name), recipe, planted(512, 0, signed)[0], steps=steps)
    for step in range(steps):
        training.step(planted(256, step, signed)[0])
    sae, (x, axes) = training.sae.requires_grad_(False), planted(4000, 10**6, signed)
    along = torch.nn.functional.cosine_similarity(sae.W_dec[:, None], axes, dim=-1)
    share = ((along.abs() if signed else along).amax(0) > 0.95).float().mean()
    # A JumpReLU cannot wake a silent latent, so that some stand for two directions: 83 to 100 % over seeds.
    assert share >= (0.7 if name == "jumprelu" else 0.9)
    z = sae.encode(x)
    assert float((z != 0).sum(1).float().mean()) == pytest.approx(0.1 * N, rel=0.2)
    assert float((z < 0).sum() / (z != 0).sum()) == pytest.approx(0.5 if signed else 0, abs=0.03)
    least = 0.75 if name == "abstopk" else 0.9  # two latents for every row, whatever its number of directions
    assert 1 - float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()) > least


@pytest.mark.parametrize("name", ["jumprelu", "bypass:jumprelu", "bypass:bijumprelu"])
def test_learned_thresholds_scale_with_the_scores(name):
    """Scores of a bypass SAE are cosines, whatever the size of the activations."""
    found = []
    for size in (1.0, 1024.0):
        training = SAETraining(named(name), Recipe(D_SAE, lr=1e-2), size * inputs(), steps=8)
        for n in range(8):
            training.step(size * inputs(seed=n))
        threshold = training.sae.selector.threshold.detach() / (size if name == "jumprelu" else 1)
        found.append((training.metrics()["l0"], threshold))
    assert found[0][0] == pytest.approx(found[1][0], rel=0.05) and found[0][0] > 1
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.1, atol=0)  # gradients of biases share the clipped norm


def test_invalid_settings_raise():
    with pytest.raises(SAEError, match="a gate reads the inner product"):
        named("cosine:gated")
    with pytest.raises(SAEError, match=r"k = 2\.5 for AbsTopK"):
        SAETraining(named("abstopk"), Recipe(D_SAE, k=2.5), inputs(), steps=3)
    with pytest.raises(SAEError, match="p_end = 0"):
        Recipe(D_SAE, p_end=0.0)
    with pytest.raises(SAEError, match="prefixes"):
        Recipe(D_SAE, prefixes=(0.5, 1.0))
    assert set(SELECTORS.values()) == {"k", "l1", "l0"}
