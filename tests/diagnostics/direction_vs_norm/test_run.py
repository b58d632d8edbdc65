"""Rows against full forward passes of a plain model with edits written out here."""

import functools
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.direction_vs_norm.choices import PAIR_SETS
from diagnostics.direction_vs_norm.design import COLUMNS, EDITS
from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.direction_vs_norm.run import direction_norm
from diagnostics.running.clean import CONTEXTS
from diagnostics.sampling.tokens import cross_prompt_pairs
from diagnostics.statistics.tables import lines_of as some
from interventions import MechdiagError, ResultError, Site, SiteError, TextError, wrap
from interventions.files import jsonable
from interventions.texts.prompts import Prompts
from tests.tiny import N_LAYERS, alone, blocks, changed_in, exact_kl, fresh, prompts, tiny_model, tokenizer

LENGTHS = tuple(20 + (7 * i) % 21 for i in range(24))
PROMPTS = prompts(LENGTHS)
LAYERS = (1, 3, 5)
DRAWN = ("model", "layer", "point", "context", "pair", "pair_set", "edit")
PLACES = ("target_prompt", "target_position", "source_prompt", "source_position")
EFFECTS = ["kl", "js", "clean_entropy", "top1_changed", "kl_direct"]
PLACEBOS = [edit for edit in EDITS["random"] if edit.startswith("placebo")]
DELTA = 1e-4  # logits of two float32 ways to one row: `tiny.TOLERANCE`


@functools.cache
def result(name: str = "llama", **settings) -> DirectionNorm:
    """A run shared by tests, which leave it as it is."""
    return direction_norm(tiny_model(name), PROMPTS, **{"layers": LAYERS, "pairs": 40, "context": "both", **settings})


def assert_close(frame: pd.DataFrame, expected: pd.DataFrame) -> None:
    """The same rows; effects by two float32 ways."""
    drawn = [name for name in expected if name not in EFFECTS]
    pd.testing.assert_frame_equal(frame[drawn], expected[drawn], check_exact=True)
    for name in ("kl", "kl_direct"):
        kl, exact = frame[name].to_numpy(float), expected[name].to_numpy(float)
        assert (np.abs(kl - exact) <= allowed(exact)).all(), name
    assert (np.abs(frame.js - expected.js) <= allowed(expected.kl.to_numpy(float))).all()
    np.testing.assert_allclose(frame.clean_entropy, expected.clean_entropy, atol=DELTA)
    assert (frame.top1_changed != expected.top1_changed).mean() <= 0.01


def allowed(kl: np.ndarray) -> np.ndarray:
    """What logits off by DELTA do to a KL or JS: |Δ| ≤ 2·√(2·KL)·δ to first order (Pinsker), 1e-4 of what is worth reporting."""
    return np.minimum(2 * np.sqrt(2 * kl) * DELTA + 1e-8, np.where(kl >= 0.05, 1e-4 * kl, np.inf))


def drawn_of(run: DirectionNorm, model: str = "trained") -> dict:
    """What was drawn of a model's tokens and what was dropped."""
    return run.provenance["drawn"][model]


# The table


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_table_has_all_columns_and_rows(name):
    frame, provenance = result(name).frame, result(name).provenance
    assert tuple(c for c in frame if c != "norm_read") == COLUMNS
    assert ("norm_read" in frame) == (name == "gpt2")
    expected = sum(
        len(CONTEXTS) * counts["used"] * len(EDITS[pair_set])
        for pair_set, sites in drawn_of(result(name))["pair_sets"].items()
        for counts in sites.values()
    )
    assert provenance["rows"] == len(frame) == expected - sum(provenance["rows_dropped"].values())
    assert not frame.duplicated(list(DRAWN)).any()
    assert set(frame.layer) == set(LAYERS)
    assert (set(frame.model), set(frame.point), set(frame.context)) == ({"trained"}, {"resid_post"}, set(CONTEXTS))
    for pair_set in PAIR_SETS:
        assert set(frame[frame.pair_set == pair_set].edit) == set(EDITS[pair_set])
    assert frame[["kl", "js", "clean_entropy", "kl_direct", "delta_norm"]].ge(-1e-9).all(axis=None)
    assert frame.top1_changed.dtype == bool


