"""Metrics against references in float64 whose terms are all ≥ 0, so that nothing cancels, and against 50 digits.

What float32 attains: logits of order 10 are given to 1e-6, and the references see the same rounded logits, so only the
formula is under test. Observed relative errors, at 97 and 49 152 tokens: KL ≤ 5e-6 from 1e-9 to 45 and ≤ 4e-6 at
1e-13; JS ≤ 3e-5 from 1e-13 to ln 2 (its series is cut at w³).
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from interventions import EditError, metrics
from interventions.metrics import METRICS, CleanRows, CleanSide, Comparison, LogitDifference, Probability, Rank
from tests.tiny import exact_kl, growth

RELATIVE = 1e-4
vocabularies = pytest.mark.parametrize("vocab", [97, 49152])


def gaussian(seed, *shape, scale=1.0, dtype=torch.float32):
    """Logits formed in float64, rounded once."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * draw).to(dtype)


def exact_js(clean, intervened):
    """½KL(p‖m) + ½KL(q‖m), m = (p + q)/2, in float64 on the CPU, each as `exact_kl` forms it."""
    log_p, log_q = (x.double().cpu().log_softmax(-1) for x in (clean, intervened))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    # where p and q are alike log m loses its digits: log m − log p = w/2 + w²/8 − w⁴/192, w = log q − log p
    w = log_q - log_p
    log_m = torch.where(w.abs() < 1e-3, log_p + w / 2 + w * w / 8, log_m)
    return 0.5 * (growth(log_p, log_m) + growth(log_q, log_m)).sum(-1)


def relative(found, exact):
    return float(((found.double().cpu() - exact).abs() / exact).max())


def pairs(vocab, device, smallest, largest):
    """Clean and intervened logits of 16 rows, changed by Gaussians of `smallest` to `largest` standard deviations.

    KL is about half the square of that while it is small.
    """
    clean = gaussian(0, 16, vocab, scale=3.0)
    size = torch.logspace(math.log10(smallest), math.log10(largest), 16, dtype=torch.float64)
    change = size[:, None] * gaussian(1, 16, vocab, dtype=torch.float64)
    return clean.to(device), (clean.double() + change).float().to(device)


# Against references


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 5.0])
def test_exact_divergences_agree_with_50_digits(scale):
    import mpmath

    clean = gaussian(0, 1, 97, scale=3.0, dtype=torch.float64)
    intervened = clean + scale * gaussian(1, 1, 97, dtype=torch.float64)
    with mpmath.workdps(50):
        p, q = ([mpmath.exp(x) for x in side[0].tolist()] for side in (clean, intervened))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        kl = sum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))
        js = (
            sum(a * mpmath.log(2 * a / (a + b)) + b * mpmath.log(2 * b / (a + b)) for a, b in zip(p, q, strict=True))
            / 2
        )
    assert float(exact_kl(clean, intervened)) == pytest.approx(float(kl), rel=1e-7)
    assert float(exact_js(clean, intervened)) == pytest.approx(float(js), rel=1e-7)


@vocabularies
@pytest.mark.parametrize(
    ("smallest", "largest", "least", "most"), [(4e-7, 5e-5, 2e-13, 3e-10), (5e-5, 14.0, 1e-8, 30.0)]
)
def test_kl_is_exact_from_1e_13_to_30(vocab, smallest, largest, least, most, device):
    """The smallest changes are a few units in the last place of the logits; KL of the rounded logits is met to 1e-4."""
    clean, intervened = pairs(vocab, device, smallest, largest)
    exact = exact_kl(clean, intervened)
    assert least / 10 < exact.min() < least and exact.max() > most
    assert relative(metrics.kl_divergence(clean, intervened), exact) <= RELATIVE
    assert relative(metrics.kl_divergence(intervened, clean), exact_kl(intervened, clean)) <= RELATIVE


