"""Gradients by replay against central differences of `measure` and of full forward passes, and what attributions add up to."""

import functools

import pytest
import torch
from torch import nn

from interventions import EditError, ReplayError, Site, SiteError, measure, record, wrap
from interventions.attribution import (
    Attribution,
    gradient_times_activation,
    gradients,
    gradients_everywhere,
    integrated_gradients,
)
from interventions.metrics import LogitDifference, Probability, Rank
from tests.tiny import D_MODEL, N_LAYERS, alone, forward_alone, fresh, points, prompts, rows, tiny_model, wrapped

OBJECTIVE = LogitDifference([3], [5, 6])
PROMPT, POSITION = rows(((0, 3), (3, 20), (0, 0), (1, 4), (2, 16), (0, 20), (3, 22)))
LAYER_NORM = ("gpt2", "phi")
"""transformers' LayerNorm computes in the model's dtype, float64 here"""


@functools.cache
def recorded(name: str, layers: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float64):
    """A clean pass over the prompts with every point of some blocks; tests leave it as it is."""
    sites = [Site(layer, point) for layer in layers for point in points(name)]
    return record(wrap(tiny_model(name, "cpu", dtype)), prompts(), sites)


def plain(logits: torch.Tensor, tokens: tuple = (3, 5, 6)) -> torch.Tensor:
    """OBJECTIVE written out, `[..., vocab]` to `[...]`."""
    return logits[..., tokens[0]] - (logits[..., tokens[1]] + logits[..., tokens[2]]) / 2


def by_measure(recording, site, x, horizon=1, objective=OBJECTIVE) -> torch.Tensor:
    """The objective of each row with x in place, summed over what the horizon reads, `[row]`."""
    value = measure(recording, site, PROMPT, POSITION, x, metrics=(objective,), horizon=horizon)[objective.name]
    return value.double().nan_to_num(0).reshape(len(PROMPT), -1).sum(1)


def difference(f, x: torch.Tensor, along: torch.Tensor, step: float) -> torch.Tensor:
    """∂f/∂x · along by differences of fourth order, `[row]`."""
    near, far = ((f(x + s * step * along) - f(x - s * step * along)) / (2 * s * step) for s in (1, 2))
    return (4 * near - far) / 3