def test_random_pairs_are_shared_across_layers_and_contexts():
    frame = some(result().frame, pair_set="random")
    tables = [rows[["pair", "edit", *PLACES]].reset_index(drop=True) for _, rows in frame.groupby(["layer", "context"])]
    assert len(tables) == len(LAYERS) * len(CONTEXTS)
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    assert (frame.target_prompt != frame.source_prompt).all()
    turned = some(result().frame, pair_set="scale_rotate", layer=3, context="in_place")
    assert (turned[["source_prompt", "source_position"]] == -1).all(axis=None)
    assert turned[["source_norm", "cosine"]].isna().all(axis=None)
    same = tables[0].drop_duplicates("pair")[["pair", *PLACES[:2]]].reset_index(drop=True)
    pd.testing.assert_frame_equal(turned.drop_duplicates("pair")[list(same)].reset_index(drop=True), same)


def test_random_pairs_exclude_first_tokens():
    drawn = cross_prompt_pairs(np.array(LENGTHS), 40, 0)
    good = (drawn.target_position > 0) & (drawn.source_position > 0)
    pairs = some(result().frame, pair_set="random", layer=1, context="in_place", edit="norm")
    assert pairs.pair.tolist() == np.flatnonzero(good).tolist()
    for name in PLACES:
        assert pairs[name].tolist() == getattr(drawn, name)[good].tolist()
    assert drawn_of(result())["pairs_dropped"] == {"position 0": (~good).sum()} != {"position 0": 0}


# Every number again, by other means


@torch.no_grad()
def stream(name: str, hf, tokens: list[int], layer: int) -> torch.Tensor:
    """What block `layer` hands on, `[pos, d_model]` in float64, in one pass of one unpadded prompt."""
    seen = []
    handle = blocks(name, hf)[layer].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    hf(input_ids=torch.tensor([tokens]))
    handle.remove()
    return seen[0][0].double()


def by_hand(edit: str, x: torch.Tensor, a: torch.Tensor | None) -> torch.Tensor:
    if edit.startswith("scale_"):
        return x * float(edit.removeprefix("scale_"))
    return {"direction": a / a.norm() * x.norm(), "norm": x / x.norm() * a.norm(), "full": a, "self": x}[edit]


def carried(name: str, hf, tokens: list[int], site: Site, position: int, x: torch.Tensor, new: torch.Tensor):
    """Logits where the change alone is carried to the final norm: what later blocks write stays as it was."""
    last, seen = Site(N_LAYERS - 1), []
    if site == last:
        return alone(name, hf, tokens, last, position, new.float())
    remove = changed_in(name, hf, last, lambda hidden: seen.append(hidden[0, position].double()) or hidden)
    try:
        alone(name, hf, tokens, site, position, x.float())
    finally:
        remove()
    return alone(name, hf, tokens, last, position, (seen[0] + new - x).float())


def exact_js(one: torch.Tensor, other: torch.Tensor) -> float:
    p, q = (x.double().softmax(-1) for x in (one, other))
    middle = (p + q) / 2
    return float((p * (p / middle).log() + q * (q / middle).log()).sum() / 2)