@vocabularies
def test_js_is_exact_from_1e_13_to_ln_2(vocab, device):
    clean, intervened = pairs(vocab, device, 1e-6, 30.0)
    exact = exact_js(clean, intervened)
    assert exact.min() < 1e-12 and exact.max() > 0.6
    assert relative(metrics.js_divergence(clean, intervened), exact) <= RELATIVE


@pytest.mark.parametrize("change", [1e-3, 0.03, 1.0])
def test_float64_logits_stay_float64(change, device):
    """Exact to where the series are cut: d³/60 ≤ 2e-8 of KL at |d| < 0.01, w³/8 ≤ 2e-5 of JS at |w| < 0.05."""
    clean = gaussian(0, 5, 97, dtype=torch.float64)
    intervened = clean + change * gaussian(1, 5, 97, dtype=torch.float64)
    kl = metrics.kl_divergence(clean.to(device), intervened.to(device))
    js = metrics.js_divergence(clean.to(device), intervened.to(device))
    assert kl.dtype == js.dtype == torch.float64
    assert relative(kl, exact_kl(clean, intervened)) <= 2e-8
    assert relative(js, exact_js(clean, intervened)) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_widened(dtype, device):
    clean, intervened = gaussian(0, 5, 97, scale=3.0, dtype=dtype), gaussian(1, 5, 97, scale=3.0, dtype=dtype)
    for function, exact in ((metrics.kl_divergence, exact_kl), (metrics.js_divergence, exact_js)):
        found = function(clean.to(device), intervened.to(device))
        assert found.dtype == torch.float32
        assert torch.equal(found, function(clean.float().to(device), intervened.float().to(device)))
        assert relative(found, exact(clean, intervened)) <= RELATIVE


# Extreme logits


def extreme(device, *changes, vocab=97):
    """Ordinary rows of logits with some tokens' set: clean and intervened, `(token, clean, intervened)`."""
    clean = gaussian(0, 3, vocab)
    intervened = clean + gaussian(1, 3, vocab, scale=0.1)
    for token, before, after in changes:
        clean[:, token], intervened[:, token] = before, after
    return clean.to(device), intervened.to(device)


@pytest.mark.parametrize(
    "changes",
    [
        [(5, -120.0, 60.0)],  # p underflows in float32, q is nearly 1
        [(5, -200.0, 30.0), (6, -90.0, -300.0)],
        [(5, -120.0, 5.0)],  # p underflows, q is one of many
        [(5, 60.0, -120.0)],
        [(5, 80.0, -80.0), (6, -80.0, 80.0)],  # one certainty for another
        [(5, -100.0, -40.0)],  # nowhere does it matter
        [(token, -200.0, 200.0) for token in range(48)],
    ],
    ids=str,
)
def test_divergences_of_extreme_logits_are_exact(changes, device):
    clean, intervened = extreme(device, *changes[:48])
    kl, js = metrics.kl_divergence(clean, intervened), metrics.js_divergence(clean, intervened)
    assert relative(kl, exact_kl(clean, intervened)) <= RELATIVE
    assert relative(js, exact_js(clean, intervened)) <= RELATIVE
    assert (js <= math.log(2) * (1 + 1e-6)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_logits_give_nonfinite_divergences(value, device):
    clean = gaussian(0, 1, 97).to(device)
    broken = clean.clone()
    broken[0, 3] = value
    for function in (metrics.kl_divergence, metrics.js_divergence):
        assert not function(clean, broken).isfinite().any()
        assert not function(broken, clean).isfinite().any()


def masked_reference(clean, intervened):
    """KL, JS and both entropies in float64 numpy, each a sum over the tokens that have a probability."""
    p, q = (np.exp(x - np.logaddexp.reduce(x, -1, keepdims=True)) for x in (clean, intervened))
    log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (clean, intervened))
    here, there = log_p > -np.inf, log_q > -np.inf
    with np.errstate(invalid="ignore"):
        term = np.where(here & there, q - p + p * (log_p - log_q), 0.0)  # ≥ 0, as exact_kl
        near = np.where(here & there, log_q - log_p, 0.0)
        term = np.where(np.abs(near) < 1e-4, p * near**2 * (0.5 + near / 6), term)
        term = np.where(there & ~here, q, term)
        kl = np.where((here & ~there).any(-1), np.inf, term.sum(-1))
        log_m = np.logaddexp(log_p, log_q) - np.log(2)
        js = 0.5 * (np.where(here, p * (log_p - log_m), 0.0) + np.where(there, q * (log_q - log_m), 0.0)).sum(-1)
        entropy = -np.where(here, p * log_p, 0.0).sum(-1)
    return kl, js, entropy


