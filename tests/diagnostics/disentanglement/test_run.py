"""Disentanglement from facts to tables on a tiny model, against full forward passes with a hook."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.disentanglement.facts import known_facts
from diagnostics.disentanglement.result import COLUMNS, Disentanglement
from diagnostics.disentanglement.run import disentangle
from diagnostics.disentanglement.summary import CHOSEN, EVERY
from diagnostics.disentanglement.work import FOLDS, folds_of, pairs_of
from diagnostics.statistics.jackknife import jackknife
from interventions import ResultError, Site
from sae_models.architectures import build, named
from sae_models.sae import SAE
from tests.diagnostics.disentanglement.made_facts import answered, answers, model
from tests.tiny import TOLERANCE, alone, tiny_model

SITE = Site(2)
HOW = {"ks": (2, 8), "pairs": 12, "learn": 2}
pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


@functools.cache
def facts():
    with tempfile.TemporaryDirectory() as folder:
        return answered(Path(folder))


@functools.cache
def sae() -> SAE:
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    found = build(named("standard:relu"), 40, 6, x, torch.Generator().manual_seed(1), hook_name=SITE.hook_name)
    return found.requires_grad_(False)


@functools.cache
def result() -> Disentanglement:
    """A run that tests share and do not change."""
    return disentangle(model(), {"2/standard": sae()}, facts(), **HOW)


def test_one_line_for_each_pair_target_kind_and_k():
    frame = result().frame
    assert set(frame.columns) == set(COLUMNS)
    keys = ["fold", "target", "kind", "k", "context", "base", "source"]
    assert not frame.duplicated(keys).any() and frame.drop(columns="sae").notna().all().all()
    assert set(zip(frame.kind, frame.k, strict=True)) == {
        *((kind, k) for kind in ("latents", "random", "pca", "subspace") for k in HOW["ks"]), *((kind, 0) for kind in ("all", "whole", "mask", "das"))
    }  # fmt: skip
    known = known_facts(model(), facts())
    half = dict(zip(known.entity.tolist(), folds_of(known, 0).tolist(), strict=True))
    assert all(half[b] == half[s] == f for b, s, f in zip(frame.base, frame.source, frame.fold, strict=True))
    assert {frame.fold.value_counts().size, FOLDS} == {2} and sorted(half.values()).count(0) == len(half) // 2


def test_pairs_differ_in_every_answer_and_are_nested():
    known = known_facts(model(), facts())
    half = folds_of(known, 0)
    few, many = (pairs_of(known, half, 0, n, 0) for n in (5, 20))
    assert np.array_equal(few, many[:5]) and len(many) == 20 and (half[many] == 0).all()
    assert (known.answer[many[:, 0]] != known.answer[many[:, 1]]).all()


def test_effects_match_forward_passes_with_a_hook():
    """The whole activation and all latents, exchanged by hand at the entity's token."""
    known, frame = known_facts(model(), facts()), result().frame
    hf, unit = tiny_model("llama"), {int(e): i for i, e in enumerate(known.entity)}
    names = known.facts.attributes
    for kind in ("whole", "all"):
        for _, row in frame.query("kind == @kind").iloc[::7].iterrows():
            b, s = unit[row.base], unit[row.source]
            here, x = int(known.position[b]), {}
            for u in (b, s):
                ids = known.tokens[2 * u]
                alone("llama", hf, ids, SITE, here, lambda v, u=u, x=x: x.__setitem__(u, v) or v)
            change = x[s] - x[b] if kind == "whole" else (sae().encode(x[s]) - sae().encode(x[b])) @ sae().W_dec
            assert row.dose == pytest.approx(float(change.norm()), rel=1e-4)
            tops, m = [], []
            for a in range(2):
                clean, edited, other = (
                    _last(hf, known.tokens[2 * u + a], here, by * change) for u, by in ((b, 0), (b, 1), (s, 0))
                )
                right, wrong = known.answer[s, a], known.answer[b, a]
                tops.append(int(edited.argmax()))
                m.append([float(v[right] - v[wrong]) for v in (clean, edited, other)])
            t = names.index(row.target)
            assert bool(row.cause) == (tops[t] == known.answer[s, t])
            assert bool(row.isolation) == (tops[1 - t] == known.answer[b, 1 - t])
            for a, (moved, whole) in ((t, (row.moved, row.whole)), (1 - t, (row.moved_others, row.whole_others))):
                clean, edited, other = m[a]
                assert moved == pytest.approx(edited - clean, abs=2 * TOLERANCE)
                assert whole == pytest.approx(other - clean, abs=2 * TOLERANCE)


