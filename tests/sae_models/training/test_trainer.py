"""One SAE while it is trained: against the recipe done by hand, a planted dictionary, and itself when resumed."""

import io
import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sae_models.architectures import build, named
from sae_models.errors import SAEError
from sae_models.scores import Cosine
from sae_models.selectors import ReLU
from sae_models.training.recipe import Recipe
from sae_models.training.trainer import SAETraining
from tests.sae_models.built import (
    ALL,
    D_MODEL,
    D_SAE,
    SELECTORS,
    auxiliary,
    close,
    decoded,
    drawn,
    generator,
    inputs,
    mask_of,
    normalised,
    scores,
)

STEPS, ROWS = 15, 24
SHORT = Recipe(d_sae=D_SAE, k=3, lr=0.01)


def batches(steps=STEPS, rows=ROWS, dtype=torch.float64):
    return [inputs(rows, seed=100 + i, dtype=dtype) for i in range(steps)]


def begun(name, recipe=SHORT, steps=STEPS, kind="none", dtype=torch.float64):
    return SAETraining(replace(named(name), normalise=kind), recipe, batches(dtype=dtype)[0], steps=steps)


# The recipe by hand


class ByHand:
    """The recipe done densely, with nothing of the code under test but the SAE's first weights."""

    def __init__(self, name, recipe, kind="none"):
        self.architecture, self.recipe = replace(named(name), normalise=kind), recipe
        first = batches()[0]
        self.sae = build(self.architecture, recipe.d_sae, recipe.k, first, generator(recipe.seed))
        u = normalised(self.sae, first)[0]
        self.variance = (u - u.mean(0)).square().sum(1).mean()
        if name.endswith("relu") and self.sae.score.b_enc is not None:
            self.sae.score.b_enc.data.fill_(-recipe.bandwidth * float(self.variance) ** 0.5)
        weights = {key: parameter for key, parameter in self.sae.named_parameters() if parameter.requires_grad}
        rates = {"W": recipe.lr, "b": recipe.lr * float(self.variance / D_MODEL) ** 0.5, "s": recipe.lr_scale}
        self.weights = list(weights.values())
        self.adams = [(torch.optim.Adam([p], foreach=False), rates[k.split(".")[-1][0]]) for k, p in weights.items()]
        self.silent, self.done, self.ever_dead, self.threshold = [0] * recipe.d_sae, 0, 0, None
        self.loss, self.squared, self.spread, self.active = 0.0, 0.0, 0.0, 0

    def step(self, x):
        sae, recipe, d = self.sae, self.recipe, self.sae.W_dec
        s, u = scores(sae, x), normalised(sae, x)[0]
        f = sae.selector.value(s) * mask_of(sae, s)
        output = decoded(sae, x, f)[0]
        size = (u - sae.b_dec).norm(dim=1).detach()
        weight = size**-recipe.reweight / (size**-recipe.reweight).mean()
        squared = (u - output).square().sum(1)
        loss = (weight * squared).mean() / self.variance
        if sae.selector.kind != "relu":
            if recipe.multi:
                wide = decoded(sae, x, sae.selector.value(s) * mask_of(sae, s, 4))[0]
                loss = loss + recipe.multi * (weight * (u - wide).square().sum(1)).mean() / self.variance
            dead = [i for i, n in enumerate(self.silent) if n > recipe.dead_window * ROWS * STEPS]
            self.ever_dead += len(dead)
            if dead and recipe.aux:
                r, total = f @ d, output - sae.b_dec
                some = r.detach().any(1)  # rows without an active latent: 0
                factor = torch.where(some, total.norm(dim=1) / r.norm(dim=1), 0).detach()
                factor = factor if sae.restore_norm else torch.ones(len(x))
                k = recipe.aux_k or D_MODEL // 2
                loss = loss + recipe.aux * auxiliary(sae, x, dead, k, (u - output).detach(), factor)
        else:
            loss = loss + recipe.l1 * (f * d.norm(dim=1)).sum(1).mean() / self.variance.sqrt()
        for parameter, gradient in zip(self.weights, torch.autograd.grad(loss, self.weights), strict=True):
            parameter.grad = gradient
        self.update()
        self.loss += float(loss.detach()) / STEPS
        self.squared += float(squared.detach().sum())
        self.spread += float((u - u.mean(0)).square().sum())
        self.active += int((f != 0).sum())
        fired = (f != 0).any(0).tolist()
        self.silent = [0 if now else n + ROWS for now, n in zip(fired, self.silent, strict=True)]
        self.done += 1
        chosen = s.detach()[mask_of(sae, s)]
        if self.done >= recipe.threshold_from * STEPS and len(chosen):
            weakest = float(chosen.min())
            memory = max(10, recipe.threshold_memory * STEPS)
            old = self.threshold
            self.threshold = weakest if old is None else old + (weakest - old) / memory

    @torch.no_grad()
    def update(self):
        d, recipe = self.sae.W_dec, self.recipe
        if self.architecture.unit_decoder:
            for i in range(len(d)):
                d.grad[i] -= (d.grad[i] @ d[i]) * d[i]
        length = math.sqrt(sum(float(p.grad.square().sum()) for p in self.weights))
        if length > recipe.clip:
            for parameter in self.weights:
                parameter.grad *= recipe.clip / (length + 1e-6)
        now = self.done + 1
        rate = min(1, now / max(1, recipe.warm_up * STEPS), (STEPS + 1 - now) / max(1, (1 - recipe.decay_from) * STEPS))
        for adam, lr in self.adams:
            adam.param_groups[0]["lr"] = lr * rate
            adam.step()
        if self.architecture.unit_decoder:
            d /= d.norm(dim=1, keepdim=True)