PINS = [-np.inf, -1e9, float(torch.finfo(torch.float32).min), -65504.0, -200.0]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-3, 0.1, 3.0]),
    st.lists(
        st.tuples(st.sampled_from(PINS), st.sampled_from(["both", "clean", "intervened"])), min_size=1, max_size=3
    ),
    st.sampled_from([97, 3000]),
    st.booleans(),
    st.booleans(),
)
def test_pinned_logits_match_float64(seed, change, pins, vocab, one, split):
    """Pinned on one side or both; one clean row shared by all edits or one each; rows with and without pins in one call."""
    clean = gaussian(seed, 1 if one else 4, vocab, scale=3.0)
    intervened = clean + gaussian(seed + 1, 4, vocab, scale=change)
    for k, (value, where) in enumerate(pins):
        some = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed + k))[: 1 + vocab // 20]
        if where != "intervened":
            clean[..., some] = value
        if where != "clean":
            rows = slice(None) if where == "both" else slice(1, 3)
            intervened[rows, some] = value
    side = CleanSide(clean)
    found = Comparison(side, intervened, split=split)
    kl, js, entropy = masked_reference(clean.double().numpy(), intervened.double().numpy())
    lowest = torch.finfo(torch.float32).min  # taken as −inf, which it stands for
    tiny = [(x == lowest).numpy() for x in (clean, intervened)]
    kl = np.where((tiny[1] & ~tiny[0] & (clean.numpy() > -np.inf)).any(-1), np.inf, kl)
    np.testing.assert_allclose(found.kl, kl, rtol=RELATIVE, atol=1e-12)
    np.testing.assert_allclose(found.js, js, rtol=10 * RELATIVE, atol=1e-9)
    np.testing.assert_allclose(side.entropy, entropy, rtol=1e-5)
    assert found.finite.all()
    assert torch.equal(found.top1, intervened.argmax(-1)) and not (found.kl < 0).any()
    top, row = clean.argmax(-1).expand(4), torch.arange(4)
    with np.errstate(invalid="ignore"):
        drop = clean.double().log_softmax(-1).expand(4, -1)[row, top] - intervened.double().log_softmax(-1)[row, top]
    drop[intervened[row, top] == lowest] = torch.inf
    np.testing.assert_allclose(found.top1_drop, drop, rtol=RELATIVE, atol=2e-5)


@pytest.mark.parametrize("split", [True, False])
def test_pinned_logits_do_not_reduce_precision(split, device):
    """Pinned logits may themselves differ by rounding: a KL of 1e-8 is as exact as without them."""
    clean = gaussian(0, 1, 97, scale=3.0)
    intervened = clean + gaussian(1, 3, 97, scale=1e-4)
    exact = masked_reference(clean[:, 5:].double().numpy(), intervened[:, 5:].double().numpy())[0]
    for before, after in [(-1e9, -1e9), (-1e9, -1e9 + 64), (-1e9 + 64, -1e9), (-np.inf, -np.inf), (-np.inf, -1e9)]:
        clean[:, :5], intervened[:, :5] = before, after
        found = Comparison(CleanSide(clean.to(device)), intervened.to(device), split=split)
        np.testing.assert_allclose(found.kl.cpu(), exact, rtol=RELATIVE)
    assert 1e-9 < exact.min() < exact.max() < 1e-7


def test_centred_logits_ignore_pinned_tokens(device):
    logits = gaussian(0, 3, 97)
    expected = logits[:, 5:] - logits[:, 5:].mean(-1, keepdim=True)
    for value in PINS[:-1]:
        logits[:, :5] = value
        torch.testing.assert_close(metrics.centred_logits(logits.to(device))[:, 5:].cpu(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken_side", ["clean", "intervened"])
def test_nonfinite_rows_are_not_counted_as_unchanged(value, broken_side, device):
    """One row of three is nonfinite, in one logit or in all: it counts as nonfinite and has no top token and no rank."""
    clean, intervened = gaussian(0, 3, 97).to(device), gaussian(1, 3, 97).to(device)
    side = clean if broken_side == "clean" else intervened
    for where in (3, slice(None)):
        side[1, where] = value
        found = Comparison(CleanSide(clean), intervened)
        assert found.finite.tolist() == [True, False, True]
        assert (found.top1 < 0).tolist() == [False, True, False]
        assert (found.clean_top1 < 0).tolist() == [False, broken_side == "clean", False]
        assert Rank([4])(side, torch.arange(3)).isnan().tolist() == [False, True, False]
        assert Probability([4])(side, torch.arange(3)).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Probability([3, 3]), "probability: token 3 is given twice; expected each token once"),
        (Probability([[3, 4], [5, 5]]), "probability: token 5 is given twice"),
        (LogitDifference([3, 3], 4), "logit_difference: token 3 is given twice; expected each token once, on one side"),
        (LogitDifference([3, 4], [5, 4]), "logit_difference: token 4 is given twice"),
        (LogitDifference([[1], [2]], [3, 2]), "logit_difference: token 2 is given twice"),
        (LogitDifference(7, torch.tensor(7)), "logit_difference: token 7 is given twice"),
    ],
    ids=str,
)
def test_a_token_given_twice_raises(metric, message):
    with pytest.raises(EditError, match=message):
        metric.check(2)


