"""Which tokens are drawn: quotas, quarters and prompts as stated, whatever the order in which the text was read."""

import numpy as np
import pytest

from diagnostics.whole_dictionary.scan import STRATA, Entries, drawn, kept, scanned
from interventions import ResultError, Site, record
from interventions.models.wrapping import wrap
from interventions.texts.prompts import as_prompts
from sae_models.dictionaries import dictionaries_of
from tests.diagnostics.whole_dictionary.test_run import LAST, PROMPTS, SITE, sae_of
from tests.tiny import tiny_model

QUOTA = 24


@pytest.fixture(scope="module")
def entries() -> Entries:
    rng = np.random.default_rng(0)
    token, latent = np.nonzero(rng.random((4000, 12)) < np.geomspace(0.001, 0.6, 12))
    return Entries(token // 40, token % 40, latent, rng.standard_normal(len(token)).astype(np.float32) ** 3)


def test_selection_fills_quotas_over_quartiles_and_prompts(entries):
    chosen, quartile = drawn(entries, QUOTA, seed=0)
    assert len(set(chosen)) == len(chosen)
    for i in range(12):
        own = np.flatnonzero(entries.latent == i)
        got = entries.latent[chosen] == i
        assert got.sum() == min(QUOTA, len(own))
        size = np.abs(entries.z)
        rank = np.searchsorted(np.sort(size[own]), size[chosen[got]])
        np.testing.assert_array_equal(quartile[got], STRATA * rank // len(own))
        if len(own) >= 4 * QUOTA:
            assert np.bincount(quartile[got]).tolist() == [QUOTA // STRATA] * STRATA
            assert len(set(entries.prompt[chosen[got]])) == QUOTA  # no prompt twice while others are left


def test_a_quota_of_one_favours_no_quarter():
    token, latent = (part.ravel() for part in np.mgrid[:40, :200])
    chosen, quartile = drawn(Entries(token, 0 * token, latent, token + 1.0), 1, seed=0)
    assert len(chosen) == 200 and np.bincount(quartile).tolist() == [50] * STRATA


def test_selection_depends_on_the_seed_not_on_entry_order(entries):
    def tokens(of, seed):
        some = of.take(drawn(of, QUOTA, seed)[0])
        return list(zip(some.prompt, some.position, some.latent, strict=True))

    order = np.random.default_rng(1).permutation(len(entries.z))
    assert tokens(entries, 0) == tokens(entries.take(order), 0) == sorted(tokens(entries, 0))
    assert tokens(entries, 0) != tokens(entries, 1)


def test_a_scan_counts_what_is_active_at_usable_tokens():
    model = wrap(tiny_model("llama"))
    saes = {"2/signed": sae_of(signed=True), "5/cosine": sae_of("cosine:topk", LAST)}
    how = {"sink_filter": None, "tokens_per_latent": 7, "seed": 0}
    found = scanned(model, as_prompts(PROMPTS, None), dictionaries_of(saes, model, None), **how)
    recording = record(model, PROMPTS, [SITE, LAST])
    for (name, sae), site in zip(saes.items(), (SITE, LAST), strict=True):
        scan = found[name]
        z = np.concatenate(
            [sae.encode(recording.activations[site][p, 1 : len(t)]).numpy() for p, t in enumerate(PROMPTS)]
        )
        assert scan.firings.tolist() == (z != 0).sum(0).tolist() and scan.usable.sum() == len(z)
        assert scan.left_out == {"position 0": len(PROMPTS)}
        for i in np.flatnonzero(scan.firings):
            own = z[z[:, i] != 0, i]
            assert scan.max_z[i] == pytest.approx(own[np.abs(own).argmax()], rel=1e-4)
            assert scan.median_z[i] == pytest.approx(np.median(own), rel=1e-3, abs=1e-5)
        rows = np.bincount(scan.latent, minlength=len(scan.firings))
        assert rows.tolist() == np.minimum(scan.firings, 7).tolist()
        for p, q, i, value in list(zip(scan.prompt, scan.position, scan.latent, scan.z, strict=True))[::40]:
            assert value == pytest.approx(float(sae.encode(recording.activations[site][p, q][None])[0, i]), rel=1e-4)


def test_stored_scan_is_reused_and_damage_raises(tmp_path):
    model = wrap(tiny_model("llama"))
    given = dictionaries_of({"s": sae_of()}, model, Site(2))

    def scan(seed):
        return scanned(model, as_prompts(PROMPTS, None), given, sink_filter=10.0, tokens_per_latent=3, seed=seed)

    first, again = kept(tmp_path, "x", lambda: scan(0)), kept(tmp_path, "x", lambda: scan(1))
    assert first["s"].left_out == again["s"].left_out and (first["s"].position == again["s"].position).all()
    assert (first["s"].position != kept(None, "x", lambda: scan(1))["s"].position).any()
    (tmp_path / "scan-x.npz").write_bytes(b"half")
    with pytest.raises(ResultError, match=r"scan-x.npz is damaged .*; remove it"):
        kept(tmp_path, "x", lambda: scan(0))
