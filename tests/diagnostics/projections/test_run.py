"""Ablations of directions: every row against a full forward pass of its own, every column against its definition."""

import copy
import functools
import json
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.projections.design import COLUMNS, EDITS, REFERENCES, ProjectionDesign, ProjectionPlan
from diagnostics.projections.norm_exponent import Interventional, interventional
from diagnostics.projections.result import ProjectionEffects
from diagnostics.projections.run import projection_effects
from diagnostics.projections.summary import short_frame
from diagnostics.running.clean import CleanActivations, RunSettings
from diagnostics.running.single_edits import EditedRows
from diagnostics.statistics.tables import PLACEBOS, TRAINED
from interventions import EditError, ResultError, Site, SiteError, record, wrap
from interventions.texts.prompts import as_prompts
from sae_models.architectures import build, named
from sae_models.dictionaries import dictionaries_of
from sae_models.normalise import normalisation
from tests.tiny import D_MODEL, N_LAYERS, TOLERANCE, assert_same_effect, exact_kl, forward_alone, prompts, tiny_model

SITE, LAST = Site(2), Site(N_LAYERS - 1)
PROMPTS = prompts(tuple(9 + i % 5 for i in range(14)))
SMALL: dict[str, Any] = {"latents": 5, "tokens_per_latent": 12, "detail": 0.5, "seed": 3}


def sae_of(name: str = "cosine:topk", site: Site = SITE, seed: int = 0):
    """Of activations that the model has, so that latents fire at different rates."""
    x = record(tiny_model("llama"), PROMPTS, [site]).activations[site].reshape(-1, D_MODEL)
    stream = torch.Generator().manual_seed(seed)
    sae = build(named(name), 48, 6, x, stream, hook_name=site.hook_name).requires_grad_(False)
    for weight in sae.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=stream))
    return sae


@functools.cache
def found(**more) -> ProjectionEffects:
    saes = {"2/cosine": sae_of(), "5/standard": sae_of("standard:topk", LAST, 1)}
    return projection_effects(
        tiny_model("llama"), PROMPTS, saes, context="both", single_token_share=0.6, **(SMALL | more)
    )


def some(frame: pd.DataFrame, **values) -> pd.DataFrame:
    for name, value in values.items():
        frame = frame[frame[name].isin(value)] if isinstance(value, tuple) else frame[frame[name] == value]
    return cast(pd.DataFrame, frame)


