"""Numbers of cards against direct computations on a tiny model."""

import numpy as np
import pytest
import torch

from diagnostics.cards import effects as latent_effects
from diagnostics.cards.choice import parsed
from diagnostics.cards.effects import share_of_top
from diagnostics.cards.run import latent_card
from interventions import ResultError
from interventions.edits import angle_between
from sae_models.errors import BelongingError, SAEError
from tests.cards import DEAD, OPTIONS, PROMPTS, SITE, Table, activations, cards, model, of_tokens, sae, usable
from tests.tiny import TOLERANCE, alone, assert_same_effect, exact_kl


@pytest.fixture(scope="module")
def card():
    return cards([7])[0]


def test_frequency_activations_and_norms(card):
    """Against `encode` and numpy, over the usable tokens."""
    own, x, count = sae(), activations(), usable()
    z, size = own.encode(x)[:, 7].numpy(), x.norm(dim=1).double().numpy()
    active = count & (z != 0)
    assert 20 < active.sum() == card.n_active and card.n_tokens == count.sum()
    assert card.active_left_out == ((z != 0) & ~count).sum() > 0
    assert card.frequency.value == pytest.approx(active.sum() / count.sum()) and card.frequency.low > 0
    assert card.z_mean == pytest.approx(z[active].mean(), rel=1e-5)
    assert card.z_range == pytest.approx((z[active].min(), z[active].max()), rel=1e-5)
    quarter = np.searchsorted(np.quantile(size[count], [0.25, 0.5, 0.75]), size)
    assert [e.value for e in card.quartile_shares] == pytest.approx([(quarter[active] == q).mean() for q in range(4)])
    assert card.z_histogram.counts.sum() == active.sum()
    for histogram, which in zip(card.norm_histograms, (active, count), strict=True):
        inside = (size[which] >= histogram.edges[3]) & (size[which] < histogram.edges[9])
        assert histogram.counts.sum() == pytest.approx(1)
        assert histogram.counts[3:9].sum() == pytest.approx(inside.mean())
    d, w = own.W_dec[7], own.encoder_rows()[7]
    assert (card.alignment, card.decoder_norm) == pytest.approx((float(d @ w), float(d.norm())), rel=1e-5)
    assert card.alignment_cosine == pytest.approx(float(d @ w / d.norm() / w.norm()), rel=1e-5)
    assert card.learned_a is None and cards([0], sae=None, others={})[0].latent == 0


def test_effects_match_full_forward_passes(card):
    own, x = sae(), activations()
    z = own.encode(x)[:, 7]
    prompt, _ = of_tokens()
    first = {int(p): int(np.flatnonzero(prompt == p)[0]) for p in np.unique(prompt)}
    seen = 0
    for example in card.examples[:3]:
        for i, kl in enumerate(example.kl):
            at = example.start + i
            token = first[example.prompt] + at
            assert example.z[i] == pytest.approx(float(z[token]), rel=1e-5)
            assert np.isfinite(kl) == bool(z[token] != 0 and usable()[token])
            if not np.isfinite(kl):
                continue
            ids = PROMPTS[example.prompt]
            edited = x[token] - z[token] * own.W_dec[7]
            clean, after = (alone("llama", model().hf, ids, site, at, v) for site, v in ((None, None), (SITE, edited)))
            assert_same_effect(torch.tensor([kl]), exact_kl(clean[None], after[None]), TOLERANCE)
            seen += 1
            if i == example.peak:
                words = model().tokenizer
                assert example.clean_top1 == words.decode([int(clean.argmax())])
                assert example.top1 == words.decode([int(after.argmax())])
                dose = abs(z[token]) * own.W_dec[7].norm() / x[token].norm()
                assert example.dose == pytest.approx(float(dose), rel=1e-4)
    assert seen > 5


