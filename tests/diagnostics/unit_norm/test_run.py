"""The unit-norm sweep against `measure` of x/‖x‖, and against full forward passes under a hook on every position."""

import functools
import json

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics import statistics
from diagnostics.running import single_edits as study
from diagnostics.running.clean import METRICS
from diagnostics.statistics.tables import lines_of as some
from diagnostics.unit_norm.design import ALONE, TOGETHER
from diagnostics.unit_norm.result import UnitNorm
from diagnostics.unit_norm.run import unit_norm_sweep
from interventions import ResultError, Site, SiteError, measure, record
from interventions.files import jsonable
from tests.tiny import N_LAYERS, TOLERANCE, changed_in, exact_kl, forward_alone, fresh, prompts, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")
LENGTHS = tuple(8 + (5 * i) % 13 for i in range(20))
PROMPTS = prompts(LENGTHS)
LAYERS = (1, 4)


@functools.cache
def result(name: str = "llama", **settings) -> UnitNorm:
    """A run shared by tests, which leave it as it is."""
    return unit_norm_sweep(tiny_model(name), PROMPTS, **{"layers": LAYERS, "tokens": 40, **settings})


@functools.cache
def activations(name: str, layer: int) -> torch.Tensor:
    return record(tiny_model(name), PROMPTS, [Site(layer)]).activations[Site(layer)]


def places(frame: pd.DataFrame) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(frame[f"target_{what}"].to_numpy(np.int64)) for what in ("prompt", "position"))


def allowed(kl: np.ndarray) -> np.ndarray:
    """|∂KL| ≤ δ·√(2KL) to first order (Pinsker), logits off by as much as two float32 ways are."""
    return np.sqrt(2 * np.abs(kl)) * TOLERANCE + TOLERANCE**2


# The table


