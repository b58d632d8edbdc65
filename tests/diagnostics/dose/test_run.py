"""Doses, tangents and effects of dose-response rows: the vectors that were measured, and full forward passes with them."""

import functools
import inspect
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.direction_vs_norm.run import direction_norm
from diagnostics.dose.choices import DOSES
from diagnostics.dose.design import COLUMNS, EDITS, edit_names
from diagnostics.dose.result import DoseResponse
from diagnostics.dose.run import dose_response
from diagnostics.running import single_edits as study
from diagnostics.running.clean import METRICS
from interventions import EditError, ResultError, Site, SiteError, measure, record
from interventions.files import jsonable
from tests.tiny import D_MODEL, TOLERANCE, alone, exact_kl, fresh, prompts, tiny_model

LENGTHS = tuple(20 + (7 * i) % 21 for i in range(24))
PROMPTS = prompts(LENGTHS)
LAYERS = (1, 5)
STEER = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(11)) * 7
GIVEN = {"steer": STEER, "short": torch.eye(D_MODEL)[4] * 1e-3}
ROTATIONS = ("toward_token", "between_tokens", "isotropic")
PLACES = ["target_prompt", "target_position", "source_prompt", "source_position"]
KEY = ["model", "layer", "pair", "edit", "dose"]


@functools.cache
def result(name: str = "llama", **settings) -> DoseResponse:
    """A run shared by tests, which leave it as it is."""
    chosen = {"layers": LAYERS, "tokens": 30, "doses": (0.05, 0.5, 1.0), **settings}
    return dose_response(tiny_model(name), PROMPTS, directions=GIVEN, **chosen)


