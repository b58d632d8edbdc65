"""Effects of whole dictionaries: each row against a full forward pass; parts, resumes and files; what cards read of them."""

import functools
import json

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
import torch

from diagnostics import DictionaryEffects, dictionary_effects, latent_card
from diagnostics.results.words import left_out
from diagnostics.running.units import Interrupted, PartDone
from diagnostics.running.workers import workers
from diagnostics.whole_dictionary import work as effects_work
from diagnostics.whole_dictionary.columns import LATENTS, ROWS
from diagnostics.whole_dictionary.verdicts import VERDICTS
from interventions import ResultError, Site, SiteError, measure, record
from interventions.texts.prompts import as_prompts
from sae_models.architectures import build, named
from sae_models.errors import BelongingError
from sae_models.selectors import AbsTopK
from tests.tiny import D_MODEL, TOLERANCE, assert_same_effect, exact_kl, forward_alone, fresh, prompts, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:an interval from .* prompts")
SITE, LAST = Site(2), Site(5)
PROMPTS = prompts(tuple(7 + i % 4 for i in range(70)))  # two shards


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


SAES = {"2/signed": (SITE, "standard:topk", True), "5/cosine": (LAST, "cosine:topk", False)}


def found(**how) -> DictionaryEffects:
    saes = {name: sae_of(kind, site, signed) for name, (site, kind, signed) in SAES.items()}
    return dictionary_effects(tiny_model("llama"), PROMPTS, saes, tokens_per_latent=12, **how)


whole = functools.cache(found)


@pytest.mark.parametrize("name", SAES)
def test_effects_match_full_forward_passes(name):
    result, (site, kind, signed) = whole(), SAES[name]
    sae, frame = sae_of(kind, site, signed), result.frame[result.frame.sae == name]
    for row in frame.iloc[:: len(frame) // 12].itertuples():
        tokens, p = PROMPTS[row.prompt], row.position
        d = sae.W_dec[row.latent]
        clean = forward_alone("llama", tiny_model("llama"), tokens, None, {})[p]
        got = forward_alone("llama", tiny_model("llama"), tokens, site, {p: lambda x, d=row.z * d: x - d})[p]
        assert_same_effect(torch.tensor([row.kl]), exact_kl(clean[None], got[None]), TOLERANCE)
        assert row.clean_top1 == int(clean.argmax()) and row.top1_changed == (row.top1 != row.clean_top1)
        recording = record(tiny_model("llama"), [tokens], [site])
        x = recording.activations[site][0, p]
        assert row.z == pytest.approx(float(sae.encode(x[None])[0, row.latent]), rel=1e-3)
        assert row.norm == pytest.approx(float(x.norm()), rel=1e-4)
        assert row.delta_norm == pytest.approx(abs(row.z) * float(d.norm()), rel=1e-4)
        assert row.final_norm == pytest.approx(float(recording.activations[Site(5)][0, p].norm()), rel=1e-4)
    if site == LAST:
        np.testing.assert_allclose(frame.kl, frame.kl_direct, rtol=2e-3, atol=1e-8)
    counts = frame.groupby("latent").size()
    firings = result.latents[result.latents.sae == name].set_index("latent").firings
    assert counts.to_dict() == {i: min(12, n) for i, n in firings.items() if n}
    np.testing.assert_allclose(frame.groupby("latent").weight.sum(), firings[firings > 0], rtol=1e-5)


def test_every_row_has_a_placebo_of_equal_norm_and_angle(monkeypatch):
    seen = []

    def watched(recording, site, prompt, position, vectors, **more):
        if callable(vectors):
            every = torch.arange(len(prompt))
            seen.append((recording.at(site, prompt, position), vectors(every)))
        return measure(recording, site, prompt, position, vectors, **more)

    monkeypatch.setattr(effects_work, "measure", watched)
    sae = sae_of(signed=True)
    result = dictionary_effects(tiny_model("llama"), PROMPTS[:9], {"s": sae}, tokens_per_latent=5)
    frame = result.frame.sort_values(["prompt", "position", "latent"])
    assert frame.kl_placebo.notna().all()
    x, placebo = (torch.cat(parts) for parts in zip(*seen, strict=True))
    d = sae.W_dec[torch.tensor(frame.latent.to_numpy(), dtype=torch.long)]
    edit, cosine = x - torch.tensor(frame.z.to_numpy())[:, None] * d, torch.nn.functional.cosine_similarity
    torch.testing.assert_close(placebo.norm(dim=-1), edit.norm(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cosine(placebo, x), cosine(edit, x), rtol=0, atol=1e-5)
    assert float(cosine(placebo - x, edit - x).abs().median()) < 0.9  # elsewhere


def test_written_files_are_a_partitioned_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(DictionaryEffects, "figures", lambda self: {})  # test_names_in_figures draws them
    result = whole()
    names = result.write(tmp_path)
    assert set(DictionaryEffects.files()) <= set(names)
    again = DictionaryEffects.load(tmp_path)
    pd.testing.assert_frame_equal(again.frame, result.frame)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "latents.parquet"), result.latents)
    assert again.tokens == result.tokens and again.table() == result.table()
    assert list(result.latents) == list(LATENTS) and list(result.frame) == list(ROWS)
    assert len(result.latents) == 96 and set(result.latents.verdict) <= set(VERDICTS)
    for rows in (
        pd.read_parquet(tmp_path / "rows"),
        ds.dataset(tmp_path / "rows", partitioning="hive").to_table().to_pandas(),
    ):
        assert len(rows) == len(result.frame) and set(rows.sae) == set(SAES)
        assert rows.kl.sum() == pytest.approx(result.frame.kl.sum(), rel=1e-6)
    fewer = dictionary_effects(tiny_model("llama"), PROMPTS[:9], {"only": sae_of()}, tokens_per_latent=2)
    fewer.write(tmp_path)  # parts of SAEs that are not in it any more are gone
    assert DictionaryEffects.load(tmp_path).saes == ["only"] and set(pd.read_parquet(tmp_path / "rows").sae) == {"only"}
    next((tmp_path / "rows").rglob("*.parquet")).unlink()
    with pytest.raises(ResultError, match=r"rows/sae=only/part-00000.parquet is damaged: it is missing"):
        DictionaryEffects.load(tmp_path)


