"""Feature ablation: planted effects computed by hand, parity with full forward passes, resumed runs."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.concept_ablation.choices import ARMS
from diagnostics.concept_ablation.concepts import Concept, ConceptTexts, given_concepts
from diagnostics.concept_ablation.result import COLUMNS, FeatureAblation
from diagnostics.concept_ablation.run import feature_ablation
from interventions import ResultError, Site, record, wrap
from interventions.errors import ReplayError
from interventions.files import jsonable
from sae_models.architectures import build, named
from sae_models.edits import zero_latents
from sae_models.errors import BelongingError
from tests.diagnostics.planted_concept import CONCEPT, OTHER, SIZE, TARGET, planted_model, planted_sae, size_read
from tests.tiny import D_MODEL, TOLERANCE, VOCAB, assert_same_effect, exact_kl, forward_alone, prompts, tiny_model

N, LENGTH = 40, 10
SITE = Site(2)


def planted_texts(labelled: bool = True) -> ConceptTexts:
    """40 texts with 1 to 4 of the concept's token among 9 that count, 40 with as many of the other; half of each ranks."""
    generator = np.random.default_rng(0)
    tokens = []
    for special in (CONCEPT, OTHER):
        for i in range(N):
            row = generator.integers(40, 90, LENGTH)
            row[1 + generator.permutation(LENGTH - 1)[: 1 + i // 2 % 4]] = special
            tokens.append([int(t) for t in row])
    own, others = tuple(range(N)), tuple(range(N, 2 * N))
    concepts = (Concept("concept", own, others, (TARGET,)), Concept("other", others, own, (TARGET,)))
    labels = ("concept",) * N + ("other",) * N
    special = [[False] * LENGTH] * len(tokens)
    ranking = tuple(i % 2 == 0 for i in range(2 * N))
    return ConceptTexts("planted", tokens, special, ranking, concepts, labels if labelled else None)


@pytest.fixture(scope="module", params=[False, True], ids=["positive", "signed"])
def planted(request):
    texts = planted_texts()
    saes = {"planted": planted_sae(request.param)}
    return texts, feature_ablation(planted_model(), texts, saes, counts=(1, 2), arms=ARMS, reads=None, sink_filter=None)


def test_planted_effects_by_hand(planted):
    """Texts have m of 9 tokens at which the one logit that there is falls from L to 0; elsewhere nothing happens."""
    texts, found = planted
    measured = [i for i in texts.concepts[0].own if not texts.ranking[i]]
    m = np.array([texts.tokens[i].count(CONCEPT) for i in measured]) / (LENGTH - 1)
    logit = size_read()
    clean = torch.zeros(VOCAB, dtype=torch.float64)
    clean[TARGET] = logit
    kl = float(exact_kl(clean[None], torch.zeros(1, VOCAB)))
    by_hand = {
        "kl": (m.mean() * kl, 0.0, 1.0),
        "logit": (m.mean() * logit * (1 - 1 / VOCAB), np.sqrt(m.mean()) * logit / VOCAB, None),
    }
    for form, (intended, collateral, selectivity) in by_hand.items():
        (group,) = (g for g in found.groups if _is(g, "concept", "selected", form, 1))
        assert group["intended"].value == pytest.approx(intended, rel=1e-4)
        assert group["collateral"].value == pytest.approx(collateral, rel=1e-4, abs=1e-9)
        expected = intended / (intended + collateral) if selectivity is None else selectivity
        assert group["selectivity"].value == pytest.approx(expected, rel=1e-4)
        assert group["n_latents"] == 1
        assert (group["delta_square"], group["delta_square_others"]) == (pytest.approx(m.mean() * SIZE**2), 0)
        assert (group["edited"], group["edited_others"]) == (pytest.approx(m.mean()), 0)
    rows = found.frame.query("concept == 'concept' and arm == 'selected' and count == 1 and own")
    assert np.allclose(rows["kl"], m * kl, rtol=1e-4) and np.allclose(rows["delta_norm"], SIZE)
    assert rows["text"].tolist() == measured


def test_planted_probe_effects_by_hand(planted):
    """Subtracting z_i·d_i moves a text's mean activation by −m·SIZE·e_0, and its probe with it."""
    texts, found = planted
    rows = found.frame.query("arm == 'selected' and count == 1 and concept == 'concept'")
    own = rows[rows["own"]]
    m = np.array([texts.tokens[i].count(CONCEPT) for i in own["text"]]) / (LENGTH - 1)
    fall = (own["class_probe_clean"] - own["class_probe"]).to_numpy() / m
    assert np.allclose(fall, fall[0], rtol=1e-5) and fall[0] > 0
    assert not (rows["class_probe_clean"] - rows["class_probe"])[~rows["own"]].any()
    (group,) = (g for g in found.groups if _is(g, "concept", "selected", "probe", 1))
    assert group["selectivity"].value == 1 and group["intended"].value == pytest.approx(fall[0] * m.mean(), rel=1e-5)
    assert found.provenance["probe_accuracy"]["planted, 2.resid_post"]["concept"] > 0.9


def test_planted_collateral_and_keep_conditions(planted):
    """Latent 2, which marks the other concept's texts, changes no logit. Keeping latent 0 alone keeps the whole effect."""
    _, found = planted
    frame = found.frame
    assert not frame.query("concept == 'other' and arm == 'selected' and count == 1 and not own")["kl"].any()
    (none, one) = (next(g for g in found.groups if _is(g, "concept", "keep", "kl", n)) for n in (0, 1))
    (selected,) = (g for g in found.groups if _is(g, "concept", "selected", "kl", 1))
    assert none["recovered"].value == 0
    # Without latent 1 the norm is a little smaller and the logit larger: 25 of about 30 in ‖x‖² against 1.
    assert 0.9 < one["recovered"].value <= 1 and none["intended"].value == pytest.approx(selected["intended"].value)
    random = frame.query("arm == 'random' and concept == 'concept'")
    # two latents are active: the random one is the other one, then both
    assert random.groupby("count")["n_latents"].unique().map(list).to_dict() == {1: [1], 2: [2]}


def test_placebos_have_the_doses_of_the_selected_edit(planted):
    _, found = planted
    arms = {name: rows.reset_index(drop=True) for name, rows in found.frame.groupby("arm")}
    assert (arms["placebo"]["n_edited"] == arms["selected"]["n_edited"]).all() and not found.provenance["dropped"]
    for column in ("delta_norm", "delta_square"):
        assert np.allclose(arms["placebo"][column], arms["selected"][column], rtol=1e-5, atol=1e-6)
    one = arms["selected"]["n_edited"].eq(1)
    for arm in ("placebo", "selected"):
        assert np.allclose(arms[arm]["coherence"][one], 1)
    alike = arms["selected"].query("count == 1 and n_edited > 1")["coherence"]
    assert len(alike) and np.allclose(alike, 1)  # one latent: one direction
    assert found.provenance["texts_untouched"] > 0


def test_counts_are_independent_and_repeats_run_once():
    texts, sae = random_texts(12), random_sae()
    alone, many = (
        feature_ablation(tiny_model("llama"), texts, {"sae": sae}, counts=n, sink_filter=None, arms=ARMS)
        for n in ((1,), (1, 4, 50, 60))
    )
    key = ["arm", "count", "text"]
    both = (f[f["count"] <= 1].sort_values(key).reset_index(drop=True) for f in (alone.frame, many.frame))
    pd.testing.assert_frame_equal(*both)
    last, before = (many.frame.query("count == @n").drop(columns="count").reset_index(drop=True) for n in (60, 50))
    pd.testing.assert_frame_equal(last, before)  # fewer than 50 latents
    every, by_lot = (last.query("arm == @arm")["n_latents"].unique() for arm in ("selected", "random"))
    assert every < 50 and every - 1 <= by_lot <= every  # all that there are, but for one that only itself was left for
    p, n_texts = many.provenance, many.frame["text"].nunique()
    assert p["texts_passed"] + p["texts_untouched"] == n_texts * (4 * 3 + 1)  # of 4 * 4 + 1 changes


def _is(group, concept, arm, form, count):
    return (group["concept"], group["arm"], group["form"], group["count"]) == (concept, arm, form, count)


def random_sae():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, D_MODEL, generator=generator)
    sae = build(named("standard:relu"), 24, 6, x, generator, hook_name=SITE.hook_name).requires_grad_(False)
    for weight in sae.parameters():
        weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return sae


def random_texts(n: int = 6, positions: bool = False):
    rows = prompts((9, 7, 11, 8) * (n // 2))
    found = given_concepts("random", {"half": (rows[:n], rows[n:])}, targets={"half": [3, 5]})
    if not positions:
        return found
    (concept,) = found.concepts
    return replace(found, concepts=(replace(concept, positions={i: (2, 5) for i in concept.own}),))


@pytest.mark.parametrize(("path", "positions"), [("blocks", False), ("blocks", True), ("hooks", True)])
def test_effects_match_full_forward_passes(path, positions):
    """Selected latents are removed at every token but the first; effects are read at all of these or at the concept's."""
    hf, sae, texts = tiny_model("llama"), random_sae(), random_texts(positions=positions)
    run = feature_ablation(
        hf, texts, {"sae": sae}, counts=(3,), arms=("selected",), reads=None, path=path, sink_filter=None
    )
    assert set(run.provenance["path"].values()) == {path}
    (said,) = run.provenance["latents"].values()
    for row in run.frame.itertuples():
        tokens = texts.tokens[row.text]
        edits = {p: lambda x: zero_latents(x, sae, said["top"][:3]) for p in range(1, len(tokens))}
        at = [2, 5] if positions and row.own else list(range(1, len(tokens)))
        p, q = (forward_alone("llama", hf, tokens, SITE, e)[at] for e in ({}, edits))
        assert_same_effect(torch.tensor([row.kl]), exact_kl(p, q).mean()[None], TOLERANCE)
        assert (row.n_reads, row.n_tokens) == (len(at), len(tokens) - 1)
        x = record(wrap(hf), [tokens], [SITE]).activations[SITE][0, 1:]
        delta = (zero_latents(x, sae, said["top"][:3]) - x).norm(dim=1)
        assert row.delta_square == pytest.approx(float(delta.square().mean()), rel=1e-4)
        assert row.n_edited == int((delta > 0).sum())


def test_attribution_finds_the_planted_latent_and_needs_replay():
    texts, saes = planted_texts(labelled=False), {"planted": planted_sae(False)}
    settings = {"counts": (1,), "arms": ("selected",), "rankings": ("attribution",), "reads": None, "sink_filter": None}
    found = feature_ablation(planted_model(), texts, saes, **settings)
    tops = {name: said["top"][0] for name, said in found.provenance["latents"].items()}
    assert tops["data=planted sae=planted concept=concept ranking=attribution"] == 0
    assert found.forms == ["kl", "logit"]
    with pytest.raises(ReplayError, match="attribution runs the blocks"):
        feature_ablation(planted_model(), texts, saes, **settings, path="hooks")


def test_the_probe_ranking_finds_the_planted_latents():
    settings = {"counts": (1,), "arms": ("selected",), "rankings": ("probe",), "reads": 4, "sink_filter": None}
    texts = planted_texts()
    found = feature_ablation(planted_model(), texts, {"planted": planted_sae(True)}, **settings)
    tops = {name.split("concept=")[1].split()[0]: said["top"][0] for name, said in found.provenance["latents"].items()}
    assert tops == {"concept": 0, "other": 2}
    assert found.frame["n_reads"].eq(4).all()
    with pytest.raises(ResultError, match="no classes, so no probe"):
        feature_ablation(planted_model(), planted_texts(False), {"planted": planted_sae(True)}, **settings)


def test_resume_and_roundtrip(tmp_path, monkeypatch):
    model, texts, saes = planted_model(), planted_texts(), {"planted": planted_sae(False)}
    settings = {"counts": (1, 2), "reads": 4, "sink_filter": None, "folder": tmp_path}
    done, again = [], []
    first = feature_ablation(model, texts, saes, **settings, progress=lambda n, total: done.append((n, total)))
    assert sum(n for n, _ in done) == done[0][1] == 2 * 40 * (3 * 2)
    second = feature_ablation(model, texts, saes, **settings, progress=lambda n, total: again.append(n))
    assert again == [480]  # in one step
    pd.testing.assert_frame_equal(first.frame, second.frame)
    assert tuple(first.frame) == COLUMNS and first.frame["group"].equals(first.frame["text"])
    monkeypatch.setattr(FeatureAblation, "figures", lambda self: {})  # test_names_in_figures draws them
    first.write(tmp_path)
    loaded = FeatureAblation.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.frame, first.frame)
    assert loaded.tokens == texts.tokens and loaded.concepts == [("planted", "concept"), ("planted", "other")]
    assert "at equal intended effect" in loaded.table() and "<table" in loaded._repr_html_()
    assert json.loads((tmp_path / "feature_ablation.json").read_text())["summary"] == jsonable(loaded.groups)


def test_groups_of_several_data_sets():
    texts, saes = planted_texts(), {"planted": planted_sae(False)}
    grouped = replace(texts, groups=tuple(i - i % 4 + i % 2 for i in range(2 * N)))  # two texts of one side
    data = {"first": texts, "planted": grouped}
    pairs = feature_ablation(planted_model(), data, saes, counts=(1,), reads=4, sink_filter=None, arms=("selected",))
    rows = pairs.frame[pairs.frame["data"] == "planted"]
    first_text = (rows["text"] - 2 * N) // 4 * 4 + (rows["text"] - 2 * N) % 2 + 2 * N
    assert rows["group"].equals(first_text.rename("group")) and rows["group"].nunique() == N // 2
    by = {c.data: (c.n_texts, len(c.groups)) for c in pairs.curves if c.form == "kl"}
    assert by == {"first": (N, N), "planted": (N, N // 2)}
    assert pairs.provenance["texts"]["planted"]["concepts"]["other"]["measuring_groups"] == [10, 10]
    assert pairs.provenance["texts"]["planted"]["measured"] == {"texts": 40, "groups": 20}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"arms": ("best",)}, ResultError, r"arms \['best'\]; expected some of selected"),
        ({"rankings": ()}, ResultError, r"rankings \[\]"),
        ({"counts": (0, 1)}, ResultError, "1 or more"),
        ({"reads": 0}, ResultError, "0 reads"),
        ({"path": "replay"}, ResultError, "path 'replay'"),
        ({"prompts": {"all": planted_texts()}}, ResultError, "a data set is called 'all'"),
        ({"saes": {"d": torch.eye(D_MODEL)}}, Exception, "do not say where they act"),
        ({"saes": {"wide": build(named("standard:relu"), 8, 2, torch.randn(9, 16), torch.Generator(), hook_name="blocks.1.hook_resid_post")}}, BelongingError, "width 16"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise(settings, error, message):
    with pytest.raises(error, match=message):
        given = {"prompts": planted_texts(), "saes": {"planted": planted_sae(False)}, **settings}
        feature_ablation(planted_model(), given.pop("prompts"), given.pop("saes"), **given)