RECIPES = {
    "plain": SHORT,
    "tight clip": replace(SHORT, clip=0.01),
    "few dead latents at once": replace(SHORT, aux=1.0, aux_k=2, dead_window=0.1),
    "no aux": replace(SHORT, aux=0.0, dead_window=0.1),
    "multi": replace(SHORT, multi=0.125),
    "by norm": replace(SHORT, reweight=1, multi=0.125),
    "by squared norm": replace(SHORT, reweight=2),
    "l1": replace(SHORT, l1=0.5),
    "late": replace(SHORT, warm_up=0.5, decay_from=0.9, threshold_from=0.8, threshold_memory=0.9, lr_scale=0.1),
}
CASES = [
    *((name, "plain", kind) for name in ALL for kind in ("none",)),
    *((f"{name}:{selector}", "plain", "none") for name in ("standard", "cosine", "bypass") for selector in SELECTORS),
    *(("standard", recipe, "none") for recipe in RECIPES),
    *(("cosine:topk", recipe, "none") for recipe in ("few dead latents at once", "multi", "late")),
    *((f"{name}:relu", "l1", "none") for name in ("aligned", "standard", "bypass-free-decoder")),
    *(("bypass", recipe, "none") for recipe in ("few dead latents at once", "multi", "by norm")),
    *((name, "few dead latents at once", "layer_norm") for name in ("standard:topk", "cosine", "standard:relu")),
]


