"""A comparison of small SAEs on a tiny model: planted copies are matched, and numbers agree with ones computed by hand."""

import functools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from diagnostics.dictionary_comparison.ablations import COLUMNS
from diagnostics.dictionary_comparison.result import DictionaryComparison
from diagnostics.dictionary_comparison.run import compare_dictionaries
from diagnostics.dictionary_comparison.summary import seed_groups
from interventions import ResultError, Site, record
from interventions.files import jsonable
from sae_models.architectures import build, named
from sae_models.sae import SAE
from tests.tiny import changed_in, exact_kl, prompts, tiny_model

SITE, D_SAE = Site(3), 48
PROMPTS = prompts(tuple(12 + (5 * i) % 9 for i in range(22)))


@functools.cache
def stream() -> list[torch.Tensor]:
    recording = record(tiny_model("llama"), PROMPTS, [SITE], keep_cache=False)
    return [recording.activations[SITE][i, : len(tokens)] for i, tokens in enumerate(PROMPTS)]


@functools.cache
@torch.no_grad()
def random_sae(name: str, seed: int, site: Site = SITE) -> SAE:
    x, g = torch.cat(stream()), torch.Generator().manual_seed(seed)
    sae = build(named(name), D_SAE, 8, x, g, hook_name=site.hook_name, model_name="LlamaForCausalLM")
    for parameter in sae.parameters():
        parameter.data += 0.1 * parameter.data.abs().mean().clamp(min=0.3) * torch.randn(parameter.shape, generator=g)
    if hasattr(sae.selector, "threshold"):
        sae.selector.threshold.fill_(float(sae.score(sae.centred(x), sae.W_dec).flatten().quantile(0.85)))
    return sae.requires_grad_(False)


def permuted(sae: SAE, order: torch.Tensor) -> SAE:
    """The same SAE, its latents in another order."""
    copy = build(named("standard"), D_SAE, 8, torch.cat(stream()), torch.Generator(), hook_name=sae.hook_name)
    state = {k: v[order] if v.shape[:1] == (D_SAE,) else v for k, v in sae.state_dict().items()}
    copy.load_state_dict(state)
    return copy.requires_grad_(False)


ORDER = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(5))
LABELLED = {"parity": (PROMPTS, ["even" if sum(tokens) % 2 else "odd" for tokens in PROMPTS])}
SETTINGS = {"causal_latents": 16, "causal_tokens": 6, "min_active": 5, "min_quartile": 2, "labelled": LABELLED}


@functools.cache
def saes() -> dict[str, SAE]:
    standard = random_sae("standard", 0)
    found = {"standard": standard, "standard-seed1": permuted(standard, ORDER), "cosine": random_sae("cosine", 1)}
    found["cosine"].W_dec.data[7] = found["cosine"].W_dec.data[2]
    return found


@functools.cache
def result() -> DictionaryComparison:
    return compare_dictionaries(tiny_model("llama"), PROMPTS, saes(), **SETTINGS)


def test_a_permuted_copy_is_matched_with_itself():
    found = result()
    one = found.partners.query("sae == 'standard' and other == 'standard-seed1'").set_index("latent")
    usable = found.frame.query("sae == 'standard'").set_index("latent")["usable"]
    assert usable.sum() > D_SAE / 2
    np.testing.assert_array_equal(ORDER[one["match"][usable]], np.flatnonzero(usable))
    np.testing.assert_allclose(one["correlation"][usable], 1, atol=1e-5)
    np.testing.assert_allclose(one["mcs"], 1, atol=1e-5)
    line, other = found.pair("standard", "standard-seed1"), found.pair("standard", "cosine")
    assert line["matched_share"] == 1 and line["unique"] == 0 and line["matched"] == usable.sum()
    assert line["matched_share_null"] == 0 and line["mcs"] == pytest.approx(1, abs=1e-5)
    assert other["matched_share"] < 0.2 and other["mcs"] < 0.7
    assert found.lines["seeds"][0]["saes"] == ["standard", "standard-seed1"]
    assert found.lines["seeds"][0]["stable_share"] == 1
    assert found.provenance["seed_groups"] == {"standard": ["standard", "standard-seed1"]}