def _last(hf, ids, position, change):
    """Logits after the last token, with a change added at one token of the site, by a plain hook."""

    def add(_, __, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[:, position] += change
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = hf.model.layers[SITE.layer].register_forward_hook(add)
    try:
        return hf(torch.tensor([ids])).logits[0, -1]
    finally:
        handle.remove()


def test_random_latents_have_the_dose_of_the_chosen():
    frame = result().frame
    keys = ["fold", "target", "k", "context", "base", "source"]
    both = frame.query("kind == 'latents'").merge(frame.query("kind == 'random'"), on=keys, suffixes=("", "_r"))
    assert len(both) == (frame.kind == "random").sum() > 0
    np.testing.assert_allclose(both["dose"], both["dose_r"], rtol=1e-5)


def test_largest_k_matches_exchanging_all_latents():
    """k as large as the dictionary gives what `all` gives."""
    many = disentangle(model(), {"2/standard": sae()}, facts(), ks=(40,), pairs=5).frame
    keys, said = ["fold", "target", "base", "source"], ["dose", "cause", "isolation", "moved", "moved_others"]
    one, other = (many.query("kind == @kind").sort_values(keys)[said].reset_index(drop=True) for kind in ("latents", "all"))  # fmt: skip
    pd.testing.assert_frame_equal(one, other, atol=2 * TOLERANCE)


def test_estimates_are_means_with_intervals_over_base_and_source():
    own = result().frame.query("kind == 'latents' and k == 8")
    [group] = result().select(kind="latents", k=8)
    assert group["target"] == EVERY
    clusters = own[["base", "source"]].to_numpy(int)
    score = (own["cause"].to_numpy(float) + own["isolation"].to_numpy(float)) / 2
    by_hand = jackknife(lambda keep: float(score[keep].mean()), len(own), clusters, transform="logit")
    for name in ("value", "low", "high"):
        assert getattr(group["score"], name) == pytest.approx(getattr(by_hand, name))
    assert group["moved"].value == pytest.approx(own["moved"].sum() / own["whole"].sum(), rel=1e-5)


def test_k_is_chosen_on_the_other_half():
    frame = result().frame.query("kind == 'subspace'")
    [group] = result().select(kind="subspace", k=CHOSEN)
    parts = []
    for fold in (0, 1):
        other = frame[frame.fold != fold].assign(score=lambda t: t.cause.astype(float) + t.isolation)
        parts.append(frame[(frame.fold == fold) & (frame.k == other.groupby("k")["score"].mean().idxmax())])
    own = pd.concat(parts)
    assert group["cause"].value == pytest.approx(own["cause"].mean()) and group["pairs"] == len(own)


def test_run_with_a_folder_matches_and_roundtrips(tmp_path):
    again = disentangle(model(), {"2/standard": sae()}, facts(), folder=tmp_path / "run", **HOW)
    pd.testing.assert_frame_equal(again.frame, result().frame)
    again.write(tmp_path / "run")
    loaded, n = Disentanglement.load(tmp_path / "run"), len(answers())
    pd.testing.assert_frame_equal(loaded.frame, again.frame)
    assert loaded.table() == again.table() and f"known: a {n}, b {n}, all {n}" in loaded.table()
    [headline] = loaded.headlines()
    assert "nothing: 0.5" in headline.against and "whole" in headline.against


@pytest.mark.parametrize(
    ("how", "said"),
    [({"ks": ()}, "ks"), ({"ks": (0,)}, "ks"), ({"pairs": 0}, "0 pairs"), ({"saes": torch.eye(32)}, "directions")],
)
def test_invalid_arguments_raise(how, said):
    given = {"saes": {"2/standard": sae()}, "site": SITE} | how
    with pytest.raises(ResultError, match=said):
        disentangle(model(), given.pop("saes"), facts(), **given)