# Identities


@vocabularies
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_identical_logits_have_zero_divergence(vocab, scale, device):
    logits = gaussian(0, 4, vocab, scale=scale).to(device)
    assert torch.equal(metrics.kl_divergence(logits, logits.clone()), torch.zeros(4, device=device))
    assert torch.equal(metrics.js_divergence(logits, logits.clone()), torch.zeros(4, device=device))
    assert not metrics.top1_changed(logits, logits.clone()).any()


seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.0, 1e-7, 1e-4, 0.01, 1.0, 10.0, 100.0])


@given(seeds, scales, scales)
@example(3971386214, 100.0, 1.0)  # a JS of 4e-43, below float32's normal numbers
def test_divergences_are_bounded_and_js_is_symmetric(seed, size, change):
    """Rounding of log-probabilities grows with the logits, so the bounds allow for it."""
    clean = gaussian(seed, 2, 97, scale=size)
    intervened = clean + gaussian(seed + 1, 2, 97, scale=change)
    kl, js = metrics.kl_divergence(clean, intervened), metrics.js_divergence(clean, intervened)
    rounding = torch.finfo(torch.float32).eps * float(1 + clean.abs().max() + intervened.abs().max())
    assert (kl >= 0).all() and kl.isfinite().all()
    assert (js >= 0).all() and (js <= math.log(2) * (1 + rounding)).all()
    back = metrics.js_divergence(intervened, clean)
    assert torch.allclose(js, back, rtol=RELATIVE, atol=rounding**2)
    assert torch.allclose(js.double(), exact_js(clean, intervened), rtol=RELATIVE, atol=rounding**2)