def test_numbers_of_latents_match_encode():
    found = result()
    x = torch.cat([part[1:] for part in stream()])
    norm = x.double().norm(dim=1).numpy()
    assert found.provenance["counted"] == len(x)
    quartile = 1 + np.searchsorted(np.quantile(norm, (0.25, 0.5, 0.75)), norm, side="left")
    for name, sae in saes().items():
        z = sae.encode(x).numpy()
        own = found.frame[found.frame["sae"] == name].set_index("latent")
        fired = (z != 0).sum(0)
        np.testing.assert_array_equal(own["fired"], fired)
        live = fired > 0
        np.testing.assert_allclose(own["mean_activation"][live], (z.sum(0) / np.maximum(fired, 1))[live], rtol=1e-4)
        for q in range(1, 5):
            share = ((z != 0) & (quartile == q)[:, None]).sum(0)[live] / fired[live]
            np.testing.assert_allclose(own[f"share_q{q}"][live], share, rtol=1e-6)
        np.testing.assert_allclose(own["alignment"], sae.alignment(), rtol=1e-4, atol=1e-6)
    both = [sae.encode(x).numpy() for sae in (saes()["standard"], saes()["cosine"])]
    pair = found.partners.query("sae == 'standard' and other == 'cosine' and partner >= 0")
    dense = [
        np.corrcoef(both[0][:, i], both[1][:, j])[0, 1] for i, j in zip(pair["latent"], pair["partner"], strict=True)
    ]
    np.testing.assert_allclose(pair["correlation"], dense, atol=1e-4)


def test_the_planted_duplicate_is_listed():
    found = result()
    own = found.duplicates[found.duplicates["sae"] == "cosine"]
    assert [(r.latent, r.other) for r in own.itertuples()] == [(2, 7)]
    assert own["cosine"].iloc[0] == pytest.approx(1, abs=1e-6)
    assert found.frame.query("sae == 'cosine' and duplicates > 0")["latent"].tolist() == [2, 7]


def test_only_cosine_sensitivities_depend_on_the_norm():
    found = result().frame.dropna(subset="sensitivity_ratio")
    for name, own in found.groupby("sae"):
        constant = np.allclose(own["sensitivity_ratio"], 1, atol=1e-4)
        assert constant == name.startswith("standard") and own["gradient_ratio"].notna().all()


def test_ablations_match_full_forward_passes():
    found = result()
    assert found.provenance["ablations"]["cosine"]["path"] == "replay"
    rows = found.ablations
    assert (rows.groupby(["sae", "latent"]).size() <= 6).all()
    assert (rows.groupby("sae")["latent"].nunique() == 16).all()
    for row in rows[rows["sae"] != "standard-seed1"].iloc[::31].itertuples():
        sae = saes()[row.sae]
        ids = torch.tensor([PROMPTS[row.prompt]])
        clean = tiny_model("llama")(input_ids=ids).logits[0, row.position].double()

        def without(x, sae=sae, row=row):
            x = x.clone()
            z = sae.encode(x[0, row.position])[row.latent]
            assert float(z) == pytest.approx(row.activation, rel=1e-4)
            assert row.delta_norm == pytest.approx(float((z * sae.W_dec[row.latent]).norm()), rel=1e-4)
            x[0, row.position] -= z * sae.W_dec[row.latent]
            return x

        remove = changed_in("llama", tiny_model("llama"), SITE, without)
        logits = tiny_model("llama")(input_ids=ids).logits[0, row.position].double()
        remove()
        assert row.kl == pytest.approx(float(exact_kl(clean[None], logits[None])[0]), rel=2e-3, abs=1e-6)
    assert (rows[["kl_placebo_token", "kl_placebo_isotropic"]] > 0).all(axis=None)
    mean = rows.groupby(["sae", "latent"])["kl"].mean()
    joined = found.frame.set_index(["sae", "latent"])["kl"].dropna()
    np.testing.assert_allclose(joined.sort_index(), mean.sort_index(), rtol=1e-5)
    own = found.frame.query("sae == 'cosine'").dropna(subset="kl")
    line = next(line for line in found.lines["alignment"] if line["sae"] == "cosine")
    fired = found.frame.query("sae == 'cosine'")["fired"].gt(0).sum()
    assert own["latent_weight"].sum() == pytest.approx(fired) and own["latent_weight"].nunique() > 1
    # of weights that are whole multiples of 1/k: each latent so many times
    times = (own["latent_weight"] * 60).round().astype(int)
    expected = stats.spearmanr(own["alignment"].repeat(times), own["kl"].repeat(times)).statistic
    assert line["alignment_kl_spearman"]["value"] == pytest.approx(expected, abs=1e-3)
    assert stats.spearmanr(own["alignment"], own["kl"]).statistic != pytest.approx(expected, abs=1e-2)
    assert tuple(rows) == tuple(COLUMNS)
    w = rows[rows["sae"] == "cosine"].groupby("latent")["latent_weight"].first()
    assert line["ablated"] == len(w) == 16 and line["ablated_effective"] == pytest.approx(w.sum() ** 2 / (w @ w))