def tensor(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def by_hand(row, x, sae, mean, median) -> torch.Tensor:
    """The edited vector, straight from the definition."""
    d = sae.W_dec[row.latent].double()
    unit, x = d / d.norm(), x.double()
    along = x @ unit
    if row.edit in ("zero", "scaled"):
        return x - along * unit
    if row.edit == "half":
        return x - 0.5 * along * unit
    if row.edit == "mean":
        return x - ((x - mean) @ unit) * unit
    if row.edit == "latent":
        return x - sae.encode(x.float())[row.latent].double() * d
    if row.edit == "cosine":
        return x - along / x.norm() * median * unit
    if row.edit == "rotate":
        away = -torch.sign(along) * unit
        tangent = away - (away @ x) / (x @ x) * x
        return x.norm() * (np.cos(0.1) * x / x.norm() + np.sin(0.1) * tangent / tangent.norm())
    assert row.edit == "self"
    return x


@pytest.fixture(scope="module")
def stream():
    """Activations at both sites, and the mean and median norm of the usable tokens."""
    recording = record(tiny_model("llama"), PROMPTS, [SITE, LAST])
    usable = CleanActivations(
        wrap(tiny_model("llama")), as_prompts(PROMPTS, None), RunSettings(sites=(SITE, LAST))
    ).usable
    at = torch.from_numpy(usable)
    values = {site: recording.activations[site] for site in (SITE, LAST)}
    own = {site: x[at].double() for site, x in values.items()}
    return {site: (values[site], x.mean(0), float(x.norm(dim=-1).median())) for site, x in own.items()}, usable


def test_every_edit_matches_a_full_forward_pass(stream):
    model, frame = tiny_model("llama"), found().frame
    saes = {2: sae_of(), 5: sae_of("standard:topk", LAST, 1)}
    known = (*REFERENCES, "rotate", "half", "scaled", "self")
    chosen = some(frame, edit=known).groupby(["layer", "context", "edit", "scale"]).head(3)
    assert set(chosen.edit) == set(known) and {round(float(v), 3) for v in some(chosen, edit="scaled").scale} == {
        0.9,
        1.1,
    }
    kls, expected = [], []
    for row in chosen.itertuples():
        site = Site(row.layer)
        values, mean, _ = stream[0][site]
        median = float(np.median(values.norm(dim=-1).numpy()[stream[1]]))
        x = values[row.target_prompt, row.target_position].double() * float(np.round(row.scale, 6))
        edited = by_hand(row, x, saes[row.layer], mean, median).float()
        assert float((edited.double() - x).norm()) == pytest.approx(row.delta_norm, rel=1e-4, abs=1e-5)
        tokens, position = PROMPTS[row.target_prompt], row.target_position
        if row.context == "single_token":
            tokens, position = [0], 0
        clean = {position: x.float()} if row.context == "single_token" or row.edit == "scaled" else {}
        one, other = (forward_alone("llama", model, tokens, site, e)[position] for e in (clean, {position: edited}))
        expected.append(exact_kl(one, other))
        kls.append(row.kl)
    assert_same_effect(tensor(kls), torch.stack(expected), TOLERANCE)


def test_replay_and_full_forward_passes_agree_row_by_row():
    small = SMALL | {"latents": 2, "tokens_per_latent": 8, "detail": 1.0}
    runs = [
        projection_effects(tiny_model("llama"), PROMPTS, {"s": sae_of()}, path=p, **small) for p in ("auto", "hooks")
    ]
    fast, slow = (run.frame for run in runs)
    labels = [c for c in COLUMNS if c in fast and c not in ("kl", "js", "kl_direct", "clean_entropy", "top1_changed")]
    pd.testing.assert_frame_equal(fast[labels], slow[labels])
    for name in ("kl", "js", "kl_direct"):
        assert_same_effect(tensor(fast[name]), tensor(slow[name]), TOLERANCE)
    assert [set(run.provenance["path"].values()) for run in runs] == [{"replay"}, {"hooks"}]


def test_scores_and_doses_follow_their_definitions(stream):
    frame = found().frame
    assert tuple(frame.columns) == COLUMNS
    for layer, sae in ((2, sae_of()), (5, sae_of("standard:topk", LAST, 1))):
        values, mean, _ = stream[0][Site(layer)]
        rows = some(frame, layer=layer, context="in_place", edit="zero")
        x = values[torch.tensor(rows.target_prompt.to_numpy()), torch.tensor(rows.target_position.to_numpy())].double()
        latent = torch.tensor(rows.latent.to_numpy())
        d, w = (m.double()[latent] for m in (sae.W_dec, sae.encoder_rows()))
        unit, x_c = d / d.norm(dim=-1, keepdim=True), x - sae.b_dec
        z = sae.encode(x.float())[torch.arange(len(rows)), latent]
        cos = torch.nn.functional.cosine_similarity
        expected = {
            "cosine": cos(x, d), "inner": (x * unit).sum(-1), "cosine_centred": cos(x_c, d), "inner_centred": (x_c * unit).sum(-1),
            "cosine_encoder": cos(x, w), "inner_encoder": (x * w).sum(-1), "cosine_encoder_centred": cos(x_c, w),
            "inner_encoder_centred": (x_c * w).sum(-1), "activation": z, "norm": x.norm(dim=-1), "norm_read": x.norm(dim=-1),
            "norm_centred": x_c.norm(dim=-1), "dose_zero": (x * unit).sum(-1).abs(), "dose_mean": ((x - mean) * unit).sum(-1).abs(),
            "dose_latent": z.abs() * d.norm(dim=-1),
        }  # fmt: skip
        for name, value in expected.items():
            np.testing.assert_allclose(rows[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
        edges = np.quantile(values.norm(dim=-1).numpy()[stream[1]], (0.25, 0.5, 0.75))
        assert (rows.norm_quartile.to_numpy() == np.searchsorted(edges, rows["norm"], side="right")).all()
        for edit in ("zero", "mean", "latent"):
            own = some(frame, layer=layer, context="in_place", edit=edit)
            np.testing.assert_allclose(own.delta_norm, own[f"dose_{edit}"], rtol=1e-3, atol=2e-5)
    assert some(frame, layer=2).learned_a.notna().all() and some(frame, layer=5).learned_a.isna().all()


def test_placebos_have_the_norm_angle_and_dose_of_their_edit():
    frame = found().frame.copy()
    key = ["context", "sae", "latent", "target_prompt", "target_position"]
    frame["scale"] = frame["scale"].round(6)
    key.append("scale")
    for main, prefix in (("zero", ""), ("rotate", "rotate_"), ("half", "half_"), ("scaled", "scaled_")):
        own = some(frame, edit=main).set_index(key)
        for placebo in PLACEBOS:
            other = some(frame, edit=prefix + placebo).set_index(key).loc[own.index]
            for name in ("delta_norm", "delta_angle"):
                np.testing.assert_allclose(other[name], own[name], rtol=2e-3, atol=1e-4)
            assert not np.allclose(other.kl, own.kl)
    np.testing.assert_allclose(some(frame, edit="rotate").delta_angle, 0.1, rtol=1e-3)
    assert some(frame, edit="self").delta_norm.max() == 0 and some(frame, edit="self").kl.abs().max() < 1e-9
    assert (some(frame, edit="latent").activation != 0).all()


def drawn_rows(directions, reference="zero", edits="rescaled") -> list[EditedRows]:
    """All rows of a design at every pair: those compared with the prompt as it stands, and those of rescaled activations."""
    clean = CleanActivations(wrap(tiny_model("llama")), as_prompts(PROMPTS, None), RunSettings(sites=(SITE,), seed=3))
    plan = ProjectionPlan(len(directions), None, 24, "stratified", reference, 1.0, 0.1, 0.5, edits)
    design = ProjectionDesign(clean, dictionaries_of({"d": directions}, clean.model, SITE), plan)
    rows = design.rows(SITE, np.arange(len(PROMPTS)))
    assert rows.against is not None
    assert design.count(SITE, np.arange(len(PROMPTS))) >= len(rows.table) + len(rows.against.table)
    return [rows, rows.against]


def placed(response, reference="zero", edits="rescaled") -> Interventional:
    """The interventional exponent where a row's effect is response(what stands there, the edited vector)."""
    parts = drawn_rows(DIRECTIONS, reference, edits)
    tables = [p.table.assign(kl=response(p.clean.double(), p.vectors.double()).numpy()) for p in parts]
    return interventional(pd.concat(tables), 0.0, reference)


DIRECTIONS = torch.linalg.qr(torch.randn(D_MODEL, 3, generator=torch.Generator().manual_seed(2)))[0].T


@pytest.mark.parametrize("reference", ["zero", "mean"])
@pytest.mark.parametrize("power", [-3.0, -2.0, 0.0])
def test_isotropic_effect_has_the_placebo_exponent(power, reference):
    """‖Δx‖²·‖x‖^power: the dose to the power 2, the length to the power 2 + power."""
    noise = torch.Generator().manual_seed(5)

    def response(x, y):
        random = (0.2 * torch.randn(len(x), generator=noise)).exp()
        return (y - x).square().sum(-1) * x.norm(dim=-1) ** power * random

    exact = placed(lambda x, y: (y - x).square().sum(-1) * x.norm(dim=-1) ** power, reference)
    noisy = placed(response, reference)
    assert list(exact.placebos) == list(PLACEBOS)
    for name in PLACEBOS:
        found = exact.placebos[name]
        a = [found.latent.value, found.placebo.value, found.difference.value]
        assert a == pytest.approx([1 + power / 2, 1 + power / 2, 0], abs=2e-3)
        assert noisy.placebos[name].difference.low < 0 < noisy.placebos[name].difference.high


@pytest.mark.parametrize(("inside", "outside"), [(0, 1), (1, 0)])
def test_specially_read_directions_differ_from_placebos(inside, outside):
    """Components in the span of the directions act by cosine (0) or inner product (1), components outside by the other."""

    def response(x, y):
        length = x.norm(dim=-1) / 10
        along = ((y - x) @ DIRECTIONS.double().T).square().sum(-1)
        across = 30 * ((y - x).square().sum(-1) - along).clamp(min=0)
        return along * length ** (2 * inside - 2) + across * length ** (2 * outside - 2)

    for found in placed(response, edits="all").placebos.values():
        assert found.latent.value == pytest.approx(inside, abs=2e-3)
        assert found.placebo.value == pytest.approx(outside, abs=0.15)
        low, high = sorted([abs(found.difference.low), abs(found.difference.high)])
        assert low > 0.8 and high < 1.1 and np.sign(found.difference.value) == inside - outside


def test_rescaled_placebos_ablate_a_direction_of_equal_cosine():
    of = {}
    for part in drawn_rows(DIRECTIONS):
        at = part.table.reset_index(drop=True)
        at["scale"] = at.scale.round(6)
        for key, own in at.groupby(["edit", "scale"]):
            order = own.sort_values(["latent", "target_prompt", "target_position"]).index.to_numpy().copy()
            of[key] = (
                part.clean.double()[order],
                part.vectors.double()[order],
                own.latent.loc[order].to_numpy().copy(),
            )
    x, _, latent = of["zero", 1.0]
    for name in PLACEBOS:
        other = x - of[name, 1.0][1]
        other = other / other.norm(dim=-1, keepdim=True)  # the direction that is removed in place of the latent's
        along = (x * other).sum(-1, keepdim=True)
        torch.testing.assert_close(
            along[:, 0].abs(), (x * DIRECTIONS.double()[latent]).sum(-1).abs(), rtol=1e-3, atol=1e-4
        )
        for edit, s, share in ((f"half_{name}", 1.0, 0.5), (f"scaled_{name}", 0.9, 1.0), (f"scaled_{name}", 1.1, 1.0)):
            there, edited, _ = of[edit, s]
            torch.testing.assert_close(there, s * x, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(edited, s * (x - share * along * other), rtol=1e-4, atol=1e-4)


def test_the_exponent_is_1_in_a_linear_model_without_norms():
    """Small logits, so that KL is a quadratic form that hardly depends on x: for latents and placebos alike."""
    model = copy.deepcopy(tiny_model("llama"))
    for block in model.model.layers:
        for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            weight.data.zero_()
    model.model.norm = torch.nn.Identity()
    model.lm_head.weight.data.mul_(0.01)
    result = projection_effects(model, PROMPTS, DIRECTIONS, site=SITE, edits="rescaled", **(SMALL | {"detail": 1.0}))
    assert set(result.frame.edit) == {"zero", *PLACEBOS, "half", "scaled", "self"} | {
        f"{step}_{name}" for step in ("half", "scaled") for name in PLACEBOS
    }
    way = result.groups[0]["exponents"]["interventional"]
    for found in (way.a, *(beside.placebo for beside in way.placebos.values())):
        assert found.value == pytest.approx(1, abs=0.02)
    assert "a less placebo's" in short_frame(result.groups)
    assert any("latents less placebos" in headline.what for headline in result.headlines())


def test_all_pairs_have_placebos_and_a_share_has_details():
    frame = some(found().frame, context="in_place")
    pairs = some(frame, edit="zero").groupby("sae").size()
    assert (pairs == 60).all()
    for placebo in PLACEBOS:
        assert some(frame, edit=placebo).groupby("sae").size().equals(pairs)
    details = some(frame, edit="half").groupby("sae").size()
    assert ((0.3 * pairs < details) & (details < 0.7 * pairs)).all()
    for edit in ("mean", "cosine", "rotate", *(f"half_{placebo}" for placebo in PLACEBOS)):
        assert some(frame, edit=edit).groupby("sae").size().equals(details)
    assert some(frame, edit="scaled").groupby("sae").size().equals(2 * details)
    alone = some(found().frame, context="single_token")
    assert alone.groupby("sae").latent.nunique().tolist() == [3, 3] and set(alone.edit) <= {"zero", *PLACEBOS, "self"}
    one = some(found(detail=0.0).frame, context="in_place")
    assert set(one.edit) == {"zero", *PLACEBOS, "self"}


def test_weights_count_the_latents_and_tokens_represented():
    result = found()
    for name, said in result.provenance["drawn"][TRAINED]["saes"].items():
        rows = some(result.frame, sae=name, context="in_place", edit="zero")
        reached = sum(size for size, n in zip(said["bin sizes"], said["drawn of each"], strict=True) if n)
        assert rows.drop_duplicates("latent").latent_weight.sum() == pytest.approx(reached)
        usable = result.provenance["drawn"][TRAINED]["usable_tokens"]
        totals = rows.groupby("latent").token_weight.sum()
        assert (totals <= usable + 1e-3).all() and (totals > 0.2 * usable).all()
        alone = some(result.frame, sae=name, context="single_token", edit="zero").drop_duplicates("latent")
        assert len(alone) == 3 and 0 < alone.latent_weight.sum() <= reached + 1e-3
        assert said["fve_here"] < 1


def test_rows_do_not_depend_on_the_order_of_prompts():
    clean = CleanActivations(wrap(tiny_model("llama")), as_prompts(PROMPTS, None), RunSettings(sites=(SITE,), seed=3))
    plan = ProjectionPlan(5, None, 12, "stratified", "zero", 0.5, 0.1, 0.5)
    design = ProjectionDesign(clean, dictionaries_of({"a": sae_of()}, clean.model, None), plan)
    whole = design.rows(SITE, np.arange(14))
    parts = [design.rows(SITE, np.arange(start, start + 7)) for start in (7, 0)]
    for kind in (lambda r: r, lambda r: r.against):
        keys = ["latent", "target_prompt", "target_position", "edit", "scale"]
        tables = [
            kind(part).table.assign(v=[tuple(v.tolist()) for v in kind(part).vectors]) for part in (whole, *parts)
        ]
        one, other = (t.sort_values(keys).reset_index(drop=True) for t in (tables[0], pd.concat(tables[1:])))
        pd.testing.assert_frame_equal(one, other)
    assert design.count(SITE, np.arange(14)) >= len(whole.table)


def test_rows_of_an_sae_do_not_depend_on_the_other_saes():
    both = some(found().frame, sae="2/cosine", context="in_place", edit=("zero", "half", "placebo_token"))
    prompts_of = record(tiny_model("llama"), PROMPTS, [SITE])  # a recording may give the prompts
    alone = projection_effects(tiny_model("llama"), prompts_of, {"2/cosine": sae_of()}, **SMALL)
    assert alone.tokens == PROMPTS
    one = some(alone.frame, edit=("zero", "half", "placebo_token")).reset_index(drop=True)
    labels = ["latent", "target_prompt", "target_position", "edit", "delta_norm"]
    pd.testing.assert_frame_equal(both.reset_index(drop=True)[labels], one[labels])


def test_the_norm_matters_before_the_last_block_only():
    groups = {g["sae"]: g for g in found().select()}
    last = groups["5/standard"]["exponents"]["interventional"]
    assert abs(last.a.value) < 1e-3 and last.n_rows > 20
    for beside in last.placebos.values():
        assert max(abs(beside.placebo.value), abs(beside.difference.value)) < 1e-3
    frame = some(found().frame, sae="5/standard", edit="scaled")
    by = frame.pivot(index=["latent", "target_prompt", "target_position"], columns="scale", values="kl")
    np.testing.assert_allclose(by.iloc[:, 0], by.iloc[:, 1], rtol=1e-3, atol=1e-7)
    inside = some(found().frame, sae="2/cosine", edit="scaled")
    by = inside.pivot(index=["latent", "target_prompt", "target_position"], columns="scale", values="kl")
    assert (np.abs(np.log(by.iloc[:, 0] / by.iloc[:, 1])) > 0.01).mean() > 0.9


def test_active_sampling_uses_active_tokens_only():
    frame = projection_effects(
        tiny_model("llama"), PROMPTS * 8, {"s": sae_of("standard:relu")}, sampling="active", **SMALL
    ).frame
    assert (some(frame, edit="zero").activation != 0).all() and (frame.latent_weight == 1).all()
    often = frame.drop_duplicates("latent").frequency
    assert len(often) == 5 and often.min() > 0.1


@pytest.mark.parametrize("reference", ["mean", "latent", "cosine"])
def test_placebos_match_the_chosen_reference(reference):
    sae = {"2/cosine": sae_of("standard:relu")}
    result = projection_effects(tiny_model("llama"), PROMPTS, sae, reference=reference, **(SMALL | {"detail": 1.0}))
    frame, key = result.frame, ["latent", "target_prompt", "target_position"]
    own = some(frame, edit=reference).set_index(key)
    for placebo in PLACEBOS:
        other = some(frame, edit=placebo).set_index(key)
        assert other.index.equals(own.index)
        np.testing.assert_allclose(other.delta_norm, own.delta_norm, rtol=2e-3, atol=1e-4)
    assert set(frame.edit) == set(EDITS) and result.main == reference
    assert f"KL {reference}" in short_frame(result.groups) and result.groups[0]["main"] == reference
    assert reference in result.groups[0]["edits"] and "observational" in result.groups[0]["exponents"]


def test_directions_without_an_sae():
    rows = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(1)) * 7

    def frame_of(directions, **more):
        return projection_effects(tiny_model("llama"), PROMPTS, {"d": directions}, site=SITE, **(SMALL | more)).frame

    frame = frame_of(rows, detail=1.0)
    assert sorted(set(frame.latent)) == [0, 1, 2] and "latent" not in set(frame.edit)
    missing = ["activation", "dose_latent", "cosine_encoder", "inner_encoder_centred", "frequency", "learned_a"]
    assert frame[missing].isna().all().all() and (frame.latent_weight == 1).all()
    one = frame_of(rows, latents=[2])
    both = some(frame, latent=2, edit="zero")[["target_prompt", "target_position", "kl"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(both, some(one, edit="zero")[both.columns].reset_index(drop=True), atol=1e-6)
    # Of many, those drawn stand for all.
    many = frame_of(torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(1)))
    assert sorted(set(many.latent)) != [0, 1, 2, 3, 4] and (many.latent_weight == 8).all()
    # Removing a direction removes the same however long it is.
    for size in (1e19, 1e36, 1e-25):
        long = frame_of(size * rows, detail=1.0)
        for name in ("kl", "cosine", "inner", "dose_zero", "delta_norm"):
            np.testing.assert_allclose(long[name], frame[name], rtol=1e-3, atol=1e-6)


def test_normalising_saes_use_activation_units():
    sae, plain = sae_of("standard:topk"), sae_of("standard:topk")
    sae.normalise = normalisation("factor", factor=0.25)
    x = torch.randn(9, D_MODEL) * 5
    z, x_c = dictionaries_of({"s": sae}, wrap(tiny_model("llama")), None)[0].activation(x, torch.arange(9))
    assert torch.allclose(x_c, x - sae.offset(x), atol=1e-5) and torch.equal(z, sae.encode(x)[range(9), range(9)])
    digests = [
        dictionaries_of({"s": one}, wrap(tiny_model("llama")), None)[0].provenance()["sha256"] for one in (sae, plain)
    ]
    assert digests[0] != digests[1]


def test_randomly_initialised_models_share_the_latents():
    result = projection_effects(tiny_model("llama"), PROMPTS, {"2/cosine": sae_of()}, null_seeds=1, **SMALL)
    latents = result.frame.groupby("model").latent.unique().map(sorted)
    assert list(latents.index) == ["random 0", TRAINED] and latents.iloc[0] == latents.iloc[1]
    assert [g["model"] for g in result.groups] == [TRAINED, "random 0"]
    # The figure has the rescaled exponents below: points at their values, the randomly initialised model's in grey.
    across, rescaled = result.plot().axes
    way, null = (g["exponents"]["interventional"] for g in result.groups)
    points = {line.get_label(): float(line.get_ydata()[0]) for line in rescaled.lines}
    beside = way.placebos["placebo_token"]
    assert points["latents, same token rescaled"] == way.a.value and points["placebos"] == beside.placebo.value
    assert points["rescaled: latents less placebos"] == beside.difference.value
    drawn = null.a.value if null.a.kind == "bounded" else np.nan  # not identified: not drawn
    assert points["latents in randomly initialised models"] == pytest.approx(drawn, nan_ok=True)
    assert "placebos" in {line.get_label() for line in across.lines}


def test_norm_read_of_layer_norm_models():
    x = record(tiny_model("gpt2"), PROMPTS, [SITE]).activations[SITE]
    frame = projection_effects(tiny_model("gpt2"), PROMPTS, torch.ones(1, D_MODEL), site=SITE, **SMALL).frame
    values = x[torch.tensor(frame.target_prompt.to_numpy()), torch.tensor(frame.target_position.to_numpy())]
    centred = (values - values.mean(-1, keepdim=True)).norm(dim=-1)
    np.testing.assert_allclose(frame.norm_read, centred, rtol=1e-4)
    assert (np.abs(frame.norm_read / frame["norm"] - 1) > 1e-3).mean() > 0.9


def test_result_roundtrip(tmp_path, monkeypatch):
    monkeypatch.setattr(ProjectionEffects, "figures", lambda self: {})
    result = found()
    assert "projections.parquet" in result.write(tmp_path)
    again = ProjectionEffects.load(tmp_path)
    pd.testing.assert_frame_equal(again.frame, result.frame)
    assert json.loads((tmp_path / "projections.json").read_text())["provenance"] == again.provenance
    assert "norm exponent" in result.table() and len(result.summary()) == 4 and again.saes == ["2/cosine", "5/standard"]


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"sampling": "all"}, ResultError, "sampling 'all'; known: stratified, active"),
        ({"reference": "none"}, ResultError, "reference 'none'"),
        ({"edits": "some"}, ResultError, "edits 'some'; known: all, rescaled"),
        ({"latents": 0}, ResultError, "0 latents"),
        ({"latents": [48]}, ResultError, "has latents 0 to 47; asked for 48 to 48"),
        ({"tokens_per_latent": 0}, ResultError, "0 tokens of each"),
        ({"detail": 1.5}, ResultError, "detail 1.5"),
        ({"angle": 2.0}, ResultError, "angle 2.0"),
        ({"metrics": ("kl",)}, ResultError, "lack 'clean_entropy'"),
        ({"site": Site(3)}, Exception, "put to site"),
        ({"saes": torch.ones(D_MODEL)}, SiteError, "do not say where they act"),
        ({"saes": torch.zeros(D_MODEL), "site": SITE}, EditError, "finite and not zero"),
        ({"saes": torch.ones(D_MODEL), "site": SITE, "sampling": "active"}, ResultError, "never active"),
    ],
)
def test_invalid_settings_raise(more, error, message):
    with pytest.raises(error, match=message):
        projection_effects(tiny_model("llama"), PROMPTS, **({"saes": {"2/cosine": sae_of()}} | SMALL | more))