def test_promoted_tokens_match_the_direct_path():
    """After the last block, where only the direct path is left, with norms held fixed."""
    model, sae, result = tiny_model("llama"), sae_of("cosine:topk", LAST), whole()
    lines = result.latents[result.latents.sae == "5/cosine"].set_index("latent")
    head = model.lm_head.weight.float() * model.model.norm.weight.float()
    for i in lines.index[lines.rows > 5][:6]:
        rows = result.frame[(result.frame.sae == "5/cosine") & (result.frame.latent == i)]
        change = head @ sae.W_dec[i] * float(-(rows.z / rows.final_norm).mean())
        order = (change - change.mean()).argsort(descending=True).tolist()
        assert lines.promoted[i] == "  ".join(f"⟨{t}⟩" for t in order[:5])
        assert lines.suppressed[i] == "  ".join(f"⟨{t}⟩" for t in order[:-6:-1])


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_resumed_and_joined_runs_match_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(DictionaryEffects, "figures", lambda self: {})
    alone = found(folder=tmp_path / "alone")
    stops = iter(range(100))

    def stop(n: int, total: int) -> None:
        if next(stops) == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        found(folder=tmp_path / "resumed", progress=stop)
    assert 1 < len(list((tmp_path / "resumed" / "units").iterdir())) < 5
    for i in (2, 1):
        with workers(part=(i, 2)), pytest.raises(PartDone) if i == 2 else nothing():
            found(folder=tmp_path / "joined")
    for name in ("resumed", "joined"):
        again = found(folder=tmp_path / name)
        pd.testing.assert_frame_equal(again.latents, alone.latents, check_exact=True)
        assert again.provenance == alone.provenance
        for result, folder in ((again, name), (alone, "alone")):
            result.write(tmp_path / folder)
        assert files(tmp_path / name) == files(tmp_path / "alone")


def nothing():
    import contextlib

    return contextlib.nullcontext()