def directions(seed: int) -> torch.Tensor:
    return torch.randn(len(PROMPT), D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Against differences


@pytest.mark.parametrize(
    ("name", "point", "horizon"),
    [*(("gpt2", point, (1, 4, "last")[i % 3]) for i, point in enumerate(points("gpt2"))), ("phi", "mlp_out", 4)],
)
def test_gradients_equal_finite_differences(name, point, horizon):
    """All in float64: rounding of 1e-15 over a step of 1e-3 stays far below the tolerance."""
    recording, site = recorded(name), Site(2, point)
    gradient, value = gradients(recording, site, PROMPT, POSITION, OBJECTIVE, horizon=horizon)
    x = recording.at(site, PROMPT, POSITION)
    torch.testing.assert_close(value, by_measure(recording, site, x, horizon), rtol=1e-10, atol=1e-10)
    along = directions(0)
    expected = difference(lambda y: by_measure(recording, site, y, horizon), x, along, 1e-3)
    assert (expected.abs() > 0.02).any()
    torch.testing.assert_close((gradient * along).sum(-1), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("name", "point"), [("llama", "resid_mid"), ("gemma3", "attn_out")])
def test_gradients_with_float32_norms_equal_finite_differences(name, point):
    """The RMSNorm of transformers computes in float32, so rounding limits agreement to about 1e-4."""
    recording, site = recorded(name), Site(2, point)
    for horizon in (1, 4):
        gradient, _ = gradients(recording, site, PROMPT, POSITION, OBJECTIVE, horizon=horizon)
        x, along = recording.at(site, PROMPT, POSITION), directions(0)
        along = along / along.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
        expected = difference(lambda y, h=horizon: by_measure(recording, site, y, h), x, along, 5e-3)
        assert (expected.abs() > 0.02).any()
        torch.testing.assert_close((gradient * along).sum(-1), expected, rtol=2e-3, atol=2e-3)


def test_each_row_has_its_own_objective_whatever_the_chunks():
    """Token lists are `[row, token]`; rows are sorted and cut into chunks internally."""
    recording, site = recorded("gpt2"), Site(2)
    own = LogitDifference([[7 + i] for i in range(len(PROMPT))], [[60 - i, 40] for i in range(len(PROMPT))])
    whole, value = gradients(recording, site, PROMPT, POSITION, own, horizon=4)
    for batch_rows in (1, 3):
        again, same = gradients(recording, site, PROMPT, POSITION, own, horizon=4, batch_rows=batch_rows)
        torch.testing.assert_close(again, whole, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(same, value, rtol=1e-10, atol=1e-12)
    for i in range(len(PROMPT)):
        one = LogitDifference([7 + i], [60 - i, 40])
        alone_, _ = gradients(recording, site, PROMPT[i : i + 1], POSITION[i : i + 1], one, horizon=4)
        torch.testing.assert_close(alone_[0], whole[i], rtol=1e-10, atol=1e-12)


def test_functions_of_logits_are_objectives():
    """A token metric equals the same function written out, and the chain rule holds: ∂log P = ∂P / P."""
    recording, site = recorded("gpt2"), Site(2)
    some = recording, site, PROMPT, POSITION
    by_metric, by_hand = (gradients(*some, o)[0] for o in (OBJECTIVE, lambda logits, _: plain(logits)))
    torch.testing.assert_close(by_metric, by_hand, rtol=1e-10, atol=1e-12)
    slope, p = gradients(*some, Probability([3, 8]))
    log_slope, log_p = gradients(*some, lambda logits, _: logits.log_softmax(-1)[:, [3, 8]].logsumexp(-1))
    torch.testing.assert_close(p.log(), log_p, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope / p[:, None], log_slope, rtol=1e-9, atol=1e-12)


def test_gradients_are_formed_under_no_grad():
    recording, site = recorded("gpt2"), Site(2)
    expected, _ = gradients(recording, site, PROMPT, POSITION, OBJECTIVE)
    with torch.no_grad():
        found, value = gradients(recording, site, PROMPT, POSITION, OBJECTIVE)
        everywhere = gradients_everywhere(recording, [site], PROMPT, POSITION, OBJECTIVE)[site]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not (found.requires_grad or value.requires_grad or everywhere.requires_grad)


# At every position


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_everywhere_agree_with_replay(name):
    recording = recorded(name, (1, 2))
    sites = [Site(layer, point) for layer in (1, 2) for point in points(name)]
    last = recording.length[PROMPT] - 1
    whole = gradients_everywhere(recording, sites, PROMPT, last, OBJECTIVE)
    assert list(whole) == sites
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if name in LAYER_NORM else {"rtol": 1e-4, "atol": 1e-5}
    for site in sites:
        assert whole[site].shape == (len(PROMPT), int(recording.length.max()), D_MODEL)
        one, _ = gradients(recording, site, PROMPT, POSITION, OBJECTIVE, horizon="last")
        torch.testing.assert_close(whole[site][torch.arange(len(PROMPT)), POSITION], one, **tolerance)


@pytest.mark.parametrize(("name", "inside"), [("mamba", torch.float32), ("gpt2", torch.float64)])
def test_gradients_everywhere_equal_finite_differences(name, inside):
    """Also for models that replay does not support; nothing after the row's own position matters.

    inside: what the norms of mamba compute in, in a float64 model.
    """
    hf, site = tiny_model(name, "cpu", torch.float64), Site(2)
    recording = record(wrap(hf), prompts(), [site])
    prompt, position = torch.tensor([0, 1, 3, 3]), torch.tensor([20, 9, 14, 23])
    found = gradients_everywhere(recording, [site], prompt, position, OBJECTIVE, batch_rows=3)[site]
    step, tolerance = (1e-3, 1e-7) if inside == torch.float64 else (2e-2, 3e-3)
    for row, earlier in ((0, 20), (0, 13), (1, 2), (2, 0), (2, 11), (3, 20)):
        tokens = prompts()[int(prompt[row])]
        along = directions(row)[0]
        f = lambda y, t=tokens, q=earlier, p=int(position[row]): plain(forward_alone(name, hf, t, site, {q: y})[p])  # noqa: E731
        x = recording.activations[site][prompt[row], earlier]
        expected = difference(f, x, along, step)
        assert float(found[row, earlier] @ along) == pytest.approx(float(expected), rel=tolerance, abs=tolerance)
        assert found[row, : position[row] + 1].norm(dim=-1).gt(0).any()
    for row, p in enumerate(position.tolist()):
        assert not found[row, p + 1 :].any()


def test_gradients_everywhere_take_several_sites_and_objectives():
    recording = recorded("gpt2", (1, 2))
    sites = [Site(1, "attn_out"), Site(2), Site(2, "resid_mid")]
    own = LogitDifference([[7 + i] for i in range(len(PROMPT))], [40])
    together = gradients_everywhere(recording, sites, PROMPT, POSITION, own, batch_rows=4)
    for site in sites:
        for i in range(len(PROMPT)):
            one = gradients_everywhere(
                recording, [site], PROMPT[i : i + 1], POSITION[i : i + 1], LogitDifference([7 + i], [40])
            )
            torch.testing.assert_close(together[site][i], one[site][0], rtol=1e-9, atol=1e-12)


# Attributions


def linear_head():
    """A llama that unembeds the stream itself: after its last block logits are linear in the activation."""
    hf = fresh("llama", dtype=torch.float64)
    hf.model.norm = nn.Identity()
    return hf, Site(N_LAYERS - 1)


@pytest.mark.parametrize("baseline", [0.0, "vectors"])
def test_attributions_are_exact_where_the_objective_is_linear(baseline):
    hf, site = linear_head()
    recording = record(wrap(hf), prompts(), [site])
    b = directions(3) if baseline == "vectors" else baseline
    first = gradient_times_activation(recording, site, PROMPT, POSITION, OBJECTIVE, baseline=b)
    path = integrated_gradients(recording, site, PROMPT, POSITION, OBJECTIVE, baseline=b, steps=1)
    weight = hf.lm_head.weight.double()
    w = weight[3] - (weight[5] + weight[6]) / 2
    x = recording.at(site, PROMPT, POSITION)
    for found in (first, path):
        torch.testing.assert_close(found.score, (x - b) @ w, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.gradient, w.expand_as(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.clean, x @ w, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(path.baseline, ((x * 0) + b) @ w, rtol=1e-10, atol=1e-10)
    assert path.gap.abs().max() < 1e-10


@pytest.mark.parametrize(
    ("power", "steps", "exact"), [(2, 1, True), (3, 1, False), (3, 2, True), (5, 2, False), (5, 3, True)]
)
def test_n_steps_are_exact_for_polynomials_of_degree_2n_minus_1(power, steps, exact):
    """Gauss-Legendre quadrature; the integrand has degree `power` − 1."""
    hf, site = linear_head()
    recording = record(wrap(hf), prompts(), [site])
    found = integrated_gradients(recording, site, PROMPT, POSITION, lambda y, _: y[:, 3] ** power, steps=steps)
    error = (found.gap.abs() / found.clean.abs()).max()
    assert (error < 1e-10) == exact
    assert exact or error > 1e-3


@pytest.mark.parametrize(("name", "horizon"), [("gpt2", 4), ("llama", 1)])
def test_integrated_gradients_are_complete(name, horizon):
    """The gap shrinks with the number of steps; scores add up to the effect of replacing the baseline by the activation."""
    recording, site = recorded(name), Site(2)
    x = recording.at(site, PROMPT, POSITION)
    baseline = x + 2 * directions(6)
    runs = [
        integrated_gradients(recording, site, PROMPT, POSITION, OBJECTIVE, baseline=baseline, steps=n, horizon=horizon)
        for n in (1, 24)
    ]
    gaps = [float(run.gap.abs().max()) for run in runs]
    effect = by_measure(recording, site, x, horizon) - by_measure(recording, site, baseline, horizon)
    assert effect.abs().max() > 0.4
    assert gaps[0] > 10 * gaps[1]
    assert gaps[1] < 1e-4
    torch.testing.assert_close(runs[1].score, effect, rtol=0, atol=2e-4)
    torch.testing.assert_close(runs[1].clean - runs[1].baseline, effect, rtol=1e-6, atol=1e-5)


# Errors, and what is left behind


def test_a_rank_cannot_be_attributed():
    some = PROMPT, POSITION, Rank([3])
    for form in (gradients, gradient_times_activation, integrated_gradients):
        with pytest.raises(EditError, match=r"cannot be differentiated \(a rank\?\)"):
            form(recorded("gpt2"), Site(2), *some)
    with pytest.raises(EditError, match=r"cannot be differentiated \(a rank\?\)"):
        gradients_everywhere(recorded("gpt2"), [Site(2)], *some)


def test_invalid_arguments_raise():
    recording, site = recorded("gpt2"), Site(2)
    some = (PROMPT, POSITION, OBJECTIVE)
    with pytest.raises(EditError, match="0 steps; expected 1 or more"):
        integrated_gradients(recording, site, *some, steps=0)
    with pytest.raises(EditError, match="use integrated_gradients"):
        _ = gradient_times_activation(recording, site, *some).gap
    with pytest.raises(SiteError, match="no block 9"):
        gradients_everywhere(recording, [Site(9)], *some)
    with pytest.raises(SiteError, match="no resid_mid in block 2"):
        gradients_everywhere(recorded("phi"), [Site(2, "resid_mid")], *some)
    with pytest.raises(SiteError, match="was not recorded"):
        gradients(recording, Site(4), *some)
    with pytest.raises(SiteError, match="position 24 lies outside prompt 0"):
        gradients_everywhere(recording, [site], torch.tensor([0]), torch.tensor([24]), OBJECTIVE)
    without_keys = record(wrap(tiny_model("mamba")), prompts(), [site])
    with pytest.raises(ReplayError, match=r"replay is not exact here: blocks of kind (linear_attention|mamba) "):
        gradients(without_keys, site, *some)


def hooks_of(hf: nn.Module) -> list[int]:
    return [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ("forward" in m.__dict__)
        for m in hf.modules()
    ]


def fails(logits, row):
    raise ArithmeticError("an objective of one's own")


def test_trainable_parameters_do_not_change_gradients():
    """`from_pretrained` gives such models."""
    recording = record(wrap(fresh("llama").requires_grad_(True)), prompts(), [Site(2)])
    found, value = gradients(recording, Site(2), PROMPT, POSITION, OBJECTIVE)
    expected, _ = gradients(recorded("llama", dtype=torch.float32), Site(2), PROMPT, POSITION, OBJECTIVE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not (found.requires_grad or value.requires_grad)
    assert all(p.grad is None for p in recording.model.hf.parameters())


@pytest.mark.parametrize("objective", [OBJECTIVE, fails])
def test_attribution_leaves_the_model_unchanged(objective):
    """No hook remains and the forward pass is unchanged, also where the objective raises."""
    hf = fresh("llama")
    before = hooks_of(hf)
    assert not any(before)
    recording = record(wrap(hf), prompts(), [Site(2), Site(3, "attn_out")])
    for form in (
        lambda: gradients(recording, Site(2), PROMPT, POSITION, objective, horizon=2),
        lambda: integrated_gradients(recording, Site(3, "attn_out"), PROMPT, POSITION, objective, steps=2),
        lambda: gradients_everywhere(recording, [Site(2), Site(3, "attn_out")], PROMPT, POSITION, objective),
    ):
        if objective is OBJECTIVE:
            found = form()
            assert not isinstance(found, Attribution) or found.gap.isfinite().all()
        else:
            with pytest.raises((EditError, ArithmeticError)):
                form()
        assert hooks_of(hf) == before
    clean = alone("llama", hf, prompts()[0], None, 5)
    torch.testing.assert_close(clean, alone("llama", tiny_model("llama"), prompts()[0], None, 5), rtol=0, atol=0)


# However the model is wrapped


@pytest.mark.bridge
def test_a_bridge_gives_the_same_gradients():
    """Both in float32, so they agree to 1e-4 of a gradient."""
    sites = [Site(2), Site(3, "attn_out"), Site(3, "mlp_out")]
    recordings = [record(wrap(wrapped("llama", kind)), prompts(), sites) for kind in ("plain", "bridge")]
    everywhere = [gradients_everywhere(r, sites, PROMPT, POSITION, OBJECTIVE) for r in recordings]
    for site in sites:
        (one, value), (other, same) = (gradients(r, site, PROMPT, POSITION, OBJECTIVE, horizon=4) for r in recordings)
        assert (one - other).norm(dim=-1).max() < 1e-4 * one.norm(dim=-1).max()
        torch.testing.assert_close(value, same, rtol=1e-4, atol=1e-4)
        assert (everywhere[0][site] - everywhere[1][site]).norm() < 1e-4 * everywhere[0][site].norm()


def test_baseline_dtype_may_differ_and_wrong_token_lists_raise():
    recording = record(wrap(fresh("llama", dtype=torch.bfloat16)), prompts(), [Site(2)])
    baseline = torch.zeros(len(PROMPT), D_MODEL)
    found = integrated_gradients(recording, Site(2), PROMPT, POSITION, OBJECTIVE, baseline=baseline, steps=2)
    assert found.gradient.dtype == torch.bfloat16 and found.score.isfinite().all()
    objective = LogitDifference(torch.zeros(len(PROMPT) + 1, 1, dtype=torch.long), [1])
    with pytest.raises(EditError, match="token ids of shape"):
        gradients(recording, Site(2), PROMPT, POSITION, objective)