@given(seeds, st.floats(-50, 50), st.floats(-50, 50), st.sampled_from([1e-3, 0.1, 3.0]))
def test_a_constant_added_to_either_side_changes_nothing(seed, a, b, change):
    """Compared with the exact KL of the logits as they were before the constant was added.

    Adding c rounds each logit by eps·(|c| + 10) at most: a δ of the distribution, whose effect is ≤ √(2KL)·δ + δ².
    """
    clean = gaussian(seed, 2, 97, scale=2.0)
    intervened = clean + gaussian(seed + 1, 2, 97, scale=change)
    exact = exact_kl(clean, intervened)
    delta = 2 * torch.finfo(torch.float32).eps * (abs(a) + abs(b) + 10)
    found = metrics.kl_divergence(clean + a, intervened + b).double()
    assert ((found - exact).abs() <= (2 * exact).sqrt() * delta + delta**2 + 1e-5 * exact).all()
    exact = exact_js(clean, intervened)
    found = metrics.js_divergence(clean + a, intervened + b).double()
    assert ((found - exact).abs() <= (2 * exact).sqrt() * 2 * delta + delta**2 + 1e-5 * exact).all()


@pytest.mark.parametrize("constant", [-60.0, 30.0, 200.0])
@pytest.mark.parametrize(("vocab", "change"), [(97, 0.03), (97, 0.3), (97, 3.0), (97, 9.0), (49152, 0.3)])
def test_large_constant_on_one_side_keeps_precision(vocab, constant, change, device):
    """References see the same rounded logits, so this is the formula alone: what Σp misses of 1 must not count `constant` times.

    JS loses more than KL of what cancels between its two terms where log q − log p is just too large for the series.
    """
    clean = gaussian(0, 4, vocab, scale=4.0)
    intervened = clean + gaussian(1, 4, vocab, scale=change) + constant
    for found_clean in (clean, clean[:1].expand(4, -1)):
        one = found_clean if found_clean is clean else found_clean[:1]
        found = Comparison(CleanSide(one.to(device)), intervened.to(device))
        assert relative(found.kl, exact_kl(found_clean, intervened)) <= RELATIVE
        assert relative(found.js, exact_js(found_clean, intervened)) <= 10 * RELATIVE


def test_entropy_of_uniform_and_certain_distributions(device):
    for vocab in (1, 2, 97, 49152):
        uniform = torch.full((2, vocab), 3.7, device=device)
        assert torch.allclose(metrics.entropy(uniform), torch.full((2,), math.log(vocab), device=device), rtol=2e-6)
    logits = torch.zeros(1, 97, device=device)
    logits[0, 3] = 300.0
    assert float(metrics.entropy(logits)) == 0.0


# Known answers


def test_kl_and_js_of_two_coins(device):
    """p = (3/4, 1/4), q = (1/2, 1/2), computed by hand; the first argument is the clean one."""
    p = torch.tensor([[0.75, 0.25]], dtype=torch.float64, device=device).log()
    q = torch.tensor([[0.5, 0.5]], dtype=torch.float64, device=device).log()
    assert float(metrics.kl_divergence(p, q)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)
    assert float(metrics.kl_divergence(q, p)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-12)
    m = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375) + math.log(0.5) - 0.5 * math.log(0.625 * 0.375)
    assert float(metrics.js_divergence(p, q)) == pytest.approx(0.5 * m, rel=1e-12)


def test_top1_changed(device):
    clean = torch.tensor([[1.0, 3.0, 2.0]]).repeat(4, 1).to(device)
    intervened = torch.tensor([[9.0, 10.0, 9.9], [1.0, 2.0, 3.0], [2.0, 2.0, 1.0], [5.0, -5.0, 0.0]], device=device)
    assert metrics.top1_changed(clean, intervened).tolist() == [False, True, False, True]
    assert metrics.top1_changed(clean, intervened).dtype == torch.bool


def test_centred_logits(device):
    logits = gaussian(0, 3, 97, scale=5.0).to(device) + 20
    centred = metrics.centred_logits(logits)
    assert centred.mean(-1).abs().max() <= 1e-5
    assert torch.allclose(centred.log_softmax(-1), logits.log_softmax(-1), atol=1e-5)
    assert metrics.centred_logits(logits.half()).dtype == torch.float32