def test_other_saes_do_not_change_an_saes_rows():
    """A run with this SAE alone has the same tokens and, to rounding, the same effects."""
    alone = dictionary_effects(tiny_model("llama"), PROMPTS, {"2/signed": sae_of(signed=True)}, tokens_per_latent=12)
    both = whole().frame[whole().frame.sae == "2/signed"].reset_index(drop=True)
    columns = ["prompt", "position", "latent", "quartile"]
    pd.testing.assert_frame_equal(alone.frame[columns], both[columns])
    np.testing.assert_allclose(alone.frame.kl, both.kl, rtol=1e-3, atol=1e-9)


def test_a_card_reads_its_rows():
    result, sae = whole(), sae_of(signed=True)
    weighted = (result.frame.kl * result.frame.weight)[result.frame.sae == "2/signed"]
    total = weighted.groupby(result.frame.latent).sum().sort_values(ascending=False)
    card = latent_card(tiny_model("llama"), sae, int(total.index[1]), PROMPTS, atlas=result, top=2, few=1, n_effects=5)
    assert card.atlas is not None and card.atlas["rank"] == 2 and card.atlas["rows_of_latent"] == 12
    assert card.atlas["share_of_effect"] == pytest.approx(total.iloc[1] / total.sum(), rel=1e-4)
    assert card.effects is not None and card.effects.source == "atlas"
    assert card.atlas["largest_difference"] is None or card.atlas["largest_difference"] < 1e-4


def test_dropped_tokens_and_prompts_are_counted():
    special = [[i == 1 for i in range(len(tokens))] for tokens in PROMPTS[:9]]
    marked = as_prompts(PROMPTS[:9], None)
    marked.special[:] = special
    result = dictionary_effects(tiny_model("llama"), marked, {"s": sae_of()}, tokens_per_latent=100, sink_filter=1.1)
    notes = result.provenance["dictionary"]["s"]
    assert notes["tokens_left_out"]["special token"] == 9 and notes["tokens_left_out"]["sink"] > 0
    assert sum(notes["tokens_left_out"].values()) + notes["tokens"] == sum(map(len, PROMPTS[:9]))
    assert "tokens left out (s)" in " ".join(left_out(result))
    assert result.groups[0]["short"] == (result.latents.firings > 0).sum() and not result.latents.q.notna().any()
    some = dictionary_effects(tiny_model("llama"), PROMPTS, {"s": sae_of()}, tokens_per_latent=1, scan_tokens=40)
    assert sum(map(len, some.tokens)) <= 40 < sum(map(len, PROMPTS[: len(some.tokens) + 1]))
    assert json.loads(json.dumps(some.provenance["text"]))["prompts_beyond_scan"] == 70 - len(some.tokens)


def test_invalid_input_raises():
    model, silent = tiny_model("llama"), sae_of("standard:topk", SITE)
    with pytest.raises(ResultError, match="0 tokens a latent; expected 1 or more"):
        dictionary_effects(model, PROMPTS, {"s": silent}, tokens_per_latent=0)
    with pytest.raises(ResultError, match="3 tokens to scan, but the first prompt has 7"):
        dictionary_effects(model, PROMPTS, {"s": silent}, scan_tokens=3)
    with pytest.raises(SiteError, match="do not say where they act"):
        dictionary_effects(model, PROMPTS, {"s": torch.eye(D_MODEL)})
    other = build(named("standard:topk"), 8, 2, torch.randn(9, 5), torch.Generator(), hook_name=SITE.hook_name)
    with pytest.raises(BelongingError):
        dictionary_effects(model, PROMPTS, {"s": other})
    with pytest.raises(
        ResultError, match=r"no latent is active at a usable token; left out: .*position 0.*give more text"
    ):
        dictionary_effects(model, [[5], [6]], {"s": silent})
    broken = fresh("llama")
    broken.lm_head.weight[3] = torch.inf
    with (
        pytest.warns(UserWarning, match="logits are not finite"),
        pytest.raises(ResultError, match=r"none of \d+ rows has a finite effect"),
    ):
        dictionary_effects(broken, PROMPTS[:9], {"s": silent}, tokens_per_latent=4)
