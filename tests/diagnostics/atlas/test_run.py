"""The atlas: every active latent once; each effect against a full forward pass, each column against its definition."""

import functools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from diagnostics.atlas import work as atlas_units
from diagnostics.atlas.columns import COLUMNS
from diagnostics.atlas.result import CausalAtlas
from diagnostics.atlas.run import causal_atlas
from diagnostics.atlas.scores import DRAWS
from diagnostics.results.words import left_out
from diagnostics.running.units import Interrupted
from interventions import ResultError, Site, SiteError, measure, record
from interventions.texts.prompts import as_prompts
from sae_models.architectures import build, named
from sae_models.selectors import AbsTopK
from tests.tiny import D_MODEL, TOLERANCE, assert_same_effect, exact_kl, forward_alone, prompts, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:an interval from .* prompts")
SITE, LAST = Site(2), Site(5)
PROMPTS = prompts(tuple(7 + i % 4 for i in range(21)))


@functools.cache
def sae_of(name: str = "standard:topk", site: Site = SITE, signed: bool = False):
    """Made from the model's activations; decoder rows of any length."""
    x = record(tiny_model("llama"), PROMPTS, [site]).activations[site].reshape(-1, D_MODEL)
    stream = torch.Generator().manual_seed(1)
    sae = build(named(name), 48, 5, x, stream, hook_name=site.hook_name).requires_grad_(False)
    for weight in sae.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=stream))
    if signed:
        sae.selector = AbsTopK(5)
    return sae


@functools.cache
def found(**more) -> CausalAtlas:
    saes = {"2/signed": sae_of(signed=True), "5/cosine": sae_of("cosine:topk", LAST)}
    return causal_atlas(tiny_model("llama"), PROMPTS, saes, path_share=0.5, placebo_share=0.5, **more)


def test_every_active_latent_of_every_usable_token_has_one_row():
    atlas = found(sink_filter=None)
    recording = record(tiny_model("llama"), PROMPTS, [SITE, LAST])
    for name, sae, site in (("2/signed", sae_of(signed=True), SITE), ("5/cosine", sae_of("cosine:topk", LAST), LAST)):
        rows = atlas.frame[atlas.frame.sae == name]
        expected = {}
        for p, tokens in enumerate(PROMPTS):
            z = sae.encode(recording.activations[site][p, : len(tokens)])
            expected |= {(p, q, i): float(z[q, i]) for q, i in z.nonzero().tolist() if q}
        got = dict(zip(zip(rows.prompt, rows.position, rows.latent, strict=True), rows.z, strict=True))
        assert got.keys() == expected.keys() and len(rows) == len(expected)
        np.testing.assert_allclose([got[k] for k in expected], list(expected.values()), rtol=1e-4)
    assert (atlas.frame.z < 0).any()
    notes = atlas.provenance["atlas"]["2/signed"]
    assert notes["tokens_left_out"] == {"position 0": len(PROMPTS)}
    assert notes["tokens"] == sum(map(len, PROMPTS)) - len(PROMPTS)
    assert list(atlas.frame) == list(COLUMNS) and 0 <= notes["noise_floor"] < 1e-9