@functools.cache
def measured(name: str = "llama", doses: tuple[float, ...] = (0.1, 1.0, 1.7)):
    """A run, and beside each of its rows the vector that was put in and the one that stood there."""
    seen, real = [], study.measure

    def spy(recording, site, prompt, position, vectors, **how):
        seen.append((recording.at(site, prompt, position).double(), vectors.double()))
        return real(recording, site, prompt, position, vectors, **how)

    study.measure = spy
    try:
        run = dose_response(tiny_model(name), PROMPTS, layers=LAYERS, tokens=12, doses=doses, directions=GIVEN)
    finally:
        study.measure = real
    names = edit_names(GIVEN)
    lines = [("self", 0.0), *((edit, dose) for edit in names for dose in doses)]
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    pairs = list(dict.fromkeys(run.frame.pair))  # units run token by token, edit by edit
    order = pd.MultiIndex.from_tuples(
        [(layer, pair, edit, np.float32(dose)) for layer in LAYERS for pair in pairs for edit, dose in lines]
    )
    assert len(order) == len(x) == len(run.frame)
    at = order.get_indexer(pd.MultiIndex.from_frame(run.frame[["layer", "pair", "edit", "dose"]]))
    assert (at >= 0).all()
    return run.frame, x[torch.from_numpy(at)], y[torch.from_numpy(at)]


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def tangents(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The unit tangent at x along which y lies."""
    rest = y - (y * unit(x)).sum(-1, keepdim=True) * unit(x)
    return unit(rest)


def is_(frame: pd.DataFrame, *edits: str) -> torch.Tensor:
    return torch.tensor(frame.edit.isin(edits).tolist())


# The table


def test_table_has_all_columns_and_rows():
    frame, provenance = result().frame, result().provenance
    assert tuple(frame) == COLUMNS
    used = provenance["drawn"]["trained"]["pairs_used"]
    assert 0 < used < 30
    assert len(frame) == provenance["rows"] == len(LAYERS) * used * (1 + 3 * (5 + 2 * 3))
    assert not frame.duplicated(KEY).any()
    assert set(frame.edit) == {"self", *EDITS} | {
        name + end for name in GIVEN for end in ("", "_placebo_token", "_placebo_isotropic")
    }
    assert (frame[frame.edit == "self"].dose == 0).all()
    assert set(frame[frame.edit != "self"].dose) == set(np.float32((0.05, 0.5, 1.0)))
    assert frame.edit.head(1 + 33).tolist() == ["self"] + [e for e in edit_names(GIVEN) for _ in range(3)]
    assert frame[["kl", "js", "clean_entropy", "kl_direct", "delta_norm"]].ge(-1e-9).all(axis=None)
    assert inspect.signature(dose_response).parameters["doses"].default == DOSES == (0.05, 0.1, 0.2, 0.5, 1.0)


# What was put in


def test_every_edit_moves_by_its_dose():
    """Vectors and table; float32 rounds an activation's entries at 6e-8 of them, which is 1e-5 of a dose of 0.1 and less."""
    frame, x, y = measured()
    dose = torch.tensor(frame.dose.to_numpy(float))
    moved = (y - x).norm(dim=-1) / x.norm(dim=-1)
    edited = ~is_(frame, "self")
    torch.testing.assert_close(moved[edited], dose[edited], rtol=1e-5, atol=0)
    assert moved[~edited].max() < 1e-6
    np.testing.assert_allclose(frame.delta_norm, (y - x).norm(dim=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(frame.target_norm, x.norm(dim=-1), rtol=1e-6)
    expected = frame.target_norm * frame.dose
    np.testing.assert_allclose(frame.delta_norm[frame.edit != "self"], expected[frame.edit != "self"], rtol=2e-5)


def test_rotations_keep_the_norm_and_turn_by_their_dose():
    frame, x, y = measured()
    rows = is_(frame, *ROTATIONS)
    torch.testing.assert_close(y[rows].norm(dim=-1), x[rows].norm(dim=-1), rtol=1e-5, atol=0)
    angle = 2 * np.arcsin(frame.dose[rows.numpy()] / 2)
    np.testing.assert_allclose(frame.delta_angle[rows.numpy()], angle, rtol=1e-5)
    up, down = (is_(frame, name) for name in ("norm_up", "norm_down"))
    for which, sign in ((up, 1), (down, -1)):
        factor = 1 + sign * torch.tensor(frame.dose[which.numpy()].to_numpy(float))
        torch.testing.assert_close(y[which], factor[:, None] * x[which], rtol=1e-6, atol=1e-6)


def test_tangents_do_not_depend_on_the_dose():
    frame, x, y = measured()
    along = tangents(x, y)
    for _, rows in frame[~frame.edit.isin(["self", "norm_up", "norm_down"])].groupby(["layer", "pair", "edit"]):
        assert len(rows) == 3
        u = along[rows.index.tolist()]
        assert ((u @ u.T) > 1 - 1e-6).all(), rows.edit.iloc[0]
    at_one = frame[(frame.dose == 1) & ~frame.edit.isin(["norm_up", "norm_down"])]
    for _, rows in at_one.groupby(["layer", "pair"]):
        own = rows[~rows.edit.str.contains("_placebo_")]
        u = along[own.index.tolist()]
        assert ((u @ u.T) - torch.eye(len(u))).abs().max() < 0.95
    toward = is_(frame, "toward_token").numpy()
    source = frame[toward]
    for row, u in zip(source.itertuples(), along[np.flatnonzero(toward).tolist()], strict=True):
        a = activations(row.layer)[row.source_prompt, row.source_position].double()
        assert float(u @ unit(a)) == pytest.approx(math.sqrt(1 - row.cosine**2), abs=1e-5)
    isotropic = along[is_(frame, "isotropic")]
    assert isotropic.mean(0).norm() < 0.5  # no direction is preferred


@functools.cache
def activations(layer: int, name: str = "llama") -> torch.Tensor:
    return record(tiny_model(name), PROMPTS, [Site(layer)]).activations[Site(layer)]


def test_placebos_of_given_directions_match_their_geometry():
    frame, x, y = measured()
    along = tangents(x, y)
    dose = torch.tensor(frame.dose.to_numpy(float))
    for name, d in GIVEN.items():
        own, token, isotropic = (is_(frame, name + end) for end in ("", "_placebo_token", "_placebo_isotropic"))
        added = x[own] + dose[own, None] * x[own].norm(dim=-1, keepdim=True) * unit(d.double())
        torch.testing.assert_close(y[own], added, rtol=1e-5, atol=1e-5)
        for other, like in ((token, "between_tokens"), (isotropic, "isotropic")):
            torch.testing.assert_close(y[other].norm(dim=-1), y[own].norm(dim=-1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close((y - x)[other].norm(dim=-1), (y - x)[own].norm(dim=-1), rtol=1e-5, atol=1e-5)
            angles = [frame.delta_angle[which.numpy()] for which in (other, own)]
            np.testing.assert_allclose(*angles, rtol=1e-5, atol=1e-6)
            same = is_(frame, like)  # the tangent of that edit of the same token
            assert ((along[other] * along[same]).sum(-1) > 1 - 1e-5).all()
            assert ((along[other] * along[own]).sum(-1).abs() < 0.9).all()
        assert ((along[token] * along[isotropic]).sum(-1).abs() < 0.9).all()


def test_rows_match_measure_and_full_forward_passes():
    frame, _, y = measured()
    sample = frame.groupby(["layer", "edit"]).sample(3, random_state=0)
    assert len(sample) == 2 * 12 * 3
    exact, hf = [], tiny_model("llama")
    for row in sample.itertuples():
        tokens, site, position = PROMPTS[row.target_prompt], Site(row.layer), row.target_position
        clean = alone("llama", hf, tokens, None, position)
        exact.append(float(exact_kl(clean, alone("llama", hf, tokens, site, position, y[row.Index].float()))))
    exact = np.array(exact)
    # |∂KL| ≤ δ·√(2KL) to first order (Pinsker), δ off by as much as two float32 ways are
    assert (np.abs(sample.kl - exact) <= np.sqrt(2 * exact) * TOLERANCE + TOLERANCE**2).all()
    assert (exact > 0.05).sum() > 20
    for layer, rows in frame.groupby("layer"):
        at = [torch.from_numpy(rows[name].to_numpy(np.int64)) for name in PLACES[:2]]
        recording = record(hf, PROMPTS, [Site(layer)])
        effects = measure(recording, Site(layer), *at, y[rows.index.tolist()].float(), metrics=METRICS)
        for metric in METRICS:
            np.testing.assert_array_equal(rows[metric], effects[metric].numpy(), err_msg=metric)


# Known answers


def test_toward_token_at_full_chord_is_the_direction_patch():
    patches = direction_norm(tiny_model("llama"), PROMPTS, layers=[1], pairs=30, pair_sets=("random",)).frame
    patches = patches[patches.edit == "direction"].set_index("pair")
    some = patches.index[:4]
    chord = {pair: 2 * math.sin(patches.delta_angle[pair] / 2) for pair in some}
    assert min(chord.values()) > 0.3
    run = dose_response(tiny_model("llama"), PROMPTS, layers=[1], tokens=30, doses=tuple(chord.values()))
    toward = run.frame[run.frame.edit == "toward_token"]
    for pair, dose in chord.items():
        (row,) = toward[(toward.pair == pair) & np.isclose(toward.dose, dose, rtol=1e-6)].itertuples()
        patch = patches.loc[pair]
        assert [getattr(row, name) for name in PLACES] == [patch[name] for name in PLACES]
        # angles in float32: 1e-6 of the vector, some 1e-5 of the effect
        assert row.kl == pytest.approx(patch.kl, rel=1e-3)
        assert row.kl_direct == pytest.approx(patch.kl_direct, rel=1e-3)
        assert row.delta_angle == pytest.approx(patch.delta_angle, rel=1e-5)
        assert row.cosine == pytest.approx(math.cos(patch.delta_angle), abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_self_gives_the_noise_floor(name):
    frame = result(name).frame
    assert (frame[frame.edit == "self"].kl < 1e-10).all()
    assert frame[(frame.edit == "toward_token") & (frame.dose == 0.5)].kl.median() > 1e-3
    for group in result(name).groups:
        floor = np.percentile(frame[(frame.edit == "self") & (frame.layer == group["layer"])].kl.abs(), 99)
        assert group["noise_floor"] == pytest.approx(floor, rel=1e-6)


def test_kl_is_quadratic_at_small_doses():
    """KL is least at the clean point: a smooth model in float64 has slope 2, to the third order that a dose of 2e-3 adds."""
    model = tiny_model("gpt2", "cpu", torch.float64)
    run = dose_response(model, PROMPTS, layers=[2], tokens=20, doses=(1e-3, 2e-3), directions={"steer": STEER})
    kl = run.frame.pivot(index="pair", columns=["edit", "dose"], values="kl").astype(float)
    one, two = np.float32(1e-3), np.float32(2e-3)
    for edit in edit_names({"steer": STEER}):
        ratio = kl[edit][two] / kl[edit][one]
        assert np.median(ratio) == pytest.approx(4, rel=0.01), edit
        assert ratio.between(3.6, 4.4).all(), edit
        assert kl[edit][one].median() > 1e-9


def test_rotations_and_norm_down_reach_the_antipode_at_dose_2():
    run = dose_response(tiny_model("llama"), PROMPTS, layers=[5], tokens=20, doses=(1.5, 2.0))
    assert not run.provenance["rows_dropped"]
    frame = run.frame
    for dose, angle in ((1.5, 2 * math.asin(0.75)), (2.0, math.pi)):
        turned = frame[frame.edit.isin(ROTATIONS) & (frame.dose == dose)]
        np.testing.assert_allclose(turned.delta_angle, angle, atol=2e-3 if dose == 2 else 1e-5)
        np.testing.assert_allclose(turned.delta_norm / turned.target_norm, dose, rtol=1e-5)
    at = frame[frame.dose == 2].pivot(index="pair", columns="edit", values="kl")
    for edit in (*ROTATIONS, "norm_down"):  # −x, whichever way
        np.testing.assert_allclose(at[edit], at["norm_down"], rtol=2e-2)
    assert (at.norm_down > 0.1).all()
    half = frame[(frame.dose == 1.5) & (frame.edit == "norm_down")].set_index("pair").kl  # −x/2: the final norm sees −x
    np.testing.assert_allclose(half, at["norm_down"], rtol=1e-3)


# Contexts, sites, horizons


@pytest.mark.parametrize("name", ["steer_placebo_token", "steer_placebo_isotropic", "a_placebo_b", "trained", "$x_<&"])
def test_any_direction_name_gives_the_same_numbers(name):
    """The same numbers under any name, in the table, in its ratios, in what is shown."""
    how = {"layers": [2], "tokens": 8, "doses": (0.2,)}
    plain = dose_response(tiny_model("llama"), PROMPTS, directions={"d": STEER}, **how)
    run = dose_response(tiny_model("llama"), PROMPTS, directions={name: STEER}, **how)
    np.testing.assert_array_equal(plain.frame.kl, run.frame.kl)
    assert list(run.frame.edit) == [x if x in ("self", *EDITS) else f"{name}{x[1:]}" for x in plain.frame.edit]
    ours, theirs = plain.select()[0]["ratios"], run.select()[0]["ratios"]
    assert ours["d ÷ d_placebo_token"] == theirs[f"{name} ÷ {name}_placebo_token"]
    (shown,) = run.tables().values()
    assert name.replace("_", " ") in shown and f"{name}÷its placebo".replace("_", " ") in shown
    assert [c for c in shown if c.endswith("placebo isotropic")] == (
        [name.replace("_", " ")] if name.endswith("isotropic") else []
    )
    assert set(run.figures()) == {"dose_response", "dose_response_depth"}


def test_the_length_of_a_direction_does_not_matter():
    """However large or small: the dose is what was asked for, the KL that of the direction of ordinary length."""
    how = {"layers": [2], "tokens": 8, "doses": (0.2,)}
    plain = dose_response(tiny_model("llama"), PROMPTS, directions={"d": STEER}, **how).frame
    for size in (1e19, 1e-30, 1e300, 1e-300):
        given = STEER.double() * size
        given = given.float() if 1e-40 < size < 1e38 else given  # as wide as it needs
        run = dose_response(tiny_model("llama"), PROMPTS, directions={"d": given}, **how)
        rows = run.frame[run.frame.edit == "d"]
        np.testing.assert_allclose(rows.delta_norm, 0.2 * rows.target_norm, rtol=1e-5)
        np.testing.assert_allclose(run.frame.kl, plain.kl, rtol=1e-3, atol=1e-9)


# What is dropped, and what is refused


def bag_of_embeddings(token: int):
    """A llama whose blocks add nothing, and one of whose tokens stands on an axis: the stream is the embedding, to the bit."""
    hf = fresh("llama")
    for block in hf.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    hf.model.embed_tokens.weight[token] = 2 * torch.eye(D_MODEL)[4]
    return hf


def test_impossible_edits_are_dropped_and_counted():
    """A direction that takes the activation to zero leaves no angle to match; the edit itself stays."""
    tokens = [[7 if q % 3 else t for q, t in enumerate(p)] for p in PROMPTS[:12]]
    run = dose_response(
        bag_of_embeddings(7), tokens, layers=[2], tokens=40, doses=(1.0,), directions={"back": -torch.eye(D_MODEL)[4]}
    )
    by_edit = run.frame.pivot(index="pair", columns="edit", values="kl")
    first = run.frame.drop_duplicates("pair").set_index("pair").loc[by_edit.index]
    on_axis, same = (
        np.array([tokens[p][q] == 7 for p, q in zip(first[f"{w}_prompt"], first[f"{w}_position"], strict=True)])
        for w in ("target", "source")
    )
    no_angle, no_way = on_axis, on_axis & same
    assert 3 < no_way.sum() < no_angle.sum() < len(first)
    np.testing.assert_array_equal(by_edit.toward_token.isna(), no_way)
    np.testing.assert_array_equal(by_edit.back_placebo_isotropic.isna(), no_angle)
    assert by_edit[["back", "isotropic", "norm_up", "norm_down", "self"]].notna().all(axis=None)
    reason = "{}: no such vector (a rotation moves x by at most 2‖x‖)"
    dropped = run.provenance["rows_dropped"]
    assert dropped == {
        reason.format(name): int(by_edit[name].isna().sum()) for name in by_edit if by_edit[name].isna().any()
    }
    assert dropped[reason.format("toward_token")] == no_way.sum()
    (group,) = run.groups
    assert group["edits"]["toward_token"]["n"] == (~no_way).sum()
    both = by_edit.toward_token.notna() & by_edit.between_tokens.notna()
    ratio = group["ratios"]["toward_token ÷ between_tokens"]
    assert ratio.n_rows == both.sum()
    one, other = (by_edit[name][both].to_numpy(float) for name in ("toward_token", "between_tokens"))
    assert ratio.value == pytest.approx(np.median(one / other), rel=1e-3)  # an even count: the geometric midpoint
    assert "rows dropped" in run.table()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"doses": ()}, ResultError, r"doses \[\]; expected numbers above 0 and up to 2"),
        ({"doses": (0, 0.1)}, ResultError, r"doses \[0.0, 0.1\]"),
        ({"doses": (0.1, -0.1)}, ResultError, "shares of the activation's norm"),
        ({"doses": (0.1, 2.01)}, ResultError, r"doses \[0.1, 2.01\]"),
        ({"doses": (0.1, float("nan"), 0.2)}, ResultError, "doses"),
        ({"tokens": 0}, ResultError, "0 tokens asked for"),
        ({"layers": [1], "sites": [Site(1)]}, ResultError, "layers and sites both given"),
        ({"layers": [6]}, SiteError, "no block 6"),
        ({"sink_filter": 1e-3}, ResultError, "none of 20 tokens is left, dropped"),
        (
            {"directions": {"d": torch.zeros(D_MODEL)}},
            EditError,
            "'d' has shape .32. and norm 0; expected .32., finite",
        ),
        ({"directions": {"d": torch.ones(D_MODEL - 1)}}, EditError, r"'d' has shape \[31\]"),
        ({"directions": {"d": torch.ones(1, D_MODEL)}}, EditError, r"'d' has shape \[1, 32\]"),
        ({"directions": {"d": torch.full((D_MODEL,), float("inf"))}}, EditError, "finite and not zero"),
        ({"directions": {"d": torch.ones(D_MODEL) * float("nan")}}, EditError, "finite and not zero"),
        (
            {"directions": {"d": torch.tensor([1e19] * (D_MODEL - 1) + [float("nan")])}},
            EditError,
            "finite and not zero",
        ),
        ({"directions": {"self": STEER}}, EditError, "two edits have the name 'self'"),
        ({"directions": {"a b": STEER, "a_b": STEER}}, EditError, "two edits have the name 'a_b'"),
        ({"directions": {"d": STEER, "d_placebo_token": -STEER}}, EditError, "two edits have the name"),
        ({"directions": {"dose": STEER}}, EditError, "a direction is called 'dose'"),
        ({"directions": {"a ÷ b": STEER}}, EditError, "a direction is called 'a ÷ b'"),
        ({"directions": {"": STEER}}, EditError, "a direction is called ''"),
        ({"directions": {"norm_up": STEER}}, EditError, "two edits have the name 'norm_up'"),
    ],
)
def test_invalid_arguments_raise(settings, error, message):
    with pytest.raises(error, match=message):
        dose_response(tiny_model("llama"), PROMPTS, **{"layers": [1], "tokens": 20, **settings})


# On disk


def test_result_roundtrip_and_other_settings_raise(tmp_path, monkeypatch):
    """Doses are sorted and given once; other directions or doses are another run."""
    monkeypatch.setattr(DoseResponse, "figures", lambda self: {})
    how = {"layers": (1,), "tokens": 5, "doses": (0.5, 0.2, 0.5), "directions": {"d": STEER}, "folder": tmp_path}
    run = dose_response(tiny_model("llama"), PROMPTS, **how)
    assert run.provenance["doses"] == [0.2, 0.5] == [g["dose"] for g in run.groups]
    assert run.write(tmp_path) == ["dose_response.parquet", "dose_response.json", "tokens.npy"]
    loaded = DoseResponse.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.frame, run.frame, check_exact=True)
    assert loaded.provenance == json.loads(json.dumps(jsonable(run.provenance)))
    assert loaded.table() == run.table()
    for other in ({"doses": (0.2, 0.9)}, {"directions": {"d": STEER.flip(0)}}, {"directions": {"e": STEER}}):
        with pytest.raises(ResultError):
            dose_response(tiny_model("llama"), PROMPTS, **(how | other))