def check_rows(name: str, hf, tokens: list[list[int]], rows: pd.DataFrame) -> None:
    """Recompute rows from what the table and its tokens say."""
    before = functools.cache(lambda prompt, layer: stream(name, hf, tokens[prompt], layer))
    kl, exact = rows.kl.to_numpy(float), []
    for row in rows.itertuples():
        x = before(row.target_prompt, row.layer)[row.target_position]
        a = None if row.source_prompt < 0 else before(row.source_prompt, row.layer)[row.source_position]
        new, site = by_hand(row.edit, x, a if a is not None else x), Site(row.layer)
        prompt, position = (tokens[row.target_prompt], row.target_position) if row.context == "in_place" else ([0], 0)
        clean = alone(name, hf, prompt, site, position, x.float())
        intervened = alone(name, hf, prompt, site, position, new.float())
        p = clean.double().log_softmax(-1)
        exact.append(float(exact_kl(clean, intervened)))
        direct = float(exact_kl(clean, carried(name, hf, prompt, site, position, x, new)))
        assert row.kl_direct == pytest.approx(direct, abs=allowed(np.array(direct)))
        assert row.js == pytest.approx(exact_js(clean, intervened), abs=allowed(np.array(exact[-1])))
        assert row.clean_entropy == pytest.approx(float(-(p.exp() * p).sum()), abs=DELTA)
        first, second = intervened.topk(2).values
        if first - second > 2 * DELTA and clean.topk(2).values.diff().abs() > 2 * DELTA:
            assert row.top1_changed == bool(clean.argmax() != intervened.argmax())
        # Vectors are float32: 1e-5 of a norm, an angle to some 1e-6.
        assert row.target_norm == pytest.approx(float(x.norm()), rel=1e-5)
        assert row.delta_norm == pytest.approx(float((new - x).norm()), rel=1e-4, abs=1e-5)
        angle = torch.atan2((new / new.norm() - x / x.norm()).norm(), (new / new.norm() + x / x.norm()).norm()) * 2
        assert row.delta_angle == pytest.approx(float(angle), abs=1e-5)
        if a is not None:
            assert row.source_norm == pytest.approx(float(a.norm()), rel=1e-5)
            assert row.cosine == pytest.approx(float(x @ a / x.norm() / a.norm()), abs=1e-5)
        if name == "gpt2":
            assert row.norm_read == pytest.approx(float((x - x.mean()).norm()), rel=1e-5)
    exact = np.array(exact)
    assert (np.abs(kl - exact) <= allowed(exact)).all()


HAND_MADE = ("direction", "norm", "full", "self", "scale_0.5", "scale_2", "scale_5")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_match_full_forward_passes(name):
    frame = result(name).frame
    frame = frame[frame.edit.isin(HAND_MADE)]
    sample = frame.groupby(["layer", "context", "pair_set", "edit"], group_keys=False).sample(1, random_state=0)
    assert len(sample) == len(LAYERS) * len(CONTEXTS) * (4 + 3 + 3 + 3)
    assert (sample.kl > 0.05).sum() > 30
    check_rows(name, tiny_model(name), result(name).tokens, sample)


def test_rows_beyond_the_first_shard_match_full_passes():
    many = prompts(tuple(6 + i % 5 for i in range(70)))
    frame = direction_norm(tiny_model("llama"), many, layers=[2], pairs=150, pair_sets=("random",), seed=3).frame
    late = frame[(frame.target_prompt >= 64) & frame.edit.isin(HAND_MADE)]
    mixed = frame[(frame.target_prompt < 64) & (frame.source_prompt >= 64) & frame.edit.isin(HAND_MADE)]
    assert min(len(late), len(mixed)) > 16
    check_rows("llama", tiny_model("llama"), many, pd.concat([late, mixed.head(16)]))


FEW = {"pairs": 10, "layers": (1, 5), "pair_sets": ("random", "scale_rotate")}


def test_full_forward_passes_agree_with_replay():
    slow, fast = result(path="hooks", **FEW), result(**FEW)
    assert slow.provenance["path"] == {"1.resid_post": "hooks", "5.resid_post": "hooks"}
    assert fast.provenance["path"] == {"1.resid_post": "replay", "5.resid_post": "replay"}
    assert fast.provenance["replay_delta"] <= DELTA
    assert_close(slow.frame, fast.frame)
    assert (fast.frame.kl_direct > 0.05).sum() > 100


# Doses and placebos