@pytest.mark.parametrize("name", ["2/signed", "5/cosine"])
def test_effects_match_full_forward_passes(name):
    atlas = found()
    sae, site = (sae_of(signed=True), SITE) if name == "2/signed" else (sae_of("cosine:topk", LAST), LAST)
    frame = atlas.frame[atlas.frame.sae == name]
    for row in frame.iloc[:: len(frame) // 12].itertuples():
        tokens, p = PROMPTS[row.prompt], row.position
        clean = forward_alone("llama", tiny_model("llama"), tokens, None, {})[p]
        removed = row.z * sae.W_dec[row.latent]
        got = forward_alone("llama", tiny_model("llama"), tokens, site, {p: lambda x, d=removed: x - d})[p]
        assert_same_effect(torch.tensor([row.kl]), exact_kl(clean[None], got[None]), TOLERANCE)
        top = int(clean.argmax())
        drop = clean.log_softmax(-1)[top] - got.log_softmax(-1)[top]
        assert row.top1_drop == pytest.approx(float(drop), abs=5 * TOLERANCE)
        assert row.clean_top1 == top and row.top1_changed == (row.top1 != top)
        x = record(tiny_model("llama"), [tokens], [site]).activations[site][0, p]
        d = sae.W_dec[row.latent]
        assert row.norm == pytest.approx(float(x.norm()), rel=1e-4)
        assert row.delta_norm == pytest.approx(abs(row.z) * float(d.norm()), rel=1e-4)
        assert row.cosine == pytest.approx(float(x @ d / x.norm() / d.norm()), abs=1e-5)
        assert row.inner == pytest.approx(float(x @ d / d.norm()), rel=1e-3, abs=1e-4)
    if site == LAST:  # nothing above: direct is all there is, to rounding of the logits
        np.testing.assert_allclose(frame.kl, frame.kl_direct, rtol=2e-3, atol=1e-8)


def test_all_saes_score_the_same_whole_tokens():
    frame = found().frame
    assert 0.3 < frame.kl_placebo.notna().mean() < 0.7
    by_token = frame.groupby(["sae", "prompt", "position"], observed=True).fisher.agg(lambda x: x.notna().mean())
    assert set(by_token) == {0.0, 1.0} and 0.3 < by_token.mean() < 0.7
    assert (frame.integrated.notna() == frame.fisher.notna()).all() and frame.gradient.notna().all()
    assert (frame[["second_order", "fisher_1", "fisher_128"]].notna().eq(frame.fisher.notna(), axis=0)).all(axis=None)
    both = by_token.unstack("sae").dropna()
    assert len(both) > 50 and (both["2/signed"] == both["5/cosine"]).all()


def test_second_order_matches_variance_of_logit_slopes():
    """Slopes by central differences of full forward passes, in float32: 2 % of the form."""
    atlas = found()
    rows = atlas.frame[(atlas.frame.sae == "2/signed") & atlas.frame.second_order.notna()]
    for row in rows.iloc[:: len(rows) // 8].itertuples():
        tokens, p, d = PROMPTS[row.prompt], row.position, row.z * sae_of(signed=True).W_dec[row.latent]
        step = 5e-3 * row.norm / row.delta_norm
        clean, up, down = (
            forward_alone("llama", tiny_model("llama"), tokens, SITE, {p: lambda x, e=s * d: x - e})[p]
            for s in (0, step, -step)
        )
        share, slope = clean.softmax(-1).double(), (up - down).double() / (2 * step)
        variance = (share * slope**2).sum() - (share * slope).sum() ** 2
        assert row.second_order == pytest.approx(float(variance / 2), rel=0.02)
    how = atlas.provenance["atlas"]["2/signed"]["second_order"]
    assert how["methods"] == ["forward"] and how["agreement"] < 0.02 and how["rows"] == len(rows)


def test_sampled_fisher_forms_converge_to_the_exact_one():
    """128 draws: the form's standard error is 1/√64 of it or more; its mean over a few hundred tokens is within a few percent."""
    rows = found().frame.dropna(subset="second_order")
    error = [np.abs(np.log(rows[f"fisher_{n}"] / rows.second_order)).median() for n in (1, 8, 128)]
    assert error[0] > 2 * error[1] > 4 * error[2] and error[2] < 0.2
    mean = rows.groupby("sae", observed=True)[["fisher_128", "second_order"]].mean()
    np.testing.assert_allclose(mean.fisher_128, mean.second_order, rtol=0.1)


def test_rank_agreement_rises_with_fisher_draws():
    """ρ matches scipy, token by token; an older atlas has no draws and the same other scores."""
    atlas = found()
    for g in atlas.groups:
        rows = atlas.frame[(atlas.frame.sae == g["sae"]) & atlas.frame.second_order.notna()]
        tokens = [own for _, own in rows.groupby(["prompt", "position"]) if len(own) >= 3]
        assert list(g["draws"]) == [*map(str, DRAWS), "∞"]
        for draws, form in (("1", "fisher_1"), ("8", "fisher_8"), ("∞", "second_order")):
            rho = np.mean([stats.spearmanr(own[form], own.kl).statistic for own in tokens])
            assert g["draws"][draws]["rank"].value == pytest.approx(rho, abs=1e-9)
        rank = [s["rank"].value for s in g["draws"].values()]
        assert rank[0] < rank[3] < rank[-1] and rank[-1] > g["scores"]["delta_norm"]["rank"].value
        over = np.mean([stats.spearmanr(own.delta_norm, own.kl).statistic for own in tokens])
        assert g["draws"]["∞"]["over_dose"].value == pytest.approx(rho - over, abs=1e-9)
    assert len(atlas.tables()["draws"]) == 2 * (len(DRAWS) + 1)
    assert [h.what for h in atlas.headlines() if "exact second order" in h.what]
    before = replace(atlas, frame=atlas.frame.drop(columns=["second_order", *(f"fisher_{n}" for n in DRAWS)]))
    assert "draws" not in before.tables()
    for g, same in zip(before.groups, atlas.groups, strict=True):
        assert [*g["scores"], "second_order"] == list(same["scores"])
        assert all(s["rank"] == same["scores"][name]["rank"] for name, s in g["scores"].items())
    with pytest.raises(ResultError, match="no token of this atlas has exact second order"):
        before.plot_draws()


def test_placebos_have_the_norm_and_the_angle_of_their_edit(monkeypatch):
    seen = []

    def watched(recording, site, prompt, position, vectors, **more):
        if isinstance(vectors, torch.Tensor):
            seen.append((recording.at(site, prompt, position), vectors))
        return measure(recording, site, prompt, position, vectors, **more)

    monkeypatch.setattr(atlas_units, "measure", watched)
    how = {"placebo_share": 0.5, "path_share": 0.1}
    atlas = causal_atlas(tiny_model("llama"), PROMPTS[:8], {"s": sae_of(signed=True)}, **how)
    some = atlas.frame.dropna(subset="kl_placebo")
    x, placebo = (torch.cat(parts) for parts in zip(*seen, strict=True))
    d = sae_of(signed=True).W_dec[torch.tensor(some.latent.to_numpy(), dtype=torch.long)]
    edit = x - torch.tensor(some.z.to_numpy())[:, None] * d
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(placebo.norm(dim=-1), edit.norm(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cosine(placebo, x), cosine(edit, x), rtol=0, atol=1e-5)
    torch.testing.assert_close((placebo - x).norm(dim=-1), (edit - x).norm(dim=-1), rtol=1e-3, atol=1e-4)
    assert float(cosine(placebo - x, edit - x).abs().median()) < 0.9  # elsewhere


def test_sinks_depend_on_own_site_and_tokens_count_once():
    few = PROMPTS[:4]
    special = [[i == 0 for i in range(len(tokens))] for tokens in few]  # a BOS
    marked, how = replace(as_prompts(few, None), special=special), {"sink_filter": 1.1, "path_share": 0.1}
    alone = causal_atlas(tiny_model("llama"), marked, {"s": sae_of()}, **how)
    both = causal_atlas(tiny_model("llama"), marked, {"s": sae_of(), "c": sae_of("cosine:topk", LAST)}, **how)
    notes, same = (atlas.provenance["atlas"]["s"] for atlas in (alone, both))
    assert notes["tokens_left_out"] == same["tokens_left_out"] and notes["tokens_left_out"]["sink"] > 0
    assert sum(notes["tokens_left_out"].values()) + notes["tokens"] == sum(map(len, few))
    assert "special token" not in notes["tokens_left_out"]  # counted at position 0


def test_shards_roundtrip_and_damage_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(CausalAtlas, "figures", lambda self: {})  # test_names_in_figures draws them
    atlas = found()
    names = atlas.write(tmp_path)
    assert set(CausalAtlas.files()) <= set(names)
    shards = sorted(path.name for path in (tmp_path / "atlas").iterdir())
    assert shards == [f"{sae:02d}-{part:05d}.parquet" for sae in range(2) for part in range(3)]
    again = CausalAtlas.load(tmp_path)
    pd.testing.assert_frame_equal(again.frame, atlas.frame)
    assert again.tokens == atlas.tokens and again.table() == atlas.table()
    (tmp_path / "atlas" / shards[0]).unlink()
    with pytest.raises(ResultError, match=rf"atlas/{shards[0]} is damaged: it is missing"):
        CausalAtlas.load(tmp_path)
    stated = json.loads((tmp_path / "atlas.json").read_text())
    del stated["sha256"]  # as before there were digests
    (tmp_path / "atlas.json").write_text(json.dumps(stated))
    with pytest.raises(ResultError, match=r"atlas is damaged: it holds \d+ rows, atlas.json says"):
        CausalAtlas.load(tmp_path)
    with pytest.raises(ResultError, match=r"tokens.npy is missing"):
        (tmp_path / "tokens.npy").unlink()
        CausalAtlas.load(tmp_path)


def test_resumes_to_the_same_table(tmp_path):
    given = tiny_model("llama"), PROMPTS[:17], {"s": sae_of()}
    stops = iter(range(100))

    def stop(n: int, total: int) -> None:
        if next(stops) == 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        causal_atlas(*given, folder=tmp_path, progress=stop)
    assert len(list((tmp_path / "units").iterdir())) == 2
    pd.testing.assert_frame_equal(causal_atlas(*given, folder=tmp_path).frame, causal_atlas(*given).frame)


def test_joined_atlases_match_one_run_over_all_saes():
    """Also where one has fewer prompts."""
    how = {"path_share": 0.5, "placebo_share": 0.5}
    one = causal_atlas(tiny_model("llama"), PROMPTS[:16], {"2/signed": sae_of(signed=True)}, **how)
    whole = found()
    other, alike = (_part(whole, name) for name in ("5/cosine", "2/signed"))
    both = CausalAtlas.joined([one, other])
    assert both.saes == ["2/signed", "5/cosine"] and both.tokens == PROMPTS
    assert both.provenance["rows"] == len(both.frame) and both.provenance["text"] == other.provenance["text"]
    for name in both.saes:
        mine, theirs = (a.frame[(a.frame.sae == name) & (a.frame.prompt < 16)] for a in (both, whole))
        mine, theirs = (some.drop(columns="kl_placebo").reset_index(drop=True) for some in (mine, theirs))
        pd.testing.assert_frame_equal(mine, theirs)  # placebos turn towards tokens of the whole text
    assert [g["prompts"] for g in both.groups] == [16, 21]
    again = CausalAtlas.joined([CausalAtlas.joined([one]), other])
    pd.testing.assert_frame_equal(again.frame, both.frame)
    for others, message in (
        ([alike], "two SAEs have the name"),
        ([replace(other, tokens=PROMPTS[1:])], "other prompts"),
        ([replace(other, provenance=other.provenance | {"path_share": 0.1})], "path_share is"),
    ):
        with pytest.raises(ResultError, match=message):
            CausalAtlas.joined([one, *others])


def test_joined_saes_of_equal_name_are_named_by_block():
    both = CausalAtlas.joined([_part(found(), "2/signed"), _part(found(), "5/cosine", "2/signed")])
    assert both.saes == ["2/signed", "5/2/signed"] == list(both.frame.sae.cat.categories)
    layers = both.frame.groupby("sae", observed=True).layer.unique().map(list).to_dict()
    assert layers == {"2/signed": [2], "5/2/signed": [5]}


def _part(atlas: CausalAtlas, name: str, called: str = "") -> CausalAtlas:
    """The rows of one SAE, as an atlas of that SAE alone, by another name if one is given."""
    p, called = atlas.provenance, called or name
    frame = atlas.frame[atlas.frame.sae == name].reset_index(drop=True)
    frame["sae"] = frame.sae.cat.remove_unused_categories().cat.rename_categories({name: called})
    own = {part: {called: p[part][name]} for part in ("saes", "atlas", "path")}
    return CausalAtlas(frame, atlas.tokens, p | own | {"rows": len(frame), "sites": [p["atlas"][name]["site"]]})


@pytest.mark.filterwarnings("ignore:mechdiag falls back to central differences")
def test_full_pass_fallback_has_effects_but_no_gradients():
    x = record(tiny_model("bloom"), PROMPTS[:4], [SITE]).activations[SITE].reshape(-1, D_MODEL)
    sae = build(named("standard:topk"), 48, 3, x, torch.Generator().manual_seed(0), hook_name=SITE.hook_name)
    with pytest.warns(UserWarning, match="falls back to full forward passes"):
        atlas = causal_atlas(tiny_model("bloom"), PROMPTS[:4], {"s": sae}, path_share=0.5)
    assert atlas.provenance["path"] == {"s": "hooks"} and atlas.provenance["why_hooks"]
    assert (
        atlas.frame[["direct", "gradient", "integrated", "fisher"]].isna().all(axis=None) and (atlas.frame.kl > 0).all()
    )
    assert list(atlas.groups[0]["scores"]) == ["delta_norm", "z", "cosine", "inner", "second_order"]
    assert atlas.provenance["atlas"]["s"]["second_order"]["methods"] == ["central"]
    assert any("central differences in place of forward mode" in line for line in left_out(atlas))


def test_invalid_arguments_raise():
    with pytest.raises(ResultError, match="path_share 2"):
        causal_atlas(tiny_model("llama"), PROMPTS, {"s": sae_of()}, path_share=2)
    with pytest.raises(SiteError, match="do not say where they act"):
        causal_atlas(tiny_model("llama"), PROMPTS, {"s": torch.eye(D_MODEL)})