def test_logit_difference(device):
    logits = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, -1.0, 5.0, 5.0]], device=device)
    found = metrics.logit_difference(logits, torch.tensor([2, 3]), torch.tensor([1]))
    assert found.tolist() == [4.0, 6.0]
    assert metrics.logit_difference(logits.bfloat16(), torch.tensor([3]), torch.tensor([0, 1])).dtype == torch.float32


# How rows meet


@pytest.mark.parametrize("name", METRICS)
def test_one_clean_row_is_shared_by_several_edits(name, device):
    """Sums over the vocabulary may be taken in another order, so results agree only within their precision."""
    clean = gaussian(0, 1, 97, scale=3.0).to(device)
    scale = torch.tensor([1e-4, 1e-4, 1.0, 1.0, 100.0, 100.0])[:, None]
    intervened = clean + (scale * gaussian(1, 6, 97)).to(device)
    shared = METRICS[name](Comparison(CleanSide(clean), intervened))
    assert shared.shape == (6,)
    for i in range(6):
        one = METRICS[name](Comparison(CleanSide(clean), intervened[i : i + 1]))
        assert torch.allclose(shared[i : i + 1].double(), one.double(), rtol=RELATIVE)
    repeated = METRICS[name](Comparison(CleanSide(clean.expand(6, -1)), intervened))
    assert torch.allclose(shared.double(), repeated.double(), rtol=RELATIVE)


@pytest.mark.parametrize("name", METRICS)
def test_each_edit_is_compared_with_its_own_clean_row(name, device):
    side = CleanSide(gaussian(0, 3, 97, scale=3.0).to(device))
    intervened = gaussian(1, 5, 97, scale=3.0).to(device)
    index = torch.tensor([2, 0, 0, 1, 2], device=device)
    found = METRICS[name](Comparison(CleanRows(side, index), intervened))
    expected = METRICS[name](Comparison(CleanSide(side.logits[index]), intervened))
    assert torch.allclose(found.double(), expected.double(), rtol=1e-6)
    one = METRICS[name](Comparison(CleanRows(side, slice(1, 2)), intervened))
    expected = METRICS[name](Comparison(CleanSide(side.logits[1:2]), intervened))
    assert torch.allclose(one.double(), expected.double(), rtol=1e-6)


def test_metrics_do_not_change_their_arguments(device):
    clean, intervened = gaussian(0, 3, 97, scale=40.0).to(device), gaussian(1, 3, 97, scale=40.0).to(device)
    before = clean.clone(), intervened.clone()
    comparison = Comparison(CleanSide(clean), intervened)
    for metric in METRICS.values():
        metric(comparison)
    assert torch.equal(clean, before[0]) and torch.equal(intervened, before[1])


# Metrics of tokens


def test_token_metrics_equal_hand_computed_values(device):
    logits = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, -1.0, 5.0, 5.0]], device=device)
    rows = torch.tensor([1, 0])  # the lines are rows 1 and 0 of the call
    assert LogitDifference([2, 3], 1)(logits, rows).tolist() == [4.0, 6.0]
    assert LogitDifference([[0], [3]], [[1], [2]])(logits, rows).tolist() == [4.0, 1.0]
    assert Rank(0)(logits, rows).tolist() == [3.0, 2.0]
    assert Rank([0, 2])(logits, rows).tolist() == [1.0, 0.0]  # a tie is no larger logit
    assert Rank([[3], [0]])(logits, rows).tolist() == [3.0, 0.0]
    p = logits.double().softmax(-1).cpu()
    assert Probability([0, 2])(logits, rows).tolist() == pytest.approx((p[:, 0] + p[:, 2]).tolist(), rel=1e-6)
    assert Probability([[1], [3]])(logits, rows).tolist() == pytest.approx([float(p[0, 3]), float(p[1, 1])], rel=1e-6)
    assert Rank([0]).name == "rank" and Rank(0, name="mine").name == "mine"
    for metric in (LogitDifference(0, 1), Probability(0), Rank(0)):
        assert metric(logits.bfloat16(), rows).dtype == torch.float32
        assert metric(logits.double(), rows).dtype == torch.float64