def by_edit(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    return frame.pivot(index=["layer", "context", "pair_set", "pair"], columns="edit", values=column).astype(float)


def on_the_sphere(rows: pd.DataFrame) -> np.ndarray:
    """‖Δx‖ of a vector turned by delta_angle that keeps its norm."""
    return (2 * rows.target_norm * np.sin(rows.delta_angle / 2)).to_numpy(float)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_placebos_match_the_dose_and_differ_in_direction(name):
    frame = result(name).frame
    frame = frame[frame.pair_set != "scale_rotate"]
    distance, angle, kl = (by_edit(frame, column) for column in ("delta_norm", "delta_angle", "kl"))
    for placebo in ("placebo_direction", "placebo_token"):
        np.testing.assert_allclose(distance[placebo], distance.direction, rtol=1e-4)
        np.testing.assert_allclose(angle[placebo], angle.direction, rtol=1e-4)
    for kept in ("direction", "placebo_direction", "placebo_token", "placebo_norm"):
        rows = frame[frame.edit == kept]
        # A norm that were not kept would add what 1e-4 of the norm is beside the distance.
        np.testing.assert_allclose(on_the_sphere(rows), rows.delta_norm, rtol=1e-3, atol=1e-4)
    there = distance.placebo_norm.notna()
    np.testing.assert_allclose(distance.placebo_norm[there], distance.norm[there], rtol=1e-3, atol=1e-5)
    large = there & (distance.norm > 0.1 * by_edit(frame, "target_norm").norm)
    assert large.mean() > 0.2
    assert (angle.norm < 1e-5).all()
    assert (angle.placebo_norm[large] > 0.1).all()
    for one, other in (
        ("direction", "placebo_direction"),
        ("direction", "placebo_token"),
        ("placebo_direction", "placebo_token"),
        ("placebo_direction", "placebo_norm"),
    ):
        different = (kl[one] / kl[other]).sub(1).abs() > 1e-3
        assert different[there].mean() > 0.95, (one, other)


def test_scaled_and_rotated_vectors_have_their_named_dose():
    frame = some(result().frame, pair_set="scale_rotate")
    dose = by_edit(frame.assign(dose=frame.delta_norm / frame.target_norm), "dose")
    angle = by_edit(frame, "delta_angle")
    for edit, size in {
        "scale_0.5": 0.5,
        "scale_2": 1,
        "scale_5": 4,
        "rotate_like_0.5": 0.5,
        "rotate_like_2": 1,
    }.items():
        np.testing.assert_allclose(dose[edit], size, rtol=1e-4)
        turned = 2 * math.asin(size / 2) if edit.startswith("rotate") else 0
        np.testing.assert_allclose(angle[edit], turned, atol=1e-4)
    rows = frame[frame.edit == "random_direction"]
    np.testing.assert_allclose(on_the_sphere(rows), rows.delta_norm, rtol=1e-4)
    assert (rows.delta_angle - math.pi / 2).abs().mean() < 0.3  # 32 dimensions: a standard deviation of 0.18


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_self_swap_has_zero_effect(name):
    rows = some(result(name).frame, edit="self")
    assert (rows.kl <= 1e-9).all()
    assert (rows.delta_norm <= 1e-6 * rows.target_norm).all()
    assert not rows.top1_changed.any()
    pairs = some(rows, layer=3, context="in_place")
    assert (pairs.source_prompt != pairs.target_prompt).all()  # the columns name the pair; the edit leaves A out


# What must not matter


def test_single_context_run_matches_joint_run():
    for context in CONTEXTS:
        own = result(context=context).frame
        both = some(result().frame, context=context).reset_index(drop=True)
        pd.testing.assert_frame_equal(own, both, check_exact=True)


def test_another_seed_draws_other_pairs_and_placebos():
    other = some(result(seed=1, context="in_place").frame, pair_set="random", edit="placebo_direction")
    own = some(result().frame, context="in_place", pair_set="random", edit="placebo_direction")
    assert set(other.target_position) != set(own.target_position) or set(other.kl) != set(own.kl)
    assert not set(other.kl) & set(own.kl)


def test_rows_do_not_depend_on_other_pair_sets():
    """To tolerance: rows share their chunks with others."""
    sets = ("scale_rotate", "random")
    frame = result().frame
    assert_close(result(pair_sets=sets).frame, frame[frame.pair_set.isin(sets)].reset_index(drop=True))


def test_default_layers_run_from_first_to_last():
    found = direction_norm(tiny_model("llama"), PROMPTS, pairs=4, pair_sets=("random",))
    assert found.provenance["sites"] == [f"{layer}.resid_post" for layer in (0, 1, 3, 4, 5)]
    assert list(dict.fromkeys(found.frame.layer)) == [0, 1, 3, 4, 5]
    assert set(found.frame.context) == {"in_place"}


# Prompts


def test_all_prompt_formats_give_the_same_rows():
    """The mask removes padding; `input_ids` and `attention_mask` are not texts."""
    words = tokenizer()
    model, settings = wrap(tiny_model("llama"), words), {"layers": [3], "pairs": 10, "pair_sets": ("random",)}
    tokens = [[i + 30 * (20 <= i < 30) for i in ids] for ids in PROMPTS]  # w2, a special token, stands in w24 too
    texts = [" ".join(f"w{i}" for i in ids) for ids in tokens]
    special = [[i in words.all_special_ids for i in ids] for ids in tokens]
    given = Prompts(tokens, special, texts, provenance={"name": "mine"})
    padded_ = [words(texts, padding=True, padding_side=side, return_tensors="pt") for side in ("left", "right")]
    runs = [direction_norm(model, p, **settings) for p in (texts, given, tokens, words(texts), *padded_)]
    for run in runs:
        assert [list(ids) for ids in run.tokens] == tokens
        pd.testing.assert_frame_equal(run.frame, runs[0].frame, check_exact=True)
    assert [run.provenance["text"]["name"] for run in runs[:2]] == ["given", "mine"]
    with pytest.raises(TextError, match="no tokenizer"):
        direction_norm(tiny_model("llama"), texts, **settings)


def drawn_and_dropped(run: DirectionNorm, reasons: dict[str, np.ndarray], pairs: int) -> pd.DataFrame:
    """The pairs that should be left; the counts of those that should not are compared with the provenance."""
    drawn = cross_prompt_pairs(np.array([len(p) for p in run.tokens]), pairs, 0)
    left = np.ones(pairs, dtype=bool)
    expected = {}
    for reason, bad in reasons.items():
        hit = bad[drawn.target_prompt, drawn.target_position] | bad[drawn.source_prompt, drawn.source_position]
        if (left & hit).any():
            expected[reason] = int((left & hit).sum())
        left &= ~hit
    assert drawn_of(run)["pairs_dropped"] == expected
    assert set(expected) == set(reasons), "the example plants each reason"
    used = {counts["used"] for counts in drawn_of(run)["pair_sets"]["random"].values()}
    assert used == {pairs - sum(expected.values())} == {left.sum()}
    rows = some(run.frame, pair_set="random", edit="direction", layer=Site.parse(run.provenance["sites"][0]).layer)
    assert rows.pair.tolist() == np.flatnonzero(left).tolist()
    return rows


def padded(flags: list) -> np.ndarray:
    """Of each token of PROMPTS, `[prompt, pos]`, False beyond."""
    table = np.zeros((len(flags), max(LENGTHS)), dtype=bool)
    for row, some_flags in zip(table, flags, strict=True):
        row[: len(some_flags)] = some_flags
    return table


def with_a_sink(token: int):
    """A llama whose `token` stands in a far larger stream, at each of its places."""
    hf = fresh("llama")
    hf.model.embed_tokens.weight[token] *= 300
    return hf


def test_unusable_tokens_are_dropped_and_counted():
    hf = with_a_sink(5)
    special = [[(7 * q + p) % 11 == 0 for q in range(n)] for p, n in enumerate(LENGTHS)]
    run = direction_norm(hf, Prompts(PROMPTS, special, [""] * 24), layers=[0, 4], pairs=150)
    size = {layer: [stream("llama", hf, tokens, layer).norm(dim=-1).numpy() for tokens in PROMPTS] for layer in (0, 4)}
    sink = [
        np.any([size[layer][p] > 10 * np.median(np.concatenate(size[layer])) for layer in size], axis=0)
        for p in range(24)
    ]
    assert all(flags[np.array(tokens) == 5].all() for flags, tokens in zip(sink, PROMPTS, strict=True))
    reasons = {
        "position 0": padded([np.arange(n) == 0 for n in LENGTHS]),
        "special token": padded(special),
        "sink": padded(sink),
    }
    drawn_and_dropped(run, reasons, 150)
    bad = np.logical_or.reduce(list(reasons.values()))
    for row in run.frame.drop_duplicates(list(PLACES)).itertuples():  # matching pairs too
        assert not bad[row.target_prompt, row.target_position]
        assert row.source_prompt < 0 or not bad[row.source_prompt, row.source_position]
    assert run.provenance["sink_filter"] == 10.0


def test_impossible_rotations_are_dropped_and_counted():
    """‖x_A‖ > 3‖x_B‖ asks the norm patch's placebo to move x further than 2‖x‖."""
    run = direction_norm(with_a_sink(5), PROMPTS, layers=[0, 4], pairs=150, sink_filter=None, context="both")
    norms = run.frame[run.frame.edit == "norm"]
    impossible = (norms.source_norm - norms.target_norm).abs() > 2 * norms.target_norm
    assert run.provenance["rows_dropped"]
    assert all(reason.startswith("placebo_norm: no such vector") for reason in run.provenance["rows_dropped"])
    assert sum(run.provenance["rows_dropped"].values()) == impossible.sum() >= 4
    left = by_edit(run.frame[run.frame.pair_set != "scale_rotate"], "kl")
    assert left.placebo_norm.isna().sum() == impossible.sum()
    assert left.drop(columns=["placebo_norm", "self"]).notna().all(axis=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(run.groups) == 2 * 2 * 4  # the summary does without these rows


def test_token_placebo_uses_two_distinct_tokens():
    tokens = prompts((6, 6))
    for seed in range(12):
        settings = {"layers": [1], "pairs": 4, "pair_sets": ("random",), "sink_filter": None, "seed": seed}
        run = direction_norm(tiny_model("llama"), tokens, **settings)
        assert not [reason for reason in run.provenance["rows_dropped"] if reason.startswith("placebo_token")], seed


def test_non_finite_activations_are_dropped_and_counted():
    hf = fresh("llama")
    hf.model.embed_tokens.weight[7] = float("nan")
    run = direction_norm(hf, PROMPTS, layers=[1], pairs=150, context="both")
    after = padded([np.cumsum(np.array(tokens) == 7) > 0 for tokens in PROMPTS])  # later positions attend to it
    dropped = drawn_of(run)["pairs_dropped"]
    assert 0 < dropped["non-finite activation"] < 150
    assert drawn_of(run)["pair_sets"]["random"]["1.resid_post"]["used"] == 150 - sum(dropped.values())
    assert not after[run.frame.target_prompt, run.frame.target_position].any()
    sources = run.frame[run.frame.source_prompt >= 0]
    assert not after[sources.source_prompt, sources.source_position].any()
    assert np.isfinite(run.frame[["kl", "js", "clean_entropy", "kl_direct", "delta_norm", "delta_angle"]]).all(
        axis=None
    )
    check_rows("llama", hf, PROMPTS, run.frame[run.frame.edit.isin(HAND_MADE)].sample(10, random_state=0))
    assert run.provenance["path"] == {"1.resid_post": "replay"}


# Errors


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"context": "in_context"}, ResultError, "no context 'in_context'; known: in_place, single_token, both"),
        (
            {"pair_sets": ("random", "rand")},
            ResultError,
            "no pair set 'rand'; known: random, same_norm, high_cosine, scale_rotate",
        ),
        ({"layers": [1, 6]}, SiteError, "no block 6 in a model of 6 blocks"),
        ({"layers": [-1]}, SiteError, "layer -1 is negative"),
        ({"pairs": 0}, ResultError, "0 pairs asked for"),
        ({"pairs": 10**4}, TextError, "648 tokens for 10000 pairs"),
        ({"sites": [Site(1), Site(6, "attn_out")], "layers": None}, SiteError, "no block 6 in a model of 6 blocks"),
        ({"sites": [Site(1)]}, ResultError, "layers and sites both given"),
        ({"horizon": 0}, ResultError, "horizon 0; expected a number of positions, 1 or more, or 'last'"),
        ({"horizon": "first"}, ResultError, "horizon 'first'"),
        ({"horizon": 2, "context": "single_token"}, ResultError, "a single token has no later positions"),
        ({"horizon": "last", "context": "both"}, ResultError, "a single token has no later positions"),
        ({"null_seeds": -1}, ResultError, "-1 randomly initialised models; expected 0 or more"),
        ({"layers": []}, MechdiagError, "no site"),
        ({"layers": None, "sites": []}, MechdiagError, "no site"),
        ({"pair_sets": ()}, MechdiagError, "no pair set; give at least one of random"),
        ({"path": "rerun"}, MechdiagError, "rerun"),
        ({"batch_rows": -3}, MechdiagError, "-3"),
        ({"sink_filter": 1e-3}, ResultError, r"none of 40 pairs is left, dropped: .*'sink': 38.*looser sink filter"),
    ],
)
def test_invalid_arguments_raise(settings, error, message):
    with pytest.raises(error, match=message):
        direction_norm(tiny_model("llama"), PROMPTS, **{"layers": [1], "pairs": 40, **settings})


