"""Every cell of activation patching against full forward passes by torch hooks set here, controls and scores against their formulas."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.pairs.controls import partners
from diagnostics.pairs.pair import Pair, labels
from diagnostics.pairs.read import pairs_from
from diagnostics.patching.design import PairBatch, settings_of
from diagnostics.patching.work import PatchingRunner
from interventions import ResultError, Site, SiteError, wrap
from tests import induction, inside
from tests.tiny import TOLERANCE, VOCAB, fresh, tiny_model, wrapped

N, LENGTH = 5, 9
POINTS = ("q", "k", "v", "z", "neurons", "resid_pre", "attn_out")


def given(name="llama", n=N):
    """Pairs that differ at two positions, the first of them 3 or 4; a model's own choice of answers does not matter."""
    draw, found = torch.Generator().manual_seed(7), []
    for i in range(n):
        clean = torch.randint(1, VOCAB, (LENGTH,), generator=draw).tolist()
        corrupt = list(clean)
        for p in (4, 6):
            corrupt[p] = clean[p] % (VOCAB - 1) + 1
        found.append(Pair(tuple(clean), tuple(corrupt), 5 + i, 40 + i))
    return measured(name, found, floor=0.0)


def measured(name, found, **how):
    """On a model that knows nothing of these pairs, and says so."""
    model = wrap(tiny_model(name)) if isinstance(name, str) else wrap(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pairs_from(model, found, **how)


def settings(model, sites=POINTS, layers=(0, 3), directions=("denoise", "noise"), **more):
    asked = {
        "positions": "each",
        "metric": "logit_difference",
        "controls": 1,
        "scores": (),
        "seed": 0,
        "path": "auto",
        "batch_rows": None,
    }
    return settings_of(wrap(model), sites, layers, directions, **(asked | more))


def table(model, pairs, chosen):
    runner = PatchingRunner(wrap(model), pairs, chosen)
    parts = [runner(unit, lambda n: None) for unit in runner.units()]
    assert all(notes["path"] == "replay" for _, notes in parts)
    return pd.concat([frame for frame, _ in parts], ignore_index=True)


def plain(name, hf, pair, site, position, direction, positions=None):
    """m with what stands at a cell of the one run put into the other, by torch hooks alone."""
    base, source = (pair.corrupt, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupt)
    there = inside.clean(name, hf, list(source), site)
    part = lambda p: there[p] if site.head is None else there[p].unflatten(0, (-1, inside.D_HEAD))[site.head]  # noqa: E731
    edits = [(site, p, part(p)) for p in (positions or [position])]
    logits = inside.forward(name, hf, list(base), edits)[-1]
    return float(logits[pair.right] - logits[pair.wrong])


@pytest.mark.parametrize(("name", "wrapper"), [("llama", "plain"), ("gpt2", "bridge")])
def test_cells_match_full_forward_passes(name, wrapper):
    hf, pairs = tiny_model(name), given(name, 2)
    points = ("q", "k", "v", "z", "neurons")
    frame = table(wrapped(name, wrapper), pairs, settings(wrapped(name, wrapper), points, controls=0))
    rng = np.random.default_rng(0)
    assert len(frame) == 2 * 2 * 2 * LENGTH * (inside.HEADS * 2 + 2 * inside.heads(name, "k") + 1)
    for row in frame.iloc[rng.choice(np.flatnonzero(frame.run), 60, replace=False)].itertuples():
        pair, head = pairs[row.pair], None if row.head < 0 else int(row.head)
        expected = plain(name, hf, pair, Site(row.layer, row.site, head=head), row.position, row.direction)
        assert abs(row.m - expected) < 2 * TOLERANCE
        m_clean, m_corrupt = (
            float(inside.forward(name, hf, list(x), [])[-1][[pair.right, pair.wrong]] @ torch.tensor([1.0, -1.0]))
            for x in (pair.clean, pair.corrupt)
        )
        assert abs(row.m_clean - m_clean) < TOLERANCE and abs(row.m_corrupt - m_corrupt) < TOLERANCE
        effect = expected - m_corrupt if row.direction == "denoise" else m_clean - expected
        assert abs(row.effect - effect) < 3 * TOLERANCE


def test_cells_that_cannot_differ_are_0_and_skipped():
    hf, pairs = tiny_model("llama"), given(n=2)
    frame = table(hf, pairs, settings(hf, controls=0))
    early = frame.position < 4
    own_token = (frame.layer == 0) & frame.site.isin(["q", "k", "v", "resid_pre"]) & ~frame.position.isin([4, 6])
    assert (frame.run == ~(early | own_token)).all()
    assert (frame.effect[~frame.run] == 0).all() and (frame.dose[~frame.run] == 0).all()
    some = frame[~frame.run & (frame.direction == "denoise") & (frame.site == "z")].iloc[::17]
    for row in some.itertuples():  # a full pass says so too
        expected = plain("llama", hf, pairs[row.pair], Site(row.layer, "z", head=row.head), row.position, "denoise")
        assert abs(expected - row.m) < TOLERANCE


def test_all_positions_at_once():
    hf, pairs = tiny_model("llama"), given(n=2)
    frame = table(hf, pairs, settings(hf, ("z",), positions="all"))
    assert set(frame.label) == {"all"} and (frame.position == -1).all()
    for row in frame[frame.control == 0].iloc[::3].itertuples():
        site = Site(row.layer, "z", head=row.head)
        expected = plain("llama", hf, pairs[row.pair], site, None, row.direction, list(range(4, LENGTH)))
        assert abs(row.m - expected) < 2 * TOLERANCE


def test_controls_match_the_dose_along_another_pair_difference():
    hf, pairs = tiny_model("llama"), given()
    model, chosen = wrap(hf), settings(hf, ("z", "resid_pre"), controls=2)
    batch = PairBatch(model, pairs, [1, 3], chosen)
    drawn = partners(pairs, 2, 0)
    assert all(len({i, *two}) == 3 for i, row in enumerate(drawn) for two in row.tolist())
    site = Site(3, "z")
    for direction in ("denoise", "noise"):
        base, source = batch.change(site, direction)
        for k in range(2):
            control = batch.control(site, base, source, k)
            for n, i in enumerate((1, 3)):
                a, b = (inside.clean("llama", hf, list(pairs[int(j)].clean), site) for j in drawn[i, k])
                along = (a - b).unflatten(-1, (inside.HEADS, -1))
                far = (source[n] - base[n]).norm(dim=-1, keepdim=True)
                expected = base[n] + far * along / along.norm(dim=-1, keepdim=True)
                assert torch.allclose(control[n], expected, atol=1e-4)
    frame = table(hf, pairs, chosen)
    assert set(frame.control) == {0, 1, 2}
    run = frame[frame.run].pivot_table(
        index=["pair", "direction", "site", "layer", "head", "position"], columns="control", values="dose"
    )
    assert np.allclose(run[0], run[1]) and np.allclose(run[0], run[2])


def test_without_two_other_pairs_there_is_no_control():
    hf, pairs = tiny_model("llama"), given(n=2)
    runner = PatchingRunner(wrap(hf), pairs, settings(hf, ("z",), directions=("noise",)))
    frame, notes = runner(runner.units()[0], lambda n: None)
    assert set(frame.control) == {0} and frame.m.notna().all()
    assert notes["rows_dropped"] == {"control without two other pairs that differ": int(frame.run.sum())}


def test_scores_are_slopes_and_direct_writes():
    """float64 where LayerNorm allows: gradients against central differences of full passes, dla against the unembedding by hand."""
    hf = fresh("gpt2", dtype=torch.float64)
    pairs = given("gpt2", 2)
    chosen = settings(hf, ("z", "neurons", "attn_out"), (2,), controls=0, scores=("gradient", "ig20", "dla"))
    frame = table(hf, pairs, chosen)
    for row in frame[frame.run & (frame.site == "z")].iloc[::5].itertuples():
        pair, site = pairs[row.pair], Site(2, "z", head=row.head)
        base, source = (pair.corrupt, pair.clean) if row.direction == "denoise" else (pair.clean, pair.corrupt)
        here, there = (
            inside.clean("gpt2", hf, list(x), site)[row.position].unflatten(0, (-1, 8))[row.head]
            for x in (base, source)
        )
        ends = []
        for step in (1e-4, -1e-4):
            logits = inside.forward("gpt2", hf, list(base), [(site, row.position, here + step * (there - here))])[-1]
            ends.append(float(logits[pair.right] - logits[pair.wrong]))
        slope = (ends[0] - ends[1]) / 2e-4
        assert abs(row.gradient - (slope if row.direction == "denoise" else -slope)) < 1e-5
        if row.position < LENGTH - 1:
            assert row.dla == 0
            continue
        block, final = hf.transformer.h[2], hf.transformer.ln_f
        write = (there - here) @ block.attn.c_proj.weight[8 * row.head : 8 * row.head + 8]
        stream = []
        handle = hf.transformer.h[-1].register_forward_hook(
            lambda _, __, out, s=stream: s.append(out[0] if isinstance(out, tuple) else out)
        )
        hf(input_ids=torch.tensor([base]))
        handle.remove()
        scale = stream[0][0, -1].var(unbiased=False).add(final.eps).sqrt()
        along = hf.lm_head.weight[pair.right] - hf.lm_head.weight[pair.wrong]
        direct = float((final.weight * (write - write.mean()) / scale) @ along)
        assert abs(row.dla - (direct if row.direction == "denoise" else -direct)) < 1e-3 * max(1, abs(direct))


def test_integrated_gradients_are_complete_at_the_embeddings():
    """Completeness: over the positions of the first block's input the path integral is m_clean − m_corrupt."""
    hf, pairs = fresh("gpt2", dtype=torch.float64), given("gpt2", 2)
    frame = table(hf, pairs, settings(hf, ("resid_pre",), (0,), controls=0, scores=("ig5", "ig20")))
    whole = frame[frame.run].groupby(["pair", "direction"])[["ig5", "ig20"]].sum()
    total = frame.groupby(["pair", "direction"])["total"].first()
    off = (whole.sub(total, axis=0)).abs().div(total.abs(), axis=0)
    assert (off.ig20 < 0.1).all() and off.ig20.mean() < off.ig5.mean()


@pytest.mark.parametrize("kind", induction.KINDS)
def test_only_the_planted_circuit_has_effects(kind):
    hf = induction.induction_model()
    planted = induction.pairs(4, (8, 10), (kind,))
    roles = lambda p: tuple({at: role for role, at in p.roles.items()}.get(i, f"t{i}") for i in range(len(p.clean)))  # noqa: E731
    given = [Pair(tuple(p.clean), tuple(p.corrupt), p.right, p.wrong, roles(p)) for p in planted]
    pairs = measured(hf, given)
    frame = table(hf, pairs, settings(hf, ("z",), None, controls=0))
    assert labels(pairs[0])[-1] == "END"
    for _, part in frame.groupby("direction"):
        cells = part.groupby(["layer", "head", "label"])[["effect", "total"]].sum()
        share = cells.effect / cells.total
        true = {(layer, head, role) for layer, head, role in induction.CELLS[kind]}
        assert {cell for cell, value in share.items() if abs(value) > induction.INERT} == true
        assert all(abs(share[cell] - 1) < induction.INERT for cell in true)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sites": ("zz",)}, SiteError, "'zz'"),
        ({"sites": (Site(9, "z"),)}, SiteError, "no block 9"),
        ({"layers": (6,)}, SiteError, "no block 6"),
        ({"directions": ("denoising",)}, ResultError, "known: denoise, noise"),
        ({"positions": "END"}, ResultError, "known: each, all"),
        ({"metric": "loss"}, ResultError, "known: logit_difference, probability"),
        ({"scores": ("atp",)}, ResultError, "known: gradient, ig5, ig20, dla"),
        ({"scores": ("dla",), "metric": "probability"}, ResultError, "attribution is of logits"),
        ({"controls": -1}, ResultError, "-1 controls"),
    ],
)
def test_bad_settings_raise(change, error, message):
    with pytest.raises(error, match=message):
        settings(tiny_model("llama"), **change)


def test_heads_under_a_norm_across_heads_raise():
    with pytest.raises(SiteError, match="norm spans heads"):
        settings(tiny_model("olmo2"), ("q",))


def test_probability_metric_lies_between_0_and_1():
    hf, pairs = tiny_model("llama"), given(n=2)
    frame = table(hf, pairs, settings(hf, ("z",), (5,), metric="probability", scores=("gradient",)))
    assert frame.m.between(0, 1).all() and frame.gradient[frame.run & (frame.control == 0)].abs().max() > 0