@vocabularies
def test_probabilities_of_extreme_tokens_are_precise(vocab, device):
    """Down to the smallest float32 numbers, where a softmax of float32 logits would lose precision."""
    logits = gaussian(0, 6, vocab, scale=10.0)
    exact = logits.double().softmax(-1)
    rows = torch.arange(6)
    for tokens in (logits.argmin(-1, keepdim=True), logits.argmax(-1, keepdim=True), logits.topk(20).indices):
        found = Probability(tokens)(logits.to(device), rows)
        assert relative(found, exact.gather(-1, tokens).sum(-1)) <= RELATIVE


@given(seeds, st.integers(1, 5), st.integers(1, 8))
def test_token_metrics_equal_plain_torch(seed, n, k):
    logits = gaussian(seed, n, 97, scale=5.0)
    tokens = torch.randint(97, (7, k), generator=torch.Generator().manual_seed(seed))
    rows = torch.randint(7, (n,), generator=torch.Generator().manual_seed(seed + 1))
    mine = logits.gather(-1, tokens[rows])
    rank = (logits[:, None] > mine[:, :, None]).sum(-1).amin(-1)
    assert Rank(tokens)(logits, rows).tolist() == rank.tolist()
    difference = LogitDifference(tokens, tokens.flip(0))(logits, rows)
    assert torch.allclose(difference, mine.mean(-1) - logits.gather(-1, tokens.flip(0)[rows]).mean(-1), atol=1e-5)
    assert torch.allclose(LogitDifference(tokens, tokens)(logits, rows), torch.zeros(n))
    one = Probability(tokens[:, :1])(logits, rows)
    assert torch.allclose(one, logits.softmax(-1).gather(-1, tokens[rows, :1])[:, 0], rtol=1e-4)


def test_invalid_token_ids_raise():
    logits, rows = gaussian(0, 2, 97), torch.tensor([0, 1])
    for tokens in (97, -1, [3, 100]):
        with pytest.raises(EditError, match="rank: a token id lies outside the vocabulary of 97"):
            Rank(tokens)(logits, rows)
    for metric in (
        Rank([]),
        Rank([[1], [2], [3]]),
        Rank(0.5),
        LogitDifference(3),
        LogitDifference([], 3),
        Rank([[[1]]]),
    ):
        with pytest.raises(EditError, match=f"{metric.name}: token ids of shape .*; expected one or more"):
            metric.check(2)
    for metric in (Rank(3), Rank([[1], [2]]), LogitDifference(3, [[1, 2], [5, 4]]), Probability(torch.tensor([3, 4]))):
        metric.check(2)


def test_metrics_of_the_clean_top_token(device):
    """`top1_drop` is the drop of its log-probability; `top1` and `clean_top1` are token ids."""
    clean, intervened = pairs(97, device, 1e-3, 5.0)
    comparison = metrics.Comparison(metrics.CleanSide(clean), intervened)
    top, row = clean.double().argmax(-1), torch.arange(len(clean), device=clean.device)
    drop = clean.double().log_softmax(-1)[row, top] - intervened.double().log_softmax(-1)[row, top]
    torch.testing.assert_close(metrics.METRICS["top1_drop"](comparison).double(), drop, rtol=1e-4, atol=5e-6)
    assert torch.equal(metrics.METRICS["clean_top1"](comparison), top)
    assert torch.equal(metrics.METRICS["top1"](comparison), intervened.argmax(-1))
    changed = metrics.METRICS["top1_changed"](comparison)
    assert changed.any() and not changed.all() and torch.equal(changed, metrics.METRICS["top1"](comparison) != top)
