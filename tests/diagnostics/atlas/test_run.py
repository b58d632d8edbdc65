"""The atlas: every active latent once, every effect against a full forward pass, every column against its definition."""

import functools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.atlas import work as atlas_units
from diagnostics.atlas.result import CausalAtlas
from diagnostics.atlas.run import causal_atlas
from diagnostics.atlas.work import COLUMNS
from diagnostics.running.units import Interrupted
from interventions import ResultError, Site, SiteError, measure, record
from interventions.texts.prompts import as_prompts
from sae_models.architectures import build, named
from tests.sae_models.built import AbsTopK
from tests.tiny import D_MODEL, TOLERANCE, assert_same_effect, exact_kl, forward_alone, prompts, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:an interval from .* prompts")
SITE, LAST = Site(2), Site(5)
PROMPTS = prompts(tuple(7 + i % 4 for i in range(21)))


@functools.cache
def sae_of(name: str = "standard:topk", site: Site = SITE, signed: bool = False):
    """Of activations that the model has; decoder rows of any length."""
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
def test_effects_are_those_of_full_forward_passes(name):
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


def test_shares_are_drawn_by_hash_and_scores_stand_on_whole_tokens():
    frame = found().frame
    assert 0.3 < frame.kl_placebo.notna().mean() < 0.7
    by_token = frame.groupby(["sae", "prompt", "position"], observed=True).fisher.agg(lambda x: x.notna().mean())
    assert set(by_token) == {0.0, 1.0} and 0.3 < by_token.mean() < 0.7
    assert (frame.integrated.notna() == frame.fisher.notna()).all() and frame.gradient.notna().all()