def test_every_pair_has_a_split_of_the_probing_gap():
    lines = result().lines["discovery"]
    assert [(line["sae"], line["other"]) for line in lines] == [
        ("standard", "standard-seed1"), ("standard", "cosine"), ("standard-seed1", "cosine"),
    ]  # fmt: skip
    assert lines[0]["gap"]["value"] == lines[0]["separability"]["value"] == 0
    assert all(("gap" in line) == (line["why_not"] is None) == (line["matches"] > 0) for line in lines)


def test_roundtrip_and_resume(tmp_path, monkeypatch):
    found = result()
    monkeypatch.setattr(DictionaryComparison, "figures", lambda self: {})  # test_names_in_figures draws them
    assert tuple(found.write(tmp_path / "x")[:6]) == DictionaryComparison.files()
    back = DictionaryComparison.load(tmp_path / "x")
    assert back.as_dict() == jsonable(found.as_dict()) and back.tokens == found.tokens
    for name in ("frame", "partners", "duplicates", "ablations"):
        pd.testing.assert_frame_equal(getattr(back, name), getattr(found, name))
    assert "matched" in found.table() and json.dumps(jsonable(found.as_dict()), allow_nan=False)
    (tmp_path / "x" / "dictionary_partners.parquet").unlink()
    with pytest.raises(ResultError, match=r"dictionary_partners\.parquet is missing"):
        DictionaryComparison.load(tmp_path / "x")
    some = {name: saes()[name] for name in ("standard", "cosine")}
    done = []
    settings = {"folder": tmp_path / "run", "min_active": 5, "labelled": LABELLED}
    settings["progress"] = lambda n, total: done.append((n, total))
    one = compare_dictionaries(tiny_model("llama"), PROMPTS, some, **settings)
    assert sum(n for n, _ in done) == 6 and {total for _, total in done} == {6}
    again = compare_dictionaries(tiny_model("llama"), PROMPTS, some, **settings)
    assert jsonable(one.as_dict()) == jsonable(again.as_dict())
    pd.testing.assert_frame_equal(one.frame, again.frame)
    assert len(one.ablations) == 0 and one.frame["kl"].isna().all()
    others = {"parity": (PROMPTS, LABELLED["parity"][1][::-1])}  # the same texts
    with pytest.raises(ResultError, match=r"holds units of another run: labelled\.parity\.labels_sha256 was"):
        compare_dictionaries(tiny_model("llama"), PROMPTS, some, **settings | {"labelled": others})


def test_seed_groups_from_metadata_then_from_names():
    def with_seed(seed: int, lr: float = 0.1) -> SAE:
        sae = build(named("standard"), 8, 2, torch.randn(9, 4), torch.Generator().manual_seed(seed))
        sae.metadata = {"architecture": {"score": "inner"}, "recipe": {"seed": seed, "lr": lr}, "tokens": 9}
        return sae

    told = {"a": with_seed(0), "b": with_seed(1), "a-seed2": with_seed(2, lr=0.2)}
    assert seed_groups(told) == {"a": ["a", "b"]}
    mute = {name: with_seed(0) for name in ("x/cosine", "x/cosine-seed1", "x/standard")}
    for sae in mute.values():
        sae.metadata = {}
    assert seed_groups(mute) == {"x/cosine": ["x/cosine", "x/cosine-seed1"]}


@pytest.mark.parametrize(
    ("some", "settings", "message"),
    [
        (("standard",), {}, "1 SAE; a comparison needs two"),
        (("standard", "cosine"), {"cosine": 1.5}, "threshold cosine 1.5"),
        (("standard", "cosine"), {"min_active": 0}, "min_active 0; expected 1 or more"),
        (("standard", "cosine"), {"causal_latents": -1}, "causal_latents -1"),
        (
            ("standard", "cosine"),
            {"labelled": {"few": (PROMPTS, ["a"] * 20 + ["b"] * 2)}},
            "'few': class 'b' has 2 texts",
        ),
        (("standard", "early"), {}, "SAEs of 1.resid_post, 3.resid_post; dictionaries are compared at one site"),
    ],
)
def test_invalid_arguments_raise_before_the_model_runs(some, settings, message):
    known = saes() | {"early": random_sae("standard", 2, Site(1))}
    with pytest.raises(ResultError, match=message):
        compare_dictionaries(tiny_model("llama"), PROMPTS, {name: known[name] for name in some}, **settings)