def test_missing_matching_pairs_raise_only_if_no_row_is_left():
    """Two prompts of two usable tokens each: no pair of cosine above 0.7 among them at one layer or the other."""
    few = {"pairs": 2, "context": "both", "sink_filter": None}
    tokens = [[1, 5, 9], [2, 30, 60]]
    counts = {
        layer: drawn_of(direction_norm(tiny_model("llama"), tokens, layers=[layer], **few))["pair_sets"]
        for layer in LAYERS
    }
    empty = [layer for layer in LAYERS if counts[layer]["high_cosine"][f"{layer}.resid_post"]["used"] == 0]
    assert empty, "choose other tokens"
    with pytest.raises(ResultError, match="no row is left"):
        direction_norm(tiny_model("llama"), tokens, layers=empty[:1], pair_sets=("high_cosine",), **few)


# What is kept of it


def test_provenance_records_settings_and_path():
    p = result().provenance
    assert p["diagnostic"] == "direction_norm"
    sites = [f"{layer}.resid_post" for layer in LAYERS]
    assert (p["sites"], p["context"], p["horizon"], p["seed"]) == (sites, list(CONTEXTS), 1, 0)
    assert (p["null_models"], p["pairs_asked"], p["pair_sets"]) == ([], 40, list(PAIR_SETS))
    assert list(p["drawn"]) == ["trained"] and list(p["drawn"]["trained"]["pair_sets"]) == list(PAIR_SETS)
    assert all(list(by_site) == sites for by_site in p["drawn"]["trained"]["pair_sets"].values())
    assert (p["prompts"], p["tokens"]) == (24, sum(LENGTHS))
    assert p["path"] == dict.fromkeys(sites, "replay") and p["why_hooks"] is None
    assert 0 < p["replay_delta"] < DELTA


def test_result_roundtrip(tmp_path, monkeypatch):
    monkeypatch.setattr(DirectionNorm, "figures", lambda self: {})
    run = result(pairs=10, layers=(1, 5), pair_sets=("random", "scale_rotate"))
    assert run.write(tmp_path) == ["direction_norm.parquet", "direction_norm.json", "tokens.npy"]
    loaded = DirectionNorm.load(tmp_path)
    assert loaded.tokens == run.tokens
    assert loaded.provenance == json.loads(json.dumps(jsonable(run.provenance)))
    pd.testing.assert_frame_equal(loaded.frame, run.frame, check_exact=True)
    assert loaded.table() == run.table()
    pd.testing.assert_frame_equal(loaded.summary(), run.summary(), check_exact=True)