def test_placebos_have_the_norm_and_the_angle_of_their_edit(monkeypatch):
    seen = []

    def watched(recording, site, prompt, position, vectors, **more):
        if isinstance(vectors, torch.Tensor):
            seen.append((recording.at(site, prompt, position), vectors))
        return measure(recording, site, prompt, position, vectors, **more)

    monkeypatch.setattr(atlas_units, "measure", watched)
    atlas = causal_atlas(tiny_model("llama"), PROMPTS, {"s": sae_of(signed=True)}, placebo_share=0.5)
    some = atlas.frame.dropna(subset="kl_placebo")
    x, placebo = (torch.cat(parts) for parts in zip(*seen, strict=True))
    d = sae_of(signed=True).W_dec[torch.tensor(some.latent.to_numpy(), dtype=torch.long)]
    edit = x - torch.tensor(some.z.to_numpy())[:, None] * d
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(placebo.norm(dim=-1), edit.norm(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cosine(placebo, x), cosine(edit, x), rtol=0, atol=1e-5)
    torch.testing.assert_close((placebo - x).norm(dim=-1), (edit - x).norm(dim=-1), rtol=1e-3, atol=1e-4)
    assert float(cosine(placebo - x, edit - x).abs().median()) < 0.9  # elsewhere


def test_which_rows_are_drawn_does_not_depend_on_the_sae():
    """Every score of every SAE is judged on the same tokens, whatever else was asked about."""
    drawn = {}
    for name, rows in found().frame.groupby("sae", observed=True):
        on = rows[rows.fisher.notna()]
        off = rows[rows.fisher.isna()]
        drawn[name] = set(zip(on.prompt, on.position, strict=True)), set(zip(off.prompt, off.position, strict=True))
    (one, not_one), (other, not_other) = drawn.values()
    assert one and not_one and not (one & not_other) and not (other & not_one)


def test_sinks_are_those_of_the_saes_own_site_and_each_token_is_counted_once(monkeypatch):
    prompts_of = as_prompts(PROMPTS, None)
    special = [[i == 0 for i in range(len(tokens))] for tokens in PROMPTS]  # a BOS
    marked = replace(prompts_of, special=special)
    alone = causal_atlas(tiny_model("llama"), marked, {"s": sae_of()}, sink_filter=1.1)
    both = causal_atlas(tiny_model("llama"), marked, {"s": sae_of(), "c": sae_of("cosine:topk", LAST)}, sink_filter=1.1)
    notes, same = (atlas.provenance["atlas"]["s"] for atlas in (alone, both))
    assert notes["tokens_left_out"] == same["tokens_left_out"] and notes["tokens_left_out"]["sink"] > 0
    assert sum(notes["tokens_left_out"].values()) + notes["tokens"] == sum(map(len, PROMPTS))
    assert "special token" not in notes["tokens_left_out"]  # counted at position 0


def test_it_is_written_in_shards_and_read_back(tmp_path):
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


def test_an_interrupted_atlas_goes_on_to_the_same_table(tmp_path):
    saes, asked = {"s": sae_of()}, {"path_share": 0.3, "folder": tmp_path}
    stops = iter(range(100))

    def stop(n: int, total: int) -> None:
        if next(stops) == 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        causal_atlas(tiny_model("llama"), PROMPTS, saes, progress=stop, **asked)
    assert len(list((tmp_path / "units").iterdir())) == 2
    went_on = causal_atlas(tiny_model("llama"), PROMPTS, saes, **asked)
    whole = causal_atlas(tiny_model("llama"), PROMPTS, saes, path_share=0.3)
    pd.testing.assert_frame_equal(went_on.frame, whole.frame)


def test_atlases_of_several_saes_are_joined_where_they_agree():
    """The same table as one run over both, also where one read fewer prompts."""
    how = {"path_share": 0.5, "placebo_share": 0.5}
    one = causal_atlas(tiny_model("llama"), PROMPTS[:16], {"2/signed": sae_of(signed=True)}, **how)
    other = causal_atlas(tiny_model("llama"), PROMPTS, {"5/cosine": sae_of("cosine:topk", LAST)}, **how)
    both = CausalAtlas.joined([one, other])
    assert (
        both.saes == ["2/signed", "5/cosine"] and both.tokens == PROMPTS and both.provenance["rows"] == len(both.frame)
    )
    whole = found()
    for name in both.saes:
        mine, theirs = (a.frame[(a.frame.sae == name) & (a.frame.prompt < 16)] for a in (both, whole))
        mine, theirs = (some.drop(columns="kl_placebo").reset_index(drop=True) for some in (mine, theirs))
        pd.testing.assert_frame_equal(mine, theirs)  # placebos turn towards tokens of the whole text
    assert [g["prompts"] for g in both.groups] == [16, 21]
    alike = causal_atlas(tiny_model("llama"), PROMPTS, {"2/signed": sae_of("cosine:topk", LAST)}, **how)
    named = CausalAtlas.joined([one, alike])  # one name, two blocks
    assert named.saes == ["2/signed", "5/2/signed"] == list(named.frame.sae.cat.categories)
    assert named.frame.groupby("sae", observed=True).layer.unique().map(list).to_dict() == {
        "2/signed": [2],
        "5/2/signed": [5],
    }
    again = CausalAtlas.joined([CausalAtlas.joined([one]), other])
    pd.testing.assert_frame_equal(again.frame, both.frame)
    assert again.provenance["text"] == other.provenance["text"]
    with pytest.raises(ResultError, match="two SAEs have the name"):
        CausalAtlas.joined([one, one])
    with pytest.raises(ResultError, match="other prompts"):
        CausalAtlas.joined([one, causal_atlas(tiny_model("llama"), PROMPTS[1:], {"x": sae_of()}, **how)])
    with pytest.raises(ResultError, match="path_share is"):
        CausalAtlas.joined([one, causal_atlas(tiny_model("llama"), PROMPTS, {"x": sae_of()})])


def test_a_model_that_replay_does_not_serve_has_effects_and_no_gradients():
    x = record(tiny_model("bloom"), PROMPTS[:4], [SITE]).activations[SITE].reshape(-1, D_MODEL)
    sae = build(named("standard:topk"), 48, 3, x, torch.Generator().manual_seed(0), hook_name=SITE.hook_name)
    with pytest.warns(UserWarning, match="falls back to full forward passes"):
        atlas = causal_atlas(tiny_model("bloom"), PROMPTS[:4], {"s": sae})
    assert atlas.provenance["path"] == {"s": "hooks"} and atlas.provenance["why_hooks"]
    assert atlas.frame.gradient.isna().all() and (atlas.frame.kl > 0).all()
    assert "direct" not in atlas.groups[0]["scores"]


def test_what_does_not_serve_is_refused():
    with pytest.raises(ResultError, match="path_share 2"):
        causal_atlas(tiny_model("llama"), PROMPTS, {"s": sae_of()}, path_share=2)
    with pytest.raises(SiteError, match="do not say where they act"):
        causal_atlas(tiny_model("llama"), PROMPTS, {"s": torch.eye(D_MODEL)})