def test_table_has_all_rows_at_the_same_tokens():
    frame, p = result().frame, result().provenance
    drawn = p["drawn"]["trained"]
    assert drawn["tokens_used"] == 40 - sum(drawn["pairs_dropped"].values())
    assert set(drawn["pairs_dropped"]) == {"position 0"}
    assert len(frame) == p["rows"] == len(LAYERS) * drawn["tokens_used"] * len((*ALONE, *TOGETHER))
    assert frame.edit.head(5).tolist() == [*ALONE, *TOGETHER]
    assert not frame.duplicated(["model", "layer", "token", "edit"]).any()
    tables = [
        rows[["token", "target_prompt", "target_position"]].reset_index(drop=True)
        for _, rows in frame.groupby(["layer", "edit"])
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    assert (frame.target_position > 0).all()
    assert not tables[0].duplicated().any()
    assert frame.target_prompt.nunique() > 10
    assert np.isfinite(frame[["kl", "js", "clean_entropy", "kl_direct", "delta_norm", "delta_angle"]]).all(axis=None)


# Every number again


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unit_norm_rows_match_measure(name):
    for layer in LAYERS:
        rows = some(result(name).frame, layer=layer, edit="unit_norm")
        at, site = places(rows), Site(layer)
        recording = record(tiny_model(name), PROMPTS, [site])
        x = recording.at(site, *at)
        effects = measure(recording, site, *at, x / x.norm(dim=-1, keepdim=True), metrics=METRICS)
        for metric in ("kl", "kl_direct", "js", "clean_entropy"):
            np.testing.assert_allclose(rows[metric], effects[metric], rtol=1e-3, atol=1e-5)
        assert (rows.kl > 0.05).mean() > 0.5
        np.testing.assert_allclose(rows.target_norm, x.norm(dim=-1), rtol=1e-6)
        np.testing.assert_allclose(rows.delta_norm, (x.norm(dim=-1) - 1).abs(), rtol=1e-5)
        np.testing.assert_allclose(rows.delta_angle, 0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:mechdiag falls back to full forward passes")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_everywhere_matches_a_pass_with_all_norms_set_to_1(name):
    """Replay does not support mamba."""
    hf = tiny_model(name)
    frame = result(name, tokens=12).frame
    whole = some(frame, edit="unit_norm_everywhere")
    assert len(whole) == 2 * frame.token.nunique()
    for (layer, prompt), rows in whole.groupby(["layer", "target_prompt"]):
        tokens, site = PROMPTS[prompt], Site(layer)
        clean = forward_alone(name, hf, tokens, None, {})
        remove = changed_in(name, hf, site, lambda hidden: hidden / hidden.norm(dim=-1, keepdim=True))
        try:
            with torch.no_grad():
                forced = hf(input_ids=torch.tensor([tokens])).logits[0]
        finally:
            remove()
        at = rows.target_position.tolist()
        exact = exact_kl(clean[at], forced[at]).numpy()
        assert (np.abs(rows.kl - exact) <= allowed(exact) + 1e-4 * exact).all()
    kl = frame.pivot(index=["layer", "token"], columns="edit", values="kl")
    assert not np.allclose(kl.unit_norm, kl.unit_norm_everywhere, rtol=0.05)


def test_everywhere_rotation_matches_the_dose_per_position(monkeypatch):
    seen, real = [], study.measure

    def spy(recording, site, prompt, position, vectors, **how):
        if position.ndim == 2:
            seen.append((site, prompt, position, vectors))
        return real(recording, site, prompt, position, vectors, **how)

    monkeypatch.setattr(study, "measure", spy)
    frame = unit_norm_sweep(tiny_model("llama"), PROMPTS, layers=LAYERS, tokens=30).frame
    assert [site.layer for site, *_ in seen] == list(LAYERS)
    for site, prompt, position, vectors in seen:
        half = len(prompt) // 2
        assert torch.equal(prompt[:half], prompt[half:])
        inside = position >= 0
        assert (position[inside] == position.clamp(min=0)[inside]).all()
        x = activations("llama", site.layer)[prompt, : position.shape[1]]
        size = x.norm(dim=-1)
        forced, turned = vectors[:half], vectors[half:]
        torch.testing.assert_close(forced.norm(dim=-1)[inside[:half]], torch.ones(int(inside[:half].sum())))
        torch.testing.assert_close(turned.norm(dim=-1)[inside[half:]], size[half:][inside[half:]])
        distance = (turned - x[half:]).norm(dim=-1)
        torch.testing.assert_close(
            distance[inside[half:]], (size[half:] - 1).abs()[inside[half:]], rtol=1e-4, atol=1e-5
        )
        exact = []
        rows = some(frame, layer=site.layer, edit="rotation_everywhere")
        for row in rows.itertuples():
            (i,) = torch.nonzero(prompt[half:] == row.target_prompt)[0].tolist()
            edits = dict(enumerate(turned[i][: len(PROMPTS[row.target_prompt])]))
            tokens = PROMPTS[row.target_prompt]
            clean = forward_alone("llama", tiny_model("llama"), tokens, None, {})[row.target_position]
            new = forward_alone("llama", tiny_model("llama"), tokens, site, edits)[row.target_position]
            exact.append(float(exact_kl(clean, new)))
        exact = np.array(exact)
        assert (np.abs(rows.kl - exact) <= allowed(exact) + 1e-4 * exact).all()
        towards = (turned / size[half:, :, None] - x[half:] / size[half:, :, None])[inside[half:]]
        towards = towards / towards.norm(dim=-1, keepdim=True)
        assert (towards @ towards.T - torch.eye(len(towards))).abs().max() < 0.99  # a tangent for each position


@pytest.mark.parametrize("end", ["", "_everywhere"])
def test_rotation_matches_the_dose_and_keeps_the_norm(end):
    frame = result().frame
    turned, forced = (some(frame, edit=f"{edit}{end}").reset_index(drop=True) for edit in ("rotation", "unit_norm"))
    np.testing.assert_allclose(turned.delta_norm, forced.delta_norm, rtol=1e-4)
    np.testing.assert_allclose(turned.delta_norm, (turned.target_norm - 1).abs(), rtol=1e-4)
    chord = 2 * turned.target_norm * np.sin(turned.delta_angle / 2)
    np.testing.assert_allclose(turned.delta_norm, chord, rtol=1e-4)


def test_self_edits_and_last_block_norms_have_no_effect():
    frame = result(layers=(1, N_LAYERS - 1)).frame
    assert (frame[frame.edit == "self"].kl < 1e-10).all()
    last = frame[frame.layer == N_LAYERS - 1]
    # ε of 1e-6 beside the mean square of a unit vector of 32 entries: 3e-5 of each logit's scale
    assert (last[last.edit == "unit_norm"].kl < 1e-7).all()
    np.testing.assert_allclose(
        some(last, edit="unit_norm_everywhere").kl, some(last, edit="unit_norm").kl, rtol=1e-2, atol=1e-9
    )
    assert (last[last.edit == "rotation"].kl > 1e-3).mean() > 0.9
    np.testing.assert_allclose(last.kl_direct, last.kl, rtol=1e-3, atol=1e-8)


def test_rows_beyond_the_first_shard_match_full_passes():
    many = prompts(tuple(4 + i % 3 for i in range(70)))
    frame = unit_norm_sweep(tiny_model("llama"), many, layers=[2], tokens=200).frame
    late = frame[(frame.target_prompt >= 64) & (frame.edit == "unit_norm_everywhere")]
    assert len(late) > 5
    for row in late.itertuples():
        tokens = many[row.target_prompt]
        clean = forward_alone("llama", tiny_model("llama"), tokens, None, {})
        every = {q: (lambda x: x / x.norm()) for q in range(len(tokens))}
        new = forward_alone("llama", tiny_model("llama"), tokens, Site(2), every)
        exact = float(exact_kl(clean[row.target_position], new[row.target_position]))
        assert abs(row.kl - exact) <= allowed(exact) + 1e-4 * exact


# Tokens without a rotation


def small_tokens(token: int):
    """A llama whose first block adds next to nothing, and one of whose tokens is far shorter than 1/3."""
    hf = fresh("llama")
    hf.model.layers[0].self_attn.o_proj.weight *= 1e-4
    hf.model.layers[0].mlp.down_proj.weight *= 1e-4
    hf.model.embed_tokens.weight[token] *= 0.01
    return hf


def test_tokens_too_short_for_the_rotation_are_counted():
    hf, site = small_tokens(7), Site(0)
    given = [[*p[:3], 7, *p[4:]] if i % 2 else [t if t != 7 else 8 for t in p] for i, p in enumerate(PROMPTS)]
    run = unit_norm_sweep(hf, given, layers=[0], tokens=150)
    size = record(hf, given, [site]).activations[site].norm(dim=-1).numpy()
    rows = {edit: part for edit, part in run.frame.groupby("edit")}
    read = rows["unit_norm_everywhere"]
    short = size[read.target_prompt, read.target_position] < 1 / 3
    np.testing.assert_array_equal(short, read.target_norm < 1 / 3)
    assert (rows["rotation"].target_norm >= 1 / 3).all() and short.sum() >= 3
    first = {p: np.flatnonzero(size[p, : len(given[p])] < 1 / 3) for p in range(len(given))}
    assert {p for p in first if len(first[p])} == {p for p in first if 7 in given[p]}
    furthest = read.groupby("target_prompt").target_position.max()
    without = {p for p, last in furthest.items() if len(first[p]) and last >= first[p][0]}
    assert set(rows["rotation_everywhere"].target_prompt) == set(read.target_prompt) - without
    gone = int(read.target_prompt.isin(without).sum())
    assert run.provenance["rows_dropped"] == {
        "rotation: no such vector (a rotation moves x by at most 2‖x‖)": short.sum(),
        "some token of the prompt has no such vector": gone,
    }
    (group,) = run.groups
    assert group["unit_norm"].n_rows == group["n_tokens"] == len(read) == len(rows["self"])
    assert group["rotation"].n_rows == group["unit_norm ÷ rotation"].n_rows == len(read) - short.sum()
    assert group["rotation_everywhere"].n_rows == len(read) - gone


def test_model_without_rotations_has_a_summary_and_a_figure():
    hf = small_tokens(7)
    hf.model.embed_tokens.weight *= 0.01
    run = unit_norm_sweep(hf, PROMPTS, layers=[0], tokens=20)
    (group,) = run.groups
    assert set(run.frame.edit) == {"self", "unit_norm", "unit_norm_everywhere"}
    assert group["unit_norm"].value > 0
    assert np.isnan(group["rotation"].value)
    assert group["rotation"].n_rows == group["unit_norm ÷ rotation"].n_rows == 0
    assert "rows dropped" in run.table()
    run.plot().canvas.draw()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tokens": 0}, ResultError, "0 tokens asked for"),
        ({"layers": []}, ResultError, "no site; give at least one layer"),
        ({"layers": [6]}, SiteError, "no block 6"),
        ({"sink_filter": 1e-3}, ResultError, "none of 20 tokens is left, dropped: .*'sink'"),
        ({"null_seeds": -1}, ResultError, "-1 randomly initialised models"),
    ],
)
def test_invalid_arguments_raise(settings, error, message):
    with pytest.raises(error, match=message):
        unit_norm_sweep(tiny_model("llama"), PROMPTS, **{"layers": [1], "tokens": 20, **settings})