def test_statistics_of_effects(card):
    rows, e = card.effect_rows, card.effects
    assert len(rows) == card.n_active and e.source == "measured"  # all of them: fewer than were asked for
    placebos = rows[[f"kl_placebo_{i}" for i in range(4)]].to_numpy(float)
    np.testing.assert_allclose(rows.kl_placebo, placebos.mean(1))
    assert e.kl.value == pytest.approx(np.median(rows.kl)) and e.kl_placebo.value == pytest.approx(np.median(placebos))
    middle = np.sort((rows.kl.to_numpy(float)[:, None] / placebos).ravel())[placebos.size // 2 - 1 :][:2]
    assert e.placebo_ratio.value == pytest.approx(np.sqrt(middle.prod()))  # 4 for each row: an even count
    assert e.placebo_ratio.low < e.placebo_ratio.value < e.placebo_ratio.high
    assert e.placebo_ratio.n_rows == e.kl_placebo.n_rows == 4 * len(rows)
    assert e.kl_direct.value == pytest.approx(np.median(rows.kl_direct))
    assert e.dose.value == pytest.approx((rows.delta_norm / rows.norm).mean())
    strongest = rows.sort_values("z", ascending=False)[: -(-len(rows) // 10)]
    assert e.top_tenth.value == pytest.approx(strongest.kl.sum() / rows.kl.sum())
    assert e.top_tenth_dose == pytest.approx((strongest.delta_norm**2).sum() / (rows.delta_norm**2).sum())
    assert 0 <= e.noise_floor < 1e-9 < rows.kl.min()


def test_placebos_have_the_norm_and_angle_of_the_edit(monkeypatch):
    seen = []
    real = latent_effects.measure
    monkeypatch.setattr(latent_effects, "measure", lambda *a, **k: seen.append((*a, k)) or real(*a, **k))
    rows = cards([7], n_effects=9)[0].effect_rows
    (recording, site, prompt, position, vectors, _) = seen[0]
    k = latent_effects.PLACEBOS
    n = (len(vectors) - latent_effects.SELF) // (k + 1)
    x = recording.activations[site][prompt, position]
    edited, placebo, selves = vectors[:n].repeat(k, 1), vectors[n : -latent_effects.SELF], vectors[(k + 1) * n :]
    clean = x[:n].repeat(k, 1)
    for size in (lambda v: v.norm(dim=1), lambda v: angle_between(clean, v), lambda v: (v - clean).norm(dim=1)):
        torch.testing.assert_close(size(edited), size(placebo), rtol=1e-4, atol=1e-5)
    assert torch.equal(x[n : (k + 1) * n], clean) and torch.equal(selves, x[(k + 1) * n :])
    kl = real(recording, site, prompt[n : (k + 1) * n], position[n : (k + 1) * n], placebo)["kl"].view(k, n).mean(0)
    np.testing.assert_allclose(rows.kl_placebo, kl[: len(rows)], rtol=1e-4)
    assert len(rows) == 9 < n  # the tokens of the texts are measured too, and do not count in the mean


def test_examples_and_tokens_depend_only_on_the_seed(card):
    again, other = cards([7])[0], cards([3, 7], seed=1, n_effects=9)[1]
    assert repr(again.examples) == repr(card.examples) and again.effect_rows.equals(card.effect_rows)
    few = cards([3, 7], n_effects=9)[1].effect_rows
    assert set(few.token) <= set(card.effect_rows.token) and set(few.token) != set(other.effect_rows.token)


def test_a_dead_latent_has_a_card():
    card = cards([DEAD])[0]
    assert card.dead and card.effects is None and card.examples == () and card.effect_rows.empty
    assert card.frequency.value == 0 and np.isnan(card.z_mean) and np.isnan(card.quartile_shares[0].value)
    assert len(card.promoted) == 10 and all(np.isnan(n.correlation) for n in card.neighbours)
    assert "dead on this text" in card.line()


def test_signed_latents():
    """Examples of each sign; the signed z·d is subtracted; the mean is of |z|."""
    own, x = sae(signed=True), activations()
    z = own.encode(x)[:, 7].numpy()
    active = usable() & (z != 0)
    assert (z[active] < 0).any() and (z[active] > 0).any()
    card = cards([7], sae=own)[0]
    assert card.z_mean == pytest.approx(np.abs(z[active]).mean(), rel=1e-5) and card.z_range[0] < 0 < card.z_range[1]
    for sign in (1, -1):
        shown = [e for e in card.examples if e.sign == sign]
        top = [e.z[e.peak] for e in shown if e.group == "top"]
        assert top == sorted(top, key=abs, reverse=True) and all(np.sign(value) == sign for value in top)
        assert abs(top[0]) == pytest.approx(np.abs(z[active & (np.sign(z) == sign)]).max(), rel=1e-5)
    row = card.effect_rows.loc[card.effect_rows.z < 0].iloc[0]
    at = int(row.token)
    ids, edited = PROMPTS[int(row.prompt)], x[at] - float(z[at]) * own.W_dec[7]
    clean = alone("llama", model().hf, ids, None, int(row.position))
    after = alone("llama", model().hf, ids, SITE, int(row.position), edited)
    assert_same_effect(torch.tensor([row.kl]), exact_kl(clean[None], after[None]), TOLERANCE)
    assert card.z_histogram.edges[0] < 0 and card.z_histogram.counts.sum() == active.sum()


def test_atlas_rows_give_median_effect_and_rank():
    table = Table(sae(), [2, 7, 11])
    card = cards([7], atlas=table, n_effects=9)[0]
    own = table.frame.loc[table.frame.latent == 7]
    assert card.effects.source == "atlas" and card.effects.kl.n_rows == len(own) == card.n_active
    assert card.effects.kl.value == pytest.approx(own.kl.median()) and card.effects.kl_placebo.n_rows == 4 * 9
    totals = table.frame.groupby("latent").kl.sum().sort_values(ascending=False)
    assert card.atlas["rank"] == list(totals.index).index(7) + 1 and card.atlas["latents"] == 3
    assert card.atlas["share_of_effect"] == pytest.approx(totals[7] / totals.sum())
    assert card.atlas["largest_difference"] > 0.1  # these effects are made up, and measuring again says so
    assert card.chosen_by == "number"


def test_top_latents_show_effects_of_held_out_prompts():
    """Latent 11 has the largest effect at even prompts and almost none at odd ones; its card shows the odd ones."""
    table = Table(sae(), [2, 7, 11])
    rows = table.frame
    at = {11: (1e3, 0.001), 2: (1e-3, 1e6), 7: (1, 1)}  # at even and at odd prompts; over both, 2 is the largest
    rows["kl"] = [at[i][p % 2] * (1 + t) for i, p, t in zip(rows.latent, rows.prompt, rows.position, strict=True)]
    shown = cards(["top:2", 11, 2], atlas=table, n_effects=9)
    odd = rows.loc[rows.prompt % 2 == 1]
    even_totals = rows.loc[rows.prompt % 2 == 0].groupby("latent").kl.sum().sort_values(ascending=False)
    totals = odd.groupby("latent").kl.sum().sort_values(ascending=False)
    assert [(c.latent, c.chosen_by) for c in shown] == [
        *((i, "top") for i in even_totals.index[:2]),
        *((i, "number") for i in even_totals.index[2:]),
    ]
    card, own = shown[0], odd.loc[odd.latent == 11]
    assert card.latent == 11 and card.effects.kl.value == pytest.approx(own.kl.median())
    assert card.effects.kl.n_rows == len(own) < card.n_active == card.atlas["rows_of_latent"]
    assert set(card.effect_rows.prompt % 2) == {1} and card.effects.kl_placebo.n_rows == 4 * len(card.effect_rows) == 36
    assert card.atlas["rank"] == list(totals.index).index(11) + 1 == 3 and card.effects.source == "atlas"
    assert card.atlas["share_of_effect"] == pytest.approx(totals[11] / totals.sum())
    asked = cards([11], atlas=table, n_effects=9)[0]
    assert asked.effects.kl.value > card.effects.kl.value and asked.effects.kl.high > 1e3 and asked.atlas["rank"] == 2
    assert "at prompts that did not choose it" in card.line() and "did not choose" not in asked.line()
    said = f"its {len(own):,} rows at the 12 joined prompts that did not choose it"
    assert said in card.html() and "Chosen by top:N" in card.html()


def test_top_latent_silent_on_held_out_prompts_has_no_effects(monkeypatch):
    """Every other prompt is a copy of the one before, so the only held-out prompt is one without the latent."""
    z = sae().encode(activations())[:, 7].numpy()
    prompt, _ = of_tokens()
    silent = next(i for i in range(len(PROMPTS)) if not (z[(prompt == i) & usable()]).any())
    table = Table(sae(), [7])
    others = [ids for i, ids in enumerate(PROMPTS) if i != silent]
    monkeypatch.setattr("tests.cards.PROMPTS", [*others, PROMPTS[silent]])
    table.tokens = [ids for i, ids in enumerate(table.tokens) if i != silent for _ in range(2)]
    table.frame = table.frame.loc[table.frame.prompt != silent]
    table.frame["prompt"] = 2 * (table.frame.prompt - (table.frame.prompt > silent))
    card = cards(["top:1"], atlas=table)[0]
    assert (card.latent, card.dead, card.effects, len(card.effect_rows)) == (7, False, None, 0)
    assert "not active at prompts that did not choose it" in card.line() and card.atlas["rank"] is None
    assert "Active at none of the prompts that did not choose it" in card.html() and card.examples
    monkeypatch.setattr("tests.cards.PROMPTS", others)
    with pytest.raises(ResultError, match=r"ranks by the even prompts .* this text has no others"):
        cards(["top:1"], atlas=table)


def test_the_most_frequent_latents():
    fires = (sae().encode(activations())[torch.from_numpy(usable())] != 0).sum(0).numpy()
    found = [card.latent for card in cards(["frequent:3", "7"], n_effects=9)]
    assert sorted(fires[found[:3]]) == sorted(np.sort(fires)[-3:]) and found[3] == 7


def test_invalid_arguments_raise():
    with pytest.raises(SAEError, match="latent 40 does not exist; sae has 40"):
        latent_card(model(), sae(), 40, PROMPTS, **OPTIONS)
    other = sae()
    other.hook_name = "blocks.9.hook_resid_post"
    with pytest.raises(ValueError, match="no block 9"):
        latent_card(model(), other, 0, PROMPTS, **OPTIONS)
    other.hook_name, other.model_name = SITE.hook_name, "another"
    with pytest.raises(BelongingError, match="another"):
        latent_card(model(), other, 0, PROMPTS, **OPTIONS)
    for word in ("²", "٣", "top:²", "-1", "", "top:0", "best:3"):  # other scripts' digits are digits to `str.isdigit`
        with pytest.raises(ResultError, match="expected a number from 0"):
            parsed(word)
    for latents, options, message in (
        ([], {}, "no latent"),
        (["best:3"], {}, "latent 'best:3'; expected a number from 0, top:N or frequent:N"),
        (["top:3"], {}, "top:3 asks for the largest effects of an atlas"),
        ([0], {"top": 0}, "top 0"),
        ([0], {"others": {"sae": sae()}}, "two SAEs are called 'sae'"),
    ):
        with pytest.raises(ResultError, match=message):
            cards(latents, **options)


def test_share_of_the_top_tenth():
    z = np.array([-9.0, 1, 2, 3, 4, 5, 6, 7, 8, 8.5, 0.5])
    mass = np.arange(1.0, 12)
    assert share_of_top(mass, z) == pytest.approx((1 + 10) / 66)  # two of eleven
    assert np.isnan(share_of_top(mass[:0], z[:0])) and np.isnan(share_of_top(0 * mass, z))