@pytest.mark.parametrize(("name", "recipe", "kind"), dict.fromkeys(CASES))
def test_training_steps_match_the_recipe_by_hand(name, recipe, kind):
    """Adam's division by small gradients makes float64 rounding grow over the steps, to about 1e-9."""
    recipe = RECIPES[recipe]
    if name.endswith("relu"):
        recipe = replace(recipe, multi=0.0)
    ours, hand = begun(name, recipe, kind=kind), ByHand(name, recipe, kind)
    for x in batches():
        ours.step(x)
        hand.step(x)
    for (key, found), (_, expected) in zip(ours.sae.named_parameters(), hand.sae.named_parameters(), strict=True):
        close(found, expected, rtol=1e-6, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")
    said = ours.metrics()
    assert said["loss"] == pytest.approx(hand.loss, rel=1e-6)
    assert said["fve"] == pytest.approx(1 - hand.squared / hand.spread, rel=1e-6)
    assert said["l0"] == hand.active / (ROWS * STEPS)
    assert (said["step"], said["tokens"], said["lr"]) == (STEPS, ROWS * STEPS, 0.0)
    dead = sum(n > recipe.dead_window * ROWS * STEPS for n in hand.silent) / D_SAE
    assert said["dead"] == pytest.approx(dead, abs=1e-12)
    if ours.sae.selector.kind == "batchtopk":
        assert said["threshold"] == pytest.approx(hand.threshold, rel=1e-6)  # which is kept in float32
    if recipe.dead_window == 0.1 and not name.endswith("relu"):
        assert hand.ever_dead > 0
    if isinstance(ours.sae.score, Cosine):
        a = hand.sae.score.exponents().detach()
        assert (said["a_mean"], said["a_sd"]) == pytest.approx(
            (float(a.mean()), float(a.std(unbiased=False))), rel=1e-5
        )
        assert a.any() == (name != "cosine-pure")


# Learning rate, decoder rows, threshold, dead latents: each alone, so that both hands cannot be wrong alike


def test_learning_rate_schedule():
    recipe = replace(SHORT, lr=0.5, lr_scale=2.0, warm_up=0.1, decay_from=0.8)
    training = begun("cosine", recipe, steps=100)
    of = {id(p): group for group in training.optimizer.param_groups for p in group["params"]}
    matrix, scale = of[id(training.sae.W_dec)], of[id(training.sae.score.scale_a)]
    rates, announced = [], []
    for _ in range(100):
        announced.append(training.metrics()["lr"] / 0.5)
        training.step(batches(1)[0])
        rates.append(matrix["lr"] / 0.5)
        assert scale["lr"] == pytest.approx(2 * rates[-1])
    expected = {1: 0.1, 2: 0.2, 9: 0.9, 10: 1, 11: 1, 50: 1, 80: 1, 81: 1, 82: 0.95, 91: 0.5, 100: 0.05}
    assert {step: rates[step - 1] for step in expected} == pytest.approx(expected)
    assert announced == pytest.approx(rates)
    assert training.metrics()["lr"] == 0
    shortest = begun("standard", steps=1)
    before = shortest.sae.W_dec.detach().clone()
    shortest.step(batches(1)[0])
    assert not torch.allclose(shortest.sae.W_dec, before, atol=1e-5) and shortest.sae.selector.threshold.isfinite()


@pytest.mark.parametrize("name", ["standard", "cosine:topk", "aligned", "tied", "bypass", "bypass-free-decoder"])
def test_decoder_rows_stay_unit_and_aligned_rows_stay_aligned(name):
    training, off = begun(name, replace(SHORT, betas=(0.0, 0.999))), []
    for x in batches(5):
        before = training.sae.W_dec.detach().clone()
        training.step(x)
        off.append((training.sae.W_dec.norm(dim=1) - 1).abs().max().item())
        if name == "standard":  # Adam's first moment is the gradient, without its part along the row
            moment = training.optimizer.state[training.sae.W_dec]["exp_avg"]
            assert moment.abs().max() > 1e-4
            close((moment * before).sum(1), torch.zeros(D_SAE, dtype=x.dtype))
        if name == "aligned":
            close(training.sae.alignment(), torch.ones(D_SAE, dtype=x.dtype))
    assert max(off) < 1e-12 if named(name).unit_decoder else max(off) > 1e-3


def test_threshold_is_a_running_average_of_the_weakest_active_score():
    recipe = replace(SHORT, threshold_from=0.4, threshold_memory=0.0, lr=1e-12)  # the weights stand still
    training, memory, expected = begun("standard", recipe, steps=30), 10, None
    for n, x in enumerate(batches(30), 1):
        weakest = scores(training.sae, x).detach().flatten().sort(descending=True).values[3 * ROWS - 1]
        training.step(x)
        if n < 12:
            assert training.sae.selector.threshold.isnan()
            continue
        expected = weakest if expected is None else (1 - 1 / memory) * expected + weakest / memory
        close(training.sae.selector.threshold.double(), expected, rtol=1e-5)
    memory = 25
    training = begun("standard", replace(recipe, threshold_from=0.0, threshold_memory=25 / 30), steps=30)
    for n, x in enumerate(batches(3)):
        weakest = scores(training.sae, x).detach().flatten().sort(descending=True).values[3 * ROWS - 1]
        training.step(x)
        expected = weakest if n == 0 else expected + (weakest - expected) / memory
    close(training.sae.selector.threshold.double(), expected, rtol=1e-5)


def test_latents_silent_for_the_dead_window_are_dead():
    training = begun("standard:topk", replace(SHORT, k=1, lr=1e-12, dead_window=0.3, aux=0.0))  # of 15 steps: 4.5
    last = torch.full((D_SAE,), 0)
    for n, x in enumerate(batches(), 1):
        with torch.no_grad():
            last[mask_of(training.sae, scores(training.sae, x)).any(0)] = n
        training.step(x)
        assert torch.equal(training.silent_for, (n - last) * ROWS)
        assert training.metrics()["dead"] == pytest.approx(float((n - last > 4.5).double().mean()))
    assert 0 < float((n - last > 4.5).double().mean()) < 1


def test_metrics_are_means_over_tokens_since_the_last_call():
    one, two, both = begun("standard:topk"), begun("standard:topk"), []  # of batches of different sizes
    for n, x in enumerate((inputs(8), inputs(24, seed=5))):
        one.step(x)
        two.step(x)
        both.append(one.metrics() | {"rows": (8, 24)[n]})
    expected = sum(m["loss"] * m["rows"] for m in both) / 32
    said = two.metrics()
    assert said["loss"] == pytest.approx(expected) and said["tokens"] == two.tokens == 32
    assert two.metrics()["loss"] == 0


# Resumption


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        *((name, 9) for name in ("standard:topk", "standard:relu", "cosine-pure", "bypass", "aligned", "tied")),
        *((name, 9) for name in ("jumprelu", "signed-gated")),
        *((name, at) for name in ("standard", "cosine") for at in (1, 9)),  # before and after latents are dead
    ],
)
def test_resumed_training_matches_bit_for_bit(name, at):
    recipe = replace(SHORT, dead_window=0.1)
    training = begun(name, recipe, dtype=torch.float32)
    for x in batches(at, dtype=torch.float32):
        training.step(x)
    other = SAETraining(named(name), recipe, torch.ones(1, D_MODEL), steps=STEPS)
    other.load_state_dict(through_a_file(training.state_dict()))
    for x in batches(dtype=torch.float32)[at:]:
        training.step(x)
        other.step(x)
    assert other.metrics() == training.metrics()
    torch.testing.assert_close(
        through_a_file(other.state_dict()), through_a_file(training.state_dict()), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(other.sae(inputs(dtype=torch.float32)), training.sae(inputs(dtype=torch.float32)))


# Planted dictionaries

D, ATOMS, ACTIVE, LATENTS, PLANTED_STEPS = 48, 64, 3, 96, 250
PLANTED = Recipe(d_sae=LATENTS, k=ACTIVE, lr=2e-2)


def planted():
    """Random unit atoms."""
    return torch.nn.functional.normalize(drawn(ATOMS, D, seed=11, dtype=torch.float32), dim=1)


def samples(n, draw):
    """Three atoms at a time, with coefficients from 0.5 to 1.5."""
    which = torch.rand(n, ATOMS, generator=draw).topk(ACTIVE, dim=1).indices
    return ((torch.rand(n, ACTIVE, 1, generator=draw) + 0.5) * planted()[which]).sum(1)


def recovered(sae) -> float:
    """Share of the atoms that a latent of their own points along, at a cosine of 0.95, matched one to one."""
    cosine = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1) @ planted().T
    latent, atom = linear_sum_assignment(-cosine.numpy())
    return float((cosine[latent, atom] >= 0.95).float().mean())