# Statistics and files


def test_group_statistics_match_the_rows():
    run = result(null_seeds=1)
    assert [(g["model"], g["layer"]) for g in run.groups] == [(m, n) for m in ("trained", "random 0") for n in LAYERS]
    for group in run.groups:
        rows = some(run.frame, model=group["model"], layer=group["layer"])
        kl = {edit: part.kl.to_numpy(float) for edit, part in rows.groupby("edit")}
        own = some(rows, edit="self").target_prompt.to_numpy(np.int64)
        for edit in (*ALONE[1:], *TOGETHER):
            if edit not in kl:  # a randomly initialised model this narrow has no token that could be turned so far
                assert group["model"] == "random 0" and group[edit].n_rows == 0
                continue
            assert group[edit].value == pytest.approx(np.median(kl[edit]), rel=1e-6)
            expected = statistics.median(kl[edit], own)
            assert (group[edit].low, group[edit].high) == (expected.low, expected.high)
            mean = group[f"mean {edit}"]
            assert mean.value == pytest.approx(kl[edit].mean(), rel=1e-6) and np.isnan(mean.low)
            assert mean.influence == pytest.approx(np.abs(kl[edit]).max() / np.abs(kl[edit]).sum())
        for one, other in (ALONE[1:], TOGETHER):
            if other not in kl:
                continue
            ratios = np.sort(kl[one] / kl[other])
            low, high = ratios[[(len(ratios) - 1) // 2, len(ratios) // 2]]
            assert group[f"{one} ÷ {other}"].value == pytest.approx(np.sqrt(low * high), rel=1e-6)
            of_means = group[f"mean {one} ÷ mean {other}"]
            assert of_means.value == pytest.approx(kl[one].mean() / kl[other].mean(), rel=1e-6)
        forced = some(rows, edit="unit_norm")
        assert group["mean_dose"] == pytest.approx((forced.delta_norm / forced.target_norm).mean(), rel=1e-6)
        assert group["noise_floor"] == pytest.approx(np.percentile(np.abs(kl["self"]), 99), rel=1e-6)
    frame = run.summary()
    assert frame["unit_norm"].tolist() == [g["unit_norm"].value for g in run.groups]
    assert frame["unit_norm_high"].tolist() == [g["unit_norm"].high for g in run.groups]


@pytest.mark.filterwarnings("error:an interval from")
def test_few_prompts_give_a_summary_without_warning():
    run = unit_norm_sweep(tiny_model("llama"), PROMPTS[:12], layers=[1], tokens=30)
    assert 10 <= run.groups[0]["unit_norm"].n_prompts < 20


def test_result_roundtrip_and_other_settings_raise(tmp_path, monkeypatch):
    monkeypatch.setattr(UnitNorm, "figures", lambda self: {})
    how = {"layers": LAYERS, "folder": tmp_path}
    run = unit_norm_sweep(tiny_model("llama"), PROMPTS, tokens=12, **how)
    assert run.write(tmp_path) == ["unit_norm.parquet", "unit_norm.json", "tokens.npy"]
    loaded = UnitNorm.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.frame, run.frame, check_exact=True)
    assert loaded.table() == run.table()
    text = json.dumps(jsonable(loaded.as_dict()), allow_nan=False)
    assert [g["layer"] for g in json.loads(text)["summary"]] == list(LAYERS)
    with pytest.raises(ResultError):
        unit_norm_sweep(tiny_model("llama"), PROMPTS, tokens=13, **how)