@pytest.mark.parametrize(("name", "least"), [("standard", 0.95), ("cosine:topk", 0.95), ("standard:relu", 0.85)])
def test_a_planted_dictionary_is_found(name, least):
    draw = generator(5)
    training = SAETraining(named(name), PLANTED, samples(192, draw), steps=PLANTED_STEPS)
    assert recovered(training.sae) < 0.05  # the first weights know nothing of the atoms
    for _ in range(PLANTED_STEPS):
        training.step(samples(192, draw))
    assert recovered(training.sae) >= least


@pytest.mark.parametrize("name", ["standard", "aligned", "cosine-group3", "tied", "bypass-free-both"])
def test_threshold_keeps_the_mean_l0_of_training(name):
    draw = generator(5)
    training = SAETraining(named(name), replace(PLANTED, lr=5e-3), samples(192, draw), steps=60)
    for _ in range(60):
        training.step(samples(192, draw))
    active = (training.sae.encode(samples(2048, draw)) != 0).sum(1).double().mean()
    assert float(active) == pytest.approx(training.metrics()["l0"], rel=0.1)


# Errors


@pytest.mark.parametrize("name", ["standard", "standard:topk", "standard:relu", "bypass"])
def test_nonfinite_loss_raises_naming_the_step(name):
    training = begun(name)
    for n, x in enumerate(batches(4)):
        training.step(x * (torch.nan if n == 2 else 1))
    with pytest.raises(SAEError, match=r"the loss is nan at step 4; lower lr \(0\.01\) or look at the activations"):
        training.metrics()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({name: value}, f"{name} = {value}; expected a share of the run, from 0 to 1")
          for name in ("warm_up", "decay_from", "dead_window", "threshold_from", "threshold_memory")
          for value in (-0.1, 1.1, math.nan)),
        *(({name: value}, f"{name} = {value}; expected a positive number")
          for name in ("d_sae", "k", "lr", "lr_scale", "clip") for value in (0, -1)),
        ({"betas": (0.9, 1.0)}, "betas = .*expected two numbers from 0 to below 1"),
        ({"seed": -1}, "seed = -1; expected 0 or more"),
        *(({"reweight": value}, f"reweight = {value}; expected 0, 1 or 2") for value in (-1, 3)),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_recipes_raise(wrong, message):
    with pytest.raises(SAEError, match=message):
        Recipe(**{"d_sae": 8, **wrong})


def test_invalid_runs_raise():
    with pytest.raises(SAEError, match="a run of 0 steps; expected at least 1"):
        begun("standard", steps=0)
    training = begun("standard:relu", replace(SHORT, multi=0.1))
    assert isinstance(training.sae.selector, ReLU)
    with pytest.raises(SAEError, match="Multi-TopK with selector 'relu'"):
        training.step(batches(1)[0])
